"""The 2-d convolutions of DeepSpeech2, over activations of shape [B, T, F, C]: time first, channels last.

    conv = Convolution(1, 16, kernel=(41, 11), stride=(2, 2))    # (frequency, time); 'same' padding
    outputs_BTFC = conv(features_BTFC)

Parameters and state_dict are those of torch.nn.Conv2d on [B, C, F, T], and so are the results. Other forms of the same
sums are faster than the direct convolutions of oneDNN and cuDNN (figures in BENCHMARKS.md and docs/gpu.md):

- The features, one channel that needs no gradient: a matrix product. The input is unfolded along time only, so that the
  window of an output frequency is one contiguous run; a few neighboring outputs share a slightly longer run, whose
  weights form a band (Toeplitz) matrix. The unfolded input is 5.5 times the input (11 frames for every other one);
  with im2col it would be 113 times.
- Everything else: a product of Fourier transforms, of tiles of a few frames so that a tile's padding stays small. The
  transforms are matrix products too.

Under bfloat16 autocast both are computed in bfloat16, sums in float32.

Axes: B batch, T time, F frequency, C channels; N = B x T rows.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pytorch.layers import kernels
from pytorch.layers.rows import pad_rows, padded_rows, pads_rows

NEIGHBORS = 9  # output frequencies of one product, at most: more would multiply more zeros


class Convolution(nn.Conv2d):
    """'Same'-padded 2-d convolution without bias: it is always followed by a batch norm, which would take it out.

    Kernel and stride are along (frequency, time); the kernel's sizes are odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, (kernel[0] // 2, kernel[1] // 2), bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [B, T, F, C] to [B, T', F', C'], where T' and F' are T and F over the stride, rounded up."""
        dtype = kernels.product_dtype(self.weight)
        input, weight = input.to(dtype), self.weight.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            if self.in_channels == 1 and not input.requires_grad:  # the features
                return _UnfoldedConvolution.apply(input.squeeze(3), weight, self.stride)
            return _FourierConvolution.apply(input, weight, self.stride[0])[:, :: self.stride[1]]


class _UnfoldedConvolution(torch.autograd.Function):
    """One input channel, as matrix products; no gradient of the input, which is the features.

    The output frequencies are in G groups of equally many neighbors. A group is one product [N, K] @ [K, X], of the
    windows that its outputs need and of the band matrix. N is B x T', or more, see rows.py.
    """

    @staticmethod
    def forward(ctx, input_BTF: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:  # type: ignore[no-untyped-def, override]
        batch, time, frequencies = input_BTF.shape
        channels, _, kernel_frequency, kernel_time = weight.shape
        outputs, times = math.ceil(frequencies / stride[0]), math.ceil(time / stride[1])
        neighbors = max(n for n in range(1, NEIGHBORS + 1) if outputs % n == 0)
        padded_BTF = nn.functional.pad(input_BTF, (kernel_frequency // 2,) * 2 + (kernel_time // 2,) * 2)
        unfolded_BTK = padded_BTF.unfold(1, kernel_time, stride[1]).flatten(2)  # the kernel's frames of each frequency
        rows_NK = pad_rows(unfolded_BTK.flatten(0, 1), input_BTF.dtype)
        width = (kernel_frequency + (neighbors - 1) * stride[0]) * kernel_time
        windows_GNK = rows_NK.unfold(1, width, neighbors * stride[0] * kernel_time).transpose(0, 1)  # they overlap
        band_KX = weight.new_zeros(width, neighbors * channels)
        _diagonals(band_KX, weight.shape, stride[0]).copy_(weight[:, 0].permute(1, 2, 0))
        output_NGX = input_BTF.new_empty(len(rows_NK), len(windows_GNK), neighbors * channels)
        _multiply_groups(windows_GNK, band_KX.expand(len(windows_GNK), -1, -1), output_NGX.transpose(0, 1))
        ctx.save_for_backward(windows_GNK)
        ctx.weight_shape, ctx.stride = weight.shape, stride[0]
        return output_NGX[: batch * times].view(batch, times, outputs, channels)

    @staticmethod
    def backward(ctx, d_output_BTFC: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[no-untyped-def, override]
        (windows_GNK,) = ctx.saved_tensors
        d_output_NFC = pad_rows(d_output_BTFC.contiguous().flatten(0, 1), windows_GNK.dtype)
        d_output_GNX = d_output_NFC.view(len(d_output_NFC), len(windows_GNK), -1).transpose(0, 1)
        d_band_GKX = windows_GNK.new_empty(len(windows_GNK), windows_GNK.shape[2], d_output_GNX.shape[2])
        _multiply_groups(windows_GNK.mT, d_output_GNX, d_band_GKX)
        d_band_KX = d_band_GKX.sum(0, dtype=torch.promote_types(windows_GNK.dtype, torch.float32))
        d_weight_fkC = _diagonals(d_band_KX, ctx.weight_shape, ctx.stride).sum(0)
        return None, d_weight_fkC.permute(2, 0, 1).unsqueeze(1), None


def _diagonals(band_KX: Tensor, weight_shape: torch.Size, stride: int) -> Tensor:
    """Return a view of a band matrix: the weights [f, k, C] of each of its output frequencies, zero elsewhere."""
    channels, _, kernel_frequency, kernel_time = weight_shape
    columns = band_KX.shape[1]
    shape = columns // channels, kernel_frequency, kernel_time, channels
    return band_KX.as_strided(shape, (stride * kernel_time * columns + channels, kernel_time * columns, columns, 1))


def _multiply_groups(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Compute the matrix product of each group; one by one on a CPU, since oneDNN refuses batches that overlap."""
    if left.is_cuda:
        torch.bmm(left, right, out=out)
    else:
        for left_group, right_group, out_group in zip(left, right, out, strict=True):
            torch.mm(left_group, right_group, out=out_group)


