"""Batch norm over the rows of all processes of a run (Ioffe and Szegedy, arXiv 1502.03167)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pytorch import ranks


class BatchNorm(nn.BatchNorm1d):
    """nn.BatchNorm1d over the rows [N, C] of all processes: mean and variance are those of all rows together.

    nn.SyncBatchNorm does the same on GPUs only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise rows [N, C]."""
        if not (self.training and ranks.together()):
            return super().forward(input)
        output, mean_C, variance_C, count = _OverAllRows.apply(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.get_buffer("running_mean").lerp_(mean_C, momentum)
            self.get_buffer("running_var").lerp_(variance_C * (count / (count - 1)), momentum)
            self.get_buffer("num_batches_tracked").add_(1)
        return output


class _OverAllRows(torch.autograd.Function):
    """Output [N, C], mean [C], variance [C] (both float32) and number of rows, which is a tensor."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight_C: Tensor, bias_C: Tensor, epsilon: float) -> tuple[Tensor, ...]:
        x_NC = input.float()
        variance_C, mean_C = torch.var_mean(x_NC, 0, correction=0)
        # float64, in which the difference of the means of squares and the squares of means loses nothing that counts
        variance_C, mean_C = variance_C.double(), mean_C.double()
        sums = torch.cat([mean_C, variance_C + mean_C.square(), mean_C.new_ones(1)]) * len(x_NC)
        ranks.add_up(sums)
        count = sums[-1]
        mean_C, square_C = (sums[:-1] / count).chunk(2)
        variance_C = square_C - mean_C.square()
        inverse_C = (variance_C + epsilon).rsqrt().float()
        mean_C, variance_C, count = mean_C.float(), variance_C.float(), count.float()
        normal_NC = (x_NC - mean_C) * inverse_C
        ctx.save_for_backward(normal_NC, inverse_C, weight_C, count)
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        return (normal_NC * weight_C + bias_C).to(input.dtype), mean_C, variance_C, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output_NC: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        normal_NC, inverse_C, weight_C, count = ctx.saved_tensors
        d_NC = d_output_NC.float()
        d_bias_C, d_weight_C = d_NC.sum(0), (d_NC * normal_NC).sum(0)
        mean_C, slope_C = (ranks.add_up(torch.cat([d_bias_C, d_weight_C])) / count).chunk(2)
        d_input_NC = (d_NC - mean_C - normal_NC * slope_C) * (weight_C * inverse_C)
        return d_input_NC.to(d_output_NC.dtype), d_weight_C, d_bias_C, None
