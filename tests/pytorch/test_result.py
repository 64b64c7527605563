"""The result of a run and its log, where the user has no usable name and standard output goes away."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pytorch import machine
from tests.processes import Popen, run_module_for_text
from tests.pytorch.test_train import ENVIRONMENT, SMALL
from tools.mlperf.runlog import RunLog


@pytest.mark.parametrize(
    ("environment", "shown"), [({"USER": "Doe, José"}, "Doe__Jos_"), ({"HOME": "", "USER": "x"}, "x")]
)
def test_the_result_line_has_a_user_without_commas_and_in_ascii(
    environment: dict[str, str], shown: str, tones: Path, tmp_path: Path
) -> None:
    for name in ("LOGNAME", "LNAME", "USERNAME"):
        environment = {name: "", **environment}
    arguments = [*SMALL, "--dataset-dir", tones, "--output-dir", tmp_path, "--max-steps", "1", "--target-wer", "1000"]
    run = run_module_for_text("pytorch.launch", *arguments, environment={**environment, "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1].split(",")[4] == shown


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(machine.getpass, "getuser", nobody)
    assert machine.user_name() == str(os.getuid())


def test_standard_output_that_is_full_is_refused_before_the_clock_starts(tones: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytorch.launch", *SMALL, "--dataset-dir", tones, "--output-dir", tmp_path]
    with Path("/dev/full").open("w") as full:
        run = Popen(list(map(str, command)), stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 1
    assert "error: standard output cannot be written: No space left on device" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "last_run.log").exists()


def test_a_reader_of_the_log_that_leaves_costs_neither_the_run_nor_its_log(tones: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytorch.launch", *SMALL, "--dataset-dir", tones, "--output-dir", tmp_path]
    command += ["--max-epochs", "2", "--target-wer", "1000"]
    pipe = subprocess.PIPE
    run = Popen(list(map(str, command)), stdout=pipe, stderr=pipe, text=True, env=ENVIRONMENT)
    assert run.stdout is not None and run.stderr is not None
    while "run_start" not in run.stdout.readline():
        pass
    run.stdout.close()
    errors = run.stderr.read()
    assert run.wait() == 0, errors
    assert errors.count("standard output cannot be written: Broken pipe") == 1
    assert "Traceback" not in errors and "Exception ignored" not in errors
    assert RunLog.read(tmp_path / "last_run.log").result is not None
