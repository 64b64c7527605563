from typing import Any

import pytest
import torch
from torch import nn

from pytorch.layers.convolution import Convolution

SHAPES = [  # in, out, kernel, stride, frequencies
    (1, 4, (41, 11), (2, 2), 161),
    (1, 5, (7, 3), (1, 1), 10),
    (4, 4, (21, 11), (2, 1), 81),
    (3, 8, (5, 3), (2, 1), 12),
    (2, 3, (7, 5), (3, 2), 11),
    (2, 1, (1, 1), (1, 1), 1),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("time", [1, 2, 37])
def test_convolution_and_its_gradients_equal_those_of_conv2d(shape: Any, time: int) -> None:
    inputs, outputs, kernel, stride, frequencies = shape
    torch.manual_seed(0)
    convolution = Convolution(inputs, outputs, kernel, stride)
    oracle = nn.Conv2d(inputs, outputs, kernel, stride, (kernel[0] // 2, kernel[1] // 2), bias=False).double()
    oracle.load_state_dict(convolution.state_dict())
    x_BTFC = torch.randn(3, time, frequencies, inputs, requires_grad=inputs > 1)
    x_BCFT = x_BTFC.detach().double().permute(0, 3, 2, 1).requires_grad_()
    ours, expected = convolution(x_BTFC), oracle(x_BCFT).permute(0, 3, 2, 1)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
    assert inputs > 1 or ours.is_contiguous()

    upstream = torch.randn_like(ours)
    ours.backward(upstream)
    expected.backward(upstream.double())
    assert convolution.weight.grad is not None and oracle.weight.grad is not None and x_BCFT.grad is not None
    torch.testing.assert_close(convolution.weight.grad.double(), oracle.weight.grad, rtol=1e-4, atol=1e-4)
    if inputs > 1:
        assert x_BTFC.grad is not None
        torch.testing.assert_close(x_BTFC.grad.double().permute(0, 3, 2, 1), x_BCFT.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_under_bfloat16_autocast_it_is_off_by_rounding_alone(shape: Any) -> None:
    inputs, outputs, kernel, stride, frequencies = shape
    torch.manual_seed(0)
    convolution = Convolution(inputs, outputs, kernel, stride)
    x_BTFC = torch.rand(2, 20, frequencies, inputs, requires_grad=inputs > 1)
    expected = convolution(x_BTFC)
    upstream = torch.randn_like(expected)
    leaves = [convolution.weight, x_BTFC][: 1 + (inputs > 1)]
    wanted = torch.autograd.grad(expected, leaves, upstream)
    with torch.autocast("cpu", torch.bfloat16):
        output = convolution(x_BTFC)
    assert output.dtype == torch.bfloat16
    gradients = torch.autograd.grad(output, leaves, upstream.bfloat16())
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    for rounded, exact in zip((output, *gradients), (expected, *wanted), strict=True):
        assert 1e-6 < (rounded - exact).norm() / exact.norm() < 0.015
