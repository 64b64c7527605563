"""The runs of a page: their logs, how they ended, and which of them are one series."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from mlperf_logging.mllog import constants

from pytorch.errors import Preempted, RunError
from tools.mlperf.check import check, clock_problem
from tools.mlperf.runlog import RunLog
from tools.mlperf.score import MIN_RUNS, differences, score, verdict


@dataclass(frozen=True, eq=False)
class Run:
    """A run. `refusals` are the checker's reasons to refuse its log, a target that was not reached apart."""

    label: str
    log: RunLog
    refusals: list[str]

    @property
    def seconds(self) -> float | None:
        """Time on the clock, with what was before the run was resumed; None for a run that is not over.

        If the machine's clock was set, RESULT is believed: it is by the monotonic clock.
        """
        log = self.log
        seconds = log.result.seconds if clock_problem(log) and log.result is not None else log.seconds
        return None if seconds is None else seconds + log.seconds_before

    @property
    def seconds_to_target(self) -> float | None:
        """Time on the clock; None if the target was not reached."""
        return self.seconds if self.log.reached else None

    @property
    def has_times(self) -> bool:
        """Whether the clock started, and nobody has set it since: else no figure is made of time stamps."""
        return self.log.first(constants.RUN_START) is not None and clock_problem(self.log) is None

    @property
    def wer(self) -> float | None:
        """Lowest word error rate in percent: that of the last epoch, if it reached the target."""
        return min((epoch.wer for epoch in self.log.epochs if epoch.wer is not None), default=None)

    @property
    def epochs(self) -> int:
        """Number of epochs that were completed, with those before the run was resumed."""
        return max((epoch.number for epoch in self.log.epochs if epoch.finished and epoch.wer is not None), default=0)

    @property
    def outcome(self) -> str:
        """How the run ended, as far as its log shows it."""
        log, epoch = self.log, self.log.last_evaluation
        if log.reached:
            return "target reached"
        if log.status is None:
            return "the log ends before the run did"
        *_, last = takewhile(lambda event: event.key != constants.RUN_STOP, log.events)
        if last.key == "skipped_step" and log.exception in (None, RunError.__name__):
            return "diverged: loss or gradient was not finite"
        if log.exception == Preempted.__name__ or (log.exception is None and last.key == "checkpoint"):
            return "interrupted by a signal, and saved"
        if log.exception is not None:
            return "stopped by Ctrl-C" if log.exception == "KeyboardInterrupt" else f"crashed: {log.exception}"
        if last.key == constants.EVAL_STOP and epoch is not None:
            if epoch.step is not None and epoch.step == log.configuration.get("max_steps"):
                return "max_steps reached"
            if epoch.number >= log.configuration.get("max_epochs", 0):
                return "max_epochs reached"
        return "crashed, or stopped by Ctrl-C"


@dataclass(frozen=True)
class Series:
    """Runs that differ only in their seeds, sorted by seed."""

    label: str
    runs: list[Run]
    score: float | None  # seconds
    no_score: str  # why runs that are enough for a score have none


def read_series(paths: Sequence[Path]) -> list[Series]:
    """Read logs and sort them into series, in the order of their first runs.

    A seed that a series has already begins another one, such as that of a run after a change to the code.

    Raises:
        RunError: a file is not a log, is damaged, or is named twice.
    """
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise RunError(f"{path}: named {times} times")
    groups: list[list[Run]] = []
    for path in paths:
        log, violations = check(path)
        run = Run("", log.last_start(), [each.reason for each in violations if not each.missed_target])
        for group in groups:
            seeds = [other.log.seed for other in group]
            if log.seed not in seeds and not differences([group[0].log, run.log]):
                group.append(run)
                break
        else:
            groups.append([run])
    series = []
    for label, group in zip(_labels([group[0].log for group in groups]), groups, strict=True):
        runs = []
        for run in sorted(group, key=lambda run: run.log.seed or 0):
            of_series = f"{label}, " if len(groups) > 1 else ""
            runs.append(replace(run, label=f"{of_series}seed {run.log.seed}" if len(paths) > len(groups) else label))
        series.append(Series(label, runs, *_score([run.log.path for run in runs])))
    return series


def _score(paths: list[Path]) -> tuple[float | None, str]:
    if len(paths) < MIN_RUNS:
        return None, ""
    try:
        found = score(paths)
    except RunError as error:
        return None, f"No score: {error}."
    return found.seconds, verdict(found)[0] if found.seconds is None else ""


def _labels(logs: Sequence[RunLog]) -> list[str]:
    """Configurations' names, with as few of the fields in which they differ as tell them apart; else files' names."""
    labels = [str(log.config_name or "unknown configuration") for log in logs]
    for name, values in {**differences(logs), "": file_names([log.path for log in logs])}.items():
        for label in set(labels):
            same = [number for number, other in enumerate(labels) if other == label]
            if len({str(values[number]) for number in same}) > 1:
                for number in same:
                    labels[number] += f", {name.replace('_', ' ')} {values[number]!s:.24}".replace("  ", " ")
    return labels


def file_names(paths: Sequence[Path]) -> list[str]:
    """Return the files' names, with as many of their folders as tell them apart; names need not be Unicode."""
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        names = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [os.fsencode(name).decode(errors="backslashreplace") for name in names]
