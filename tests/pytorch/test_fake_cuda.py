"""Training steps and an evaluation on CUDA, without a GPU (tests/fake_cuda.py): what they need stays within limits."""

from __future__ import annotations

import itertools
import json
import subprocess
from typing import NamedTuple

import pytest

from tests import fake_cuda
from tests.fake_cuda import Needs

# The most that a step with 128 utterances of 11 to 13.7 s on each rank may need, or an evaluation of them. A case is
# optimizer, precision, with or without EMA, and ranks; any two values of these meet in one of them. `waits` are for
# CTC, which looks at its targets on the CPU, for the EMA's counter, and in an evaluation for its result.
LIMITS = {
    ("adamw-fp32-plain-1", "step"): Needs(2, 11, 1_591_296, 191, 77.9, "float32"),
    ("sgd-fp32-ema-1", "step"): Needs(4, 16, 1_591_296, 322, 84.1, "float32"),
    ("muon-fp32-plain-8", "step"): Needs(2, 11, 1_598_464, 804, 184.0, "float32"),
    ("adamw-bf16-ema-8", "step"): Needs(4, 16, 1_598_464, 941, 178.2, "float16"),
    ("sgd-bf16-plain-8", "step"): Needs(2, 11, 1_598_464, 806, 171.6, "float16"),
    ("muon-bf16-ema-1", "step"): Needs(4, 16, 1_591_296, 552, 66.7, "float16"),
    ("sgd-fp32-ema-1", "evaluation"): Needs(1, 3, 631_816, 64, 32.1, "float32"),
    ("muon-bf16-ema-1", "evaluation"): Needs(1, 3, 631_816, 120, 22.8, "float16"),
}
CASES = list(dict.fromkeys(case for case, _ in LIMITS))
COMPLAINTS = {
    "item": "DataDependentOutputException: aten._local_scalar_dense",
    "bool": "DataDependentOutputException: aten._local_scalar_dense",
    "nonzero": "DynamicOutputShapeException: aten.nonzero",
    "mask as an index": "DynamicOutputShapeException: aten.nonzero",
    "tensor left on the CPU": "RuntimeError: add of tensors on the CPU and on the GPU",
    "index left on the CPU": "RuntimeError: index of tensors on the CPU and on the GPU",
    "matrix of another type": "RuntimeError: mm of tensors of different types",
    "blocking copy to the GPU": "waits: ",
    "blocking copy from the GPU": "waits: ",
    "synchronization": "waits: ",
    "pageable copy": "pageable_bytes: 4194304",
    "more operations": "operations: ",
}


class Measured(NamedTuple):
    error: str | None
    needs: Needs


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, str], Measured]:
    if reason := fake_cuda.unavailable():
        pytest.skip(reason)
    done = fake_cuda.start(*CASES, "faults", stdout=subprocess.PIPE, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(case, name): Measured(error, Needs(*needs)) for case, name, error, needs in lines}


def complaints(measured: Measured, limits: Needs) -> list[str]:
    """What is wrong: an error, or what exceeds its limit."""
    if measured.error is not None:
        return [measured.error]
    needs = measured.needs._asdict().items()
    return [
        f"{name}: {value}, limit {limit}"
        for (name, value), limit in zip(needs, limits, strict=True)
        if (value != limit if name == "gru" else value > limit)
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_rank_warms_up_and_accumulates_without_an_error(measured: dict[tuple[str, str], Measured], case: str) -> None:
    assert measured[case, "warm-up"].error is None
    assert measured[case, "accumulating step"].error is None


@pytest.mark.parametrize(("case", "name"), LIMITS)
def test_what_it_needs_is_within_limits(measured: dict[tuple[str, str], Measured], case: str, name: str) -> None:
    assert complaints(measured[case, name], LIMITS[case, name]) == [], measured[case, name].needs


def test_every_pair_of_values_is_in_a_case() -> None:
    values = [{"adamw", "sgd", "muon"}, {"fp32", "bf16"}, {"plain", "ema"}, {"1", "8"}]
    split = [case.split("-") for case in CASES]
    for i, j in itertools.combinations(range(4), 2):
        assert {(case[i], case[j]) for case in split} == set(itertools.product(values[i], values[j]))


@pytest.mark.parametrize("fault", COMPLAINTS)
def test_a_fault_is_found(measured: dict[tuple[str, str], Measured], fault: str) -> None:
    assert measured["faults", "nothing"].error is None
    found = complaints(measured["faults", fault], limits=measured["faults", "nothing"].needs)
    assert any(complaint.startswith(COMPLAINTS[fault]) for complaint in found), found
