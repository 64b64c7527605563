"""The runs of a report: their logs, read and looked over, and what the page calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlperf_logging.mllog import constants

from pytorch.cli import RunError
from tools.mlperf.runlog import RunLog


@dataclass(frozen=True)
class Run:
    """A run of the report. `number` counts from 1, in the order of the command line."""

    number: int
    label: str
    log: RunLog

    @property
    def seconds_before(self) -> float:
        """On the clock before this process went on from a checkpoint."""
        return self.log.seconds_before

    @property
    def target(self) -> float | None:
        """WER to reach, in percent."""
        return self.log.target_wer

    @property
    def final_wer(self) -> float | None:
        """Of the last evaluation, in percent."""
        return self.log.last_evaluation.wer if self.log.last_evaluation else None

    @property
    def seconds_to_target(self) -> float | None:
        """On the clock, with the time before it was resumed; None if the target was not reached."""
        seconds = self.log.seconds
        return seconds + self.seconds_before if self.log.reached and seconds is not None else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the logs.

    Raises:
        RunError: one is no log, is damaged, or is named twice.
    """
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise RunError(f"{path}: named {times} times")
    logs = [_last_start(RunLog.read(path)) for path in paths]
    labels = _labels(paths)
    return [Run(number, label, log) for number, (label, log) in enumerate(zip(labels, logs, strict=True), start=1)]


def _last_start(log: RunLog) -> RunLog:
    """Without what was before the last start, where processes were lost and all started again from a checkpoint."""
    starts = [position for position, event in enumerate(log.events) if event.key == constants.INIT_START]
    return replace(log, events=log.events[starts[-1] :]) if len(starts) > 1 else log


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names of the files, with as many of their folders as tell them apart."""
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        labels = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]
