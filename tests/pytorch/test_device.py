"""Which device; what is done on accelerators, tried without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pytorch import distributed
from pytorch.device import select_device
from pytorch.errors import RankFailure, RunError
from pytorch.features import padded_frames


@pytest.mark.parametrize(
    ("gpus", "name", "number", "device"),
    [
        ((None, 0), "auto", 0, "cpu"),
        (("cuda", 2), "auto", 1, "cuda:1"),
        (("cuda", 2), "cpu", 0, "cpu"),
        (("xpu", 1), "auto", 0, "xpu:0"),
        (("mps", 1), "mps", 0, "mps:0"),
    ],
    indirect=["gpus"],
)
def test_auto_is_whatever_accelerator_there_is(gpus: None, name: str, number: int, device: str) -> None:
    assert select_device(name, number) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "name", "number", "message"),
    [
        ((None, 0), "cuda", 0, "--device cuda: PyTorch finds no such device on this machine; use --device cpu or auto"),
        (("mps", 1), "cuda", 0, "--device cuda: PyTorch finds no such device"),
        (("cuda", 2), "auto", 2, "3 processes but only 2 GPUs on this machine; set NPROC_PER_NODE"),
    ],
    indirect=["gpus"],
)
def test_a_device_that_is_not_there_is_refused(gpus: None, name: str, number: int, message: str) -> None:
    with pytest.raises(RunError, match=message):
        select_device(name, number)


def test_lengths_are_rounded_up_on_accelerators_alone() -> None:
    assert [padded_frames(frames, torch.device("cuda")) for frames in (1, 32, 33)] == [32, 32, 64]
    assert padded_frames(33, torch.device("cpu")) == 33


@pytest.fixture
def one_of_two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.Store]:
    """This process as rank 0 of two; the other one is played by the test."""
    store = dist.HashStore()
    monkeypatch.setattr(distributed, "_store", store)
    monkeypatch.setattr(distributed, "_stop_time", float("inf"))
    monkeypatch.setattr(distributed, "_timeout_seconds", 60.0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "REPORT_SECONDS", 0.1)
    yield store


def event(seconds: float) -> Any:
    """What a device does for so long."""
    done = time.monotonic() + seconds
    return SimpleNamespace(query=lambda: time.monotonic() > done)


def test_a_step_on_accelerators_is_waited_for(one_of_two_ranks: dist.Store) -> None:
    started = time.monotonic()
    distributed.wait_for(event(0.2))
    assert time.monotonic() - started > 0.2


def test_each_step_under_way_has_its_own_time_after_a_signal_to_stop(
    one_of_two_ranks: dist.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "STOP_SECONDS", 1.0)
    monkeypatch.setattr(distributed, "_stop_time", time.monotonic())
    for _ in range(3):  # longer together than one of them may take
        distributed.wait_for(event(0.5))


@pytest.mark.parametrize("how", ["a rank failed", "told to stop", "took too long"])
def test_a_step_on_accelerators_that_does_not_end_names_the_lost_ranks(
    one_of_two_ranks: dist.Store, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "1"
    if how == "a rank failed":
        one_of_two_ranks.set("failed/0/1", "")
        missing = "none, but one has failed"
    elif how == "told to stop":
        monkeypatch.setattr(distributed, "STOP_SECONDS", 0.2)
        monkeypatch.setattr(distributed, "_stop_time", time.monotonic())
    else:
        monkeypatch.setattr(distributed, "_timeout_seconds", 0.2)
    with (
        pytest.raises(RankFailure, match=rf"^rank 0: lost contact; ranks that hang or are gone: {missing} \("),
        distributed.report_lost_ranks(),
    ):
        distributed.wait_for(event(100))


def test_a_rank_that_fails_by_itself_tells_the_others(one_of_two_ranks: dist.Store) -> None:
    with pytest.raises(RunError), distributed.report_lost_ranks():
        raise RunError("the disk is full")
    assert one_of_two_ranks.check(["failed/0/0"])
