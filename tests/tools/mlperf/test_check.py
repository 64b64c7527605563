"""The checker: valid logs of real runs pass; what is wrong with any other is said, with its line."""

import dataclasses
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.corpora import CORPORA
from pytorch.config import CONFIGS, HYPERPARAMETERS
from pytorch.errors import RunError
from tests.conftest import ROOT
from tests.tools.conftest import Trained
from tests.tools.mlperf.forged import Forged, made_up, reference
from tests.tools.mlperf.made_up_logs import add
from tests.tools.mlperf.test_runlog import COMMITTED
from tools.mlperf.__main__ import main
from tools.mlperf.check import NEWEST, RULES, RULESETS, broken_rules, check
from tools.mlperf.runlog import RunLog

ARCHIVES = sorted((ROOT / "results").glob("*/*.tar.xz"))
CLOSED_TUNABLE = {"seed", "max_epochs", "max_steps", "batch_size", "learning_rate", "lr_gamma"}
CLOSED_TUNABLE |= {"warmup_steps", "gradient_accumulation_steps"}
SINCE_6_1 = 9  # keys that ruleset 6.1.0 asks for, and older ones do not


@pytest.fixture(scope="module")
def real(trained: Trained) -> Path:
    """The log of a real run of several epochs that reached its target."""
    return trained.checkpoint.parent / "mlperf_ds2.log"


@pytest.fixture
def forged(real: Path) -> Forged:
    return Forged.of(real)


def reasons(path: Path, division: str | None = None) -> list[str]:
    try:
        return [violation.reason for violation in check(path, division)[1]]
    except RunError as damaged:
        return [str(damaged)]


