"""Whether a log proves what it says: our rules files, applied by the compliance checker of the package mlperf-logging,
and then what only several lines together can show (consistency.py).

The rules are this project's: the official list of benchmarks has no DeepSpeech2.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.compliance_checker.mlp_parser import parse_file
from mlperf_logging.mllog import constants

from data.corpora import CORPORA
from pytorch.cli import RunError
from pytorch.config import CONFIGS
from tools.mlperf.consistency import inconsistencies
from tools.mlperf.logs import RunLog

RULESET = "3.1.0"  # of the package: how lines are read. The rules themselves are in RULES.
RULES = Path(__file__).parent / "rules"
DIVISIONS = {constants.OPEN: ["open"], constants.CLOSED: ["open", "closed"]}
NO_RESULT = "no result: "  # how the rule begins that a sound log of a run breaks that did not reach its target
UNREACHED = "the target was not reached"
LIBRISPEECH = CORPORA["librispeech"]
REFERENCE = CONFIGS["librispeech"]


@dataclass(frozen=True)
class Violation:
    """A rule that a log breaks; `line` counts from 1, and is None for what concerns no single line."""

    line: int | None
    reason: str

    @property
    def unreached(self) -> bool:
        """Whether all that is wrong is that the run did not reach its target."""
        return self.reason.startswith(NO_RESULT)


def check(path: Path, division: str | None = None) -> tuple[RunLog, list[Violation]]:
    """Read a log and apply the rules of a division, by default that of the log.

    Returns:
        The log, and what is wrong with it: an empty list for a result.

    Raises:
        RunError: the file is no log, or a line of it is damaged.
    """
    log = RunLog.read(path)
    if division is None:
        division = log.value(constants.SUBMISSION_DIVISION)
    found = [each for rules in DIVISIONS.get(str(division), ["open"]) for each in _broken_rules(log, rules)]
    if all(each.unreached for each in found):  # else types and order are not what the other checks work with
        found += [Violation(line, reason) for line, reason in inconsistencies(log)]
    return log, found


def sound(paths: list[Path]) -> list[RunLog]:
    """Read the logs of several runs, which may have missed their target.

    Raises:
        RunError: one of them is wrong otherwise; or two are the same run.
    """
    logs = []
    for path in paths:
        log, found = check(path)
        for each in found:
            if not each.unreached:
                raise RunError(describe(path, each))
        logs.append(log)
    for number, log in enumerate(logs):
        for other in logs[:number]:
            if log.seed == other.seed:
                raise RunError(f"{log.path}: seed {log.seed} is that of {other.path} too; each run has its own")
            if [step.loss for step in log.steps] == [step.loss for step in other.steps]:
                raise RunError(f"{log.path}: its losses are those of {other.path}: one run under two seeds")
    return logs


def describe(path: Path, violation: Violation) -> str:
    """`file:line: reason`."""
    return f"{path}:{'' if violation.line is None else f'{violation.line}:'} {violation.reason}"


def notes(log: RunLog) -> list[str]:
    """What a reader must know beside the figures of a log that keeps the open rules."""
    why = why_no_librispeech_result(log)
    found = [f"no LibriSpeech result: {why}"] if why else []
    dataset = log.dataset
    corpus = CORPORA.get(dataset.corpus) if dataset is not None else None
    if dataset is not None and corpus is not None and corpus.reference_digest not in ("", dataset.digest):
        found.append(f"the data set is not that of {corpus.name}'s reference checksum: its digest is {dataset.digest}")
    if log.dirty:
        found.append("files differed from the commit")
    if log.cache_cleared is False:
        reason = log.metadata(constants.CACHE_CLEAR).get("reason")
        found.append("the data set may have been in memory: it was not dropped" + (f" ({reason})" if reason else ""))
    return found


def why_no_librispeech_result(log: RunLog) -> str:
    """Why a log that keeps the open rules is no time to train of this benchmark; empty where it is one."""
    dataset, plain = log.dataset, log.configuration
    if dataset is None or dataset.corpus != LIBRISPEECH.name:
        return f"the corpus is {'not known' if dataset is None else dataset.corpus or 'not known'}"
    if dataset.synthetic:
        return "the speech is synthetic"
    if not dataset.official:
        return "the archives were not the official ones"
    if log.target_wer != REFERENCE.target_wer:
        return f"the target is {log.target_wer}, not {REFERENCE.target_wer}"
    for name in ("hidden_size", "conv_channels"):
        if plain.get(name) != getattr(REFERENCE, name):
            return f"{name} is {plain.get(name)}, not {getattr(REFERENCE, name)}: it is another model"
    published = sum(subset.utterances or 0 for subset in LIBRISPEECH.subsets if subset.split == "train")
    if log.training_utterances != published:
        known = "an unknown number of" if log.training_utterances is None else f"{log.training_utterances:,}"
        return f"the training set has {known} utterances, not all {published:,}"
    names = {subset.name for subset in LIBRISPEECH.subsets if subset.split == "validation"}
    evaluated = log.last_evaluation
    if evaluated is not None and set(evaluated.errors) != names | {"all"}:
        return f"the validation set is not {' and '.join(sorted(names))}"
    return "" if log.reached else UNREACHED


class _Checker(mlp_compliance.ComplianceChecker):
    """The package's checker, which keeps each message with its line and with the reason behind the test."""

    def __init__(self, log: RunLog) -> None:
        super().__init__("training", RULESET, quiet=False, werror=True)
        self.violations: list[Violation] = []
        self._lines = [event.line for event in log.events]  # the package counts events, from 0
        self._failing: Violation | None = None

    def run_check_eval(self, ll: Any, tests: list[str] | str, state: dict[str, Any]) -> None:
        for test in [tests] if isinstance(tests, str) else tests:
            reason = test.rpartition("  # ")[2].format_map(state["s"])
            self._failing = Violation(self._lines[ll.lineno], reason)
            if not reason.startswith(NO_RESULT):
                self._failing = Violation(self._lines[ll.lineno], f"{ll.key}: {reason}")
            super().run_check_eval(ll, test, state)
            self._failing = None

    def put_message(self, msg: str, key: str | None = None) -> None:
        self.violations.append(self._failing or Violation(None, msg.splitlines()[0]))


def _broken_rules(log: RunLog, name: str) -> list[Violation]:
    lines, errors = parse_file(str(log.path), ruleset=RULESET)
    if errors:
        return [Violation(None, f"mlperf-logging cannot read {len(errors)} of its lines")]
    checker = _Checker(log)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.WARNING)  # the package reports its progress to the root logger
    try:
        checker.check_loglines(lines, str(RULES / f"{name}.yaml"))
    finally:
        logging.getLogger().setLevel(level)
    return _once_each(checker.violations)


def _once_each(violations: list[Violation]) -> list[Violation]:
    """Of those with the same reason only the first, which says how many there are."""
    by_reason: dict[str, list[Violation]] = {}
    for each in violations:
        by_reason.setdefault(each.reason, []).append(each)
    return [
        Violation(same[0].line, reason if len(same) == 1 else f"{reason} (and in {len(same) - 1} more lines)")
        for reason, same in by_reason.items()
    ]
