"""The log: what it says of a submission, where it goes, and the clock."""

import sys
import time
from pathlib import Path

import pytest

from data.packed import open_dataset
from pytorch import mllog
from pytorch.config import CONFIGS
from pytorch.errors import RunError
from tests.pytorch.test_train import values


def test_the_platform_counts_the_accelerators_that_are_used_not_those_that_are_there(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SUBMISSION_PLATFORM", raising=False)
    machine = {"accelerators": 8, "accelerator": "NVIDIA H100", "cores": 64, "processor": "Xeon"}
    mllog.log_submission(mllog.make_logger(tmp_path), CONFIGS["librispeech"], open_dataset(tones), machine, 2)
    assert values(capsys.readouterr().out, "submission_platform") == ["2 x NVIDIA H100"]


def test_the_clock_and_the_log_have_one_instant() -> None:
    """However long it takes to write the line of it."""
    clock = mllog.Clock()
    started = clock.start(before=5.0)
    time.sleep(0.05)
    stopped = clock.stop()
    time.sleep(0.05)
    assert clock.seconds() - 5.0 == pytest.approx((stopped - started) / 1000, abs=0.002)


# --- TensorBoard


def write_curves(board: mllog.TensorBoard, steps: range) -> None:
    log = mllog.make_logger(None)
    log.logger.addHandler(mllog.Sink("curves", board.write))
    for step in steps:
        log.event("train_loss", 100.0 / step, {"step_num": step, "learning_rate": 0.001, "gradient_norm": 2.0 * step})
    log.end("epoch_stop", metadata={"utterances_per_second": 16.0, "data_wait_fraction": 0.01})
    log.end("epoch_stop", metadata={"data_wait_fraction": 0.0})  # resumed with no step left
    for name, wer in (("all", 40.0), ("dev-clean", 30.0)):
        log.event("validation_errors", name, metadata={"wer": wer})
    log.end("eval_stop")
    log.end("run_stop")
    log.logger.info("RESULT,DEEPSPEECH2,1,2,me,now")


def test_what_is_logged_is_what_tensorboard_reads(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_curves(mllog.TensorBoard(tmp_path / "curves"), range(1, 7))
    write_curves(mllog.TensorBoard(tmp_path / "curves", 4), range(5, 9))  # resumed from a checkpoint of its fourth step
    read = EventAccumulator(str(tmp_path / "curves")).Reload()
    curves = {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}
    assert curves["train/gradient_norm"] == [(step, 2.0 * step) for step in range(1, 9)]
    assert curves["validation/wer/dev-clean"] == [(8, 30.0)]
    assert set(curves) == {
        *(f"train/{name}" for name in ("loss", "learning_rate", "gradient_norm")),
        *(f"train/{name}" for name in ("utterances_per_second", "data_wait_fraction")),
        *(f"validation/wer/{name}" for name in ("all", "dev-clean")),
    }


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match=r"pip install -e '\.\[tensorboard\]'"):
        mllog.TensorBoard(tmp_path)
