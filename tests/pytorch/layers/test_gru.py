"""The GRU layer's C++ against nn.GRU in float64. For GPUs: test_gru_triton.py, test_gpu.py."""

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from pytorch.config import CONFIGS
from pytorch.distributed import World
from pytorch.errors import RunError
from pytorch.layers import gru, kernels
from pytorch.layers.gru import GRU

INPUTS = 7


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small, more threads are slower; one test takes more."""
    if kernels.status().startswith("plain"):
        pytest.skip(kernels.status())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pack(lengths: list[int], dtype: torch.dtype = torch.float32) -> PackedSequence:
    generator = torch.Generator().manual_seed(sum(lengths))
    inputs_TBI = torch.randn(max(lengths), len(lengths), INPUTS, generator=generator).to(dtype)
    return pack_padded_sequence(inputs_TBI, torch.tensor(lengths), enforce_sorted=False)


def run(layer: nn.GRU, sequence: PackedSequence) -> tuple[Tensor, ...]:
    """Outputs, and the gradients of inputs and parameters for some gradient of the outputs."""
    data = sequence.data.detach().clone().requires_grad_()
    packed = sequence._replace(data=data)
    if isinstance(layer, GRU):
        outputs_NH = layer(packed).data
    else:
        outputs_NH = layer(packed)[0].data.unflatten(1, (-1, layer.hidden_size)).sum(1)
    d_outputs_NH = torch.randn(outputs_NH.shape, generator=torch.Generator().manual_seed(0)).to(outputs_NH)
    return outputs_NH.detach(), *torch.autograd.grad(outputs_NH, [data, *layer.parameters()], d_outputs_NH)


def assert_like_stock(lengths: list[int], hidden_size: int, bf16: bool = False) -> None:
    torch.manual_seed(0)
    layer = GRU(INPUTS, hidden_size)
    stock = nn.GRU(INPUTS, hidden_size, bidirectional=True).double()
    stock.load_state_dict(layer.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        actual = run(layer, pack(lengths))
    expected = run(stock, pack(lengths, torch.float64))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == torch.float32
        if bf16:
            assert 1e-5 < (a - e).norm() / e.norm() < 1e-2  # one rounding: up to 2 ** -9 = 2e-3
        else:
            assert (a.double() - e).abs().max() <= 2e-6 * max(1.0, e.abs().max().item())


@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(1, 100))
@example([1], 24)
@example([30], 24)
@example([9] * 5, 24)
@example([12, 12, 12, 12, 1, 1, 1], 24)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_outputs_and_gradients_are_those_of_stock_gru_for_any_shapes(lengths: list[int], hidden_size: int) -> None:
    assert_like_stock(lengths, hidden_size)


def test_the_number_of_threads_does_not_matter() -> None:
    for count in (1, 2, 3, 5, 8):
        torch.set_num_threads(count)
        assert_like_stock([9, 8, 8, 5, 2], 50)


def test_the_same_input_gives_the_same_bits_in_training_and_in_inference() -> None:
    torch.manual_seed(0)
    layer, sequence = GRU(INPUTS, 50), pack([40, 33, 30, 21, 9])
    expected = run(layer, sequence)
    for _ in range(5):
        assert all(map(torch.equal, run(layer, sequence), expected))
    with torch.no_grad():
        assert torch.equal(layer(sequence).data, expected[0])


def test_what_is_not_finite_stays_so() -> None:
    layer, sequence = GRU(INPUTS, 16), pack([6, 4])
    sequence.data[2, 3] = float("nan")
    assert layer(sequence).data[2].isnan().all()


def test_large_inputs_saturate_the_gates() -> None:
    layer, sequence = GRU(INPUTS, 16), pack([6, 4])
    outputs, *gradients = run(layer, sequence._replace(data=sequence.data * 1e4))
    assert outputs.abs().max() <= 2 and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("hidden_size", [5, 17, 50, 96])
def test_bfloat16_rounds_the_operands_and_nothing_else(hidden_size: int) -> None:
    assert_like_stock([23, 20, 20, 17, 11, 10, 4, 3, 1], hidden_size, bf16=True)


@pytest.mark.parametrize("bf16", [False, True])
def test_without_a_kernel_nn_gru_computes_in_either_precision(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, sequence = GRU(INPUTS, 8), pack([4, 1, 6])
    expected = run(layer, sequence)
    monkeypatch.setattr(kernels, "load", lambda: "not wanted")
    monkeypatch.setattr(gru, "has_bf16_kernel", lambda device: bf16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        actual = run(layer, sequence._replace(data=sequence.data.bfloat16()) if bf16 else sequence)
    assert actual[0].dtype == torch.float32
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() / e.norm() < (0.02 if bf16 else 1e-5)


def test_ranks_that_differ_and_a_kernel_that_cannot_be_had_end_the_run_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    device, config = torch.device("cpu"), CONFIGS["an4"]
    status = kernels.status()
    assert gru.agreed_implementation(World(), device, config) == status
    lacking = "plain PyTorch: no C++ compiler: g++ not found"
    monkeypatch.setattr(World, "all_gather_object", lambda world, thing: [thing, thing, lacking])
    with pytest.raises(RunError, match=f"{re.escape(status)} on rank 1, {re.escape(lacking)} on rank 2"):
        gru.agreed_implementation(World(), device, config)
    monkeypatch.undo()
    with pytest.raises(RunError, match="--gru-kernel triton"):
        gru.agreed_implementation(World(), device, replace(config, gru_kernel="triton"))
