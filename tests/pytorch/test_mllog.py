"""What a log says of the run's surroundings: cache, commit, platform; and its copy in a file."""

import logging
import mmap
import os
import subprocess
from pathlib import Path

import pytest
import torch
from mlperf_logging.mllog.mllog import MLLogger

from data.packed import open_dataset
from pytorch import machine as this_machine
from pytorch import mllog
from pytorch.cli import RunError
from pytorch.config import CONFIGS
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
        mllog.log_submission(a_logger(), CONFIGS["synthetic"], open_dataset(tones), CPU, 1)


# --- copy


def test_a_copy_of_the_log_replaces_the_one_before_it_when_the_clock_starts(tmp_path: Path) -> None:
    path, partial = tmp_path / "last_run.log", tmp_path / "last_run.log.partial"
    path.write_text("of the run before\n")
    partial.touch()
    printed = Printed()
    log = a_logger(printed, mllog._Copy(path))
    log.start("init_start")
    assert path.read_text() == "of the run before\n"
    log.start("run_start")
    log.end("run_stop")
    mllog.print_result(log, "RESULT,DEEPSPEECH2,1,2,me,now")
    assert path.read_text().splitlines() == [*printed.lines, "RESULT,DEEPSPEECH2,1,2,me,now"]
    assert not partial.exists()


def test_processes_that_are_started_in_the_place_of_lost_ones_go_on_with_the_copy(tmp_path: Path) -> None:
    path = tmp_path / "last_run.log"
    mllog.partial_copy(path).touch()
    for _ in range(2):
        log = a_logger(mllog._Copy(path))
        log.start("init_start")
        log.start("run_start")
    assert path.read_text().count("run_start") == 2
