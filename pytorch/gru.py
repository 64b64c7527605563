"""One gated recurrent layer (Cho et al. 2014) that is fast on GPUs and on CPUs: nn.GRU with the directions summed.

    layer = GRU(input_size=1312, hidden_size=256)
    outputs = layer(pack_padded_sequence(inputs_TBI, lengths_B))  # PackedSequence of [N, hidden_size]

Parameters and state_dict are those of torch.nn.GRU (one layer, time first). What runs depends on the device: CUDA has
cuDNN; a CPU has the loop over time in C++ (gru.cpp), compiled at first use, or in Python where it cannot be compiled.

Packed rows. A PackedSequence holds the B utterances sorted by decreasing length and only their N valid frames: first
the frames of time step 0, then those of step 1, and so on, batch_sizes[t] rows for step t. Nothing is padded and
nothing is masked: the forward direction sees fewer and fewer rows, and the reverse direction more and more, whose
new rows start from a zero state.

The mathematics is nn.GRU's variant, with the reset gate applied after the recurrent product; h' is the previous state:

    r = sigmoid(W_ir x + b_ir + W_hr h' + b_hr)        q = W_hn h' + b_hn
    z = sigmoid(W_iz x + b_iz + W_hz h' + b_hz)        n = tanh(W_in x + b_in + r q)
    h = n + z (h' - n)

Only the products with h' must go step by step. Those with x, and the gradients of both weight matrices, are one matrix
product each over all N rows, before and after the loop.

Axes: N packed rows, D directions, H hidden units, G = 3H gates in the order r, z, n; B batch, T time, I input.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import PackedSequence

SOURCE = Path(__file__).with_name("gru.cpp")


class GRU(nn.GRU):
    """One GRU layer over packed sequences whose two directions are summed."""

    def __init__(self, input_size: int, hidden_size: int, bidirectional: bool = True) -> None:
        super().__init__(input_size, hidden_size, bidirectional=bidirectional)

    def forward(self, sequence: PackedSequence) -> PackedSequence:  # type: ignore[override]
        """Map a PackedSequence of [N, input_size] to one of [N, hidden_size]; raises ValueError if it is not packed."""
        if not isinstance(sequence, PackedSequence):
            raise ValueError(f"GRU takes a PackedSequence, not {type(sequence).__name__}")
        if sequence.data.device.type == "cpu":
            weights = self._flat_weights
            training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (sequence.data, *weights))
            outputs_NH = _CPULayer.apply(sequence.data, sequence.batch_sizes, training, *weights)
        else:
            both_NDH = super().forward(sequence)[0].data.unflatten(-1, (-1, self.hidden_size))
            outputs_NH = both_NDH.sum(1)
        return PackedSequence(outputs_NH, sequence.batch_sizes, sequence.sorted_indices, sequence.unsorted_indices)


class _CPULayer(torch.autograd.Function):
    """Input projection, loop over time, sum of directions; in float32 (or float64) whatever the autocast state."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, inputs_NI: Tensor, batch_sizes: Tensor, keep: bool, *weights: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        weights_ih, weights_hh, biases_ih, biases_hh = (weights[kind::4] for kind in range(4))
        hidden = weights_hh[0].shape[1]
        gates_DNG = inputs_NI.new_empty(len(weights_hh), len(inputs_NI), 3 * hidden)
        for gates_NG, weight_ih, bias_ih, bias_hh in zip(gates_DNG, weights_ih, biases_ih, biases_hh, strict=True):
            bias = bias_ih.clone()
            bias[: 2 * hidden] += bias_hh[: 2 * hidden]
            torch.addmm(bias, inputs_NI, weight_ih.t(), out=gates_NG)
        biases_n = [bias_hh[2 * hidden :] for bias_hh in biases_hh]
        kernel = _kernel_for(inputs_NI.dtype)
        if kernel is None:
            states_DNH, *kept = _loop_forward(gates_DNG, weights_hh, biases_n, batch_sizes)
        else:
            states_DNH, *kept = _kernel_forward(kernel, gates_DNG, weights_hh, biases_n, batch_sizes, keep)
        if keep:
            ctx.save_for_backward(inputs_NI, batch_sizes, gates_DNG, *kept, *weights)
        return states_DNH.sum(0)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx, d_outputs_NH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        inputs_NI, batch_sizes, gates_DNG, previous_DNH, q_DNH, *weights = ctx.saved_tensors
        weights_ih, weights_hh = weights[0::4], weights[1::4]
        arguments = (d_outputs_NH.contiguous(), gates_DNG, previous_DNH, q_DNH, weights_hh, batch_sizes)
        kernel = _kernel_for(inputs_NI.dtype)
        d_gates_DNG, d_q_DNH = _loop_backward(*arguments) if kernel is None else _kernel_backward(kernel, *arguments)
        rz = 2 * q_DNH.shape[2]
        d_weights: list[Tensor | None] = []
        for d_gates_NG, d_q_NH, previous_NH, weight_hh in zip(
            d_gates_DNG, d_q_DNH, previous_DNH, weights_hh, strict=True
        ):
            d_weight_hh = torch.empty_like(weight_hh)
            torch.mm(d_gates_NG[:, :rz].t(), previous_NH, out=d_weight_hh[:rz])
            torch.mm(d_q_NH.t(), previous_NH, out=d_weight_hh[rz:])
            d_bias_ih = d_gates_NG.sum(0)
            d_bias_hh = torch.cat([d_bias_ih[:rz], d_q_NH.sum(0)])
            d_weights += [d_gates_NG.t() @ inputs_NI, d_weight_hh, d_bias_ih, d_bias_hh]
        d_inputs_NI = None
        if ctx.needs_input_grad[0]:
            d_inputs_NI = d_gates_DNG[0] @ weights_ih[0]
            for d_gates_NG, weight_ih in zip(d_gates_DNG[1:], weights_ih[1:], strict=True):
                d_inputs_NI.addmm_(d_gates_NG, weight_ih)
        return d_inputs_NI, None, None, *d_weights


