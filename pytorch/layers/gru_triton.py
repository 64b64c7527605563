"""The GRU layer on NVIDIA GPUs: one Triton kernel runs through all time steps of a pass. The mathematics is in gru.py.

cuDNN starts some kernels for every time step of packed rows. Here both directions' loops over time are one launch: a
program owns U hidden units, all gates of them, for R utterances of one direction. It keeps its recurrent weights in
shared memory and its states in registers. For a time step it needs the states of all units of its utterances (in the
backward pass, the gradients inside the gates). Programs exchange these in bfloat16 through global memory, which is L2,
in rows that are written once; those of one direction and the same utterances wait for one another with a counter. All
must run at the same time: a cooperative launch of at most one program a multiprocessor.

The products with the inputs and the gradients of both weight matrices are matrix products over all rows, before and
after. Operands are bfloat16, and so are the directions' states before their sum, what the forward pass keeps, and the
weights' gradients before they become float32. Inside a program states, gates and sums are float32.

Under TRITON_INTERPRET=1 programs run one after another and cannot wait: then each time step is a launch of its own.

Axes: as in gru.py; R rows (utterances) and U units of a program, K of its weights' rows that are multiplied at once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

# AHEAD tiles of R x K states or gradients are on their way while one is multiplied.
FORWARD = {"R": 64, "U": 32, "K": 64, "AHEAD": 3, "num_warps": 4}
BACKWARD = {"R": 64, "U": 32, "K": 64, "AHEAD": 4, "num_warps": 4}
PATIENCE = tl.constexpr(1 << 22)  # looks at a counter, some seconds in all: a program that waits no more returns NaN


@triton.jit
def _wait(counter, target, looks):
    """Wait until a counter has come to `target`; return how often it was looked at."""
    while (tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target) & (looks < PATIENCE):
        looks += 1
    tl.debug_barrier()
    return looks


@triton.jit
def _arrive(counter):
    """Say that all that this program has stored may be read by those who wait."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def _rows(offsets, step, T, reverse):
    """Return the first row and the number of rows of a time step; a step before the first has none."""
    t = tl.minimum(tl.maximum(step, 0), T - 1)
    t += reverse * (T - 1 - 2 * t)
    start = tl.load(offsets + t)
    return start, tl.where(step < 0, 0, tl.load(offsets + t + 1) - start)


@triton.jit
def _inside(mask, i: tl.constexpr, length: tl.constexpr, K: tl.constexpr):
    """Return which elements of tile i there are: rows of `mask`, and columns up to `length`."""
    return mask[:, None] if (i + 1) * K <= length else mask[:, None] & (tl.arange(0, K) < length - i * K)[None, :]


