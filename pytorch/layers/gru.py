"""One gated recurrent layer (Cho et al. 2014, arXiv 1406.1078), fast on GPUs and CPUs: nn.GRU, its directions summed.

    layer = GRU(input_size=1312, hidden_size=256)
    outputs = layer(pack_padded_sequence(inputs_TBI, lengths_B))  # a PackedSequence of [N, hidden_size]

Parameters and state_dict are those of torch.nn.GRU (one layer). On a CPU the loop over time runs in C++ (gru.cpp, which
kernels.py compiles), or where that is not possible, in Python. Hopper GPUs in bfloat16 run gru_triton.py. Other devices
run nn.GRU, which on CUDA is cuDNN.

Packed rows. A PackedSequence holds the B utterances sorted by decreasing length, and only their N valid frames: those
of time step 0 first, then those of step 1, batch_sizes[t] rows for step t. Nothing is padded and nothing masked: the
forward direction sees fewer and fewer rows; the reverse direction more and more, where a new row's state is zero.

The mathematics is nn.GRU's variant, whose reset gate comes after the recurrent product; h' is the previous state:

    r = sigmoid(W_ir x + b_ir + W_hr h' + b_hr)        q = W_hn h' + b_hn
    z = sigmoid(W_iz x + b_iz + W_hz h' + b_hz)        n = tanh(W_in x + b_in + r q)
    h = n + z (h' - n)

Only the products with h' must go step by step. Those with x and the gradients of both weight matrices are matrix
products over all N rows, before and after the loop.

Under bfloat16 autocast on a CPU the operands of all products are rounded to bfloat16 (those inside Python's loop are
not); states, gates and what the loop adds up stay in float32.

Axes: N packed rows, D directions, H hidden units, G = 3H gates in the order r, z, n; B batch, T time, I input.
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

from pytorch.layers import kernels
from pytorch.layers.rows import pad_rows


class GRU(nn.GRU):
    """One bidirectional GRU layer over packed sequences; its directions are summed."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, bidirectional=True)

    def forward(self, sequence: PackedSequence) -> PackedSequence:  # type: ignore[override]
        """Map rows of [N, input_size] to [N, hidden_size]; on a CPU in float32 (or float64), autocast or not."""
        weights: list[Tensor] = self._flat_weights  # type: ignore[assignment]
        device = sequence.data.device
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (sequence.data, *weights))
        if device.type == "cpu":
            outputs_NH = _Layer.apply(
                sequence.data, sequence.batch_sizes, keep, kernels.autocast_is_bf16("cpu"), *weights
            )
        elif torch.is_autocast_enabled(device.type) and has_triton_kernel(device, self.hidden_size):
            from pytorch.layers import gru_triton

            outputs_NH = gru_triton.Layer.apply(sequence.data, sequence.batch_sizes, keep, *weights)
        else:
            outputs_NH = (
                self._stock(sequence, weights).unflatten(-1, (-1, self.hidden_size)).sum(1, dtype=torch.float32)
            )
        return PackedSequence(outputs_NH, sequence.batch_sizes, sequence.sorted_indices, sequence.unsorted_indices)

    def _stock(self, sequence: PackedSequence, weights: Sequence[Tensor]) -> Tensor:
        """Compute nn.GRU's outputs, both directions side by side, in bfloat16 where autocast and cuDNN have that.

        Autocast's own wrapper of CUDA's recurrent layers rounds to float16, whatever it was asked for.
        """
        data, device = sequence.data, sequence.data.device
        if torch.is_autocast_enabled(device.type) and has_bf16_kernel(device):
            data, weights = data.bfloat16(), [weight.bfloat16() for weight in weights]
        with torch.autocast(device.type, enabled=False), _weights_apart():
            state_DBH = data.new_zeros(2, int(sequence.batch_sizes[0]), self.hidden_size)
            options = True, 1, 0.0, self.training, True  # bias, layers, dropout, training, bidirectional
            return torch._VF.gru(data, sequence.batch_sizes, state_DBH, list(weights), *options)[0]  # type: ignore[attr-defined]


@contextmanager
def _weights_apart() -> Iterator[None]:
    """Silence a warning: bfloat16 copies of weights are not contiguous, and cuDNN packs them, which costs little."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        yield


class _Operations(TorchDispatchMode):
    """Notes the names of the operations that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.__name__)
        return function(*args, **(kwargs or {}))


