"""A series of runs, by the command that a user types: the tree that it leaves, and how it goes on."""

import fcntl
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from mlperf_logging.system_desc_checker import system_desc_checker

from pytorch.config import RunError
from pytorch.mlperf.check import RULESET
from pytorch.mlperf.logs import RunLog
from pytorch.mlperf.system import describe_system, system_name
from pytorch.mlperf.tree import Tree
from tests.conftest import ROOT
from tests.pytorch.test_train import ENVIRONMENT, SMALL


def runs(dataset: Path, tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    fixed: list[str | Path] = [
        "--tree",
        tree,
        "--system",
        "box",
        *SMALL,
        "--dataset-dir",
        dataset,
        "--output-dir",
        tree / "checkpoints",
    ]
    command = ["sh", ROOT / "pytorch" / "run_and_time.sh", *fixed, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, env=ENVIRONMENT)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="module")
def done(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Three runs whose target is so high that the first evaluation reaches it."""
    tree = tmp_path_factory.mktemp("series") / "tree"
    return tree, runs(tones, tree, "--runs", "3", "--target-wer", "1000", "--seed", "5")


def test_a_series_leaves_logs_and_the_machine_where_the_rules_want_them_and_prints_the_score(
    done: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    tree, run = done
    assert run.returncode == 0, run.stderr
    folder = tree / "results" / "box" / "deepspeech2"
    assert sorted(stamps(folder)) == ["result_0.txt", "result_1.txt", "result_2.txt"]
    assert [RunLog.read(folder / f"result_{number}.txt").seed for number in range(3)] == [5, 6, 7]
    assert "Score: " in run.stdout
    assert "epochs to target of 3 runs, mean +- standard deviation:  1.0 +- 0.0" in run.stdout
    assert "Run 2 of 3, seed 6: target reached in" in run.stderr
    description = tree / "systems" / "box.json"
    assert system_desc_checker.check_system_desc(str(description), "training", RULESET)[:2] == (True, "box")
    assert system_desc_checker.check_system_desc(str(description), "training", "6.1.0")[0]


def test_a_series_that_is_started_again_keeps_what_is_there_and_adds_runs(
    done: tuple[Path, subprocess.CompletedProcess[str]], tones: Path
) -> None:
    tree, _ = done
    folder = tree / "results" / "box" / "deepspeech2"
    before = stamps(folder)
    (folder / "result_3.txt.partial").write_text("of a series that was killed")
    (tree / "systems" / "box.json").write_text(
        (tree / "systems" / "box.json").read_text().replace('"cooling": "not known"', '"cooling": "air"')
    )
    again = runs(tones, tree, "--runs", "4", "--target-wer", "1000", "--seed", "5")
    assert again.returncode == 0, again.stderr
    after = stamps(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"result_3.txt", "failed_3_1.txt"}
    assert "(done before)" in again.stderr
    assert json.loads((tree / "systems" / "box.json").read_text())["cooling"] == "air"


def test_runs_of_another_configuration_or_seed_do_not_mix_with_those_that_are_there(
    done: tuple[Path, subprocess.CompletedProcess[str]], tones: Path
) -> None:
    tree, _ = done
    for option, value, said in (("--batch-size", "8", "batch_size is 4 there, 8 now"), ("--seed", "1", "seed is 5")):
        run = runs(tones, tree, "--runs", "3", "--target-wer", "1000", "--seed", "5", option, value)
        assert run.returncode == 1
        assert f"result_0.txt is of another series: {said}" in run.stderr
        assert "Traceback" not in run.stderr


def test_a_run_that_misses_its_target_is_a_result_and_the_series_goes_on(tones: Path, tmp_path: Path) -> None:
    run = runs(tones, tmp_path, "--runs", "2", "--target-wer", "0", "--max-steps", "2")
    assert run.returncode == 1
    assert sorted(stamps(tmp_path / "results" / "box" / "deepspeech2")) == ["result_0.txt", "result_1.txt"]
    assert "Run 2 of 2, seed 2: target not reached" in run.stderr
    assert "runs that did not reach the target: 2" in run.stdout


def test_a_run_that_cannot_start_ends_the_series_and_its_log_is_kept(tmp_path: Path) -> None:
    run = runs(tmp_path / "nowhere", tmp_path, "--runs", "3")
    assert run.returncode == 1
    assert sorted(stamps(tmp_path / "results" / "box" / "deepspeech2")) == ["failed_0_1.txt"]
    assert "the run failed before it started" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--runs", "0"], "--runs is 0; it must be a positive integer"),
        (["--runs", "2", "--resume"], "a resumed run is no result"),
        (["--runs=2", "--system", "../box"], "--system is '../box'"),
        (["--runs", "2", "--batch-size", "0"], "--batch-size is 0; it must be any positive integer"),
    ],
)
def test_wrong_options_are_refused_before_the_first_run(
    arguments: list[str], said: str, tones: Path, tmp_path: Path
) -> None:
    run = runs(tones, tmp_path, *arguments)
    assert run.returncode == 1
    assert said in run.stderr
    assert not (tmp_path / "results").exists()


def test_an_interrupted_series_keeps_the_log_of_the_run_and_says_how_to_go_on(tones: Path, tmp_path: Path) -> None:
    command = [
        "sh",
        str(ROOT / "pytorch" / "run_and_time.sh"),
        "--runs",
        "3",
        "--tree",
        str(tmp_path),
        "--system",
        "box",
    ]
    command += [*SMALL, "--dataset-dir", str(tones), "--output-dir", str(tmp_path / "out"), "--target-wer", "0"]
    command += ["--max-epochs", "1000"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    partial = tmp_path / "results" / "box" / "deepspeech2" / "result_0.txt.partial"
    until = time.monotonic() + 120
    while not (partial.exists() and "train_loss" in partial.read_text()):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in errors
    assert "Traceback" not in errors
    assert sorted(stamps(partial.parent)) == ["failed_0_1.txt"]


def test_two_series_in_one_folder_are_refused(tmp_path: Path) -> None:
    tree = Tree(tmp_path, "box")
    tree.folder.mkdir(parents=True)
    other = os.open(tree.folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="another series of runs is under way"), tree.locked():
        pass
    os.close(other)
    with tree.locked():
        pass


def test_the_description_of_another_machine_is_not_taken_for_this_one(tmp_path: Path) -> None:
    import torch

    tree, here = Tree(tmp_path, "box"), describe_system("box", torch.device("cpu"))
    tree.describe(here)
    tree.describe(here)
    with pytest.raises(RunError, match="describes another machine"):
        tree.describe({**here, "host_processor_model_name": "Abacus"})
    tree.description.write_text("[]")
    with pytest.raises(RunError, match="no description of a machine"):
        tree.describe(here)


@pytest.mark.parametrize(
    ("processor", "cores", "accelerator", "accelerators", "name"),
    [
        ("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", "8", "none", "0", "8x-intel-xeon-cpu-e5-2686-v4"),
        ("AMD EPYC", "2", "none", "0", "2x-amd-epyc"),
        ("AMD EPYC", "64", "NVIDIA H100 80GB HBM3", "8", "8x-nvidia-h100-80gb-hbm3"),
    ],
)
def test_a_machine_has_a_name_for_files(
    processor: str, cores: str, accelerator: str, accelerators: str, name: str
) -> None:
    description = {"host_processor_model_name": processor, "host_processor_vcpu_count": cores}
    description |= {"accelerator_model_name": accelerator, "accelerators_per_node": accelerators}
    assert system_name(description) == name
