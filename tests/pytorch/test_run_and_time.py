"""What run_and_time.sh adds to the timed run: its log and its report in the output folder."""

import os
import subprocess
from pathlib import Path

from tests.conftest import ROOT
from tools.mlperf.runlog import RunLog

SMALL = ["--hidden-size", "8", "--conv-channels", "2", "--batch-size", "4", "--device", "cpu"]
SCRIPT = ROOT / "pytorch" / "run_and_time.sh"


def run_and_time(*options: str | Path, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", SCRIPT, *options]
    environment = {**os.environ, **variables}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, env=environment)


def test_run_and_time_writes_the_report_beside_a_log_that_stays_pure(tones: Path, tmp_path: Path) -> None:
    """The run ends with max_steps, which are those of an epoch: there is one evaluation, not another of no step."""
    folder = tmp_path / "results"
    options: list[str | Path] = ["--config", "synthetic", "--dataset-dir", tones, *SMALL, "--max-steps", "6"]
    run = run_and_time(*options, "--output-dir", folder, "--target-wer", "0", folder=tmp_path)
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
    variables = {"NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "MASTER_PORT": "29517"}
    run = run_and_time(*options, "--output-dir", tmp_path, folder=ROOT, **variables)
    assert run.returncode == 0, run.stderr
    log = RunLog.read(tmp_path / "last_run.log")
    assert log.path.read_text().splitlines() == [line for line in run.stdout.splitlines() if line]
    assert log.result is not None  # which is no event
    assert (tmp_path / "report.html").exists()