@functools.cache
def has_bf16_kernel(device: torch.device) -> bool:
    """Return whether an accelerator's library computes GRUs in bfloat16.

    cuDNN does from version 9.13 on, on GPUs of compute capability 8 and higher. Otherwise PyTorch would silently take
    some kernels for each time step.
    """
    layer = nn.GRU(8, 8, device=device, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _weights_apart(), _Operations() as operations:
        layer(torch.zeros(2, 1, 8, device=device, dtype=torch.bfloat16))
    return any(name.startswith(("_cudnn_rnn.", "miopen_rnn.")) for name in operations.names)


@functools.cache
def has_triton_kernel(device: torch.device, hidden_size: int) -> bool:
    """Return whether gru_triton.py runs on a device. Triton may not be installed, or its compiler not work."""
    try:
        from pytorch.layers import gru_triton
    except ImportError:
        return False
    if not gru_triton.supported(device, hidden_size):
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            weights = nn.GRU(8, hidden_size, bidirectional=True, device=device).parameters()
            inputs_NI = torch.zeros(1, 8, device=device)
            gru_triton.Layer.apply(inputs_NI, torch.ones(1).long(), True, *weights).sum().backward()
    except Exception as error:  # whatever keeps Triton from running, cuDNN needs neither it nor a compiler
        needs = "a C compiler and Python's headers (gcc, python3-dev)"
        warnings.warn(
            f"cuDNN computes the GRUs. Triton would be faster, but failed: {error}. It needs {needs}.", stacklevel=2
        )
        return False
    return True


def implementation(device: torch.device, precision: str, hidden_size: int) -> str:
    """Return in words what computes GRUs on a device."""
    if device.type == "cpu":
        return kernels.status()
    if precision == "bf16" and has_triton_kernel(device, hidden_size):
        return "Triton in bfloat16"
    dtype = "bfloat16" if precision == "bf16" and has_bf16_kernel(device) else "float32"
    library = "cuDNN" if device.type == "cuda" and torch.version.hip is None else f"PyTorch on {device.type}"
    return f"{library} in {dtype}"


class _Layer(torch.autograd.Function):
    """The layer on a CPU. `weights` are, for each direction, W_ih [G, I], W_hh [G, H], b_ih [G], b_hh [G]."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(
        ctx: Any, inputs_NI: Tensor, batch_sizes: Tensor, keep: bool, rounded: bool, *weights: Tensor
    ) -> Tensor:
        weights_ih, weights_hh, biases_ih, biases_hh = (weights[kind::4] for kind in range(4))
        rz = 2 * weights_hh[0].shape[1]
        gates_DNG = inputs_NI.new_empty(len(weights_hh), len(inputs_NI), len(weights_hh[0]))
        count = len(inputs_NI)
        inputs_NI = _operand_rows(inputs_NI, rounded)
        for gates_NG, weight_ih, bias_ih, bias_hh in zip(gates_DNG, weights_ih, biases_ih, biases_hh, strict=True):
            bias = torch.cat([bias_ih[:rz] + bias_hh[:rz], bias_ih[rz:]])
            if rounded:
                gates_NG.copy_(torch.mm(inputs_NI, _operand(weight_ih, rounded).t())[:count]).add_(bias)
            else:
                torch.addmm(bias, inputs_NI, weight_ih.t(), out=gates_NG)
        biases_n = [bias_hh[rz:] for bias_hh in biases_hh]
        if _has_kernel(gates_DNG.dtype):
            states_DNH, *kept = _kernel_forward(gates_DNG, weights_hh, biases_n, batch_sizes, keep, rounded)
        else:
            states_DNH, *kept = _loop_forward(gates_DNG, weights_hh, biases_n, batch_sizes)
        if keep:
            ctx.rounded = rounded
            ctx.save_for_backward(inputs_NI, batch_sizes, gates_DNG, *kept, *weights)
        return functools.reduce(torch.add, states_DNH)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, d_outputs_NH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs_NI, batch_sizes, gates_DNG, previous_DNH, q_DNH, *weights = ctx.saved_tensors
        weights_ih, weights_hh = weights[0::4], weights[1::4]
        rz, dtype = 2 * q_DNH.shape[2], q_DNH.dtype
        saved = d_outputs_NH.contiguous(), gates_DNG, previous_DNH, q_DNH, weights_hh, batch_sizes
        d_gates_DNG, d_q_DNH = _kernel_backward(*saved, ctx.rounded) if _has_kernel(dtype) else _loop_backward(*saved)
        d_bias_DG, d_bias_n_DH = d_gates_DNG.sum(1), d_q_DNH.sum(1)
        count = d_gates_DNG.shape[1]
        d_gates_DNG, d_q_DNH, previous_DNH = (
            _operand_rows(x, ctx.rounded, 1) for x in (d_gates_DNG, d_q_DNH, previous_DNH)
        )
        d_weights: list[Tensor | None] = []
        for direction in range(len(d_gates_DNG)):
            d_gates_NG, d_q_NH, previous_NH = d_gates_DNG[direction], d_q_DNH[direction], previous_DNH[direction]
            d_weight_hh = d_gates_NG.new_empty(weights_hh[direction].shape)
            torch.mm(d_gates_NG[:, :rz].t(), previous_NH, out=d_weight_hh[:rz])
            torch.mm(d_q_NH.t(), previous_NH, out=d_weight_hh[rz:])
            d_weight_ih = torch.mm(d_gates_NG.t(), inputs_NI)
            d_bias_hh = torch.cat([d_bias_DG[direction, :rz], d_bias_n_DH[direction]])
            d_weights += [d_weight_ih.to(dtype), d_weight_hh.to(dtype), d_bias_DG[direction], d_bias_hh]
        d_inputs_NI = None
        if ctx.needs_input_grad[0]:
            d_inputs_NI = torch.mm(d_gates_DNG[0], _operand(weights_ih[0], ctx.rounded))[:count].to(dtype)
            for d_gates_NG, weight_ih in zip(d_gates_DNG[1:], weights_ih[1:], strict=True):
                if ctx.rounded:
                    d_inputs_NI.add_(torch.mm(d_gates_NG, _operand(weight_ih, ctx.rounded))[:count])
                else:
                    d_inputs_NI.addmm_(d_gates_NG, weight_ih)
        return d_inputs_NI, None, None, None, *d_weights


def _operand(x: Tensor, rounded: bool) -> Tensor:
    """Return x, rounded to bfloat16 if so told; in float32 where the CPU, and so torch, is slow at such products."""
    if not rounded:
        return x
    return x.bfloat16() if kernels.has_native_bf16() else x.bfloat16().to(x.dtype)


def _operand_rows(x: Tensor, rounded: bool, dim: int = 0) -> Tensor:
    """Return an operand whose dimension `dim` is rows of utterances, see rows.py."""
    return pad_rows(x, torch.bfloat16, dim) if rounded and kernels.has_native_bf16() else _operand(x, rounded)


def _loop_forward(
    gates_DNG: Tensor, weights_hh: Sequence[Tensor], biases_n: Sequence[Tensor], batch_sizes: Tensor
) -> tuple[Tensor, ...]:
    """Run the recurrence. gates_DNG: the products with x before, r, z, n after. Return h, h', q [D, N, H]."""
    hidden, sizes = weights_hh[0].shape[1], batch_sizes.tolist()
    states_DNH = gates_DNG.new_empty(*gates_DNG.shape[:2], hidden)
    previous_DNH, q_DNH = torch.zeros_like(states_DNH), torch.empty_like(states_DNH)
    for direction, (weight_hh, bias_n) in enumerate(zip(weights_hh, biases_n, strict=True)):
        by_step = (whole[direction].split(sizes) for whole in (gates_DNG, previous_DNH, q_DNH, states_DNH))
        steps = list(zip(*by_step, strict=True))
        weight_rz, weight_n = weight_hh[: 2 * hidden].t(), weight_hh[2 * hidden :].t()
        before_BH = states_DNH.new_empty(0, hidden)
        for gates_BG, previous_BH, q_BH, states_BH in reversed(steps) if direction else steps:
            rows = min(len(before_BH), len(previous_BH))
            previous_BH[:rows] = before_BH[:rows]
            rz = gates_BG[:, : 2 * hidden].addmm_(previous_BH, weight_rz).sigmoid_()
            torch.addmm(bias_n, previous_BH, weight_n, out=q_BH)
            n = gates_BG[:, 2 * hidden :].addcmul_(rz[:, :hidden], q_BH).tanh_()
            before_BH = torch.lerp(n, previous_BH, rz[:, hidden:], out=states_BH)
    return states_DNH, previous_DNH, q_DNH


def _loop_backward(
    d_outputs_NH: Tensor,
    gates_DNG: Tensor,
    previous_DNH: Tensor,
    q_DNH: Tensor,
    weights_hh: Sequence[Tensor],
    batch_sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the sums inside the gates r, z, n [D, N, G], and of q [D, N, H]."""
    sizes = batch_sizes.tolist()
    r, z, n = gates_DNG.chunk(3, dim=2)
    # For every row at once: the gradients per unit of the state's gradient, which the loop multiplies in.
    by_n = (1 - z) * (1 - n * n)
    d_rzq_DNG = torch.cat([by_n * q_DNH * r * (1 - r), (previous_DNH - n) * z * (1 - z), by_n * r], dim=2)
    d_rzq_DN3H = d_rzq_DNG.unflatten(2, (3, -1))
    d_states_DNH = torch.empty_like(previous_DNH)
    for direction, weight_hh in enumerate(weights_hh):
        by_step = (whole[direction].split(sizes) for whole in (d_rzq_DNG, d_rzq_DN3H, d_states_DNH, z))
        steps = list(zip(d_outputs_NH.split(sizes), *by_step, strict=True))
        d_before_BH = d_outputs_NH.new_zeros(sizes[0], d_outputs_NH.shape[1])
        for d_output_BH, d_rzq_BG, d_rzq_B3H, d_state_BH, z_BH in steps if direction else reversed(steps):
            rows = len(d_output_BH)
            torch.add(d_output_BH, d_before_BH[:rows], out=d_state_BH)
            d_rzq_B3H.mul_(d_state_BH.unsqueeze(1))
            torch.mul(d_state_BH, z_BH, out=d_before_BH[:rows]).addmm_(d_rzq_BG, weight_hh)
    d_rz, d_q = d_rzq_DNG.split([2 * r.shape[2], r.shape[2]], dim=2)
    return torch.cat([d_rz, by_n.mul_(d_states_DNH)], dim=2), d_q


def _kernel_forward(
    gates_DNG: Tensor,
    weights_hh: Sequence[Tensor],
    biases_n: Sequence[Tensor],
    batch_sizes: Tensor,
    keep: bool,
    rounded: bool,
) -> tuple[Tensor, ...]:
    """Do as _loop_forward, but write the gates, and return h' and q, only if they are to be kept."""
    states_DNH = gates_DNG.new_empty(*gates_DNG.shape[:2], weights_hh[0].shape[1])
    kept = [torch.empty_like(states_DNH), torch.empty_like(states_DNH)] if keep else []
    by_direction = [[tensor.contiguous() for tensor in tensors] for tensors in (weights_hh, biases_n)]
    optional = kept or (None, None)
    sizes = _sizes(rounded, states_DNH, batch_sizes)
    kernels.call("gru_forward", *sizes, *by_direction, gates_DNG, states_DNH, *optional)
    return states_DNH, *kept


def _kernel_backward(
    d_outputs_NH: Tensor,
    gates_DNG: Tensor,
    previous_DNH: Tensor,
    q_DNH: Tensor,
    weights_hh: Sequence[Tensor],
    batch_sizes: Tensor,
    rounded: bool,
) -> tuple[Tensor, Tensor]:
    """Do as _loop_backward."""
    d_gates_DNG, d_q_DNH = torch.empty_like(gates_DNG), torch.empty_like(q_DNH)
    tensors = (d_outputs_NH, gates_DNG, previous_DNH, q_DNH, d_gates_DNG, d_q_DNH)
    weights = [weight.contiguous() for weight in weights_hh]
    kernels.call("gru_backward", *_sizes(rounded, q_DNH, batch_sizes), weights, *tensors)
    return d_gates_DNG, d_q_DNH


def _sizes(rounded: bool, like_DNH: Tensor, batch_sizes: Tensor) -> tuple[bool, int, int, int, int, Tensor]:
    """Return the leading arguments common to both functions of gru.cpp."""
    directions, _, hidden = like_DNH.shape
    return rounded, torch.get_num_threads(), directions, hidden, len(batch_sizes), batch_sizes


def _has_kernel(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 and kernels.available()
