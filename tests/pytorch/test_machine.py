"""The machine that a run is on: page cache, CPU time, commit, user."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.packed import open_dataset
from pytorch import machine as this_machine
from tests.conftest import write_packed_dataset


def is_cached(path: Path) -> bool:
    """Whether the first page of a file is in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def test_a_data_set_is_dropped_from_the_page_cache(tmp_path: Path) -> None:
    dataset = open_dataset(write_packed_dataset(tmp_path / "tones", {"train": 21}))
    audio = dataset.path / "tones-train" / "audio.npy"
    try:
        audio.read_bytes()
        assert is_cached(audio)
        assert this_machine.clear_cache(dataset) == ""
        if is_cached(audio):
            pytest.skip("temporary files are in memory")
    except OSError as error:
        pytest.skip(f"the file system does not say what is cached: {error.strerror}")
    (dataset.path / "tones-train" / "utterances.csv").unlink()
    assert this_machine.clear_cache(dataset) == "tones-train/utterances.csv: No such file or directory"


def test_the_cpu_time_of_others_is_told_from_that_of_a_process() -> None:
    before, begun, used = this_machine.cpu_seconds(), time.monotonic(), time.process_time()
    while time.process_time() < used + 0.3:
        pass
    spent = {name: value - before[name] for name, value in this_machine.cpu_seconds().items()}
    elapsed = time.monotonic() - begun
    assert 0.2 < spent["own"] < 1.2 * elapsed + 0.05
    assert spent["own"] < spent["busy"] + 0.1
    assert spent["all"] == pytest.approx(elapsed * len(os.sched_getaffinity(0)), rel=0.5)


def test_cpus_that_are_counted_anew_have_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {12345})
    assert this_machine.cpu_seconds() == {}


@pytest.mark.parametrize(("dirty", "changed"), [("", False), ("-dirty", True)])
def test_an_image_says_which_commit_it_was_made_of(dirty: str, changed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a repository is tested with that of an image, in tests/test_container.py."""
    monkeypatch.setenv("DEEPSPEECH2_COMMIT", "f" * 40 + dirty)
    assert this_machine.git_revision() == ("f" * 40, changed)


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSPEECH2_COMMIT", raising=False)
    monkeypatch.setenv("PATH", "")
    assert this_machine.git_revision() == ("unknown", None)


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(this_machine.getpass, "getuser", nobody)
    assert this_machine.user_name() == str(os.getuid())


def test_threads_that_are_to_be_bound_to_cores_leave_all_of_them_to_the_ranks() -> None:
    code = "import os, pytorch, torch; print(len(os.sched_getaffinity(0)))"  # as the server that ranks are forked from
    variables = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    started = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert int(started.stdout) == len(os.sched_getaffinity(0))
