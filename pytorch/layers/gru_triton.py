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

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad


def _tiles(U: int, K: int, AHEAD: int, num_warps: int = 4) -> dict[str, int]:
    """Return a program's tiles, as the kernels name them. AHEAD tiles of R x K load while one is multiplied."""
    return {"R": 64, "U": U, "K": K, "AHEAD": AHEAD, "num_warps": num_warps}


# By compute capability, of the forward pass and of the backward pass
TILES = {
    (8, 0): (_tiles(32, 32, 3, 8), _tiles(32, 32, 4)),
    (8, 9): (_tiles(16, 32, 3), _tiles(16, 32, 4)),
    (9, 0): (_tiles(32, 64, 3), _tiles(32, 64, 4)),
    (12, 0): (_tiles(16, 32, 3), _tiles(16, 32, 4)),
}
TESTED = [(9, 0)]  # on hardware


@triton.jit
def _wait(counter, target, late):
    """Spin until a counter has come to `target`. Return 1 if that took more than 5 s, else `late`.

    Every thread acquires for itself, so that no barrier need follow.
    """
    return late | tl.inline_asm_elementwise(
        """{ .reg .pred done, patient; .reg .s32 seen; .reg .u64 begun, now;
             mov.u64 begun, %globaltimer; mov.u32 $0, 0;
        SPIN: ld.acquire.gpu.global.s32 seen, [$1]; setp.ge.s32 done, seen, $2; @done bra DONE;
             mov.u64 now, %globaltimer; sub.u64 now, now, begun;
             setp.lt.u64 patient, now, 5000000000; @patient bra SPIN;
             mov.u32 $0, 1;
        DONE: }""",
        "=r,l,r", [counter.to(tl.int64), target], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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


@triton.jit(do_not_specialize=["N", "B", "T", "first", "last", "first_block", "keep"])
def _forward(
    inputs, weights, biases, offsets, counters, carry, states, kept, N, B, T, first, last, first_block, keep,
    H: tl.constexpr, R: tl.constexpr, U: tl.constexpr, K: tl.constexpr, AHEAD: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Run the recurrence from time step `first` to `last` (in the order of the direction).

    inputs [N, 6H]: products with x of r, z, n; n, r, z; weights [2, 3H, H]: of q, r, z; r, z, q; biases [2, 6H]: b_ih,
    b_hh of r, z, n; offsets [T + 1]: each time step's first row; counters [blocks, 2]: zero; carry [2, B, H]: without
    WAIT, states before and after. Writes states [2, N, H] and, if keep, kept [2, N, 5, H]: r, z, n, q, h'.
    """
    d = tl.program_id(2)
    block = first_block + tl.program_id(1)
    counter = counters + 2 * block + d
    row = block * R + tl.arange(0, R)
    unit = tl.program_id(0) * U + tl.arange(0, U)
    # r and z of the same units in one product; so that they are in the same threads, alternately for half of the units
    column = tl.arange(0, 2 * U)
    unit2 = tl.program_id(0) * U + column // U * (U // 2) + column % (U // 2)
    at_rz = column // (U // 2) % 2 * H + unit2
    inside, inside2 = unit < H, unit2 < H
    w = weights + d * 3 * H * H
    w_rz = _weights(w + ((1 - d) * H + at_rz) * H, inside2, 1, H, K)
    w_q = _weights(w + (2 * d * H + unit) * H, inside, 1, H, K)
    b = biases + d * 6 * H
    b_rz = tl.load(b + at_rz, mask=inside2, other=0.0) + tl.load(b + 3 * H + at_rz, mask=inside2, other=0.0)
    b_n = tl.load(b + 2 * H + unit, mask=inside, other=0.0)
    b_q = tl.load(b + 5 * H + unit, mask=inside, other=0.0)
    own = (d * B + row)[:, None] * H + unit[None, :]
    owned = (row < B)[:, None] & inside[None, :]
    h = tl.zeros([R, U], tl.float32) if WAIT else tl.load(carry + own, mask=owned, other=0.0)
    states += d.to(tl.int64) * N * H
    kept += d.to(tl.int64) * N * 5 * H
    before, size_before = _rows(offsets, first - 1, T, d)
    start, size = _rows(offsets, first, T, d)
    late = 0
    for step in tl.range(first, last, num_stages=1, disable_licm=True):
        active = (row < size)[:, None] & inside[None, :]
        at = (start + row).to(tl.int64)
        x = inputs + at[:, None] * (6 * H)
        x_rz = tl.load(x + (4 * d * H + at_rz)[None, :], mask=(row < size)[:, None] & inside2[None, :], other=0.0)
        x_n = tl.load(x + ((2 + d) * H + unit)[None, :], mask=active, other=0.0).to(tl.float32) + b_n[None, :]
        rz = x_rz.to(tl.float32) + b_rz[None, :]
        q = tl.zeros([R, U], tl.float32) + b_q[None, :]

        continued = row < tl.minimum(size, size_before)
        corner = states + (before + row).to(tl.int64)[:, None] * H + tl.arange(0, K)[None, :]
        before, size_before = start, size
        start, size = _rows(offsets, step + 1, T, d)
        if WAIT:
            late = _wait(counter, (step - first) * tl.num_programs(0), late)
        tiles = ()  # of what other programs wrote, hence not from L1; what is outside is left undefined
        for i in tl.static_range(-AHEAD, len(w_q)):
            if i + AHEAD < len(w_q):
                mask = _inside(continued, i + AHEAD, H, K)
                tiles += (tl.load(corner + (i + AHEAD) * K, mask=mask, cache_modifier=".cg"),)
            if i >= 0:
                tile = tl.where(_inside(continued, i, H, K), tiles[i], 0.0)
                rz = tl.dot(tile, w_rz[i], rz)
                q = tl.dot(tile, w_q[i], q)
        by_half = tl.permute(tl.reshape(tl.sigmoid(rz), [R, 2, 2, U // 2]), [0, 1, 3, 2])
        r, z = tl.split(tl.reshape(by_half, [R, U, 2]))
        n = 2 * tl.sigmoid(2 * (x_n + r * q)) - 1
        new = n + z * (h - n) + tl.where(late == 0, 0.0, float("nan"))
        tl.store(states + at[:, None] * H + unit[None, :], new, mask=active)
        if WAIT:  # say that all that this program has stored may be read
            tl.debug_barrier()
            tl.atomic_add(counter, 1, sem="release", scope="gpu")
        if keep:
            own_kept = kept + at[:, None] * (5 * H) + unit[None, :]
            values = r, z, n, q, h
            for i in tl.static_range(5):
                tl.store(own_kept + i * H, values[i], mask=active)
        h = tl.where(active, new, h)
    if not WAIT:
        tl.store(carry + own, h, mask=owned)


@triton.jit(do_not_specialize=["N", "B", "T", "first", "last", "first_block"])
def _backward(
    d_outputs, kept, weights, offsets, counters, carry, d_gates, N, B, T, first, last, first_block,
    H: tl.constexpr, R: tl.constexpr, U: tl.constexpr, K: tl.constexpr, AHEAD: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Run the recurrence backward, from the last time step (of the direction) on.

    d_outputs [N, H]; kept, weights, offsets, counters: as in _forward; carry [2, B, H]: without WAIT, the states'
    gradients through z. Writes d_gates [N, 8H]: of q and of the sums inside r, z, n of the forward direction, and of
    the sums inside n, r, z and of q of the reverse one. So neighbors are what a product or a time step needs.
    """
    d = tl.program_id(2)
    block = first_block + tl.program_id(1)
    counter = counters + 2 * block + d
    row = block * R + tl.arange(0, R)
    unit = tl.program_id(0) * U + tl.arange(0, U)
    inside = unit < H
    tiles_w = _weights(weights + d * 3 * H * H + unit, inside, H, 3 * H, K)
    own = (d * B + row)[:, None] * H + unit[None, :]
    owned = (row < B)[:, None] & inside[None, :]
    d_h = tl.zeros([R, U], tl.float32) if WAIT else tl.load(carry + own, mask=owned, other=0.0)
    kept += d.to(tl.int64) * N * 5 * H
    d_gates += 5 * d * H  # of q, r, z, or r, z, q
    before, size_before = _rows(offsets, first - 1, T, 1 - d)
    start, size = _rows(offsets, first, T, 1 - d)
    late = 0
    for step in tl.range(first, last, num_stages=1, disable_licm=True):
        active = (row < size)[:, None] & inside[None, :]
        at = (start + row).to(tl.int64)
        keep = kept + at[:, None] * (5 * H) + unit[None, :]
        values = ()
        for i in tl.static_range(5):
            values += (tl.load(keep + i * H, mask=active, other=0.0).to(tl.float32),)
        r, z, n, q, h = values  # type: ignore[misc]
        d_h += tl.load(d_outputs + at[:, None] * H + unit[None, :], mask=active, other=0.0)
        by_n = (1 - z) * (1 - n * n)
        by_r = by_n * q * r * (1 - r)
        by_z = (h - n) * z * (1 - z)

        continued = row < tl.minimum(size, size_before)
        corner = d_gates + (before + row).to(tl.int64)[:, None] * (8 * H) + tl.arange(0, K)[None, :]
        before, size_before = start, size
        start, size = _rows(offsets, step + 1, T, 1 - d)
        if WAIT:
            late = _wait(counter, (step - first) * tl.num_programs(0), late)
        tiles = ()
        product = tl.zeros([R, U], tl.float32)
        for i in tl.static_range(-AHEAD, len(tiles_w)):
            if i + AHEAD < len(tiles_w):
                mask = _inside(continued, i + AHEAD, 3 * H, K)
                tiles += (tl.load(corner + (i + AHEAD) * K, mask=mask, cache_modifier=".cg"),)
            if i >= 0:
                tile = tl.where(_inside(continued, i, 3 * H, K), tiles[i], 0.0)
                product = tl.dot(tile, tiles_w[i], product)
        d_h += product + tl.where(late == 0, 0.0, float("nan"))
        d_n = d_h * by_n
        d_r = d_h * by_r
        d_z = d_h * by_z
        d_q = d_n * r
        give = d_gates + at[:, None] * (8 * H) + unit[None, :]
        tl.store(give + 2 * d * H, d_q, mask=active)
        tl.store(give + (1 - d) * H, d_r, mask=active)
        tl.store(give + (2 - d) * H, d_z, mask=active)
        if WAIT:  # say that all that this program has stored may be read
            tl.debug_barrier()
            tl.atomic_add(counter, 1, sem="release", scope="gpu")
        tl.store(give + (3 - 4 * d) * H, d_n, mask=active)
        d_h *= z
    if not WAIT:
        tl.store(carry + own, d_h, mask=owned)


def supported(device: torch.device, untested: bool) -> bool:
    """Return whether a GPU was tested, or has tiles. A layer too large for its shared memory fails when launched."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in (TILES if untested else TESTED)


class Layer(torch.autograd.Function):
    """The layer on a GPU; offsets [T + 1] are those of batch_sizes [T], as int32 on the GPU; None has them computed.

    `weights` are, for each direction, W_ih [3H, I], W_hh [3H, H], b_ih [3H], b_hh [3H].
    """

    @staticmethod
    def forward(
        ctx: Any, inputs_NI: Tensor, batch_sizes: Tensor, offsets: Tensor | None, keep: bool, *weights: Tensor
    ) -> Tensor:
        if offsets is None:
            offsets = pad(batch_sizes.cumsum(0), (1, 0)).int().to(inputs_NI.device)
        ih_0, hh_0, bias_ih_0, bias_hh_0, ih_1, hh_1, bias_ih_1, bias_hh_1 = weights
        hidden, ctx.input_dtype = hh_0.shape[1], inputs_NI.dtype
        # Triton's interpreter, on a CPU, has no products of bfloat16
        inputs_NI = inputs_NI.to(torch.bfloat16 if inputs_NI.is_cuda else torch.float32)
        # Rows of r, z, n and n, r, z; and of q, r, z and r, z, q: as the kernels have them
        weights_ih = inputs_NI.new_empty(6 * hidden, inputs_NI.shape[1])
        weights_hh = inputs_NI.new_empty(6 * hidden, hidden)
        torch._foreach_copy_(
            [*weights_ih.split([3 * hidden, hidden, 2 * hidden]), *weights_hh.split([hidden, 2 * hidden, 3 * hidden])],
            [ih_0, ih_1[2 * hidden :], ih_1[: 2 * hidden], hh_0[2 * hidden :], hh_0[: 2 * hidden], hh_1],
        )
        products_NX = torch.mm(inputs_NI, weights_ih.t())
        biases = torch.cat([bias_ih_0, bias_hh_0, bias_ih_1, bias_hh_1]).float()
        states_2NH = inputs_NI.new_empty(2, len(inputs_NI), hidden)
        kept_2N5H = inputs_NI.new_empty(2, len(inputs_NI) if keep else 0, 5, hidden)
        given = products_NX, weights_hh, biases, offsets
        _launch(_forward, given, (states_2NH, kept_2N5H), batch_sizes, hidden, int(keep))
        if keep:
            ctx.save_for_backward(inputs_NI, batch_sizes, offsets, kept_2N5H, weights_ih, weights_hh)
        return states_2NH.sum(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_outputs_NH: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs_NI, batch_sizes, offsets, kept_2N5H, weights_ih, weights_hh = ctx.saved_tensors
        _, rows, _, hidden = kept_2N5H.shape
        d_gates_NX = kept_2N5H.new_empty(rows, 8 * hidden)
        given = d_outputs_NH.contiguous(), kept_2N5H, weights_hh, offsets
        _launch(_backward, given, (d_gates_NX,), batch_sizes, hidden)
        d_products_NX = d_gates_NX[:, hidden : 7 * hidden]  # r, z, n, n, r, z
        d_recurrent_2NG = d_gates_NX.as_strided((2, rows, 3 * hidden), (5 * hidden, 8 * hidden, 1))  # q, r, z; r, z, q
        float32: Any = {"out_dtype": torch.float32} if inputs_NI.is_cuda else {}
        d_inputs_NI = None
        if ctx.needs_input_grad[0]:
            d_inputs_NI = torch.mm(d_products_NX, weights_ih, **float32).to(ctx.input_dtype)
        d_ih_XI = torch.mm(d_products_NX.t(), inputs_NI, **float32)
        d_hh_0, d_hh_1 = torch.bmm(d_recurrent_2NG.mT, kept_2N5H[:, :, 4], **float32)
        d_bias_X = d_gates_NX.sum(0, dtype=torch.float32)
        roll = partial(torch.roll, shifts=-hidden, dims=0)
        forward = d_ih_XI[: 3 * hidden], roll(d_hh_0), d_bias_X[hidden : 4 * hidden], roll(d_bias_X[: 3 * hidden])
        reverse = roll(d_ih_XI[3 * hidden :]), d_hh_1, roll(d_bias_X[4 * hidden : 7 * hidden]), d_bias_X[5 * hidden :]
        return d_inputs_NI, None, None, None, *forward, *reverse


def _launch(
    kernel: Any, given: tuple[Tensor, ...], results: tuple[Tensor, ...], batch_sizes: Tensor, hidden: int, *flags: int
) -> None:
    """Run a kernel, over as many utterances at once as the device has multiprocessors for."""
    *_, offsets = given
    device, rows, time, batch = offsets.device, given[0].shape[0], len(batch_sizes), int(batch_sizes[0])
    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    capability = torch.cuda.get_device_capability(device) if on_gpu else (9, 0)
    tile = TILES[capability][kernel is _backward]
    few = kernel is _forward and capability == (9, 0) and batch <= tile["R"]
    if few and 2 * triton.cdiv(hidden, 16) <= processors:
        tile = tile | {"U": 16}  # 16 % faster on an H200
    units, blocks = triton.cdiv(hidden, tile["U"]), triton.cdiv(batch, tile["R"])
    at_once = max(1, processors // (2 * units))
    counters = offsets.new_zeros(blocks, 2)
    carry = None if on_gpu else given[0].new_zeros(2, batch, hidden)
    constants = {"H": hidden, "WAIT": on_gpu, "num_stages": 1, "launch_cooperative_grid": on_gpu}
    with torch.cuda.device_of(counters):
        for block in range(0, blocks, at_once):
            grid = units, min(at_once, blocks - block), 2
            for first in range(0, time, time if on_gpu else 1):
                sizes = rows, batch, time, first, time if on_gpu else first + 1, block
                kernel[grid](*given, counters, carry, *results, *sizes, *flags, **tile, **constants)
