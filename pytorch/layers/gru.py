"""One gated recurrent layer (Cho et al. 2014, arXiv 1406.1078), fast on GPUs and CPUs: nn.GRU, its directions summed.

    layer = GRU(input_size=1312, hidden_size=256)
    outputs = layer(pack_padded_sequence(inputs_TBI, lengths_B))  # a PackedSequence of [N, hidden_size]

Parameters and state_dict are those of torch.nn.GRU (one layer). On a CPU the loop over time runs in C++ (gru.cpp, which
kernels.py compiles). GPUs on which gru_triton.py has been tested run that in bfloat16. Where there is no compiler, and
on other devices, nn.GRU computes, which on CUDA is cuDNN.

Packed rows. A PackedSequence holds the B utterances sorted by decreasing length, and only their N valid frames: those
of time step 0 first, then those of step 1, batch_sizes[t] rows for step t. Nothing is padded and nothing masked: the
forward direction sees fewer and fewer rows; the reverse direction more and more, where a new row's state is zero.

The mathematics is nn.GRU's variant, whose reset gate comes after the recurrent product; h' is the previous state:

    r = sigmoid(W_ir x + b_ir + W_hr h' + b_hr)        q = W_hn h' + b_hn
    z = sigmoid(W_iz x + b_iz + W_hz h' + b_hz)        n = tanh(W_in x + b_in + r q)
    h = n + z (h' - n)

Only the products with h' must go step by step. Those with x and the gradients of both weight matrices are matrix
products over all N rows, before and after the loop.

Under bfloat16 autocast on a CPU, the operands of all products are rounded to it; states, gates and what the loop adds
up stay in float32.

Axes: N packed rows, D directions, H hidden units, G = 3H gates in the order r, z, n; B batch, T time, I input.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

from pytorch.config import Config, GRUKernel
from pytorch.distributed import World
from pytorch.errors import RunError
from pytorch.layers import kernels
from pytorch.layers.rows import pad_rows


class GRU(nn.GRU):
    """One bidirectional GRU layer over packed sequences; its directions are summed.

    On GPUs `kernel` selects what computes it under autocast; auto: Triton where that has been tested.
    """

    kernel: GRUKernel = "auto"

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, bidirectional=True)

    def forward(self, sequence: PackedSequence, offsets: Tensor | None = None) -> PackedSequence:  # type: ignore[override]
        """Map rows of [N, input_size] to [N, hidden_size], in float32 (or float64), autocast or not.

        Offsets [T + 1] are each time step's first row, int32 on the device. Triton computes those that are not given.
        """
        weights: list[Tensor] = self._flat_weights  # type: ignore[assignment]
        inputs_NI, batch_sizes, device = sequence.data, sequence.batch_sizes, sequence.data.device
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (inputs_NI, *weights))
        dtype = kernels.product_dtype(weights[0])
        with torch.autocast(device.type, enabled=False):
            if device.type == "cpu" and kernels.available() and weights[0].dtype == torch.float32:
                outputs_NH = _Layer.apply(inputs_NI.float(), batch_sizes, keep, dtype, *weights)
            elif dtype == torch.bfloat16 and has_triton_kernel(device, self.hidden_size, self.kernel):
                from pytorch.layers import gru_triton

                outputs_NH = gru_triton.Layer.apply(inputs_NI, batch_sizes, offsets, keep, *weights)
            else:
                if dtype == torch.bfloat16 and not has_bf16_kernel(device):
                    dtype = weights[0].dtype
                rounded = [weight.to(dtype) for weight in weights]
                outputs_NX = _stock_gru(inputs_NI.to(dtype), batch_sizes, rounded, self.training)
                outputs_NH = outputs_NX.unflatten(1, (2, -1)).sum(1, dtype=weights[0].dtype)
        return sequence._replace(data=outputs_NH)


def _stock_gru(inputs_NI: Tensor, batch_sizes: Tensor, weights: list[Tensor], training: bool) -> Tensor:
    """Return nn.GRU's outputs [N, 2H] in the inputs' data type; not for autocast, in which CUDA's rounds to float16."""
    state_2BH = inputs_NI.new_zeros(2, int(batch_sizes[0]), weights[1].shape[1])
    options = True, 1, 0.0, training, True  # bias, layers, dropout, training, bidirectional
    with warnings.catch_warnings():
        # cuDNN packs copies of the weights, as they are not contiguous; that costs little.
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        return torch._VF.gru(inputs_NI, batch_sizes, state_2BH, weights, *options)[0]  # type: ignore[attr-defined]


