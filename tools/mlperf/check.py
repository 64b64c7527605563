"""Does a log prove what it says? Our rules files, applied by the compliance checker of the package mlperf-logging, and
then what only several lines together can show (consistency.py).

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
from pytorch.config import CONFIGS
from pytorch.errors import RunError
from pytorch.machine import MAX_CPU_TAKEN
from tools.mlperf.consistency import inconsistencies
from tools.mlperf.runlog import RunLog

RULESET = "3.1.0"  # of the package: how lines are read. The rules themselves are in RULES.
RULES = Path(__file__).parent / "rules"
DIVISIONS = {constants.OPEN: ["open"], constants.CLOSED: ["open", "closed"]}
NO_RESULT = "no result: "  # prefix of the one rule that a valid log breaks if its run missed the target
MISSED_TARGET = "the target was not reached"
LIBRISPEECH = CORPORA["librispeech"]
REFERENCE = CONFIGS["librispeech"]


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

    Returns:
        The log, and what is wrong with it: an empty list for a result.

    Raises:
        RunError: the file is not a log, or a line of it is damaged.
    """
    log = RunLog.read(path)
    division = division or str(log.value(constants.SUBMISSION_DIVISION))
    found = [each for rules in DIVISIONS.get(division, ["open"]) for each in _broken_rules(log, rules)]
    if all(each.missed_target for each in found):  # else types and order are not what the other checks work with
        found += [Violation(path, line, reason) for line, reason in inconsistencies(log)]
    return log, found


def load_valid(paths: list[Path]) -> list[RunLog]:
    """Read the logs of several runs, which may have missed their target.

    Raises:
        RunError: one of them is wrong otherwise; or two are the same run.
    """
    logs: list[RunLog] = []
    for path in paths:
        log, found = check(path)
        if wrong := [each for each in found if not each.missed_target]:
            raise RunError(str(wrong[0]))
        for other in logs:
            if log.seed == other.seed:
                raise RunError(f"{path}: seed {log.seed} is also that of {other.path}; each run needs its own")
            if [step.loss for step in log.steps] == [step.loss for step in other.steps]:
                raise RunError(f"{path}: its losses are those of {other.path}: one run under two seeds")
        logs.append(log)
    return logs


def notes(log: RunLog) -> list[str]:
    """Return what a reader must know besides the figures of a log that follows the open rules."""
    why = ineligibility(log)
    found = [f"not a LibriSpeech result: {why}"] if why else []
    dataset = log.dataset
    corpus = CORPORA.get(dataset.corpus) if dataset is not None else None
    if dataset is not None and corpus is not None and corpus.reference_digest not in ("", dataset.digest):
        found.append(f"the data set is not that of {corpus.name}'s reference checksum: its digest is {dataset.digest}")
    if log.dirty:
        found.append("files differed from the commit, which alone may not reproduce this run")
    if log.cache_cleared is False:
        reason = log.metadata(constants.CACHE_CLEAR).get("reason")
        because = f" ({reason})" if reason else ""
        found.append(f"the data set may have been in memory already: the page cache was not cleared{because}")
    if taken := cpu_taken(log):
        found.append(taken)
    return found


def cpu_taken(log: RunLog) -> str:
    """Return why a log's time is worthless if too much of the CPU time went elsewhere, else an empty string."""
    others, stolen = log.value("cpu_taken") or 0.0, log.metadata("cpu_taken").get("stolen", 0.0)
    if others + stolen <= MAX_CPU_TAKEN:
        return ""
    took = f"other programs took {others:.0%} of the CPU time, the hypervisor {stolen:.0%}"
    return f"{took}: the run's time is not a valid benchmark result"


def ineligibility(log: RunLog) -> str:
    """Return why a log that follows the open rules is not a result of this benchmark; empty if it is one."""
    dataset, config = log.dataset, log.configuration
    if dataset is not None and dataset.synthetic:
        return "the speech is synthetic"
    if dataset is None or dataset.corpus != LIBRISPEECH.name:
        return f"the corpus is {'not known' if dataset is None else dataset.corpus or 'not known'}"
    if not dataset.official:
        return "the archives were not the official ones"
    if log.target_wer != REFERENCE.target_wer:
        return f"the target is {log.target_wer}, not {REFERENCE.target_wer}"
    for name in ("hidden_size", "conv_channels"):
        if config.get(name) != getattr(REFERENCE, name):
            return f"{name} is {config.get(name)}, not {getattr(REFERENCE, name)}: it is another model"
    if log.training_utterances != published_utterances("train"):
        known = "an unknown number of" if log.training_utterances is None else f"{log.training_utterances:,}"
        return f"the training set has {known} utterances, not all {published_utterances('train'):,}"
    names = {subset.name for subset in LIBRISPEECH.subsets if subset.split == "validation"}
    evaluated = log.last_evaluation
    if evaluated is not None:
        if set(evaluated.errors) != names | {"all"}:
            return f"the validation set is not {' and '.join(sorted(names))}"
        if evaluated.errors["all"].utterances != published_utterances("validation"):
            return f"the validation set is not all {published_utterances('validation'):,} utterances"
    return "" if log.reached else MISSED_TARGET


def published_utterances(split: str) -> int:
    """Return how many utterances a split of LibriSpeech has."""
    return sum(subset.utterances or 0 for subset in LIBRISPEECH.subsets if subset.split == split)


class _Checker(mlp_compliance.ComplianceChecker):
    """The package's checker, which keeps each message with its line and with the reason behind the test."""

    def __init__(self, log: RunLog) -> None:
        super().__init__("training", RULESET, quiet=False, werror=True)
        self.log = log
        self.violations: dict[str, list[int | None]] = {}  # the lines of each reason
        self._failing: tuple[int | None, str] | None = None

    def run_check_eval(self, ll: Any, tests: list[str] | str, state: dict[str, Any]) -> None:
        for test in [tests] if isinstance(tests, str) else tests:
            reason = test.rpartition("  # ")[2].format_map(state["s"])
            reason = reason if reason.startswith(NO_RESULT) else f"{ll.key}: {reason}"
            self._failing = self.log.events[ll.lineno].line, reason  # the package counts events, from 0
            super().run_check_eval(ll, test, state)
            self._failing = None

    def put_message(self, msg: str, key: str | None = None) -> None:
        line, reason = self._failing or (None, msg.splitlines()[0])
        self.violations.setdefault(reason, []).append(line)


def _broken_rules(log: RunLog, name: str) -> list[Violation]:
    """Return what breaks a rules file, each reason once."""
    lines, errors = parse_file(str(log.path), ruleset=RULESET)
    if errors:
        return [Violation(log.path, None, f"mlperf-logging cannot read {len(errors)} of its lines")]
    checker = _Checker(log)
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.WARNING)  # the package reports its progress to the root logger
    try:
        checker.check_loglines(lines, str(RULES / f"{name}.yaml"))
    finally:
        logging.getLogger().setLevel(level)
    return [
        Violation(log.path, found[0], reason + (f" (and in {len(found) - 1} more lines)" if len(found) > 1 else ""))
        for reason, found in checker.violations.items()
    ]
