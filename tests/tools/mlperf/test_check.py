"""The checker: valid logs of real runs pass; what is wrong with any other is said, with its line."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytorch.config import CONFIGS, HYPERPARAMETERS, Config
from pytorch.errors import RunError
from tests.conftest import ROOT
from tests.tools.conftest import Trained
from tests.tools.mlperf.forged import Forged, made_up, reference
from tests.tools.mlperf.mutations import BROKEN, MUTATIONS
from tools.mlperf.__main__ import main
from tools.mlperf.check import RULES, check
from tools.mlperf.configuration import configuration_problem

MACHINES = "1-h200", "2-cores-zen5"
COMMITTED = sorted(path for each in MACHINES for path in (ROOT / "results" / each).glob("*/result_*.txt"))
CLOSED_TUNABLE = {"seed", "max_epochs", "max_steps", "batch_size", "learning_rate", "lr_gamma"}
CLOSED_TUNABLE |= {"warmup_steps", "gradient_accumulation_steps"}


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


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_committed_result_keeps_the_open_rules(path: Path) -> None:
    assert reasons(path, "open") == []


def test_the_packages_own_command_applies_the_same_rules(real: Path, forged: Forged, tmp_path: Path) -> None:
    forged.edit("eval_accuracy", -1.0)
    for path, status in [(real, 0), (forged.write(tmp_path / "forged.log"), 1)]:
        command = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--ruleset", "3.1.0", "--werror"]
        command += ["--config", str(RULES / "open.yaml"), str(path)]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
        assert run.returncode == status, run.stderr
    assert "the WER is not a number >= 0" in run.stderr


@pytest.mark.parametrize("prefix", ["0: ", "[rank0]: ", "2026-11-26T04:44:12.123456789Z "])
def test_a_log_whose_lines_a_launcher_has_marked_is_read(prefix: str, real: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked.log"
    marked.write_text("".join(f"{prefix}{line}\n" for line in real.read_text().splitlines()))
    assert check(marked)[1] == []


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_log_that_is_wrong_is_refused_with_its_reason(name: str, forged: Forged, tmp_path: Path) -> None:
    mutate, reason = MUTATIONS[name]
    mutate(forged)
    found = reasons(forged.write(tmp_path / "forged.log"))
    assert any(reason in each for each in found), found


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_in_one_line(
    name: str, real: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, reason = BROKEN[name]
    path = tmp_path / "broken.log"
    path.write_bytes(damage(real.read_text()))
    assert main(["check", str(path)]) == 1
    output = capsys.readouterr().out
    assert output.startswith(f"{path}:")
    assert reason in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("lines", [1, 5, 20, 30, 60])
def test_a_log_that_is_cut_off_between_lines_is_refused(lines: int, forged: Forged, tmp_path: Path) -> None:
    forged.result = None
    forged.events = forged.events[:-lines]
    assert reasons(forged.write(tmp_path / "cut.log"))


def test_every_check_is_made_of_every_log_that_is_named(
    real: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["check", str(tmp_path / "absent.log"), str(real)]) == 1
    output = capsys.readouterr().out
    assert "absent.log: cannot be read: No such file or directory" in output
    assert "passes our open rules" in output
    assert main(["check"]) == 1


@pytest.mark.parametrize("division", ["open", "closed"])
def test_a_librispeech_run_that_missed_its_target_is_refused_for_that_reason_alone(
    division: str, tmp_path: Path
) -> None:
    path = made_up(reference(), wers=(60.0, 50.0), division=division).write(tmp_path / "run.log")
    (violation,) = check(path)[1]
    assert violation.missed_target
    assert violation.reason == "no result: the run did not reach its target WER of 23.0"
    assert path.read_text().splitlines()[(violation.line or 0) - 1].count("run_stop")


@pytest.mark.parametrize("seconds", [-0.5, 0.5])
def test_a_clock_that_is_set_by_less_than_a_second_is_no_reason_to_refuse(
    seconds: float, forged: Forged, tmp_path: Path
) -> None:
    forged.shift("epoch_stop", seconds)
    assert reasons(forged.write(tmp_path / "run.log")) == []


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-3600.0, ": train_loss: the clock was set back by 3"),
        (3600.0, " s: the clock was set"),
    ],
)
def test_a_clock_that_was_set_is_said_in_one_line(
    seconds: float, said: str, forged: Forged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forged.shift("train_loss", seconds, number=3)
    assert main(["check", str(forged.write(tmp_path / "set.log"))]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert said in line


def test_a_cache_that_could_not_be_cleared_is_noted_in_the_open_division_and_refused_in_the_closed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for division, status in (("open", 0), ("closed", 1)):
        log = made_up(reference(), division=division)
        log.edit("cache_clear", False, reason="3 pages of train/audio.npy are still cached")
        assert main(["check", str(log.write(tmp_path / f"{division}.log"))]) == status
    said, refused = capsys.readouterr().out.splitlines()[-2:]
    assert said.endswith(
        "note: the data set may have been in memory already: the page cache was not cleared "
        "(3 pages of train/audio.npy are still cached)"
    )
    assert refused.endswith("cache_clear: the cache was not cleared")


def test_synthetic_speech_that_is_not_the_reference_checksums_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another platform the same sentences may sound a little different."""
    config = dataclasses.replace(CONFIGS["synthetic"], precision="fp32", batch_size=100)
    log = made_up(config, corpus="synthetic", train_samples=1800, validation={"synthetic-validation": 240})
    assert main(["check", str(log.write(tmp_path / "reference.log"))]) == 0
    assert "checksum" not in capsys.readouterr().out
    log.edit("dataset", "1" * 64)
    assert main(["check", str(log.write(tmp_path / "other.log"))]) == 0
    assert f"note: the data set is not that of synthetic's reference checksum: its digest is {'1' * 64}" in (
        capsys.readouterr().out
    )


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