@functools.cache
def has_bf16_kernel(device: torch.device) -> bool:
    """Return whether PyTorch has cuDNN compute GRUs in bfloat16. Else it silently takes some kernels a time step."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return (torch.backends.cudnn.version() or 0) >= 91300 and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def has_triton_kernel(device: torch.device, hidden_size: int, kernel: GRUKernel) -> bool:
    """Return whether gru_triton.py computes a layer there. It may be untested, or not run: a trial tells."""
    try:
        from pytorch.layers import gru_triton
    except ImportError:
        return False
    if kernel == "cudnn" or not gru_triton.supported(device, untested=kernel == "triton"):
        return False
    try:
        # One block of rows, and two; the programs have to wait for one another.
        for batch_sizes in torch.tensor([[2, 2, 1], [65, 65, 33]]):
            if not (error := _trial_error(device, hidden_size, batch_sizes)) < 0.05:
                raise RuntimeError(f"the relative difference from cuDNN's results is {error:.2g}")
    except Exception as error:  # whatever keeps Triton from running, cuDNN needs neither it nor a compiler
        needs = "It needs a C compiler and Python's headers (gcc, python3-dev)."
        warnings.warn(f"cuDNN computes the GRUs. Triton would be faster, but failed: {error}. {needs}", stacklevel=2)
        return False
    return True


@torch.inference_mode(False)
@torch.enable_grad()
def _trial_error(device: torch.device, hidden_size: int, batch_sizes: Tensor) -> float:
    """Return the largest relative error of gru_triton.py's outputs and gradients, compared with nn.GRU in float32."""
    from pytorch.layers import gru_triton

    layer, rows = nn.GRU(8, hidden_size, bidirectional=True, device=device), int(batch_sizes.sum())
    inputs_NI = torch.linspace(-9, 9, rows * 8, device=device).sin().view(rows, 8).requires_grad_()
    weights: list[Tensor] = list(layer.parameters())
    found = []
    with torch.autocast(device.type, enabled=False):
        for outputs_NH in (
            _stock_gru(inputs_NI, batch_sizes, weights, training=True).unflatten(1, (2, -1)).sum(1),
            gru_triton.Layer.apply(inputs_NI, batch_sizes, None, True, *weights),
        ):
            found.append([outputs_NH, *torch.autograd.grad(outputs_NH.square().sum(), [inputs_NI, *weights])])
    errors = [(actual - expected).norm() / expected.norm() for expected, actual in zip(*found, strict=True)]
    return float(torch.stack(errors).detach().max())  # NaN if any is


def implementation(device: torch.device, precision: str, hidden_size: int, kernel: GRUKernel = "auto") -> str:
    """Return in words what computes GRUs on a device."""
    if device.type == "cpu":
        return kernels.status()
    if precision == "bf16" and has_triton_kernel(device, hidden_size, kernel):
        return "Triton in bfloat16"
    dtype = "bfloat16" if precision == "bf16" and has_bf16_kernel(device) else "float32"
    library = "cuDNN" if device.type == "cuda" and torch.version.hip is None else f"PyTorch on {device.type}"
    return f"{library} in {dtype}"


def agreed_implementation(world: World, device: torch.device, config: Config) -> str:
    """Return in words what computes the GRUs of a run; one slow rank would hold up all.

    Raises:
        RunError: ranks differ, or --gru-kernel cannot be had.
    """
    mine = implementation(device, config.precision, config.hidden_size, config.gru_kernel)
    names = world.all_gather_object(mine)
    if len(set(names)) > 1:
        by_rank = ", ".join(f"{name} on rank {rank}" for rank, name in enumerate(names))
        raise RunError(f"ranks compute the GRUs in different ways: {by_rank}")
    if config.gru_kernel == "triton" and not mine.startswith("Triton"):
        raise RunError(f"--gru-kernel triton: not possible on this device in {config.precision}; it would be {mine}")
    return mine