@triton.jit
def _weights(rows, mask, stride: tl.constexpr, length: tl.constexpr, K: tl.constexpr):
    """Load tiles of weights, [K, U] each. They are used at every time step: Triton keeps them in shared memory."""
    tiles = ()
    corner = rows[:, None] + tl.arange(0, K)[None, :] * stride
    for i in tl.static_range((length + K - 1) // K):
        tile = tl.load(corner + i * K * stride, mask=_inside(mask, i, length, K), other=0.0)
        tiles += (tl.trans(tile),)
    return tiles


@triton.jit
def _tile(corner, mask, i: tl.constexpr, length: tl.constexpr, K: tl.constexpr):
    """Load tile i of what other programs wrote, hence not from L1; what is outside is left undefined."""
    return tl.load(corner + i * K, mask=_inside(mask, i, length, K), cache_modifier=".cg")


@triton.jit(do_not_specialize=["N", "B", "T", "first", "last", "first_block"])
def _forward(
    inputs, weights, biases, offsets, counters, carry, states, kept, N, B, T, first, last, first_block,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
    AHEAD: tl.constexpr, KEEP: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Run the recurrence from time step `first` to `last` (in the order of the direction).

    inputs [N, D, 3H]: products with x; weights [D, 3H, H]; biases [D, 4, H]: r, z, W_in's, W_hn's; offsets [T + 1]:
    each time step's first row; counters [D, blocks]: zero; carry [D, B, H]: states before and after.
    Writes states [D, N, H] and kept [D, N, 5, H]: r, z, n, q, h'.
    """
    d = tl.program_id(2)
    block = first_block + tl.program_id(1)
    counter = counters + d * tl.num_programs(1) + tl.program_id(1)
    row = block * R + tl.arange(0, R)
    unit = tl.program_id(0) * U + tl.arange(0, U)
    # r and z of the same units in one product; so that they are in the same threads, alternately for half of the units
    column = tl.arange(0, 2 * U)
    unit2 = tl.program_id(0) * U + column // U * (U // 2) + column % (U // 2)
    at_rz = column // (U // 2) % 2 * H + unit2
    inside, inside2 = unit < H, unit2 < H
    w = weights + d * 3 * H * H
    w_rz = _weights(w + at_rz * H, inside2, 1, H, K)
    w_n = _weights(w + (2 * H + unit) * H, inside, 1, H, K)
    b = biases + d * 4 * H
    b_rz = tl.load(b + at_rz, mask=inside2, other=0.0)[None, :]
    b_n = tl.load(b + 2 * H + unit, mask=inside, other=0.0)[None, :]
    b_q = tl.load(b + 3 * H + unit, mask=inside, other=0.0)[None, :]
    own = (d * B + row)[:, None] * H + unit[None, :]
    owned = (row < B)[:, None] & inside[None, :]
    h = tl.load(carry + own, mask=owned, other=0.0)
    inputs += d * 3 * H
    states += d.to(tl.int64) * N * H
    kept += d.to(tl.int64) * N * 5 * H
    before, size_before = _rows(offsets, first - 1, T, d)
    start, size = _rows(offsets, first, T, d)
    looks = 0
    for step in tl.range(first, last, num_stages=1, disable_licm=True):
        active = (row < size)[:, None] & inside[None, :]
        at = (start + row).to(tl.int64)
        x = inputs + at[:, None] * (D * 3 * H)
        x_rz = tl.load(x + at_rz[None, :], mask=(row < size)[:, None] & inside2[None, :], other=0.0)
        x_n = tl.load(x + (2 * H + unit)[None, :], mask=active, other=0.0).to(tl.float32) + b_n
        rz = x_rz.to(tl.float32) + b_rz
        q = tl.zeros([R, U], tl.float32) + b_q

        continued = row < tl.minimum(size, size_before)
        corner = states + (before + row).to(tl.int64)[:, None] * H + tl.arange(0, K)[None, :]
        before, size_before = start, size
        start, size = _rows(offsets, step + 1, T, d)
        if WAIT:
            looks = _wait(counter, (step - first) * tl.num_programs(0), looks)
        tiles = ()
        for i in tl.static_range(-AHEAD, len(w_n)):
            if i + AHEAD < len(w_n):
                tiles += (_tile(corner, continued, i + AHEAD, H, K),)
            if i >= 0:
                tile = tl.where(_inside(continued, i, H, K), tiles[i], 0.0)
                rz = tl.dot(tile, w_rz[i], rz)
                q = tl.dot(tile, w_n[i], q)
        by_half = tl.permute(tl.reshape(tl.sigmoid(rz), [R, 2, 2, U // 2]), [0, 1, 3, 2])
        r, z = tl.split(tl.reshape(by_half, [R, U, 2]))
        n = 2 * tl.sigmoid(2 * (x_n + r * q)) - 1
        new = n + z * (h - n) + tl.where(looks < PATIENCE, 0.0, float("nan"))
        tl.store(states + at[:, None] * H + unit[None, :], new, mask=active)
        if WAIT:
            _arrive(counter)
        if KEEP:
            keep = kept + at[:, None] * (5 * H) + unit[None, :]
            tl.store(keep, r, mask=active)
            tl.store(keep + H, z, mask=active)
            tl.store(keep + 2 * H, n, mask=active)
            tl.store(keep + 3 * H, q, mask=active)
            tl.store(keep + 4 * H, h, mask=active)
        h = tl.where(active, new, h)
    tl.store(carry + own, h, mask=owned)


@triton.jit(do_not_specialize=["N", "B", "T", "first", "last", "first_block"])
def _backward(
    d_outputs, kept, weights, offsets, counters, carry, d_gates, N, B, T, first, last, first_block,
    D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, U: tl.constexpr, K: tl.constexpr,
    AHEAD: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Run the recurrence backward, from the last time step (of the direction) on.

    d_outputs [N, H]; kept, offsets, counters: as in _forward; weights [D, 3H, H]: of n, r, z; carry [D, B, H]: the
    states' gradients through z. Writes d_gates [D, N, 4, H]: of q and of the sums inside r, z, n.
    """
    d = tl.program_id(2)
    block = first_block + tl.program_id(1)
    counter = counters + d * tl.num_programs(1) + tl.program_id(1)
    row = block * R + tl.arange(0, R)
    unit = tl.program_id(0) * U + tl.arange(0, U)
    inside = unit < H
    tiles_w = _weights(weights + d * 3 * H * H + unit, inside, H, 3 * H, K)
    own = (d * B + row)[:, None] * H + unit[None, :]
    owned = (row < B)[:, None] & inside[None, :]
    d_h = tl.load(carry + own, mask=owned, other=0.0)
    kept += d.to(tl.int64) * N * 5 * H
    d_gates += d.to(tl.int64) * N * 4 * H
    before, size_before = _rows(offsets, first - 1, T, 1 - d)
    start, size = _rows(offsets, first, T, 1 - d)
    looks = 0
    for step in tl.range(first, last, num_stages=1, disable_licm=True):
        active = (row < size)[:, None] & inside[None, :]
        at = (start + row).to(tl.int64)
        keep = kept + at[:, None] * (5 * H) + unit[None, :]
        r = tl.load(keep, mask=active, other=0.0)
        z = tl.load(keep + H, mask=active, other=0.0)
        n = tl.load(keep + 2 * H, mask=active, other=0.0)
        q = tl.load(keep + 3 * H, mask=active, other=0.0)
        h = tl.load(keep + 4 * H, mask=active, other=0.0)
        d_h += tl.load(d_outputs + at[:, None] * H + unit[None, :], mask=active, other=0.0)
        r, z, n, q, h = r.to(tl.float32), z.to(tl.float32), n.to(tl.float32), q.to(tl.float32), h.to(tl.float32)
        by_n = (1 - z) * (1 - n * n)
        by_r = by_n * q * r * (1 - r)
        by_z = (h - n) * z * (1 - z)

        continued = row < tl.minimum(size, size_before)
        corner = d_gates + (before + row).to(tl.int64)[:, None] * (4 * H) + tl.arange(0, K)[None, :]
        before, size_before = start, size
        start, size = _rows(offsets, step + 1, T, 1 - d)
        if WAIT:
            looks = _wait(counter, (step - first) * tl.num_programs(0), looks)
        tiles = ()
        product = tl.zeros([R, U], tl.float32)
        for i in tl.static_range(-AHEAD, len(tiles_w)):
            if i + AHEAD < len(tiles_w):
                tiles += (_tile(corner, continued, i + AHEAD, 3 * H, K),)
            if i >= 0:
                tile = tl.where(_inside(continued, i, 3 * H, K), tiles[i], 0.0)
                product = tl.dot(tile, tiles_w[i], product)
        d_h += product + tl.where(looks < PATIENCE, 0.0, float("nan"))
        d_n = d_h * by_n
        d_r = d_h * by_r
        d_z = d_h * by_z
        d_q = d_n * r
        give = d_gates + at[:, None] * (4 * H) + unit[None, :]
        tl.store(give, d_q, mask=active)
        tl.store(give + H, d_r, mask=active)
        tl.store(give + 2 * H, d_z, mask=active)
        if WAIT:
            _arrive(counter)
        tl.store(give + 3 * H, d_n, mask=active)
        d_h *= z
    tl.store(carry + own, d_h, mask=owned)


def supported(device: torch.device, hidden: int) -> bool:
    """Return whether the kernels run there: on Hopper, if a program's weights fit, and all programs of an utterance."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    properties = torch.cuda.get_device_properties(device)
    bytes_needed = 2 * BACKWARD["U"] * (3 * hidden + BACKWARD["K"]) + 2**15  # weights, and tiles that pass through
    programs = 2 * triton.cdiv(hidden, BACKWARD["U"])  # of both directions
    fits = bytes_needed < properties.shared_memory_per_multiprocessor and programs <= properties.multi_processor_count
    return properties.major == 9 and fits


class Layer(torch.autograd.Function):
    """The layer on a GPU. `weights` are, for each direction, W_ih [G, I], W_hh [G, H], b_ih [G], b_hh [G]."""

    @staticmethod
    @custom_fwd(device_type="cuda", cast_inputs=torch.float32)
    def forward(ctx: Any, inputs_NI: Tensor, batch_sizes: Tensor, keep: bool, *weights: Tensor) -> Tensor:
        weights_ih, weights_hh, biases_ih, biases_hh = (weights[kind::4] for kind in range(4))
        directions, rows, hidden = len(weights_hh), len(inputs_NI), weights_hh[0].shape[1]
        # Triton's interpreter, on a CPU, has no products of bfloat16
        inputs_NI = inputs_NI.to(torch.bfloat16 if inputs_NI.is_cuda else torch.float32)
        products_NX = torch.mm(inputs_NI, torch.cat(weights_ih).to(inputs_NI).t())
        weights_DGH = torch.stack(weights_hh).to(inputs_NI)
        ih_D3H, hh_D3H = (torch.stack(biases).unflatten(1, (3, hidden)) for biases in (biases_ih, biases_hh))
        biases_D4H = torch.cat([ih_D3H[:, :2] + hh_D3H[:, :2], ih_D3H[:, 2:], hh_D3H[:, 2:]], dim=1)
        offsets = pad(batch_sizes.cumsum(0), (1, 0)).int().to(inputs_NI.device, non_blocking=True)
        states_DNH = inputs_NI.new_empty(directions, rows, hidden)
        kept_DN5H = inputs_NI.new_empty(directions, rows if keep else 0, 5, hidden)
        given = products_NX, weights_DGH, biases_D4H, offsets
        _launch(_forward, FORWARD, given, (states_DNH, kept_DN5H), batch_sizes, KEEP=keep)
        if keep:
            ctx.save_for_backward(inputs_NI, batch_sizes, offsets, kept_DN5H, *weights)
        return states_DNH.sum(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cuda")
    def backward(ctx: Any, d_outputs_NH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs_NI, batch_sizes, offsets, kept_DN5H, *weights = ctx.saved_tensors
        weights_ih, weights_hh = weights[0::4], weights[1::4]
        directions, rows, _, hidden = kept_DN5H.shape
        weights_DGH = torch.stack(weights_hh).to(inputs_NI).roll(hidden, 1)  # n, r, z
        d_gates_DN4H = kept_DN5H.new_empty(directions, rows, 4, hidden)
        given = d_outputs_NH.contiguous(), kept_DN5H, weights_DGH, offsets
        _launch(_backward, BACKWARD, given, (d_gates_DN4H,), batch_sizes)
        d_inputs_NI = torch.zeros_like(inputs_NI, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        d_weights: list[Tensor] = []
        for direction, d_bias_X in enumerate(d_gates_DN4H.sum(1, dtype=torch.float32).flatten(1)):
            d_gates_NX, previous_NH = d_gates_DN4H[direction].flatten(1), kept_DN5H[direction, :, 4]
            d_qrz_NG, d_rzn_NG = d_gates_NX[:, : 3 * hidden], d_gates_NX[:, hidden:]
            d_weight_ih, d_weight_hh = torch.mm(d_rzn_NG.t(), inputs_NI), torch.mm(d_qrz_NG.t(), previous_NH)
            d_weights += [d_weight_ih.float(), d_weight_hh.float().roll(-hidden, 0)]
            d_weights += [d_bias_X[hidden:], d_bias_X[: 3 * hidden].roll(-hidden)]
            if d_inputs_NI is not None:
                d_inputs_NI.add_(torch.mm(d_rzn_NG, weights_ih[direction].to(inputs_NI)))
        return d_inputs_NI, None, None, *d_weights


def _launch(
    kernel: Any,
    tile: dict[str, int],
    given: tuple[Tensor, ...],
    results: tuple[Tensor, ...],
    batch_sizes: Tensor,
    **constants: Any,
) -> None:
    """Run a kernel, over as many utterances at once as the device has multiprocessors for."""
    directions, rows, hidden = results[0].shape[0], results[0].shape[1], results[0].shape[-1]
    time, batch, blocks = len(batch_sizes), int(batch_sizes[0]), triton.cdiv(int(batch_sizes[0]), tile["R"])
    carry_DBH = given[0].new_zeros(directions, batch, hidden, dtype=torch.float32)
    units, on_gpu = triton.cdiv(hidden, tile["U"]), carry_DBH.is_cuda
    processors = torch.cuda.get_device_properties(carry_DBH.device).multi_processor_count if on_gpu else 1
    at_once = max(1, processors // (directions * units))
    constants |= {"D": directions, "H": hidden, "WAIT": on_gpu, "num_stages": 1, "launch_cooperative_grid": on_gpu}
    with torch.cuda.device_of(carry_DBH):
        for block in range(0, blocks, at_once):
            counters = carry_DBH.new_zeros(directions, at_once, dtype=torch.int32)
            grid = units, min(at_once, blocks - block), directions
            for first in range(0, time, time if on_gpu else 1):
                sizes = rows, batch, time, first, time if on_gpu else first + 1, block
                kernel[grid](*given, counters, carry_DBH, *results, *sizes, **tile, **constants)
