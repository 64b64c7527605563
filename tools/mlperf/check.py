"""Does a log prove what it says? Our rules, applied by the compliance checker of the package mlperf-logging, and then
what no single line shows: a clock that was set, a log pieced together from two runs, counts that do not match rates.

The rules are this project's: the official list of benchmarks has no DeepSpeech2. For MLCommons' own, see package.py.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.compliance_checker.mlp_parser.ruleset_310 import LogLine
from mlperf_logging.mllog import constants

from data.corpora import CORPORA
from pytorch.config import CONFIGS, EVENTS, HYPERPARAMETERS, Config
from pytorch.errors import RunError
from pytorch.machine import MAX_CPU_TAKEN
from pytorch.metrics import ErrorCounts
from pytorch.mllog import BENCHMARK
from tools.mlperf.runlog import CALLER, RunLog, with_current_names

OLDEST = (3, 1, 0)  # MLPerf's last round with a speech benchmark
_ROUNDS = sorted(tuple(map(int, name.split("."))) for name in mlp_compliance.rule_choices())
RULESETS = [".".join(map(str, each)) for each in _ROUNDS if each >= OLDEST]  # that the package has
NEWEST = RULESETS[-1]
RULES = Path(__file__).parent / "rules"
DIVISIONS = {constants.OPEN: ["open"], constants.CLOSED: ["open", "librispeech", "closed"]}
NO_RESULT = "no result: "  # prefix of the one rule that a valid log breaks if its run missed the target
MISSED_TARGET = "the target was not reached"
REFERENCE = CONFIGS["librispeech"]
SLACK = 1.0  # seconds that two measurements of one time may differ by
Found = tuple[int | None, str]  # line, reason


@dataclass(frozen=True)
class Violation:
    """A rule that a log breaks; `line` counts from 1, and is None for what concerns no single line."""

    path: Path
    line: int | None
    reason: str

    @property
    def missed_target(self) -> bool:
        """Whether all that is wrong is that the run did not reach its target."""
        return self.reason.startswith(NO_RESULT)

    def __str__(self) -> str:
        return f"{self.path}:{'' if self.line is None else f'{self.line}:'} {self.reason}"


def check(path: Path, division: str | None = None) -> tuple[RunLog, list[Violation]]:
    """Read a log and apply the rules of a division, by default that of the log.

    Return the log, and what is wrong with it: nothing if it is a result. RunError if the file is no log, or damaged.
    """
    log = RunLog.read(path)
    division = division or str(log.value(constants.SUBMISSION_DIVISION))
    found = [each for rules in DIVISIONS.get(division, ["open"]) for each in broken_rules(log, RULES / f"{rules}.yaml")]
    if all(each.missed_target for each in found):  # else types and order are not what the other checks work with
        found += [Violation(path, line, reason) for line, reason in _inconsistencies(log)]
    return log, found


def describe(path: Path, division: str | None = None) -> tuple[list[str], bool]:
    """Check a log. Return what there is to say, in lines, and whether it is a result. Raises what `check` does."""
    log, found = check(path, division)
    if found:
        return [str(each) for each in found], False
    rules, last = division or log.value(constants.SUBMISSION_DIVISION), log.epochs[-1]
    passed = f"{path}: passes our {rules} rules: WER {last.wer:.2f} in {log.seconds:.1f} s, epoch {last.number}"
    return [passed, *(f"{path}: note: {note}" for note in notes(log))], True


def load_valid(paths: list[Path]) -> list[RunLog]:
    """Read the logs of several runs, which may have missed their target; RunError where one is wrong otherwise."""
    checked = [check(path) for path in paths]
    if wrong := [each for _, found in checked for each in found if not each.missed_target]:
        raise RunError(str(wrong[0]))
    return [log for log, _ in checked]


def notes(log: RunLog) -> list[str]:
    """Return what a reader must know besides the figures of a log that follows the open rules."""
    why = ineligibility(log)
    found = [f"not a LibriSpeech result: {why}"] if why else []
    corpus = CORPORA.get(log.dataset.corpus) if log.dataset is not None else None
    if log.dataset is not None and corpus is not None and corpus.reference_digest not in ("", log.dataset.digest):
        digest = f"its digest is {log.dataset.digest}"
        found.append(f"the data set is not that of {corpus.name}'s reference checksum: {digest}")
    if log.dirty:
        found.append("files differed from the commit, which alone may not reproduce this run")
    if log.cache_cleared is False:
        reason = log.metadata(constants.CACHE_CLEAR).get("reason")
        because = f" ({reason})" if reason else ""
        found.append(f"the data set may have been in memory already: the page cache was not cleared{because}")
    if log.cpu_taken + log.cpu_stolen > MAX_CPU_TAKEN:
        took = f"other programs took {log.cpu_taken:.0%} of the CPU time, the hypervisor {log.cpu_stolen:.0%}"
        found.append(f"{took}: the run's time is not a valid benchmark result")
    return found


def ineligibility(log: RunLog) -> str:
    """Return why a log that follows the open rules is not a result of this benchmark; empty if it is one."""
    broken = [each.reason for each in broken_rules(log, RULES / "librispeech.yaml")]
    if not broken:
        return "" if log.reached else MISSED_TARGET
    return min(broken, key=lambda reason: not reason.startswith("dataset: ")).partition(": ")[2]


# --- a line: the rules files


class _Checker(mlp_compliance.ComplianceChecker):
    """The package's checker, which knows this benchmark, and keeps each message with its line."""

    def __init__(self, ruleset: str) -> None:
        super().__init__("training", ruleset, quiet=False, werror=True)
        self.violations: dict[str, list[int | None]] = {}  # by reason: which events, counted from 0
        self._failing: tuple[int | None, str] | None = None

    def run_check_eval(self, ll: Any, tests: list[str] | str, state: dict[str, Any]) -> None:
        for test in [tests] if isinstance(tests, str) else tests:
            rule, _, reason = test.partition("  # ")
            if BENCHMARK in rule or not _names_us(ll):  # else it is MLCommons' list of benchmarks
                reason = reason.format_map(state["s"]) or f"failed test: {rule.strip()}"
                self._failing = ll.lineno, reason if reason.startswith(NO_RESULT) else f"{ll.key}: {reason}"
                super().run_check_eval(ll, test, state)
                self._failing = None

    def run_check_exec(self, ll: Any, code: str, state: dict[str, Any], action: str) -> None:
        if not _names_us(ll):  # which would look for MLCommons' rules for this benchmark
            super().run_check_exec(ll, code, state, action)

    def put_message(self, msg: str, key: str | None = None) -> None:
        event, reason = self._failing or (None, msg.splitlines()[0])
        self.violations.setdefault(reason, []).append(event)