class _FourierConvolution(torch.autograd.Function):
    """Several input channels, stride 1 along time: products of Fourier transforms of overlapping tiles.

    As many neighboring frequencies as the stride become one row j with that many times the channels. Then the stride
    is 1, a kernel of 21 frequencies has 11 rows q, and, without the padding,

        output[t, j] = sum over k, q of weight[k, q] @ input[t + k, j + q]

    Along time the output is cut into tiles of up to twice the kernel's frames, each computed from the frames of the
    input that it needs (overlap-save). The transform along rows spans the whole axis. With exp(-2 pi i (u t + v j)) for
    the bin of rates (u, v), taken at (t, j) for the input, at -(k, q) for the weight and at -(t, j) for the output,

        output = real part of outputs^T (inputs(input) @ weights(weight)^T)

    where inputs, weights and outputs are the three transforms. This is linear in the output's bins and in either
    factor, so each gradient has the same form: a product of the bins of the other two, and a transposed transform.

    Every bin is one complex matrix product over the channels, with a row for each tile. With 32 channels that and the
    transforms take a tenth of the multiplications of the direct form.
    """

    @staticmethod
    def forward(ctx, input_BTFC: Tensor, weight: Tensor, stride: int) -> Tensor:  # type: ignore[no-untyped-def, override]
        weight_CTFI = weight.permute(0, 3, 2, 1)  # its output channels are to the transform what a batch is
        shapes = input_BTFC.shape, weight_CTFI.shape
        inputs, weights, outputs = ctx.transforms = _transforms(*shapes, stride, weight.dtype, weight.device)
        input_bins, weight_bins = inputs(input_BTFC), weights(weight_CTFI)
        ctx.save_for_backward(input_bins, weight_bins)
        return outputs.transposed(_multiply(input_bins, weight_bins.mT))

    @staticmethod
    def backward(ctx, d_output_BTFC: Tensor) -> tuple[Tensor | None, Tensor, None]:  # type: ignore[no-untyped-def, override]
        inputs, weights, outputs = ctx.transforms
        input_bins, weight_bins = ctx.saved_tensors
        d_bins = outputs(d_output_BTFC)
        d_weight_CTFI = weights.transposed(_multiply(d_bins.mT, input_bins))
        d_input_BTFC = inputs.transposed(_multiply(d_bins, weight_bins)) if ctx.needs_input_grad[0] else None
        return d_input_BTFC, d_weight_CTFI.permute(0, 3, 2, 1), None


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    """Return complex matrix products [2, bins, M, K] @ [2, bins, K, N]: real parts first, then imaginary ones."""
    product = left.new_empty(*left.shape[:3], right.shape[3])
    torch.bmm(left[0], right[0], out=product[0]).baddbmm_(left[1], right[1], alpha=-1)
    torch.bmm(left[0], right[1], out=product[1]).baddbmm_(left[1], right[0])
    return product


