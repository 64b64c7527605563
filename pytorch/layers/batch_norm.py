"""Batch norm over the rows of all processes of a run (Ioffe and Szegedy, arXiv 1502.03167), and the clipping after it.

    norm = BatchNorm(32, (0.0, 20.0))
    outputs_NC = norm(rows_NC)

With scale = weight / standard deviation, the output is y = (x - mean) scale + bias, within limits. With d, the gradient
of the output where y is within them, and 0 elsewhere, and with means over the rows of all processes,

    gradient of x = scale (d - mean of d - (x - mean) / variance * mean of (d (x - mean)))

So two passes over the rows give the output (moments; y), and two the gradient (the means; the result). On a CPU they
are C++ (batch_norm.cpp): torch's own batch norm is slow there with few channels, and clipping is three more passes. On
CUDA they are nn.BatchNorm1d, or for several ranks the kernels of nn.SyncBatchNorm, which itself would wait for the
GPU, and of clipping.

Axes: N rows, C channels.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pytorch import distributed
from pytorch.layers import kernels

NO_LIMITS = -math.inf, math.inf


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d over the rows [N, C] of all processes: mean and variance are those of all rows together.

    The output is clipped to `clamp`. nn.SyncBatchNorm does the same, without clipping, on GPUs only.
    """

    def __init__(self, channels: int, clamp: tuple[float, float] = NO_LIMITS) -> None:
        super().__init__(channels)
        self.clamp = clamp

    def forward(self, input: Tensor) -> Tensor:
        """Normalize rows [N, C]."""
        fused = _has_kernel(input)
        if not self.training or not (fused or distributed.is_distributed()):
            return self.clip(super().forward(input))
        output, mean_C, variance_C, count = _SyncBatchNorm.apply(input, self.weight, self.bias, self.eps, self.clamp)
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.get_buffer("running_mean").lerp_(mean_C, momentum)
            self.get_buffer("running_var").lerp_(variance_C * (count / (count - 1).clamp(min=1)), momentum)
            self.get_buffer("num_batches_tracked").add_(1)
        return output if fused else self.clip(output)

    def clip(self, output: Tensor) -> Tensor:
        """Return the output within the limits."""
        return output if self.clamp == NO_LIMITS else nn.functional.hardtanh(output, *self.clamp)


class _SyncBatchNorm(torch.autograd.Function):
    """Output [N, C], mean [C], variance [C] (both float32) and number of rows, which is a tensor.

    Only the C++ clips the output to `clamp`.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight_C: Tensor, bias_C: Tensor, epsilon: float, clamp: tuple[float, float]
    ) -> tuple[Tensor, ...]:
        x_NC = input.contiguous()
        mean_C, variance_C = _moments(x_NC)
        count = mean_C.new_full((), len(x_NC))
        if distributed.is_distributed():
            # float64, in which the difference of means of squares and squares of means loses nothing that counts
            sums = torch.cat([mean_C, variance_C + mean_C.square(), count.new_ones(1)]) * count
            distributed.all_reduce_sum(sums)
            count = sums[-1]
            mean_C, square_C = (sums[:-1] / count).chunk(2)
            variance_C = square_C - mean_C.square()
        inverse_C = (variance_C + epsilon).rsqrt().float()
        mean_C, variance_C, count = mean_C.float(), variance_C.float(), count.float()
        normal = _Affine(mean_C, weight_C * inverse_C, bias_C, *clamp)
        ctx.save_for_backward(x_NC, *normal[:3], inverse_C, count)
        ctx.clamp = clamp
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        return _output(x_NC, normal), mean_C, variance_C, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output_NC: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_NC, mean_C, scale_C, bias_C, inverse_C, count = ctx.saved_tensors
        normal = _Affine(mean_C, scale_C, bias_C, *ctx.clamp)
        d_output_NC = d_output_NC.contiguous()
        d_bias_C, product_C = _sums(x_NC, normal, d_output_NC)
        offset_C, slope_C = (distributed.all_reduce_sum(torch.cat([d_bias_C, product_C])) / count).float().chunk(2)
        slope_C = slope_C * inverse_C.square()
        d_input_NC = _gradient(x_NC, normal, d_output_NC, offset_C, slope_C)
        return d_input_NC, product_C.float() * inverse_C, d_bias_C.float(), None, None


class _Affine(NamedTuple):
    """y = (x - mean) scale + bias, within limits."""

    mean_C: Tensor
    scale_C: Tensor
    bias_C: Tensor
    low: float
    high: float


def _has_kernel(x_NC: Tensor) -> bool:
    return x_NC.device.type == "cpu" and x_NC.dtype in (torch.float32, torch.bfloat16) and kernels.available()


def _call(name: str, x_NC: Tensor, *arguments: float | Tensor) -> None:
    kernels.call(name, x_NC.dtype == torch.bfloat16, *x_NC.shape, torch.get_num_threads(), x_NC, *arguments)


def _moments(x_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel, float64."""
    if _has_kernel(x_NC):
        mean_C, variance_C = x_NC.new_empty(2, x_NC.shape[1], dtype=torch.float64)
        _call("batch_norm_moments", x_NC, mean_C, variance_C)
    elif x_NC.is_cuda:
        mean_C, inverse_C = torch.batch_norm_stats(x_NC, 0.0)
        variance_C = inverse_C.double().pow(-2)
    else:
        variance_C, mean_C = torch.var_mean(x_NC.float(), 0, correction=0)
    return mean_C.double(), variance_C.double()


