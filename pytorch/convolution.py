"""The 2-d convolutions of DeepSpeech2, over activations of shape [B, T, F, C]: time first, channels last.

    conv = Convolution(1, 16, kernel=(41, 11), stride=(2, 2))    # (frequency, time); 'same' padding
    outputs_BTFC = conv(features_BTFC)

Parameters and state_dict are those of torch.nn.Conv2d on [B, C, F, T], and so are the results. On a GPU cuDNN computes
them. On a CPU two forms of the same sums are faster than oneDNN's direct convolution (figures in BENCHMARKS.md):

- One input channel: a matrix product. The input is unfolded along time only, so that the window of an output frequency
  is one contiguous run; a few neighbouring outputs share a slightly longer run, whose weights form a band (Toeplitz)
  matrix. The unfolded input is 11 times the input, not 451 times as with the usual im2col.
- More channels: oneDNN, channels last for outputs and gradients of inputs, channels first for gradients of weights,
  whichever of the two is fast.

Axes: B batch, T time, F frequency, C channels; N = B x T rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd

GROUP = 3  # neighbouring output frequencies of one matrix product


class Convolution(nn.Conv2d):
    """'Same'-padded 2-d convolution without bias: it is always followed by a batch norm, which would take it out.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel: odd size along (frequency, time).
        stride: along (frequency, time).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int], stride: tuple[int, int]) -> None:
        padding = (kernel[0] // 2, kernel[1] // 2)
        super().__init__(in_channels, out_channels, kernel, stride, padding, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve [B, T, F, C] to [B, T', F', C'], where T' and F' are T and F over the stride, rounded up."""
        if input.device.type != "cpu":
            return super().forward(input.permute(0, 3, 2, 1)).permute(0, 3, 2, 1).contiguous()
        if self.in_channels == 1:
            return _UnfoldedConvolution.apply(input.squeeze(3), self.weight, self.stride)
        return _ChannelsLastConvolution.apply(input, self.weight, self.stride, self.padding)


class _UnfoldedConvolution(torch.autograd.Function):
    """One input channel, as matrix products; no gradient of the input, which is the features."""

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, input_BTF: Tensor, weight: Tensor, stride: tuple[int, int]) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(input_BTF, weight)
        ctx.stride = stride
        channels, frequencies = len(weight), -(-input_BTF.shape[2] // stride[0])
        unfolded_NK, times = _unfold(input_BTF, weight.shape, stride)
        output_NFC = input_BTF.new_empty(len(unfolded_NK), frequencies, channels)
        for outputs, columns in _groups(frequencies, weight.shape, stride):
            band = _band(weight, outputs.stop - outputs.start, stride[0])
            torch.mm(unfolded_NK[:, columns], band, out=output_NFC[:, outputs].flatten(1))
        return output_NFC.view(len(input_BTF), times, frequencies, channels)

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, d_output_BTFC: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[no-untyped-def, override]
        input_BTF, weight = ctx.saved_tensors
        unfolded_NK, _ = _unfold(input_BTF, weight.shape, ctx.stride)
        d_output_NFC = d_output_BTFC.contiguous().flatten(0, 1)
        d_weight_fkC = weight.new_zeros(*weight.shape[2:], len(weight))
        for outputs, columns in _groups(d_output_NFC.shape[1], weight.shape, ctx.stride):
            d_band = unfolded_NK[:, columns].t() @ d_output_NFC[:, outputs].flatten(1)
            d_band = d_band.view(-1, weight.shape[3], outputs.stop - outputs.start, len(weight))
            for position in range(d_band.shape[2]):
                first = position * ctx.stride[0]
                d_weight_fkC += d_band[first : first + weight.shape[2], :, position]
        return None, d_weight_fkC.permute(2, 0, 1).unsqueeze(1), None


def _unfold(input_BTF: Tensor, weight_shape: torch.Size, stride: tuple[int, int]) -> tuple[Tensor, int]:
    """Rows of one output frame each, with the kernel's frames of each padded frequency; and the number of frames T'."""
    kernel_frequency, kernel_time = weight_shape[2:]
    padded_BTF = nn.functional.pad(input_BTF, (kernel_frequency // 2,) * 2 + (kernel_time // 2,) * 2)
    unfolded_BTFk = padded_BTF.unfold(1, kernel_time, stride[1])
    return unfolded_BTFk.reshape(-1, padded_BTF.shape[2] * kernel_time), unfolded_BTFk.shape[1]


def _groups(frequencies: int, weight_shape: torch.Size, stride: tuple[int, int]) -> list[tuple[slice, slice]]:
    """Output frequencies of each matrix product, and the columns of the unfolded input that they need."""
    kernel_frequency, kernel_time = weight_shape[2:]
    groups = []
    for start in range(0, frequencies, GROUP):
        stop = min(start + GROUP, frequencies)
        last = (stop - 1) * stride[0] + kernel_frequency
        groups.append((slice(start, stop), slice(start * stride[0] * kernel_time, last * kernel_time)))
    return groups


def _band(weight: Tensor, count: int, stride: int) -> Tensor:
    """Weights of `count` neighbouring output frequencies: [columns, count x C], zero outside each one's window."""
    channels, _, kernel_frequency, kernel_time = weight.shape
    width = kernel_frequency + (count - 1) * stride
    band = weight.new_zeros(width, kernel_time, count, channels)
    for position in range(count):
        first = position * stride
        band[first : first + kernel_frequency, :, position] = weight[:, 0].permute(1, 2, 0)
    return band.view(width * kernel_time, count * channels)


class _ChannelsLastConvolution(torch.autograd.Function):
    """oneDNN's convolution, in the memory layout that is fast for each of its three products.

    To oneDNN, [B, T, F, C] is a channels-last image of height T and width F: hence the transposed kernels.
    """

    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, input_BTFC: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(input_BTFC, weight)
        ctx.stride, ctx.padding = stride, padding
        output_BCTF = nn.functional.conv2d(_as_BCTF(input_BTFC), _transposed(weight), None, stride[::-1], padding[::-1])
        return output_BCTF.permute(0, 2, 3, 1).contiguous()

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, d_output_BTFC: Tensor) -> tuple[Tensor | None, Tensor, None, None]:  # type: ignore[no-untyped-def, override]
        input_BTFC, weight = ctx.saved_tensors
        gradient = torch.ops.aten.convolution_backward
        rest = (1, 1), False, (0, 0), 1  # dilation, transposed, output padding, groups
        d_input_BTFC = None
        if ctx.needs_input_grad[0]:
            operands = _as_BCTF(d_output_BTFC), _as_BCTF(input_BTFC), _transposed(weight), None
            d_input_BCTF = gradient(*operands, ctx.stride[::-1], ctx.padding[::-1], *rest, (True, False, False))[0]
            d_input_BTFC = d_input_BCTF.permute(0, 2, 3, 1)
        operands = *(x_BTFC.permute(0, 3, 2, 1).contiguous() for x_BTFC in (d_output_BTFC, input_BTFC)), weight, None
        d_weight = gradient(*operands, ctx.stride, ctx.padding, *rest, (False, True, False))[1]
        return d_input_BTFC, d_weight, None, None


def _as_BCTF(x_BTFC: Tensor) -> Tensor:
    return x_BTFC.contiguous().permute(0, 3, 1, 2)


def _transposed(weight: Tensor) -> Tensor:
    return weight.transpose(2, 3).contiguous(memory_format=torch.channels_last)