def _loop_forward(
    gates_DNG: Tensor, weights_hh: tuple[Tensor, ...], biases_n: list[Tensor], batch_sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence. gates_DNG holds the products with x and, after, the gates r, z, n; returns h, h' and q."""
    hidden, sizes = gates_DNG.shape[2] // 3, batch_sizes.tolist()
    states_DNH = gates_DNG.new_empty(*gates_DNG.shape[:2], hidden)
    previous_DNH = torch.zeros_like(states_DNH)
    q_DNH = torch.empty_like(states_DNH)
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
    weights_hh: list[Tensor],
    batch_sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the sums inside the gates r, z and n, and of q."""
    sizes = batch_sizes.tolist()
    r, z, n = gates_DNG.chunk(3, dim=2)
    # For every row at once: the gradients per unit of the state's gradient, which the loop multiplies in.
    by_n = (1 - z) * (1 - n * n)
    d_hidden_DNG = torch.cat([by_n * q_DNH * r * (1 - r), (previous_DNH - n) * z * (1 - z), by_n * r], dim=2)
    d_hidden_DN3H = d_hidden_DNG.unflatten(2, (3, -1))
    d_states_DNH = torch.empty_like(previous_DNH)
    for direction, weight_hh in enumerate(weights_hh):
        by_step = (whole[direction].split(sizes) for whole in (d_hidden_DNG, d_hidden_DN3H, d_states_DNH, z))
        steps = list(zip(d_outputs_NH.split(sizes), *by_step, strict=True))
        carry_BH = torch.zeros_like(steps[0][0])
        for d_output_BH, d_hidden_BG, d_hidden_B3H, d_state_BH, z_BH in steps if direction else reversed(steps):
            rows = len(d_output_BH)
            torch.add(d_output_BH, carry_BH[:rows], out=d_state_BH)
            d_hidden_B3H.mul_(d_state_BH.unsqueeze(1))
            torch.mul(d_state_BH, z_BH, out=carry_BH[:rows]).addmm_(d_hidden_BG, weight_hh)
    d_rz, d_q = d_hidden_DNG.split([2 * r.shape[2], r.shape[2]], dim=2)
    return torch.cat([d_rz, by_n.mul_(d_states_DNH)], dim=2), d_q


def _kernel_forward(
    kernel: ctypes.CDLL,
    gates_DNG: Tensor,
    weights_hh: tuple[Tensor, ...],
    biases_n: list[Tensor],
    batch_sizes: Tensor,
    keep: bool,
) -> tuple[Tensor, ...]:
    """As _loop_forward, but h' and q are returned, and the gates written, only if they are to be kept."""
    states_DNH = gates_DNG.new_empty(*gates_DNG.shape[:2], gates_DNG.shape[2] // 3)
    kept = [torch.empty_like(states_DNH) for _ in range(2 if keep else 0)]
    pointers = [tensor.data_ptr() for tensor in (gates_DNG, states_DNH, *kept)] + [None] * (2 - len(kept))
    _run(kernel.gru_forward, states_DNH, batch_sizes, [weights_hh, biases_n], pointers)
    return states_DNH, *kept


def _kernel_backward(
    kernel: ctypes.CDLL,
    d_outputs_NH: Tensor,
    gates_DNG: Tensor,
    previous_DNH: Tensor,
    q_DNH: Tensor,
    weights_hh: list[Tensor],
    batch_sizes: Tensor,
) -> tuple[Tensor, Tensor]:
    """As _loop_backward."""
    d_gates_DNG, d_q_DNH = torch.empty_like(gates_DNG), torch.empty_like(q_DNH)
    tensors = (d_outputs_NH, gates_DNG, previous_DNH, q_DNH, d_gates_DNG, d_q_DNH)
    _run(kernel.gru_backward, previous_DNH, batch_sizes, [weights_hh], [tensor.data_ptr() for tensor in tensors])
    return d_gates_DNG, d_q_DNH


def _run(function, like_DNH: Tensor, batch_sizes: Tensor, by_direction, pointers) -> None:
    directions, _, hidden = like_DNH.shape
    by_direction = [[tensor.contiguous() for tensor in tensors] for tensors in by_direction]
    arrays = [(ctypes.c_void_p * directions)(*(tensor.data_ptr() for tensor in tensors)) for tensors in by_direction]
    sizes = [ctypes.c_long(size) for size in (directions, hidden, len(batch_sizes))]
    function(
        *sizes,
        ctypes.c_void_p(batch_sizes.data_ptr()),
        *arrays,
        *map(ctypes.c_void_p, pointers),
        ctypes.c_long(torch.get_num_threads()),
    )


def _kernel_for(dtype: torch.dtype) -> ctypes.CDLL | None:
    kernel = _load_kernel() if dtype == torch.float32 else None
    return kernel if isinstance(kernel, ctypes.CDLL) else None


def build_kernel() -> None:
    """Compile and load the kernel, if this machine can: what the first forward pass would do otherwise."""
    _load_kernel()


def kernel_status() -> str:
    """What the recurrent layers run on a CPU and, if that is not the kernel, why."""
    kernel = _load_kernel()
    return f"plain PyTorch: {kernel}" if isinstance(kernel, str) else f"fused kernel ({Path(kernel._name).stem})"


@functools.cache
def _load_kernel() -> ctypes.CDLL | str:
    """The loaded kernel, compiled if it is not in the cache yet; or why there is none."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() in ("aarch64", "arm64"):
        flags = []
    elif capability == "AVX2":
        flags = ["-mavx2", "-mfma"]
    elif capability == "AVX512":
        flags = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
    else:
        return f"no kernel for this CPU ({platform.machine()}, {capability}); it needs AVX2 or AVX-512"
    flags = ["-std=c++17", "-O3", *flags, "-fopenmp", "-fPIC", "-shared"]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([platform.machine(), *flags]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser()
    library = folder / f"deepspeech2_gru_{key}" / f"{capability}.so"
    try:
        if not library.exists():
            compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
            if not shutil.which(compiler[0]):
                return f"no C++ compiler ({compiler[0]} not found: apt-get install g++, or set CXX)"
            library.parent.mkdir(parents=True, exist_ok=True)
            # Any number of processes may do this at once; a finished file takes its place in one step.
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                built = Path(scratch, library.name)
                subprocess.run(
                    [*compiler, *flags, "-o", str(built), str(SOURCE)], check=True, capture_output=True, text=True
                )
                built.replace(library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(error.cmd)} failed: {error.stderr.strip()}"
    except OSError as error:
        return f"{error} (the kernel is kept in {folder}, which TORCH_EXTENSIONS_DIR changes)"