def _names_us(line: Any) -> bool:
    return line.key == constants.SUBMISSION_BENCHMARK and line.value["value"] == BENCHMARK


def broken_rules(log: RunLog, rules: Path | str, ruleset: str = NEWEST) -> list[Violation]:
    """Return what breaks a rules file, which is ours or one of the package's, each reason once."""
    lines = [
        LogLine("", event.time_ms, event.key, {"value": event.value, "metadata": event.metadata}, lineno=number)
        for number, event in enumerate(log.events)
    ]
    checker = _Checker(ruleset)
    checker.check_loglines(lines, str(rules))
    found = []
    for reason, events in checker.violations.items():
        more = f" (and in {len(events) - 1} more lines)" if len(events) > 1 else ""
        line = None if events[0] is None else log.events[events[0]].line
        found.append(Violation(log.path, line, reason + more))
    return found


def configuration_problem(plain: dict[str, Any], logged: dict[str, Any]) -> str:
    """Return what is wrong with the metadata of the event `configuration`, or nothing. For the rules files.

    Older logs may lack fields that are no hyperparameters. `logged` has the values of the events that log a field once
    more, by the field's name.
    """
    plain = with_current_names({name: value for name, value in plain.items() if name not in CALLER})
    if missing := [name for name in ("config", "precision", *HYPERPARAMETERS) if name not in plain]:
        return f"it lacks {', '.join(missing)}"
    try:
        Config(**plain)
    except (RunError, TypeError) as error:  # a constraint is broken; a field is unknown, or has the wrong type
        return str(error)
    for name in HYPERPARAMETERS:
        kind = type(getattr(REFERENCE, name))
        if type(plain[name]) not in {float: (int, float), type(None): (int, type(None))}.get(kind, (kind,)):
            return f"{name} is {plain[name]!r}: it has the wrong type"
    differ = (f"{name} is not that of the event {EVENTS[name]}" for name in logged if plain[name] != logged[name])
    return next(differ, "")


def reference_problem(plain: dict[str, Any]) -> str:
    """Return in what a configuration is not the reference recipe on LibriSpeech, or nothing. For the rules files."""
    reference, plain = CONFIGS["librispeech-2018"].to_dict(), with_current_names(plain)
    fixed = [field.name for field in dataclasses.fields(Config) if not field.metadata["free_in_closed"]]
    names = [name for name in fixed if name in HYPERPARAMETERS and plain.get(name) != reference[name]]
    return ", ".join(f"{name} is not {reference[name]}" for name in names)


# --- several lines together, of a log that keeps the open rules


def clock_problem(log: RunLog) -> Found | None:
    """Return how the times of any log contradict each other or its RESULT line, which another clock has measured."""
    for before, event in pairwise(log.events):
        if event.time_ms < before.time_ms - 1000 * SLACK:
            back = (before.time_ms - event.time_ms) / 1000
            return event.line, f"{event.key}: the clock was set back by {back:.1f} s"
    if log.result is not None and log.seconds is not None and abs(log.result.seconds - log.seconds) > SLACK:
        took = f"run_start to run_stop took {log.seconds:.1f} s"
        return log.result.line, f"RESULT: {log.result.seconds} s, but {took}: the clock was set, or a write was slow"
    return None


def _inconsistencies(log: RunLog) -> Iterator[Found]:
    if (clock := clock_problem(log)) is not None:
        yield clock
    if log.result is None and log.reached:
        yield None, "the log is cut off: a success ends with a RESULT line"
    if log.result is not None and not log.reached:
        yield log.result.line, "RESULT: the run did not reach its target"
    if log.result is not None and log.result.seed != log.seed:
        yield log.result.line, f"RESULT: the seed {log.result.seed} is not that of the event, {log.seed}"
    for epoch, accuracy in zip(log.epochs, log.all(constants.EVAL_ACCURACY), strict=False):
        total = epoch.errors.get("all", ErrorCounts())
        parts = sum((counts for subset, counts in epoch.errors.items() if subset != "all"), ErrorCounts())
        if total.utterances != log.value(constants.EVAL_SAMPLES):
            yield accuracy.line, f"epoch {epoch.number}: validation_errors counts other utterances than eval_samples"
        elif not math.isclose(accuracy.value, total.wer):
            wrong = f"{total.word_errors} errors in {total.words} words are {total.wer:.4f} %"
            yield accuracy.line, f"epoch {epoch.number}: the WER is {accuracy.value}, but {wrong}"
        if not all(math.isclose(getattr(parts, field), value) for field, value in vars(total).items()):
            yield accuracy.line, f"epoch {epoch.number}: the subsets' errors do not add up to those of all"
