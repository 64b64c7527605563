"""The parent of a run: its log and its report in the output folder, signals, exit statuses."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pytorch import run_and_time as run_and_time_module
from pytorch.config import parse_config
from tests.conftest import ROOT
from tests.processes import Popen
from tests.pytorch.test_train import SMALL
from tools.mlperf.runlog import RunLog

BY_SCRIPT: list[str | Path] = ["sh", ROOT / "pytorch" / "run_and_time.sh"]
FORKED: list[str | Path] = [sys.executable, "-m", "pytorch.run_and_time"]  # what the script starts, without its imports


def start(command: list[str | Path], *options: object, **given: Any) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    kind = Popen if command is FORKED else subprocess.Popen
    return kind([*map(str, command), *map(str, options)], text=True, errors="surrogateescape", **pipes | given)


def run_and_time(
    *options: str | Path, folder: Path, command: list[str | Path] = FORKED, **variables: str
) -> subprocess.CompletedProcess[str]:
    run = start(command, *options, cwd=folder, env={**os.environ, **variables})
    output, errors = run.communicate(timeout=300)
    return subprocess.CompletedProcess(run.args, run.returncode, output, errors)


def test_run_and_time_writes_the_report_beside_a_log_that_stays_pure(tones: Path, tmp_path: Path) -> None:
    """The run ends with max_steps, which are those of an epoch: there is one evaluation, not another of no step."""
    folder = tmp_path / "results"
    options: list[str | Path] = ["--dataset-dir", tones, *SMALL, "--max-steps", "6"]
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


@pytest.mark.parametrize("lost", ["a full disk", "a reader that has left"])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_goes_on_where_its_log_or_its_progress_cannot_be_shown(
    stream: str, lost: str, tones: Path, tmp_path: Path
) -> None:
    options = ["--dataset-dir", tones, *SMALL, "--max-steps", "2", "--target-wer", "1000", "--output-dir", tmp_path]
    reader, writer = os.pipe()
    os.close(reader)
    if lost == "a full disk":
        writer = os.open("/dev/full", os.O_WRONLY)
    run = start(FORKED, *options, **{stream: writer})
    os.close(writer)
    output, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    log = (tmp_path / "last_run.log").read_text()
    assert log.splitlines()[-1].startswith("RESULT,")
    if stream == "stdout":
        assert errors.count("standard output cannot be written") == 1
        assert "Traceback" not in errors and "Exception ignored" not in errors
    else:
        assert output == log
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("command", "processes", "moments"),
    [
        (BY_SCRIPT, "1", (0.0, 0.5, 1.0)),  # while Python imports
        (FORKED, "1", (0.02, 0.1, 0.5, 1.0)),
        (FORKED, "2", (0.05, 0.2, 0.5, 1.0, 2.0)),
    ],
)
def test_ctrl_c_ends_a_run_at_any_moment_without_a_traceback(
    command: list[str | Path], processes: str, moments: tuple[float, ...], tones: Path, tmp_path: Path
) -> None:
    options = ["--dataset-dir", tones, *SMALL, "--max-epochs", "1000", "--target-wer", "0", "--output-dir", tmp_path]
    variables = {**os.environ, "NPROC_PER_NODE": processes}
    for seconds in moments:
        run = start(command, *options, stdout=subprocess.DEVNULL, start_new_session=True, env=variables)
        # Python itself has a traceback for a Ctrl-C before it gets to our modules, which import NumPy.
        while os.getpgid(run.pid) != run.pid or "numpy" not in Path(f"/proc/{run.pid}/maps").read_text():
            assert run.poll() is None
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(run.pid, signal.SIGINT)
        errors = run.communicate(timeout=300)[1]
        assert run.returncode in (-signal.SIGINT, 130), errors
        assert "Traceback" not in errors


def test_more_sigterms_do_not_change_the_status_of_a_run_that_was_told_to_stop(tones: Path, tmp_path: Path) -> None:
    options = ["--dataset-dir", tones, *SMALL, "--max-epochs", "1000", "--target-wer", "0", "--output-dir", tmp_path]
    run = start(BY_SCRIPT, *options, stdout=subprocess.DEVNULL)  # forked, it would end too fast
    assert run.stderr is not None
    for awaited in ("epoch", "Received SIGTERM"):
        while not run.stderr.readline().startswith(awaited):
            assert run.poll() is None
        run.send_signal(signal.SIGTERM)
    while run.poll() is None:
        run.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert run.returncode == 75, run.stderr.read()
    run.stderr.close()


@pytest.mark.parametrize(
    ("environment", "shown"), [({"USER": "Doe, José"}, "Doe__Jos_"), ({"HOME": "", "USER": "x"}, "x")]
)
def test_a_user_and_a_folder_may_have_names_that_are_no_text(
    environment: dict[str, str], shown: str, tones: Path, tmp_path: Path
) -> None:
    """The result line has the user without commas and in ASCII."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    variables: dict[str, Any] = {"LOGNAME": "", "LNAME": "", "USERNAME": "", "PYTHONIOENCODING": "ascii", **environment}
    options: list[str | Path] = ["--dataset-dir", tones, *SMALL, "--max-steps", "1", "--target-wer", "1000"]
    run = run_and_time(*options, "--output-dir", folder, folder=ROOT, **variables)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout.splitlines()[-1].split(",")[4] == shown
    assert RunLog.read(folder / "last_run.log").reached
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("gpus", "options", "nodes", "processes", "said"),
    [
        ((None, 0), ["--config", "synthetic"], "1", 1, ""),
        (("cuda", 8), ["--config", "librispeech"], "1", 8, ""),
        (("cuda", 8), ["--config", "librispeech"], "32", 4, "4 of 8 GPUs: --batch-size 128"),
        (("cuda", 8), ["--batch-size", "12", "--gradient-accumulation-steps", "2"], "1", 6, "6 of 8 GPUs"),
        (("cuda", 8), ["--config", "synthetic", "--device", "cpu"], "1", 1, ""),
    ],
    indirect=["gpus"],
)
def test_no_more_ranks_than_a_batch_has_utterances(
    gpus: None, options: list[str], nodes: str, processes: int, said: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("NNODES", nodes)
    config = parse_config(options, program="test", description="")
    assert run_and_time_module.nproc_per_node(config) == processes
    errors = capsys.readouterr().err
    assert said in errors and bool(said) == bool(errors)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'; it must be a number from 1 to 65535"),
        ({"NPROC_PER_NODE": "9" * 20}, f"NPROC_PER_NODE is '{'9' * 20}'; it must be a number from 0 to 1024"),
        ({"NODE_RANK": "1"}, "NODE_RANK is 1; with NNODES=1 it must be less than that"),
        ({"MAX_RESTARTS": "1", "NNODES": "2"}, "MAX_RESTARTS with NNODES needs RUN_ID"),
    ],
)
def test_a_variable_that_cannot_be_is_an_error_of_one_line(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_and_time_module.main([]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {expected}") and errors.count("\n") == 1


def test_a_path_that_nobody_means_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--output-dir=", "--output-dir=~/runs"):
        assert run_and_time_module.main([option]) == 1
        assert capsys.readouterr().err.startswith("error: --output-dir ")
