"""A series of runs: what it leaves in a submission, and how it continues; all but a few runs are made up."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlperf_logging.system_desc_checker import system_desc_checker

from data.packed import open_dataset
from pytorch.config import CONFIGS
from pytorch.machine import describe_machine
from tests.conftest import ROOT
from tests.processes import Popen, run_module_for_text
from tests.pytorch.test_train import ENVIRONMENT, SMALL
from tests.tools.mlperf.forged import Forged, made_up
from tests.tools.mlperf.made_up_logs import add
from tools.mlperf import series
from tools.mlperf.__main__ import main
from tools.mlperf.check import NEWEST
from tools.mlperf.runlog import RunLog

VARIABLES = "NPROC_PER_NODE", "NNODES", "SUBMISSION_ORG", "SUBMISSION_DIVISION", "SUBMISSION_STATUS"


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# --- real runs, by the command that a user types


def command(tree: Path, runs: int, *options: object) -> list[str]:
    arguments = ["series", "--runs", runs, "--tree", tree, "--system", "box", "--series", "small", "--", *SMALL]
    return ["tools.mlperf", *map(str, [*arguments, *options])]


def test_a_series_leaves_logs_and_the_machine_where_the_rules_want_them(tones: Path, tmp_path: Path) -> None:
    """The target is so high that the first evaluation reaches it."""
    tree, output = tmp_path / "tree", tmp_path / "output"
    options = ["--dataset-dir", tones, "--output-dir", output, "--target-wer", 1000, "--seed", 5]
    run = run_module_for_text(*command(tree, 2, *options), folder=tmp_path, environment=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    folder = tree / "results" / "box" / "small"
    assert sorted(stamps(folder)) == ["result_0.txt", "result_1.txt"]
    assert [RunLog.read(folder / f"result_{number}.txt").seed for number in range(2)] == [5, 6]
    assert "epochs to target of 2 runs, mean +- standard deviation: 1.0 +- 0.0" in run.stdout
    assert f"python -m tools.report {folder}\n" in run.stdout
    assert "--resume" not in run.stderr  # no run of a series is worth continuing
    assert sorted(path.name for path in output.iterdir()) == ["small_0_1", "small_1_1"]
    description = tree / "systems" / "box.json"
    assert system_desc_checker.check_system_desc(str(description), "training", NEWEST)[:2] == (True, "box")


@pytest.mark.parametrize(
    ("number", "to_group", "status"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 75)], ids=["Ctrl-C", "TERM"]
)
def test_a_series_that_is_told_to_end_tells_its_run_waits_for_it_and_keeps_its_log(
    number: int, to_group: bool, status: int, tones: Path, tmp_path: Path
) -> None:
    options = ["--dataset-dir", tones, "--output-dir", tmp_path / "out", "--target-wer", 0, "--max-epochs", 1000]
    words = [sys.executable, "-m", *command(tmp_path, 3, *options)]
    process = Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True, env=ENVIRONMENT)
    log = tmp_path / "results" / "box" / "small" / "failed_0_1.txt"
    until = time.monotonic() + 240
    while not (log.exists() and "train_loss" in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == status
    assert f"its log is {log}. The same command continues the series." in errors
    assert "Traceback" not in errors
    assert list(stamps(log.parent)) == [log.name]
    assert RunLog.read(log).status == "aborted"  # the run came to its own end


# --- series whose runs are made up


@dataclasses.dataclass
class MadeUpRuns:
    """Stands in for the timed run: instead of training with a seed, it prints the log that it was given for it."""

    folder: Path
    dataset: Path

    @property
    def results(self) -> Path:
        return self.folder / "tree" / "results" / "box" / "synthetic"

    @property
    def started(self) -> list[str]:
        return (self.folder / "started").read_text().split() if (self.folder / "started").exists() else []

    def log(self, seed: int, *, reached: bool = True) -> Forged:
        config = dataclasses.replace(CONFIGS["synthetic"], precision="fp32", device="cpu", seed=seed)
        wers = (50.0, 20.0 if reached else 40.0)
        log = made_up(config, wers=wers, corpus="tones", train_samples=21, validation={"tones-validation": 7})
        add(log, "number_of_ranks", "gru_implementation", "fused kernel (AVX2)")
        log.edit("dataset", open_dataset(self.dataset).digest)
        log.edit("environment", **describe_machine(torch.device("cpu")))
        return log

    def give(self, seed: int, log: Forged, status: int = 0) -> None:
        log.write(self.folder / f"{seed}.log")
        (self.folder / f"{seed}.status").write_text(str(status))

    def run(self, *arguments: str) -> int:
        given = ["--", "--config", "synthetic", "--device", "cpu", "--dataset-dir", str(self.dataset)]
        split = arguments.index("--") if "--" in arguments else len(arguments)
        own, options = arguments[:split], arguments[split + 1 :]
        return main(["series", "--tree", str(self.folder / "tree"), "--system", "box", *own, *given, *options])


@pytest.fixture
def made(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MadeUpRuns:
    """Three runs that reach their target."""
    script = tmp_path / "script.sh"
    script.write_text(
        'while [ "$1" != --seed ]; do shift; done\n'
        f'cat "{tmp_path}/$2.log"; echo "$2" >>"{tmp_path}/started"; exit "$(cat "{tmp_path}/$2.status")"\n'
    )
    monkeypatch.setattr(series, "COMMAND", ["sh", str(script)])
    monkeypatch.setattr(series, "git_revision", lambda: ("0" * 40, False))
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")  # which counts as unset
    runs = MadeUpRuns(tmp_path, tones)
    for seed in (1, 2, 3):
        runs.give(seed, runs.log(seed))
    return runs


def test_a_series_is_scored_and_one_that_is_started_again_keeps_what_exists(
    made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made.run("--runs", "2") == 0
    before = stamps(made.results)
    (made.results / "failed_2_1.txt").write_text("of a series that was killed")
    description = made.folder / "tree" / "systems" / "box.json"
    described = description.read_text().replace("not known", "air", 1)
    description.write_text(described)
    assert made.run("--runs", "3") == 0
    after = stamps(made.results)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"result_2.txt", "failed_2_1.txt"}
    assert made.started == ["1", "2", "3"]
    assert description.read_text() == described
    said = capsys.readouterr()
    assert "(seed 1): already complete" in said.err
    assert "Score: 220.0 s" in said.out


@pytest.mark.parametrize(
    ("key", "value", "arguments", "name"),
    [
        ("seed", ..., ["--", "--batch-size", "16"], "batch_size"),
        ("seed", ..., ["--", "--seed", "2"], "seed"),
        ("dataset", "1" * 64, [], "data set"),
        ("eval_accuracy", 60.0, [], "the WER is 60.0"),
    ],
)
def test_a_result_that_is_wrong_or_of_another_series_is_refused_before_the_first_run(
    key: str, value: object, arguments: list[str], name: str, made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made.run("--runs", "1") == 0
    log = Forged.of(made.results / "result_0.txt")
    log.edit(key, value)
    log.write(made.results / "result_0.txt")
    assert made.run("--runs", "3", *arguments) == 1
    error = capsys.readouterr().err
    assert "result_0.txt" in error and name in error
    assert made.started == ["1"]


def diverge(log: Forged) -> None:
    """The run breaks off in its first epoch."""
    del log.events[log.positions("train_loss")[0] : log.positions("run_stop")[0]]
    add(log, "epoch_start", "skipped_step", 1, reason="not finite", utterances=["a"])
    log.edit("run_stop", status="aborted")
    log.result = None


def crash(log: Forged) -> None:
    log.edit("run_stop", status="aborted", exception="RunError")
    log.result = None


@pytest.mark.parametrize(
    ("damage", "said", "name"),
    [
        (None, "(seed 1): target missed", "result_0.txt"),
        (diverge, "but found 0", "failed_0_1.txt"),
        (crash, "RunError", "failed_0_1.txt"),
    ],
)
def test_a_run_that_missed_its_target_is_a_result_one_that_failed_is_not_and_the_series_goes_on(
    damage: Callable[[Forged], None] | None, said: str, name: str, made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    log = made.log(1, reached=damage is not None)
    if damage is not None:
        damage(log)
    made.give(1, log, status=1)
    assert made.run("--runs", "2") == 1
    assert sorted(stamps(made.results)) == [name, "result_1.txt"]
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda log: log.edit("git_commit", "unknown"), "git_commit"),
        (lambda log: log.edit("gru_implementation", "plain PyTorch"), "gru_implementation"),
        (lambda log: log.events.__delitem__(slice(log.positions("init_stop")[0], None)), "exit status 0"),
        (lambda log: log.edit("environment", processor="Abacus"), "host_processor_model_name"),
    ],
    ids=["refused for what was so before its clock", "of another series", "did not start", "of another machine"],
)
def test_a_run_after_which_no_other_would_be_accepted_ends_the_series(
    change: Callable[[Forged], None], said: str, made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    log = made.log(2)
    change(log)
    made.give(2, log)
    assert made.run("--runs", "3") == 1
    assert said in capsys.readouterr().err
    assert made.started == ["1", "2"]
    assert "result_0.txt" in stamps(made.results)


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--runs", "0"], {}, "--runs"),
        (["--runs", "2", "--", "--resume"], {}, "--resume"),
        (["--runs=2", "--system", "../box"], {}, "--system"),
        (["--runs=2", "--series", ".."], {}, "--series"),
        (["--runs=2", "--tree=~/tree"], {}, "--tree"),
        (["--runs", "2", "--", "--batch-size", "0"], {}, "--batch-size"),
        (["--runs", "2", "--", "--seed", str(2**63 - 1)], {}, "--seed"),
        (["--runs", "2", "--", "--dataset-dir", "nowhere"], {}, "nowhere"),
        (["--runs", "2"], {"NNODES": "2"}, "NNODES"),
        (["--runs", "2"], {"SUBMISSION_DIVISION": "ajar"}, "SUBMISSION_DIVISION"),
        (["--runs", "2"], {"SUBMISSION_STATUS": "sold"}, "SUBMISSION_STATUS"),
        (["--runs", "2"], {"SUBMISSION_DIVISION": "closed"}, "hidden_size is not 800, "),
    ],
)
def test_what_would_be_refused_in_the_end_is_refused_before_the_first_run(
    arguments: list[str],
    variables: dict[str, str],
    said: str,
    made: MadeUpRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert made.run(*arguments) == 1
    assert said in capsys.readouterr().err
    assert not (made.folder / "tree").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "systems").glob("*.json")), ids=lambda path: path.stem)
def test_committed_descriptions_pass_mlcommons_checker(path: Path) -> None:
    assert system_desc_checker.check_system_desc(str(path), "training", NEWEST)[0]
    assert json.loads(path.read_text()).keys() == json.loads(series.SYSTEM.read_text()).keys()
