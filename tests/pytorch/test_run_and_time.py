"""What run_and_time.sh adds to the timed run: its log and its report in the output folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytorch import launch
from tests.conftest import ROOT
from tests.processes import Popen
from tools.mlperf.runlog import RunLog

SMALL = ["--hidden-size", "8", "--conv-channels", "2", "--batch-size", "4", "--device", "cpu"]
SMALL += ["--precision", "fp32"]  # auto would measure
BY_SCRIPT: list[str | Path] = ["sh", ROOT / "pytorch" / "run_and_time.sh"]
FORKED: list[str | Path] = [sys.executable, "-m", "tools.run_and_time"]  # what the script starts, without its imports


def start(command: list[str | Path], *options: object, **given: Any) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    options_of_popen: dict[str, Any] = {"stdout": pipe, "stderr": pipe, "text": True, "errors": "surrogateescape"}
    kind = Popen if command is FORKED else subprocess.Popen
    return kind([*map(str, command), *map(str, options)], **options_of_popen | given)


def run_and_time(
    *options: str | Path, folder: Path, command: list[str | Path] = FORKED, **variables: str
) -> subprocess.CompletedProcess[str]:
    run = start(command, *options, cwd=folder, env={**os.environ, **variables})
    output, errors = run.communicate(timeout=300)
    return subprocess.CompletedProcess(run.args, run.returncode, output, errors)


def test_run_and_time_writes_the_report_beside_a_log_that_stays_pure(tones: Path, tmp_path: Path) -> None:
    """The run ends with max_steps, which are those of an epoch: there is one evaluation, not another of no step."""
    folder = tmp_path / "results"
    options: list[str | Path] = ["--config", "synthetic", "--dataset-dir", tones, *SMALL, "--max-steps", "6"]
    run = run_and_time(*options, "--output-dir", folder, "--target-wer", "0", folder=tmp_path, command=BY_SCRIPT)
    assert run.returncode == 1, run.stderr
    events = [line for line in run.stdout.splitlines() if line]
    assert all(line.startswith(":::MLLOG ") for line in events)
    assert sum('"epoch_start"' in line for line in events) == sum('"eval_accuracy"' in line for line in events) == 1
    assert (folder / "last_run.log").read_text().splitlines() == events
    assert f"Report: {folder / 'report.html'}" in run.stderr
    assert "was not reached" in (folder / "report.html").read_text()

    again = run_and_time(*options, "--output-dir", folder, "--resume", folder=tmp_path)
    assert again.returncode == 1
    assert "--max-steps 6: already reached" in again.stderr
    assert (folder / "last_run.log").read_text().splitlines() == events


def test_a_run_that_cannot_start_leaves_the_log_of_the_run_before_it(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "last_run.log").write_text("of the run before")
    run = run_and_time("--dataset-dir", tmp_path, "--output-dir", tmp_path / "results", folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.count("error: ") == 1
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["last_run.log"]
    assert (tmp_path / "results" / "last_run.log").read_text() == "of the run before"


def test_of_several_processes_the_first_ones_log_is_reported(tones: Path, tmp_path: Path) -> None:
    options: list[str | Path] = ["--dataset-dir", tones, *SMALL, "--max-steps", "2", "--target-wer", "1000"]
    variables: dict[str, Any] = {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "MASTER_PORT": "29517"}
    run = run_and_time(*options, "--output-dir", tmp_path, folder=ROOT, **variables)
    assert run.returncode == 0, run.stderr
    log = RunLog.read(tmp_path / "last_run.log")
    assert log.path.read_text().splitlines() == [line for line in run.stdout.splitlines() if line]
    assert log.result is not None  # which is no event
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("lost", ["a full disk", "a reader that has left"])
def test_a_run_goes_on_where_its_progress_cannot_be_shown(lost: str, tones: Path, tmp_path: Path) -> None:
    options = ["--dataset-dir", tones, *SMALL, "--max-steps", "2", "--target-wer", "1000", "--output-dir", tmp_path]
    reader, errors = os.pipe()
    os.close(reader)
    if lost == "a full disk":
        errors = os.open("/dev/full", os.O_WRONLY)
    run = start(FORKED, *options, stderr=errors)
    os.close(errors)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0
    assert output.splitlines()[-1].startswith("RESULT,")
    assert (tmp_path / "last_run.log").read_text() == output
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("command", "processes", "moments"),
    [
        (BY_SCRIPT, "1", (0.5, 1.0, 1.5)),  # while Python imports
        (FORKED, "1", (0.02, 0.1, 0.5, 1.0)),
        (FORKED, "2", (0.05, 0.2, 0.5, 1.0, 2.0)),
    ],
)
def test_ctrl_c_ends_a_run_at_any_moment_without_a_traceback(
    command: list[str | Path], processes: str, moments: tuple[float, ...], tones: Path, tmp_path: Path
) -> None:
    options = ["--dataset-dir", tones, *SMALL, "--max-epochs", "1000", "--target-wer", "0", "--output-dir", tmp_path]
    variables = {**os.environ, "NPROC_PER_NODE": processes, "MASTER_PORT": "29518"}
    for seconds in moments:
        run = start(command, *options, stdout=subprocess.DEVNULL, start_new_session=True, env=variables)
        time.sleep(seconds)
        os.killpg(run.pid, signal.SIGINT)
        errors = run.communicate(timeout=300)[1]
        assert run.returncode in (-signal.SIGINT, 130), errors
        assert "Traceback" not in errors


def test_a_second_sigterm_does_not_change_the_status_of_a_run_that_was_told_to_stop(
    tones: Path, tmp_path: Path
) -> None:
    options = ["--dataset-dir", tones, *SMALL, "--max-epochs", "1000", "--target-wer", "0", "--output-dir", tmp_path]
    for wait in (0.05, 0.15):
        run = start(BY_SCRIPT, *options, stdout=subprocess.DEVNULL)  # forked, it would end too fast
        assert run.stderr is not None
        for awaited in ("epoch", "Told to stop"):
            while not run.stderr.readline().startswith(awaited):
                assert run.poll() is None
            run.send_signal(signal.SIGTERM)
        time.sleep(wait)
        run.send_signal(signal.SIGTERM)
        assert run.wait() == 75
        run.stderr.close()


def test_a_folder_whose_name_is_no_text_has_a_log_and_a_report(tones: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    options: list[str | Path] = ["--dataset-dir", tones, *SMALL, "--max-steps", "1", "--target-wer", "1000"]
    run = run_and_time(*options, "--output-dir", folder, folder=tmp_path)
    assert run.returncode == 0
    assert "Traceback" not in run.stderr
    assert RunLog.read(folder / "last_run.log").reached
    assert (folder / "report.html").exists()


def test_a_log_that_cannot_be_written_is_an_error_before_the_clock_starts(tones: Path, tmp_path: Path) -> None:
    (tmp_path / "last_run.log").mkdir()
    run = run_and_time("--dataset-dir", tones, *SMALL, "--output-dir", tmp_path, folder=tmp_path)
    assert run.returncode == 1
    assert f"error: {tmp_path / 'last_run.log'} cannot be written: Is a directory" in run.stderr
    assert "run_start" not in run.stdout


def test_an_exit_status_that_cannot_be_left_for_the_launcher_is_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "made_up", SimpleNamespace(main=lambda arguments, launch_id: 1))
    assert launch._run_rank("/dev/full", "-", "made_up") == 1
    assert capsys.readouterr().err == "error: /dev/full: No space left on device\n"
