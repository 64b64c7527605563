"""The commands of the README, from one to the next, as a user types them."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from data.corpora import find_corpus
from tests.conftest import ROOT, SPEECH
from tests.processes import run_module_for_text
from tests.pytorch.test_train import events, values

PARTLY_THERE = "train-clean-100,dev-clean,test-clean"  # the subsets of which shared/speech has a part


def sh(folder: Path, *command: str | Path, timeout: int = 600) -> subprocess.CompletedProcess[str]:
    words = ["sh", *map(str, command)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files that shares this one's environment, so that nothing is installed again."""
    copy = tmp_path_factory.mktemp("checkout") / "a folder with spaces"
    left_out = shutil.ignore_patterns(".*", "*_dataset", "results", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    return copy


@pytest.mark.skipif(not (ROOT / ".venv").exists(), reason="no .venv: tests run in another environment")
def test_quickstart_synthesizes_verifies_trains_and_says_where_everything_is(checkout: Path) -> None:
    run = sh(checkout, "quickstart.sh", "--max-steps", "2", "--target-wer", "1000")
    assert run.returncode == 0, run.stderr
    assert "Dataset Checksum Passed." in run.stdout
    assert find_corpus("synthetic").reference_digest in run.stdout  # made anew, it is the same to the last sample
    log = checkout / "results" / "synthetic" / "last_run.log"
    assert "its time is not a benchmark result" in run.stdout
    result = next(line for line in run.stdout.splitlines() if line.startswith("RESULT,DEEPSPEECH2,"))
    assert log.read_text().splitlines()[-1] == result
    assert values(log.read_text(), "eval_samples") == [240]
    assert (log.parent / "checkpoint_best.pt").exists()

    again = sh(checkout, "quickstart.sh")
    assert again.returncode == 0
    assert result in again.stdout
    assert "train again" in again.stdout
    assert f"Log: {log} " in again.stdout
    assert f"Report: {log.parent / 'report.html'}" in again.stdout
    assert (log.parent / "report.html").exists()

    failed = sh(checkout, "quickstart.sh", "--max-steps", "1", "--target-wer", "0")
    assert failed.returncode == 1
    assert "was not reached" in failed.stderr
    assert (log.parent / "previous_run" / log.name).read_text().splitlines()[-1] == result


@pytest.mark.skipif(not SPEECH.is_dir(), reason=f"real speech is not there: {SPEECH}")
@pytest.mark.parametrize(
    ("corpus", "options", "utterances", "words"),
    [("an4", ["--corpus", "an4"], 130, 773), ("librispeech", ["--subsets", PARTLY_THERE], 234, None)],
)
def test_real_speech_is_prepared_trained_on_and_evaluated_completely(
    corpus: str, options: list[str], utterances: int, words: int | None, tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    mirror: list[str | Path] = ["--mirror", SPEECH / corpus, "--checksums", SPEECH / corpus / "md5sum.txt"]
    prepared = sh(tmp_path, ROOT / "download_dataset.sh", *options, *mirror, "--dataset-dir", "dataset")
    assert prepared.returncode == 0, prepared.stderr

    small = ["--hidden-size", "16", "--conv-channels", "2", "--batch-size", "8", "--max-steps", "3", "--device", "cpu"]
    command: list[str | Path] = [ROOT / "pytorch" / "run_and_time.sh", "--config", corpus, "--dataset-dir", dataset]
    run = sh(tmp_path, *command, "--output-dir", tmp_path / "results", *small)
    assert run.returncode == 1  # three steps do not reach the target
    (accuracy,) = (event for event in events(run.stdout) if event["key"] == "eval_accuracy")
    assert accuracy["metadata"]["utterances"] == utterances
    assert words is None or accuracy["metadata"]["words"] == words
    (dataset_event,) = (event for event in events(run.stdout) if event["key"] == "dataset")
    assert dataset_event["metadata"]["official_archives"] is (corpus == "an4")


@pytest.mark.parametrize(
    "command",
    [
        "data.download --corpus synthetic --dataset-dir PATH",
        "data.verify --dataset-dir PATH",
        "pytorch.train --dataset-dir PATH",
        "pytorch.run_and_time --output-dir PATH",
        "tools.estimate --config an4 --dataset-dir PATH",
        "tools.transcribe PATH recording.wav",
        "tools.mlperf rcp README.md -o PATH",
        "tools.report README.md -o PATH",
    ],
)
def test_a_path_that_cannot_be_looked_at_is_an_error_of_one_line(command: str) -> None:
    run = run_module_for_text(*command.replace("PATH", "x" * 300).split())
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert len((run.stdout + run.stderr).strip().splitlines()) <= 2


def test_an_environment_that_was_left_without_pip_is_made_again(tmp_path: Path) -> None:
    """Which is what a missing python3-venv and Ctrl-C leave. Here installing then fails, for want of a network."""
    venv.create(tmp_path / ".venv", with_pip=False, symlinks=True)
    shutil.copy(ROOT / "environment.sh", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[build-system]\nrequires = ['none-such']\n")
    script = f"root='{tmp_path}'; . ./environment.sh; use_environment test"
    environment = os.environ | {"PIP_NO_INDEX": "1", "PYTHON": sys.executable}
    run = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert "No module named pip" not in run.stderr
    assert "none-such" in run.stderr
    assert "Run the command again to continue." in run.stderr


def test_every_command_in_the_readme_is_there() -> None:
    folders = [ROOT, ROOT / "pytorch", ROOT / "pytorch" / "docker"]
    for script in set(re.findall(r"\bsh ([\w/-]+\.sh)", (ROOT / "README.md").read_text())):
        assert any((folder / script).exists() for folder in folders), script
