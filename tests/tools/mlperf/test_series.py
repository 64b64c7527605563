"""A series of runs: what it leaves in a submission, and how it continues; all but three runs are made up."""

import dataclasses
import fcntl
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from mlperf_logging.system_desc_checker import system_desc_checker

from data.cli import DataError
from data.packed import open_dataset
from pytorch import mllog
from pytorch.config import CONFIGS
from pytorch.errors import RunError
from pytorch.machine import describe_machine
from tests.conftest import ROOT
from tests.processes import Popen, run_module_for_text
from tests.pytorch.test_train import ENVIRONMENT, SMALL
from tests.tools.mlperf.forged import Forged, made_up, reference
from tests.tools.mlperf.made_up_logs import add
from tools.mlperf import series
from tools.mlperf.__main__ import main
from tools.mlperf.check import RULESET
from tools.mlperf.runlog import RunLog
from tools.mlperf.submission import SubmissionDir, describe_system, system_name

CPU = torch.device("cpu")


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


# --- real runs, by the command that a user types


def command(tree: Path, runs: int, *options: object) -> list[str]:
    arguments = ["series", "--runs", runs, "--tree", tree, "--system", "box", "--series", "small", "--", *SMALL]
    return ["tools.mlperf", *map(str, [*arguments, *options])]


def test_a_series_leaves_logs_and_the_machine_where_the_rules_want_them_and_a_page_of_all(
    tones: Path, tmp_path: Path
) -> None:
    """The target is so high that the first evaluation reaches it."""
    tree, checkpoints = tmp_path / "tree", tmp_path / "checkpoints"
    options = ["--dataset-dir", tones, "--output-dir", checkpoints, "--target-wer", 1000, "--seed", 5]
    options += ["--tensorboard", tmp_path / "curves"]
    run = run_module_for_text(*command(tree, 2, *options), folder=tmp_path, environment=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    folder = tree / "results" / "box" / "small"
    assert sorted(stamps(folder)) == ["result_0.txt", "result_1.txt"]
    assert [RunLog.read(folder / f"result_{number}.txt").seed for number in range(2)] == [5, 6]
    assert "epochs to target of 2 runs, mean +- standard deviation: 1.0 +- 0.0" in run.stdout
    assert "Run 2 of 2, seed 6: target reached in" in run.stderr
    description = tree / "systems" / "box.json"
    assert system_desc_checker.check_system_desc(str(description), "training", RULESET)[:2] == (True, "box")
    assert system_desc_checker.check_system_desc(str(description), "training", "6.1.0")[0]
    page = (checkpoints / "report.html").read_text()
    assert "2 of 2" in page
    assert "result_0" in page and "result_1" in page
    assert len(list((tmp_path / "curves").glob("events.*"))) == 2


@pytest.mark.parametrize(
    ("number", "to_group", "status", "said"),
    [
        (signal.SIGINT, True, 130, "Interrupted."),  # what Ctrl-C does
        (signal.SIGTERM, False, 75, "checkpoint saved at step"),
        (signal.SIGUSR1, False, 75, "checkpoint saved at step"),
    ],
)
def test_a_series_that_is_told_to_end_tells_its_run_waits_for_it_and_keeps_its_log(
    number: int, to_group: bool, status: int, said: str, tones: Path, tmp_path: Path
) -> None:
    options = ["--dataset-dir", tones, "--output-dir", tmp_path / "out", "--target-wer", 0, "--max-epochs", 1000]
    words = [sys.executable, "-m", *command(tmp_path, 3, *options)]
    process = Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True, env=ENVIRONMENT)
    partial = tmp_path / "results" / "box" / "small" / "result_0.txt.partial"
    until = time.monotonic() + 120
    while not (partial.exists() and "train_loss" in partial.read_text()):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert said in errors
    assert "failed_0_1.txt. The same command continues the series." in errors
    assert "Traceback" not in errors
    assert list(stamps(partial.parent)) == ["failed_0_1.txt"]
    assert RunLog.read(partial.parent / "failed_0_1.txt").status == "aborted"  # the run came to its own end


# --- series whose runs are made up


