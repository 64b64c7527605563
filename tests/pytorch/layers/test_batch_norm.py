"""Batch norm against torch's own in float64, with the kernel and without; several processes are in test_distributed."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pytorch.layers import kernels
from pytorch.layers.batch_norm import BatchNorm, _SyncBatchNorm

LIMITS = [(float("-inf"), float("inf")), (-0.5, 1.0)]


def rows(count: int, channels: int) -> Tensor:
    """Rows whose channels have means far from zero, as those of clipped activations have, and unlike deviations."""
    generator = torch.Generator().manual_seed(count * channels)
    return torch.randn(count, channels, generator=generator) * torch.linspace(0.5, 2, channels) + 7


@pytest.mark.parametrize("clamp", LIMITS)
@pytest.mark.parametrize(("count", "channels"), [(2, 1), (3, 5), (1000, 4), (20001, 8), (77, 168), (50, 800)])
def test_batch_norm_and_its_gradients_are_those_of_torch_in_float64(
    count: int, channels: int, clamp: tuple[float, float], cpu_path: str
) -> None:
    ours, oracle = BatchNorm(channels, clamp), nn.BatchNorm1d(channels).double()
    for norm in (ours, oracle):
        norm.load_state_dict({**norm.state_dict(), "weight": torch.linspace(-1, 2, channels)})
    x_NC = rows(count, channels).requires_grad_()
    expected_NC = x_NC.detach().double().requires_grad_()
    unclipped_NC = oracle(expected_NC)
    y_NC, wanted_NC = ours(x_NC), nn.functional.hardtanh(unclipped_NC, *clamp)
    upstream_NC = torch.randn(count, channels, generator=torch.Generator().manual_seed(0))
    for limit in clamp:  # rounding may put what is that near to a limit on its other side
        upstream_NC[(unclipped_NC - limit).abs() < 1e-3] = 0
    y_NC.backward(upstream_NC)
    wanted_NC.backward(upstream_NC.double())
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, check_dtype=False)
    close(y_NC, wanted_NC)
    close(x_NC.grad, expected_NC.grad)
    for name, parameter in ours.named_parameters():
        close(parameter.grad, oracle.get_parameter(name).grad, atol=1e-2)  # sums of up to 20,001
    for name, buffer in ours.named_buffers():
        close(buffer, oracle.get_buffer(name))

    ours.eval(), oracle.eval()
    close(ours(x_NC), nn.functional.hardtanh(oracle(expected_NC), *clamp))


def test_rows_of_bfloat16_stay_so_and_are_rounded_once(cpu_path: str) -> None:
    x_NC = rows(3000, 8).bfloat16()
    given_NC = x_NC.clone().requires_grad_()
    expected_NC = x_NC.float().requires_grad_()
    norm, same = BatchNorm(8, (0.0, 1.0)), BatchNorm(8, (0.0, 1.0))
    y_NC, wanted_NC = norm(given_NC), same(expected_NC)
    assert y_NC.dtype == torch.bfloat16
    torch.testing.assert_close(y_NC, wanted_NC.bfloat16(), rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(same.named_buffers()))
    upstream_NC = torch.randn_like(y_NC)
    y_NC.backward(upstream_NC)
    wanted_NC.backward(upstream_NC.float())
    assert given_NC.grad is not None and expected_NC.grad is not None and given_NC.grad.dtype == torch.bfloat16
    difference = (given_NC.grad.float() - expected_NC.grad).norm() / expected_NC.grad.norm()
    assert difference < 0.05  # torch's own decides from the rounded output what lies within the limits


def test_a_number_that_is_none_reaches_the_output(cpu_path: str) -> None:
    norm = BatchNorm(3, (0.0, 1.0))
    x_NC = rows(40, 3)
    x_NC[5, 1] = float("nan")
    output_NC = norm(x_NC)
    assert output_NC[:, 1].isnan().all() and output_NC[:, [0, 2]].isfinite().all()


def test_one_row_is_normalized_to_zero_and_leaves_statistics_finite() -> None:
    norm = BatchNorm(3)
    output_NC = _SyncBatchNorm.apply(torch.ones(1, 3), norm.weight, norm.bias, norm.eps, LIMITS[0])[0]
    assert torch.equal(output_NC, torch.zeros(1, 3))
    if kernels.available():  # torch's own refuses a single row
        norm(torch.ones(1, 3))
    assert norm.get_buffer("running_var").isfinite().all()