class _Layer(torch.autograd.Function):
    """The layer on a CPU; operands of products are rounded to `dtype`, float32 or bfloat16.

    `weights` are, for each direction, W_ih [G, I], W_hh [G, H], b_ih [G], b_hh [G].
    """

    @staticmethod
    def forward(
        ctx: Any, inputs_NI: Tensor, batch_sizes: Tensor, keep: bool, dtype: torch.dtype, *weights: Tensor
    ) -> Tensor:
        weights_ih, weights_hh, biases_ih, biases_hh = (weights[kind::4] for kind in range(4))
        count, hidden, bf16 = len(inputs_NI), weights_hh[0].shape[1], dtype == torch.bfloat16
        gates_DNG = inputs_NI.new_empty(2, count, 3 * hidden)
        inputs_NI = pad_rows(inputs_NI, dtype)
        for gates_NG, weight_ih, bias_ih, bias_hh in zip(gates_DNG, weights_ih, biases_ih, biases_hh, strict=True):
            bias = torch.cat([bias_ih[: 2 * hidden] + bias_hh[: 2 * hidden], bias_ih[2 * hidden :]])
            if bf16:
                gates_NG.copy_(torch.mm(inputs_NI, weight_ih.to(dtype).t())[:count]).add_(bias)
            else:
                torch.addmm(bias, inputs_NI, weight_ih.t(), out=gates_NG)
        states_DNH = gates_DNG.new_empty(2, count, hidden)
        # h' and q. Without them, the kernel does not write the gates either.
        kept = [torch.empty_like(states_DNH), torch.empty_like(states_DNH)] if keep else []
        by_direction = [w.contiguous() for w in weights_hh], [b[2 * hidden :].contiguous() for b in biases_hh]
        sizes = bf16, torch.get_num_threads(), 2, hidden, len(batch_sizes), batch_sizes
        kernels.call("gru_forward", *sizes, *by_direction, gates_DNG, states_DNH, *(kept or (None, None)))
        if keep:
            ctx.dtype, ctx.sizes = dtype, sizes
            ctx.save_for_backward(inputs_NI, gates_DNG, *kept, *weights)
        return states_DNH[0] + states_DNH[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs_NH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs_NI, gates_DNG, previous_DNH, q_DNH, *weights = ctx.saved_tensors
        weights_ih, weights_hh = weights[0::4], weights[1::4]
        _, count, hidden = q_DNH.shape
        d_gates_DNG, d_q_DNH = torch.empty_like(gates_DNG), torch.empty_like(q_DNH)
        tensors = d_outputs_NH.contiguous(), gates_DNG, previous_DNH, q_DNH, d_gates_DNG, d_q_DNH
        kernels.call("gru_backward", *ctx.sizes, [weight.contiguous() for weight in weights_hh], *tensors)
        d_bias_DG, d_bias_n_DH = d_gates_DNG.sum(1), d_q_DNH.sum(1)
        d_gates_DNG, d_q_DNH, previous_DNH = (pad_rows(x, ctx.dtype, 1) for x in (d_gates_DNG, d_q_DNH, previous_DNH))
        d_weights: list[Tensor | None] = []
        d_inputs_NI = None
        for d, (weight_ih, weight_hh) in enumerate(zip(weights_ih, weights_hh, strict=True)):
            d_weight_hh = torch.empty_like(weight_hh, dtype=ctx.dtype)
            torch.mm(d_gates_DNG[d, :, : 2 * hidden].t(), previous_DNH[d], out=d_weight_hh[: 2 * hidden])
            torch.mm(d_q_DNH[d].t(), previous_DNH[d], out=d_weight_hh[2 * hidden :])
            d_weight_ih = torch.mm(d_gates_DNG[d].t(), inputs_NI)
            d_bias_hh = torch.cat([d_bias_DG[d, : 2 * hidden], d_bias_n_DH[d]])
            d_weights += [d_weight_ih.float(), d_weight_hh.float(), d_bias_DG[d], d_bias_hh]
            if d_inputs_NI is not None and ctx.dtype == torch.float32:
                d_inputs_NI.addmm_(d_gates_DNG[d], weight_ih)
            elif ctx.needs_input_grad[0]:
                product_NI = torch.mm(d_gates_DNG[d], weight_ih.to(ctx.dtype))[:count]
                d_inputs_NI = product_NI.float() if d_inputs_NI is None else d_inputs_NI.add_(product_NI)
        return d_inputs_NI, None, None, None, *d_weights