def test_real_logs_break_the_closed_rules(real: Path) -> None:
    found = reasons(real, "closed")
    assert "dataset: the corpus is not LibriSpeech" in found
    assert "submission_division: the log says that it is not of the closed division" in found
    assert any(each.startswith("configuration: ") and "optimizer is not sgd" in each for each in found)


@pytest.mark.parametrize(
    ("key", "value", "metadata", "reason"),
    [
        ("dataset", ..., {"official_archives": False}, "the archives were not the official ones"),
        ("dataset", ..., {"corpus": "librispeech-100"}, "the corpus is not LibriSpeech"),
        ("dataset", ..., {"synthetic": True}, "the speech is synthetic"),
        ("eval_samples", 2703, {}, "not the 5,567 utterances of dev-clean and dev-other"),
        ("train_samples", 28539, {}, "not the 281,241 utterances"),
        ("git_commit", ..., {"uncommitted_changes": True}, "files differed from the commit"),
        ("cache_clear", False, {"reason": "not permitted"}, "the cache was not cleared"),
        ("configuration", ..., {"target_wer": 23.5}, "target_wer is not 23.0"),
        ("configuration", ..., {"hidden_size": 400}, "hidden_size is not 800"),
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
        ({}, {"validation": {"dev-clean": 2703}}, "the validation set is not dev-clean and dev-other"),
        ({}, {"validation": {"dev-clean": 234, "dev-other": 10}}, "the validation set is not all 5,567 utterances"),
        ({}, {"train_samples": 28539}, "the training set has 28,539 utterances, not all 281,241"),
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


def test_a_configuration_is_legal_in_a_log_exactly_where_it_is_on_the_command_line() -> None:
    plain = json.loads(json.dumps(CONFIGS["an4"].to_dict()))
    assert configuration_problem({**plain, "file": "train.py", "lineno": 3}) == ""
    for field in dataclasses.fields(Config):
        constraint = field.metadata["constraint"]
        values: list[Any] = [-1, 0, 1, 0.5, 1e31, 3, None, True, "adamw", "x", [1], {}]
        for value in values:
            try:
                legal = constraint is None or bool(constraint.check(value))
            except TypeError:
                legal = False
            if not legal and not (value is None and field.name == "max_steps"):
                assert configuration_problem({**plain, field.name: value}), (field.name, value)


def test_logs_are_read_without_importing_pytorch() -> None:
    code = "import sys; from tools.mlperf.runlog import RunLog; from pathlib import Path; "
    code += f"print(RunLog.read(Path({str(COMMITTED[0])!r})).reached, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "True False\n"


def test_a_log_with_the_waiting_statistics_of_earlier_versions_is_read(forged: Forged, tmp_path: Path) -> None:
    forged.edit("epoch_stop", rank_wait_fractions=[0.25, 0.0], communication_fraction=0.0)
    assert reasons(forged.write(tmp_path / "run.log")) == []


def test_the_page_of_requirements_names_only_tests_that_exist() -> None:
    page = (ROOT / "docs" / "mlperf_requirements.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    names = re.findall(r"`(test_[a-z0-9_]+)`", page)
    assert len(names) > 15
    assert [name for name in names if f"def {name}(" not in tests] == []
    for name in re.findall(r"`([a-z_/]+\.(?:py|sh|yaml|json|lock))`", page):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
