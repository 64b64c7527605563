"""Which device and how many processes; what is done on accelerators, tried without one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pytorch import distributed, launch
from pytorch.config import CONFIGS, parse_config
from pytorch.device import select_device
from pytorch.errors import RankFailure, RunError
from pytorch.features import padded_frames
from pytorch.layers import kernels
from pytorch.trainer import Trainer
from tests.pytorch.test_train import events, run_here, values


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As many accelerators of a kind as the test asks for."""
    kind, count = request.param
    accelerator = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)


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


@pytest.mark.parametrize(
    ("gpus", "options", "machines", "processes", "said"),
    [
        ((None, 0), ["--config", "synthetic"], 1, 1, ""),
        (("cuda", 8), ["--config", "librispeech"], 1, 8, ""),
        (("cuda", 8), ["--config", "librispeech"], 32, 4, "4 of 8 GPUs: --batch-size 128"),
        (("cuda", 8), ["--config", "librispeech", "--gradient-accumulation-steps", "32"], 1, 4, "4 of 8 GPUs"),
        (("cuda", 8), ["--config", "synthetic", "--batch-size", "6"], 1, 6, "6 of 8 GPUs: --batch-size 6"),
        (("cuda", 8), ["--config", "synthetic", "--device", "cpu"], 1, 1, ""),
    ],
    indirect=["gpus"],
)
def test_no_more_processes_than_a_batch_has_utterances(
    gpus: None, options: list[str], machines: int, processes: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = parse_config(options, program="test", description="")
    assert launch.processes_here(config, machines) == processes
    errors = capsys.readouterr().err
    assert said in errors and bool(said) == bool(errors)


def test_the_processes_that_are_asked_for_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "3")
    assert launch.processes_here(CONFIGS["synthetic"]) == 3


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


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(1.0, 0.97, "bf16"), (1.0, 2.0, "fp32"), (1.0, 0.99, "fp32")])
def test_auto_is_the_precision_that_was_measured_to_be_faster_and_stays_so_when_resumed(
    fp32: float, bf16: float, chosen: str, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def precision(*options: str) -> tuple[str, list[Any]]:
        run_here(tones, tmp_path, "--precision", "auto", "--target-wer", "0", *options)
        log = (tmp_path / "last_run.log").read_text()
        metadata = {event["key"]: event["metadata"] for event in events(log)}
        return metadata["configuration"]["precision"], values(log, "auto_precision")

    monkeypatch.setattr(kernels, "has_native_bf16", lambda: True)
    monkeypatch.setattr(Trainer, "time_precisions", lambda _: {"fp32": fp32, "bf16": bf16})
    assert precision("--max-steps", "1") == (chosen, [chosen])
    monkeypatch.setattr(Trainer, "time_precisions", lambda _: {"fp32": bf16, "bf16": fp32})
    assert precision("--max-steps", "2", "--resume") == (chosen, [])
    assert precision("--max-steps", "1", "--precision", "fp32") == ("fp32", [])