@dataclasses.dataclass
class MadeUpRuns:
    """Stands in for run_and_time.sh: instead of training with a seed, it prints the log that was given for it."""

    folder: Path
    dataset: Path

    @property
    def tree(self) -> SubmissionDir:
        return SubmissionDir(self.folder / "tree", "box", "synthetic")

    def log(self, seed: int, *, reached: bool = True) -> Forged:
        config = dataclasses.replace(CONFIGS["synthetic"], precision="fp32", device="cpu", seed=seed)
        log = made_up(
            config,
            wers=(50.0, 20.0 if reached else 40.0),
            corpus="tones",
            train_samples=21,
            validation={"tones-validation": 7},
        )
        machine = describe_machine(CPU)
        add(log, "number_of_ranks", "gru_implementation", "fused kernel (AVX2)")
        log.edit("dataset", open_dataset(self.dataset).digest)
        log.edit("submission_platform", mllog.submission_platform(machine, 1))
        log.edit("environment", **machine)
        return log

    def give(self, seed: int, log: Forged, status: int = 0) -> None:
        log.write(self.folder / f"{seed}.log")
        (self.folder / f"{seed}.status").write_text(str(status))

    def run(self, *arguments: str) -> int:
        given = ["--", "--config", "synthetic", "--device", "cpu", "--dataset-dir", str(self.dataset)]
        given += ["--output-dir", str(self.folder / "checkpoints")]
        split = arguments.index("--") if "--" in arguments else len(arguments)
        own, options = arguments[:split], arguments[split + 1 :]
        return main(["series", "--tree", str(self.tree.root), "--system", "box", *own, *given, *options])


@pytest.fixture
def made(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeUpRuns]:
    """Three runs that reach their target."""
    script = tmp_path / "script.sh"
    script.write_text(
        f'for last; do :; done\ncat "{tmp_path}/$last.log"\necho started >>"{tmp_path}/$last.started"\n'
        f'exit "$(cat "{tmp_path}/$last.status")"\n'
    )
    monkeypatch.setattr(series, "SCRIPT", script)
    monkeypatch.setattr(series, "git_revision", lambda: ("0" * 40, False))
    monkeypatch.setattr(series, "_write_page", lambda results, page: print(f"page of {len(results)} runs: {page}"))
    for variable in (
        "NPROC_PER_NODE",
        "SUBMISSION_ORG",
        "SUBMISSION_DIVISION",
        "SUBMISSION_STATUS",
        "SUBMISSION_PLATFORM",
    ):
        monkeypatch.delenv(variable, raising=False)
    runs = MadeUpRuns(tmp_path, tones)
    for seed in (1, 2, 3):
        runs.give(seed, runs.log(seed))
    yield runs


