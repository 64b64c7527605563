"""Training steps and an evaluation on CUDA, without a GPU (tests/fake_cuda.py): what they need stays within limits."""

import json
import subprocess
from typing import TypeAlias

import pytest

from tests import fake_cuda
from tests.fake_cuda import FAULTS, Needs

# The most that a step with 128 utterances of 11 to 13.7 s on each rank may need, or an evaluation of them, in bf16 on a
# Hopper GPU. A case is optimizer, precision, with or without EMA, and ranks; or a configuration and the utterances of a
# batch. A step never waits (but inside of PyTorch's CTC loss, which is not seen here), an evaluation only for its
# result. Copies from memory that is not page-locked are small enough for the driver to take them at once.
LIMITS = {
    ("adamw-bf16-ema-8", "step"): Needs(0, 8, 10_240, 680, 122.7),
    ("sgd-bf16-plain-8", "step"): Needs(0, 8, 10_240, 674, 121.5),
    ("muon-bf16-ema-1", "step"): Needs(0, 8, 10_240, 357, 123.9),  # that is librispeech
    ("librispeech-16", "step"): Needs(0, 8, 3_100, 357, 23.3),
    ("an4-6", "step"): Needs(0, 8, 956, 357, 0.7),
    ("muon-bf16-ema-1", "evaluation"): Needs(1, 8, 32_768, 135, 40.2),
}
CASES = list(dict.fromkeys(case for case, _ in LIMITS))
Measured: TypeAlias = dict[tuple[str, str], tuple[str | None, Needs]]  # error and needs by case and name


@pytest.fixture(scope="module")
def measured() -> Measured:
    if reason := fake_cuda.unavailable():
        pytest.skip(reason)
    done = fake_cuda.start(*CASES, "faults", stdout=subprocess.PIPE, check=True)
    lines = map(json.loads, done.stdout.splitlines())
    return {(case, name): (error, Needs(*needs)) for case, name, error, needs in lines}


def complaints(error: str | None, needs: Needs, limits: Needs) -> list[str]:
    """What is wrong: an error, or what exceeds its limit."""
    more = [field for field in Needs._fields if getattr(needs, field) > getattr(limits, field)]
    return [error] if error else [f"{field}: {getattr(needs, field)}, not {getattr(limits, field)}" for field in more]


@pytest.mark.parametrize("case", CASES)
def test_a_rank_warms_up_and_accumulates_without_an_error(measured: Measured, case: str) -> None:
    assert [measured[case, name][0] for name in ("warm-up", "accumulating step")] == [None, None]


@pytest.mark.parametrize(("case", "name"), LIMITS)
def test_a_step_and_an_evaluation_need_no_more_than_they_may(measured: Measured, case: str, name: str) -> None:
    assert complaints(*measured[case, name], LIMITS[case, name]) == [], measured[case, name][1]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(measured: Measured, fault: str) -> None:
    error, without_a_fault = measured["faults", "nothing"]
    assert error is None
    found = complaints(*measured["faults", fault], without_a_fault)
    assert FAULTS[fault][1] in " ".join(found) and bool(found) == (fault != "nothing")