@dataclass(frozen=True)
class _Transform:
    """Fourier bins [2, bins, count, phases x C] (real, imaginary) of x [B, T, F, C], and the transposed map.

    Both axes are products with matrices of cosines and sines. For so few points these take no longer than fast
    transforms, and they leave the channels innermost, as the bins' products need them.
    """

    shape: tuple[int, ...]  # of x
    phases: int  # neighboring frequencies of one row
    padding: tuple[int, int]  # zeros before the first frame, and before the first frequency
    tiles: int  # of each utterance
    count: int  # of all tiles, B x tiles or more, see rows.py; the others are zero
    step: int  # frames from a tile's start to the next one's
    frames: int  # of a tile
    rows: int
    of_rows: Tensor  # along rows, from real to (real, imaginary)
    of_frames: Tensor  # along time, from (real, imaginary) of each frame to that of bins
    of_bins: Tensor  # the real part of (real, imaginary)^T bins: the imaginary part of the bins comes in negated

    def __call__(self, x_BTFC: Tensor) -> Tensor:
        tiles_tjrc = self._cut(x_BTFC)
        x = torch.bmm(self.of_rows.expand(self.frames, -1, -1), tiles_tjrc.flatten(2))
        return torch.mm(self.of_frames, x.view(2 * self.frames, -1)).view(2, -1, *tiles_tjrc.shape[2:])

    def transposed(self, bins: Tensor) -> Tensor:
        """Return the real part of the transposed map."""
        x = torch.mm(self.of_bins, bins.view(len(self.of_frames), -1))
        x = torch.bmm(self.of_rows.t().expand(self.frames, -1, -1), x.view(self.frames, len(self.of_rows), -1))
        return self._join(x)

    def _cut(self, x_BTFC: Tensor) -> Tensor:
        """Return tiles [frames, rows, count, phases x C] of x and zeros around it."""
        batch, time, frequencies, channels = self.shape
        before, below = self.padding
        after = (self.tiles - 1) * self.step + self.frames - before - time
        above = self.rows * self.phases - below - frequencies
        x = nn.functional.pad(x_BTFC, (0, 0, below, above, before, after))
        tiles_brjct = x.view(batch, -1, self.rows, self.phases * channels).unfold(1, self.frames, self.step)
        cut = x.new_empty(self.frames, self.rows, self.count, self.phases * channels)
        cut[:, :, : batch * self.tiles].unflatten(2, (batch, self.tiles)).copy_(tiles_brjct.permute(4, 2, 0, 1, 3))
        if self.count > batch * self.tiles:
            cut[:, :, batch * self.tiles :] = 0
        return cut

    def _join(self, tiles: Tensor) -> Tensor:
        """Return the transpose of cutting: the sum of the tiles, each in its place."""
        batch, time, frequencies, channels = self.shape
        before, below = self.padding
        tiles = tiles.view(self.frames, self.rows, self.count, -1)[:, :, : batch * self.tiles]
        blocks = [x.permute(2, 3, 0, 1, 4) for x in tiles.unflatten(2, (batch, self.tiles)).split(self.step)]
        x = tiles.new_empty(batch, self.tiles + len(blocks) - 1, self.step, self.rows, self.phases * channels)
        x[:, : self.tiles], x[:, self.tiles :] = blocks[0], 0
        for i, block in enumerate(blocks[1:], start=1):
            x[:, i : i + self.tiles, : block.shape[2]] += block
        x_BTFC = x.view(batch, -1, self.rows * self.phases, channels)
        return x_BTFC[:, before : before + time, below : below + frequencies].contiguous()


@functools.lru_cache(maxsize=256)  # an epoch has some hundred shapes
@torch.inference_mode(False)
def _transforms(
    input_shape: torch.Size, weight_shape: torch.Size, stride: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Transform, _Transform, _Transform]:
    """Return the transforms of input [B, T, F, C], weight [C', T, F, C] and output."""
    batch, time, frequencies, _ = input_shape
    channels, kernel_time, kernel_frequency, _ = weight_shape
    tiles = math.ceil(time / (2 * kernel_time))
    step = 2 * kernel_time if pads_rows(device, dtype) else math.ceil(time / tiles)
    count = padded_rows(batch * tiles, device, dtype)
    frames = step + kernel_time - 1
    # Of the padding below the frequencies, whole rows need no zeros: instead, the weight's rows start so much earlier.
    skipped, below = divmod(kernel_frequency // 2, stride)
    rows, kernel_rows, output_rows = (
        math.ceil(n / stride) for n in (below + frequencies, kernel_frequency, frequencies)
    )
    # So many that nothing wraps around. At half-integer rates two real rows give one complex bin, and none is real.
    row_bins = math.ceil(max(skipped + rows, output_rows + kernel_rows - 1 - skipped) / 2)

    def waves(times: Tensor, rows: Tensor) -> tuple[int, int, Tensor, Tensor, Tensor]:
        time_turns = torch.outer(torch.arange(frames), times).double() / frames
        row_turns = torch.outer(torch.arange(row_bins) + 0.5, rows).double() / (2 * row_bins)
        scale = (row_bins * frames) ** (-1 / 6)  # of either axis; every product is of three transforms
        time_waves, row_waves = (scale * torch.exp(-2j * torch.pi * turns) for turns in (time_turns, row_turns))
        of_rows = torch.cat((row_waves.real, row_waves.imag)).to(device, dtype, non_blocking=True)
        of_real, of_imaginary = (torch.cat((x.real, x.imag)) for x in (time_waves, 1j * time_waves))
        of_frames = torch.stack((of_real, of_imaginary), 2).flatten(1).to(device, dtype, non_blocking=True)
        of_bins = torch.cat((of_frames[:frames], -of_frames[frames:])).t()
        return len(times), len(rows), of_rows, of_frames, of_bins

    of_input = waves(torch.arange(frames), torch.arange(rows))
    of_weight = waves(-torch.arange(kernel_time), skipped - torch.arange(kernel_rows))
    of_output = waves(-torch.arange(step), -torch.arange(output_rows))
    return (
        _Transform(input_shape, stride, (kernel_time // 2, below), tiles, count, step, *of_input),
        _Transform(weight_shape, stride, (0, 0), 1, channels, kernel_time, *of_weight),
        _Transform((batch, time, output_rows, channels), 1, (0, 0), tiles, count, step, *of_output),
    )