def _output(x_NC: Tensor, normal: _Affine) -> Tensor:
    """Return y."""
    if _has_kernel(x_NC):
        output_NC = torch.empty_like(x_NC)
        _call("batch_norm_output", x_NC, *normal, output_NC)
        return output_NC
    if x_NC.is_cuda:
        ones_C = torch.ones_like(normal.mean_C)
        return torch.batch_norm_elemt(x_NC, normal.scale_C, normal.bias_C, normal.mean_C, ones_C, 0.0)
    return ((x_NC.float() - normal.mean_C) * normal.scale_C + normal.bias_C).to(x_NC.dtype)


def _sums(x_NC: Tensor, normal: _Affine, d_output_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over rows of d and of d (x - mean), float64."""
    if _has_kernel(x_NC):
        sum_C, product_C = x_NC.new_empty(2, x_NC.shape[1], dtype=torch.float64)
        _call("batch_norm_sums", x_NC, *normal, d_output_NC, sum_C, product_C)
        return sum_C, product_C
    if x_NC.is_cuda:
        inverse_C, what = torch.ones_like(normal.mean_C), (True, False, False)  # sums for the gradient of x only
        reduce = torch.batch_norm_backward_reduce
        sum_C, product_C, *_ = reduce(d_output_NC, x_NC, normal.mean_C, inverse_C, normal.scale_C, *what)
        return sum_C.double(), product_C.double()
    d_NC = d_output_NC.float()
    return d_NC.sum(0).double(), (d_NC * (x_NC.float() - normal.mean_C)).sum(0).double()


def _gradient(x_NC: Tensor, normal: _Affine, d_output_NC: Tensor, offset_C: Tensor, slope_C: Tensor) -> Tensor:
    """Return scale (d - offset - slope (x - mean))."""
    if _has_kernel(x_NC):
        d_input_NC = torch.empty_like(x_NC)
        _call("batch_norm_gradient", x_NC, *normal, d_output_NC, offset_C, slope_C, d_input_NC)
        return d_input_NC
    if x_NC.is_cuda:
        ones_C = torch.ones_like(normal.mean_C)
        sums = offset_C, slope_C, ones_C[:1].int()  # over one row, since they are means already
        return torch.batch_norm_backward_elemt(d_output_NC, x_NC, normal.mean_C, ones_C, normal.scale_C, *sums)
    return (normal.scale_C * (d_output_NC.float() - offset_C - slope_C * (x_NC.float() - normal.mean_C))).to(x_NC.dtype)
