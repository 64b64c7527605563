"""What run_and_time.sh adds to the timed run: its log and its report in the output folder."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_run_and_time_writes_the_report_beside_a_log_that_stays_pure(tones: Path, tmp_path: Path) -> None:
    small = ["--hidden-size", "8", "--conv-channels", "2", "--batch-size", "4", "--max-steps", "3", "--device", "cpu"]
    script = ROOT / "pytorch" / "run_and_time.sh"
    command: list[str | Path] = ["sh", script, "--config", "synthetic", "--dataset-dir", tones, *small]
    folder = tmp_path / "results"
    run = subprocess.run([*command, "--output-dir", folder], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1, run.stderr  # three steps do not reach the target
    events = [line for line in run.stdout.splitlines() if line]
    assert all(line.startswith(":::MLLOG ") for line in events)
    assert (folder / "last_run.log").read_text().splitlines() == events
    assert f"Report: {folder / 'report.html'}" in run.stderr
    assert "was not reached" in (folder / "report.html").read_text()


def test_a_run_that_cannot_start_leaves_neither_log_nor_report(tmp_path: Path) -> None:
    command: list[str | Path] = ["sh", ROOT / "pytorch" / "run_and_time.sh", "--dataset-dir", tmp_path]
    run = subprocess.run([*command, "--output-dir", tmp_path / "results"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.count("error: ") == 1
    assert not list((tmp_path / "results").iterdir())


def test_of_several_processes_the_first_ones_log_is_reported(tones: Path, tmp_path: Path) -> None:
    small = ["--hidden-size", "8", "--conv-channels", "2", "--batch-size", "4", "--max-steps", "2", "--device", "cpu"]
    command: list[str | Path] = ["sh", ROOT / "pytorch" / "run_and_time.sh", "--dataset-dir", tones, *small]
    environment = {**os.environ, "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1", "MASTER_PORT": "29517"}
    run = subprocess.run([*command, "--output-dir", tmp_path], capture_output=True, text=True, env=environment)
    assert run.returncode == 1, run.stderr
    assert (tmp_path / "last_run.log").read_text().splitlines() == [line for line in run.stdout.splitlines() if line]
    assert "was not reached" in (tmp_path / "report.html").read_text()


def test_a_timed_run_imports_nothing_of_the_report() -> None:
    code = "import sys, pytorch.run_and_time; print([name for name in sys.modules if 'pytorch.report' in name])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "[]\n", run.stderr