def test_a_real_log_keeps_the_open_rules_and_says_why_it_is_no_librispeech_result(
    real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(real)]) == 0
    output = capsys.readouterr().out
    assert "passes our open rules: WER" in output
    assert "not a LibriSpeech result: the corpus is manifest" in output


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_committed_logs_keep_the_rules_whether_they_reach_their_target_or_not(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    for path in sorted(tmp_path.glob("*.txt"))[:: 1 if "synthetic" in archive.name else 4]:  # seconds for each
        log, found = check(path)
        assert log.resumed or all(each.missed_target for each in found), path


# --- MLCommons' own rules, of each round


def test_a_new_log_keeps_the_rules_of_every_round_since_the_last_with_a_speech_benchmark(real: Path) -> None:
    """The newest one is whatever the installed package has: when it has a new one, this finds out."""
    log = RunLog.read(real)
    assert RULESETS[0] == "3.1.0"
    for ruleset in RULESETS:
        broken = broken_rules(log, f"training_{ruleset}/common.yaml", ruleset)
        assert list(map(str, broken)) == [], ruleset


def test_older_logs_keep_the_rules_of_the_rounds_before_6_1() -> None:
    log = RunLog.read(COMMITTED[0])
    for ruleset in RULESETS:
        missing = broken_rules(log, f"training_{ruleset}/common.yaml", ruleset)
        assert len(missing) == (0 if ruleset < "6.1" else SINCE_6_1), ruleset


def test_what_breaks_a_rounds_rules_is_said_with_its_line(forged: Forged, tmp_path: Path) -> None:
    forged.edit("micro_batch_size", 0)
    log = RunLog.read(forged.write(tmp_path / "run.log"))
    (broken,) = broken_rules(log, f"training_{NEWEST}/common.yaml")
    assert log.events[[event.line for event in log.events].index(broken.line or 0)].key == "micro_batch_size"


# --- this project's rules


def test_the_packages_own_command_applies_the_same_rules(real: Path, forged: Forged, tmp_path: Path) -> None:
    forged.edit("eval_accuracy", -1.0)
    for path, status in [(real, 0), (forged.write(tmp_path / "forged.log"), 1)]:
        command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--ruleset", NEWEST, "--werror"]
        command += ["--config", str(RULES / "open.yaml"), str(path)]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
        assert run.returncode == status, run.stderr
    assert "the WER is not a number >= 0" in run.stderr


# Mistakes that are made in good faith, on the log of a real run of several epochs that reached its target.


def fewer_errors_in_all(log: Forged) -> None:
    first = log.events[log.positions("validation_errors")[0]]["metadata"]
    errors = first["word_errors"] - 1
    log.edit("validation_errors", number=0, word_errors=errors, wer=100 * errors / first["words"])
    log.edit("eval_accuracy", 100 * errors / first["words"], number=0)


def end_after_the_first_epoch(log: Forged) -> None:
    del log.events[log.positions("epoch_start")[1] : log.positions("run_stop")[0]]


def leave_out(log: Forged, keys: str, number: int = 0) -> None:
    for key in keys.split():
        log.remove(key, number)


@pytest.mark.parametrize(
    ("mutate", "reason"),
    [
        (lambda log: log.edit("eval_accuracy", 0.25, number=-1), "the WER is 0.25, but"),
        (fewer_errors_in_all, "the subsets' errors do not add up to those of all"),
        (lambda log: log.edit("eval_accuracy", number=0, utterances=5), "validation utterances were counted"),
        (lambda log: log.edit("configuration", target_wer=99.0), "training went on although epoch"),
        (end_after_the_first_epoch, "it claims success, but the last evaluation missed the target"),
        (lambda log: leave_out(log, "epoch_start epoch_stop eval_start eval_accuracy eval_stop", 1), "without gaps"),
        (lambda log: leave_out(log, "eval_start eval_accuracy eval_stop"), "epoch 1 has no complete evaluation"),
        (lambda log: log.edit("configuration", max_epochs=1), "more epochs than max_epochs"),
        (lambda log: log.remove("seed"), "'seed' but found 0"),
        (lambda log: log.edit("seed", 77), "seed is not that of the event seed"),
        (lambda log: log.edit("configuration", tempo_max=9.0), "--tempo-max is 9.0"),
        (lambda log: log.edit("configuration", weight_decay=None), "it lacks weight_decay"),
        (lambda log: log.edit("configuration", luck=1), "'luck'"),
        (lambda log: log.edit("configuration", max_epochs=True), "max_epochs is True: it has the wrong type"),
        (lambda log: log.remove("train_loss", 5), "steps must count from 1 without gaps"),
        (lambda log: log.remove("train_loss", -1), "its step is not the last one, "),
        (lambda log: log.edit("train_loss", float("nan"), number=4), "is not a finite number"),
        (lambda log: log.shift("epoch_stop", -9.0), "the clock was set back by 9.0 s"),
        (lambda log: log.shift("run_stop", 60.0), "run_start to run_stop took"),
        (lambda log: setattr(log, "result", str(log.result).replace(",1,", ",9,", 1)), "RESULT: the seed 9 is not"),
        (lambda log: setattr(log, "result", None), "the log is cut off"),
        (lambda log: add(log, "git_commit", "resumed", True), "the run was resumed"),
        (
            lambda log: log.events.insert(log.positions("init_stop")[0], log.events.pop(log.positions("run_start")[0])),
            "run_start: not after init_stop",
        ),
        (lambda log: log.shift("init_stop", 5 * 3600), "initialization took more than 240 minutes"),
        (lambda log: log.edit("git_commit", "unknown"), "the commit is not known"),
        (lambda log: log.edit("submission_benchmark", "rnnt"), "the benchmark is not deepspeech2"),
        (lambda log: log.edit("train_samples_left_out", 9), "not as many utterances as are named"),
    ],
)
def test_a_log_that_is_wrong_is_refused_with_its_reason(
    mutate: Callable[[Forged], object], reason: str, forged: Forged, tmp_path: Path
) -> None:
    mutate(forged)
    found = reasons(forged.write(tmp_path / "forged.log"))
    assert any(reason in each for each in found), found


@pytest.mark.parametrize("division", ["open", "closed"])
def test_a_librispeech_run_that_missed_its_target_is_refused_for_that_reason_alone(
    division: str, tmp_path: Path
) -> None:
    path = made_up(reference(), wers=(60.0, 50.0), division=division).write(tmp_path / "run.log")
    (violation,) = check(path)[1]
    assert violation.missed_target
    assert violation.reason == "no result: the run did not reach its target WER of 23.0"
    assert path.read_text().splitlines()[(violation.line or 0) - 1].count("run_stop")


def test_synthetic_speech_that_is_not_the_reference_checksums_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another platform the same sentences may sound a little different."""
    config = dataclasses.replace(CONFIGS["synthetic"], precision="fp32", batch_size=100)
    log = made_up(config, corpus="synthetic", train_samples=1800, validation={"synthetic-validation": 240})
    for digest, noted in ((CORPORA["synthetic"].reference_digest, False), ("1" * 64, True)):
        log.edit("dataset", digest)
        assert main(["check", str(log.write(tmp_path / "run.log"))]) == 0
        assert (f"synthetic's reference checksum: its digest is {digest}" in capsys.readouterr().out) is noted


# --- closed: nobody has run it, so its rules are tested on a log that is made up


@pytest.fixture
def closed() -> Forged:
    return made_up(reference(), division="closed")


def test_the_reference_recipe_on_all_of_librispeech_keeps_the_closed_rules(
    closed: Forged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = closed.write(tmp_path / "closed.log")
    assert reasons(path) == []
    assert main(["check", str(path), "--division", "closed"]) == 0
    assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "metadata", "reason"),
    [
        ("dataset", ..., {"corpus": "librispeech-100"}, "the corpus is librispeech-100"),
        ("train_samples", 28539, {}, "not the 281,241 utterances"),
        ("git_commit", ..., {"uncommitted_changes": True}, "files differed from the commit"),
        ("cache_clear", False, {"reason": "not permitted"}, "the cache was not cleared"),
        ("submission_division", "open", {}, "it is not of the closed division"),
        ("init_stop", ..., {}, "initialization took more than 30 minutes"),
    ],
)
def test_closed_rules_refuse(
    key: str, value: object, metadata: dict, reason: str, closed: Forged, tmp_path: Path
) -> None:
    closed.edit(key, value, **metadata)
    if key == "init_stop":
        closed.shift(key, 3600)
    found = reasons(closed.write(tmp_path / "closed.log"), "closed")
    assert any(reason in each for each in found), found


@pytest.mark.parametrize(
    ("changes", "options", "why"),
    [
        ({}, {"validation": {"dev-clean": 2703}}, "not the 5,567 utterances of dev-clean and dev-other"),
        ({}, {"validation": {"dev-clean": 2567, "dev-other": 3000}}, "not dev-clean (2,703 utterances) and dev-other"),
        ({}, {"train_samples": 28539}, "not the 281,241 utterances of train-clean-100"),
        ({"hidden_size": 400}, {}, "hidden_size is 400, not 800: it is another model"),
        ({"conv_channels": 8}, {}, "conv_channels is 8, not 32: it is another model"),
        ({"target_wer": 30.0}, {"wers": (40.0, 25.0)}, "the target is 30.0, not 23.0"),
    ],
)
def test_a_run_on_librispeech_that_is_easier_is_said_to_be_no_librispeech_result(
    changes: dict[str, Any], options: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = made_up(reference(**changes), **options).write(tmp_path / "easier.log")
    assert main(["check", str(path)]) == 0
    assert f"note: not a LibriSpeech result: {why}" in capsys.readouterr().out


def test_the_closed_rules_fix_every_hyperparameter_that_the_reference_does_not_leave_free(tmp_path: Path) -> None:
    free, fixed = {"seed": 5, "batch_size": 2048, "learning_rate": 1e-4, "warmup_steps": 7}, reference()
    log = made_up(reference(**free, lr_gamma=1.2), division="closed")
    assert reasons(log.write(tmp_path / "free.log"), "closed") == []
    for name in set(HYPERPARAMETERS) - CLOSED_TUNABLE:
        value = getattr(fixed, name)
        log = made_up(fixed, division="closed", train_samples=4096)
        change: dict[str, Any] = {name: {"sgd": "adamw", "anneal": "cosine"}.get(str(value), 0.5)}
        log.edit("configuration", **change)
        found = reasons(log.write(tmp_path / "fixed.log"), "closed")
        assert f"configuration: {name} is not {value}" in found


def test_the_page_of_requirements_names_only_tests_that_exist() -> None:
    page = (ROOT / "docs" / "mlperf_requirements.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_[a-z0-9_]+)`", page)
    assert len(names) > 15
    assert [name for name in names if f"def {name}(" not in tests] == []
    for name in re.findall(r"`([a-z_/]+\.(?:py|sh|yaml|json|lock))`", page):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
