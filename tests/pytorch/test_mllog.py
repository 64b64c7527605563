"""What a log says of the run's surroundings: cache, commit, platform; and where it goes."""

import logging
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlperf_logging.mllog.mllog import MLLogger

from data.packed import open_dataset
from pytorch import machine as this_machine
from pytorch import mllog
from pytorch.config import CONFIGS
from pytorch.errors import RunError
from tests.conftest import write_packed_dataset
from tools.mlperf.runlog import RunLog

CPU = torch.device("cpu")


class Printed(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def a_logger(*handlers: logging.Handler) -> MLLogger:
    logger = logging.Logger("test", logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    return MLLogger(logger)


# --- cache


def pages_in_memory(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return this_machine._cached_pages(descriptor)
    finally:
        os.close(descriptor)


def in_memory_only(folder: Path) -> bool:
    """Whether the folder is on a file system that has no disk, of which nothing can be dropped."""
    probe = folder / "probe"
    probe.write_bytes(bytes(mmap.PAGESIZE))
    return this_machine._evict(probe) > 0


def test_a_data_set_is_dropped_from_memory_to_the_last_page(tmp_path: Path) -> None:
    if in_memory_only(tmp_path):
        pytest.skip("temporary files are in memory")
    dataset = write_packed_dataset(tmp_path / "tones", {"train": 21, "validation": 7})
    files = [path for path in dataset.rglob("*") if path.suffix in (".npy", ".csv")]
    assert len(files) == 4
    for path in files:
        path.read_bytes()
        assert pages_in_memory(path) > 0
    assert this_machine.clear_cache(open_dataset(dataset)) == ""
    assert [pages_in_memory(path) for path in files] == [0] * 4


def test_one_page_that_another_process_uses_is_enough_to_say_that_the_cache_is_not_cleared(tmp_path: Path) -> None:
    dataset = write_packed_dataset(tmp_path / "tones", {"train": 21})
    audio = dataset / "tones-train" / "audio.npy"
    with audio.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[len(mapped) // 2] is not None  # not the first page
        reason = this_machine.clear_cache(open_dataset(dataset))
    assert "pages of tones-train/audio.npy are still cached: another process may be using it" in reason


def test_a_data_set_of_another_user_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_dataset(write_packed_dataset(tmp_path / "tones", {"train": 21}))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "audio.npy is another user's" in this_machine.clear_cache(dataset)


def test_cpus_that_are_counted_anew_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {12345})
    assert this_machine.cpu_seconds() == {}


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    dataset = open_dataset(write_packed_dataset(tmp_path / "tones", {"train": 21}))
    (dataset.path / "tones-train" / "utterances.csv").unlink()
    assert this_machine.clear_cache(dataset) == "tones-train/utterances.csv: No such file or directory"


@pytest.mark.parametrize(
    ("machines", "value", "metadata"),
    [
        ([""], True, {}),
        (["", ""], True, {}),
        (["not permitted"], False, {"reason": "not permitted"}),
        (["", "not permitted"], False, {"reason": "machine 1: not permitted"}),
    ],
)
def test_the_log_says_whether_all_machines_have_cleared_their_cache(
    machines: list[str], value: bool, metadata: dict, tmp_path: Path
) -> None:
    printed = Printed()
    mllog.log_cache_clear(a_logger(printed), machines)
    (tmp_path / "run.log").write_text("\n".join(printed.lines))
    (event,) = RunLog.read(tmp_path / "run.log").events
    assert (event.key, event.value, event.metadata) == ("cache_clear", value, metadata)


# --- commit


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=me", "-c", "user.email=me@localhost", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_repository_and_it_is_known_whether_files_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DEEPSPEECH2_COMMIT", raising=False)
    monkeypatch.setattr(this_machine, "ROOT", tmp_path)
    assert this_machine.git_revision() == ("unknown", None)
    git(tmp_path, "init", "--quiet")
    assert this_machine.git_revision() == ("unknown", None)  # there is no commit yet
    (tmp_path / "file").write_text("")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert this_machine.git_revision() == (commit, False)
    (tmp_path / "file").write_text("changed")
    assert this_machine.git_revision() == (commit, True)
    monkeypatch.setenv("DEEPSPEECH2_COMMIT", "f" * 40 + "-dirty")
    assert this_machine.git_revision() == ("f" * 40, True)
    monkeypatch.setenv("DEEPSPEECH2_COMMIT", "f" * 40)
    assert this_machine.git_revision() == ("f" * 40, False)


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSPEECH2_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert this_machine.git_revision() == ("unknown", None)


# --- submission


def test_the_platform_counts_the_accelerators_that_are_used_not_those_that_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SUBMISSION_PLATFORM", raising=False)
    machine = {"accelerators": 8, "accelerator": "NVIDIA H100", "cores": 64, "processor": "Xeon"}
    assert mllog.submission_platform(machine, 2) == "2 x NVIDIA H100"
    assert mllog.submission_platform({**machine, "accelerators": 0}, 2) == "64 cores of Xeon"


@pytest.mark.parametrize("variable", ["SUBMISSION_DIVISION", "SUBMISSION_STATUS"])
def test_a_submission_that_the_rules_do_not_know_is_refused(
    variable: str, tones: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "ajar")
    with pytest.raises(RunError, match=f"{variable} is 'ajar'; it must be one of"):
        mllog.log_submission(a_logger(), CONFIGS["synthetic"], open_dataset(tones), {}, 1)


# --- sinks


def test_the_file_replaces_the_log_before_it_when_the_clock_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "last_run.log"
    path.write_text("of the run before\n")
    log, _ = mllog.make_logger(path)
    log.start("init_start")
    assert path.read_text() == "of the run before\n"
    log.start("run_start")
    log.end("run_stop")
    log.logger.info("RESULT,DEEPSPEECH2,1,2,me,now")
    lines = path.read_text().splitlines()
    assert lines == capsys.readouterr().out.splitlines()
    assert (len(lines), lines[-1]) == (4, "RESULT,DEEPSPEECH2,1,2,me,now")


def test_a_run_that_torchrun_has_started_again_continues_its_file(tmp_path: Path) -> None:
    for append in (False, True):
        log, file = mllog.make_logger(tmp_path / "last_run.log")
        file.append = append
        log.start("run_start")
    assert (tmp_path / "last_run.log").read_text().count("run_start") == 2


def test_ranks_other_than_the_first_are_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    log, _ = mllog.make_logger(tmp_path / "last_run.log")
    log.start("run_start")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "last_run.log").exists()


def test_a_sink_that_fails_is_named_once_and_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, _ = mllog.make_logger(tmp_path / "no such folder" / "last_run.log")
    for _ in range(3):
        log.start("run_start")
    output, errors = capsys.readouterr()
    assert output.count("run_start") == 3
    assert errors.count("last_run.log cannot be written: No such file or directory") == 1
    with pytest.raises(RunError, match="cannot be written"):
        mllog.require_sinks(log)


# --- TensorBoard


def write_curves(board: mllog.TensorBoard, steps: range) -> None:
    log = a_logger(board)
    for step in steps:
        log.event("train_loss", 100.0 / step, {"step_num": step, "learning_rate": 0.001, "gradient_norm": 2.0 * step})
    log.end("epoch_stop", metadata={"utterances_per_second": 16.0, "data_wait_fraction": 0.01})
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


def test_a_folder_of_curves_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--tensorboard .*file"):
        mllog.TensorBoard(tmp_path / "file" / "curves")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_said_once_and_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file may grow beyond a limit for a while, which fails as a full disk does: in the writer's own thread."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    board = mllog.TensorBoard(tmp_path / "curves")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        write_curves(board, range(1, 50))
        write_curves(board, range(50, 60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("cannot be written: File too large") == 1