def test_runs_of_a_series_leave_the_configurations_own_output_folder_alone(
    made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    series.SCRIPT.write_text(f'echo "$@" >"{made.folder}/options"\n' + series.SCRIPT.read_text())
    options = ["--config", "synthetic", "--device", "cpu", "--dataset-dir", str(made.dataset)]
    assert main(["series", "--tree", str(made.tree.root), "--system", "box", "--runs", "1", "--", *options]) == 0
    folder = CONFIGS["synthetic"].output_dir / "series"
    assert f"--output-dir {folder} " in (made.folder / "options").read_text()
    assert f"page of 1 runs: {folder / 'report.html'}" in capsys.readouterr().out


def started(made: MadeUpRuns) -> list[str]:
    return sorted(path.stem for path in made.folder.glob("*.started"))


def test_a_series_is_scored_and_one_that_is_started_again_keeps_what_is_there(
    made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made.run("--runs", "2") == 0
    output = capsys.readouterr().out
    assert "No score: the fastest and the slowest run are dropped, so 3 runs are needed." in output
    assert f"page of 2 runs: {made.folder / 'checkpoints' / 'report.html'}" in output
    before = stamps(made.tree.folder)
    made.tree.partial(2).write_text("of a series that was killed")
    made.tree.description.write_text(made.tree.description.read_text().replace("not known", "air", 1))
    described = json.loads(made.tree.description.read_text())
    assert made.run("--runs", "3") == 0
    after = stamps(made.tree.folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"result_2.txt", "failed_2_1.txt"}
    assert started(made) == ["1", "2", "3"]
    assert [(made.folder / f"{seed}.started").read_text() for seed in (1, 2, 3)] == ["started\n"] * 3
    assert json.loads(made.tree.description.read_text()) == described
    said = capsys.readouterr()
    assert "seed 1: done before; its log is" in said.err
    assert "Score: 220.0 s, the mean without the fastest and the slowest of 3 runs." in said.out


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (["--", "--batch-size", "16"], {}, "batch_size is 6 there, 16 now"),
        (["--", "--seed", "2"], {}, "seed is 1 there, 2 now"),
        ([], {"NPROC_PER_NODE": "4"}, "number_of_ranks is 1 there, 4 now"),
        ([], {"SUBMISSION_PLATFORM": "abacus"}, "now; use another --series"),
    ],
)
def test_what_is_known_to_be_another_series_is_refused_before_the_first_run(
    arguments: list[str],
    variables: dict[str, str],
    said: str,
    made: MadeUpRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert made.run("--runs", "1") == 0
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert made.run("--runs", "3", *arguments) == 1
    error = capsys.readouterr().err
    assert "result_0.txt is of another series: " in error
    assert said in error
    assert started(made) == ["1"]


def test_another_data_set_is_another_series(made: MadeUpRuns, capsys: pytest.CaptureFixture[str]) -> None:
    assert made.run("--runs", "1") == 0
    log = Forged.of(made.tree.result(0))
    log.edit("dataset", "1" * 64)
    log.write(made.tree.result(0))
    assert made.run("--runs", "2") == 1
    assert "data set is " + "1" * 64 + " there" in capsys.readouterr().err
    assert started(made) == ["1"]


def test_a_result_that_would_be_refused_in_the_end_is_refused_before_the_first_run(
    made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made.run("--runs", "1") == 0
    log = Forged.of(made.tree.result(0))
    log.edit("eval_accuracy", 1.0, number=-1)
    log.write(made.tree.result(0))
    assert made.run("--runs", "2") == 1
    assert "the WER is 1.0, but" in capsys.readouterr().err
    assert started(made) == ["1"]


def test_a_run_that_misses_its_target_is_a_result_and_the_series_goes_on(
    made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    made.give(1, made.log(1, reached=False), status=1)
    assert made.run("--runs", "2") == 1
    assert sorted(stamps(made.tree.folder)) == ["result_0.txt", "result_1.txt"]
    said = capsys.readouterr()
    assert "Run 1 of 2, seed 1: target missed" in said.err
    assert "runs that did not reach the target: 1" in said.out


def diverge(log: Forged) -> None:
    """The run breaks off in its first epoch."""
    del log.events[log.positions("train_loss")[0] : log.positions("run_stop")[0]]
    add(log, "epoch_start", "skipped_step", 1, reason="not finite", utterances=["a"])
    log.edit("run_stop", status="aborted")
    log.result = None


def falsify(log: Forged) -> None:
    log.edit("eval_accuracy", 1.0, number=-1)


@pytest.mark.parametrize(("damage", "said"), [(diverge, "but found 0"), (falsify, "the WER is 1.0, but")])
def test_a_run_whose_log_is_refused_is_set_aside_and_the_series_goes_on(
    damage: Callable[[Forged], None], said: str, made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    log = made.log(1)
    damage(log)
    made.give(1, log, status=1)
    assert made.run("--runs", "2") == 1
    assert sorted(stamps(made.tree.folder)) == ["failed_0_1.txt", "result_1.txt"]
    error = capsys.readouterr().err
    assert said in error
    assert "seed 1: failed; the same command repeats it; its log is" in error


def test_a_run_that_is_refused_for_what_was_so_before_its_clock_ends_the_series(
    made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    log = made.log(1)
    log.edit("git_commit", "unknown")
    made.give(1, log)
    assert made.run("--runs", "3") == 1
    error = capsys.readouterr().err
    assert "failed_0_1.txt: git_commit: the commit is not known (every run would be refused for that)" in error
    assert started(made) == ["1"]


def test_a_run_of_another_series_than_those_before_it_ends_the_series(
    made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    log = made.log(2)
    log.edit("gru_implementation", "plain PyTorch: no compiler")
    made.give(2, log)
    assert made.run("--runs", "3") == 1
    assert "they differ in gru_implementation" in capsys.readouterr().err
    assert sorted(stamps(made.tree.folder)) == ["failed_1_1.txt", "result_0.txt"]
    assert started(made) == ["1", "2"]


def test_a_run_that_cannot_start_ends_the_series_and_its_log_is_kept(
    made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    log = made.log(1)
    del log.events[log.positions("init_stop")[0] :]
    made.give(1, log, status=1)
    assert made.run("--runs", "3") == 1
    assert sorted(stamps(made.tree.folder)) == ["failed_0_1.txt"]
    assert "the run failed before it started" in capsys.readouterr().err
    assert started(made) == ["1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--runs", "0"], "--runs is 0; it must be a positive integer"),
        (["--runs", "2", "--", "--resume"], "a resumed run is not a result"),
        (["--runs=2", "--system", "../box"], "--system is '../box'"),
        (["--runs=2", "--series", ".."], "--series is '..'"),
        (["--runs=2", "--tree", ""], "--tree has an empty value"),
        (["--runs=2", "--tree=~/tree"], "--tree is ~/tree: your shell did not expand the ~"),
        (["--runs", "2", "--", "--batch-size", "0"], "--batch-size is 0; it must be any integer in [1, 2^31)"),
        (["--runs", "2", "--", "--seed", str(2**63 - 1)], f"--seed is {2**63}; it must be"),
        (["--runs", "2", "--", "--dataset-dir", "nowhere"], "no data set in nowhere"),
    ],
)
def test_wrong_options_are_refused_before_the_first_run(
    arguments: list[str], said: str, made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    assert made.run(*arguments) == 1
    assert said in capsys.readouterr().err
    assert not made.tree.root.exists()


@pytest.mark.parametrize(
    ("variables", "state", "said"),
    [
        ({}, ("unknown", None), "the commit is not known"),
        ({"SUBMISSION_DIVISION": "closed"}, ("0" * 40, True), "files differ from the commit; "),
        ({"SUBMISSION_DIVISION": "ajar"}, ("0" * 40, False), "SUBMISSION_DIVISION is 'ajar'; it must be one of closed"),
        ({"SUBMISSION_STATUS": "sold"}, ("0" * 40, False), "SUBMISSION_STATUS is 'sold'; it must be one of onprem"),
        ({"NPROC_PER_NODE": "all"}, ("0" * 40, False), "NPROC_PER_NODE is 'all'"),
    ],
)
def test_surroundings_in_which_no_log_would_be_accepted_are_refused_before_the_first_run(
    variables: dict[str, str],
    state: tuple[str, bool | None],
    said: str,
    made: MadeUpRuns,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(series, "git_revision", lambda: state)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert made.run("--runs", "2") == 1
    assert said in capsys.readouterr().err
    assert not made.tree.root.exists()


def test_the_closed_division_wants_its_configuration_and_data_before_the_first_run(
    made: MadeUpRuns, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SUBMISSION_DIVISION", "closed")
    assert made.run("--runs", "2") == 1
    error = capsys.readouterr().err
    assert "no log would be accepted in the closed division: hidden_size is not 800, " in error
    assert "is not made of the official archives of LibriSpeech" in error
    assert "21 utterances for train, not all 281,241" in error
    assert "7 utterances for validation, not all 5,567" in error
    assert not made.tree.root.exists()


def test_a_variable_that_is_empty_counts_as_unset(made: MadeUpRuns, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SUBMISSION_ORG", "SUBMISSION_DIVISION", "SUBMISSION_STATUS", "SUBMISSION_PLATFORM"):
        monkeypatch.setenv(variable, "")
    assert made.run("--runs", "1") == 0
    described = json.loads(made.tree.description.read_text())
    assert (described["submitter"], described["division"]) == ("reference", "open")


@pytest.mark.parametrize(
    ("config", "name"),
    [("librispeech", "deepspeech2"), ("librispeech-2018", "deepspeech2"), ("librispeech-100", "librispeech-100")],
)
def test_a_series_on_librispeech_has_the_benchmarks_name(
    config: str, name: str, made: MadeUpRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    made.give(1, Forged([], None), status=1)
    assert made.run("--runs", "1", "--", "--config", config) == 1
    assert f"/results/box/{name}/failed_0_1.txt" in capsys.readouterr().err


def test_a_tree_of_librispeech_runs_passes_mlcommons_package_checker(tmp_path: Path) -> None:
    """It skips the results, whose benchmark it does not know; it wants one machine's file for each of their folders."""
    folder = SubmissionDir(tmp_path, "box", "deepspeech2")
    with folder.locked():
        folder.describe(describe_system(describe_machine(CPU), 1))
    for number in range(10):
        made_up(reference(seed=number), division="closed").write(folder.result(number))
    check = [sys.executable, "-m", "mlperf_logging.package_checker", str(tmp_path), "training", RULESET]
    run = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Skipping benchmark: deepspeech2" in run.stdout + run.stderr
    tree = inspect.signature(series.run_series).parameters["tree"].default
    assert not any(tree in config.output_dir.parents for config in CONFIGS.values())  # where single runs write


def test_two_series_on_one_machine_are_refused(tmp_path: Path) -> None:
    folder = SubmissionDir(tmp_path, "box", "an4")
    folder.folder.mkdir(parents=True)
    other = os.open(folder.folder.parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another series of runs is working in"), folder.locked():
        pass
    os.close(other)
    with folder.locked():
        pass


def test_the_description_of_another_machine_or_submission_is_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, here = SubmissionDir(tmp_path, "box", "an4"), describe_system(describe_machine(CPU), 1)
    folder.describe(here)
    folder.describe({**here, "cooling": "air"})  # what the one there says of the rest is its owner's business
    with pytest.raises(RunError, match="is of another machine or submission"):
        folder.describe({**here, "host_processor_model_name": "Abacus"})
    monkeypatch.setenv("SUBMISSION_ORG", "ACME")
    with pytest.raises(RunError, match="submitter is 'reference' there, 'ACME' here"):
        folder.describe(describe_system(describe_machine(CPU), 1))
    folder.description.write_text("[]")
    with pytest.raises(RunError, match="no description of a machine"):
        folder.describe(here)


@pytest.mark.parametrize("path", sorted((ROOT / "systems").glob("*.json")), ids=lambda path: path.stem)
def test_committed_descriptions_pass_mlcommons_checker(path: Path) -> None:
    assert system_desc_checker.check_system_desc(str(path), "training", RULESET)[0]


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
