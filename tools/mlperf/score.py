"""The score of several runs, by MLPerf's rules: the mean time without the fastest and the slowest run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytorch.cli import RunError
from tools.mlperf.check import sound, why_no_librispeech_result
from tools.mlperf.configuration import differences
from tools.mlperf.logs import RunLog

FEWEST_RUNS = 3  # fastest, slowest, and one that counts
RUNS = 10  # that the rules ask for of a speech benchmark
MOST_UNREACHED = 1  # of them; it is then the slowest


@dataclass(frozen=True)
class Spread:
    """Of some values; the standard deviation is that of a sample."""

    mean: float
    deviation: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), deviation, min(values), max(values))

    def __str__(self) -> str:
        return f"{self.mean:.1f} +- {self.deviation:.1f} ({self.lowest:.1f} to {self.highest:.1f})"


@dataclass(frozen=True)
class Score:
    """Of several runs of one configuration on one machine. Times in seconds."""

    runs: list[RunLog]  # by seed
    seconds: float | None  # the score; None where too many runs did not reach the target
    unreached: list[RunLog]
    time: Spread | None  # of the runs that reached the target
    epochs: Spread | None  # likewise, epochs to target


def score(paths: list[Path]) -> Score:
    """Read the logs of several runs and score them.

    Raises:
        RunError: a log breaks the open rules (other than by missing the target), runs share a seed, differ in more than
            the seed, or are too few.
    """
    if len(paths) < FEWEST_RUNS:
        raise RunError(f"{len(paths)} logs; a score drops the fastest and the slowest run, so it needs {FEWEST_RUNS}")
    return score_of(same_series(sound(paths)))


def same_series(logs: list[RunLog]) -> list[RunLog]:
    """Runs that differ in nothing but their seeds, sorted by seed; RunError where they differ in more."""
    found = [f"{name} ({', '.join(dict.fromkeys(map(str, values)))})" for name, values in differences(logs).items()]
    if found:
        raise RunError(f"these are runs of several configurations; they differ in {', '.join(found)}")
    return sorted(logs, key=lambda log: log.seed or 0)


def score_of(runs: list[RunLog]) -> Score:
    """The score of runs of one series."""
    times = sorted(math.inf if not run.reached else run.seconds or math.inf for run in runs)
    unreached = [run for run in runs if not run.reached]
    reached = [run for run in runs if run.reached]
    return Score(
        runs,
        seconds=statistics.fmean(times[1:-1])
        if len(unreached) <= MOST_UNREACHED and len(runs) >= FEWEST_RUNS
        else None,
        unreached=unreached,
        time=Spread.of([run.seconds or 0.0 for run in reached]) if reached else None,
        epochs=Spread.of([run.epochs_to_target or 0 for run in reached]) if reached else None,
    )


def report(found: Score) -> str:
    """The score as text, a line for each run first."""
    lines = [f"{'seed':>6}  {'epochs':>6}  {'WER':>6}  {'seconds':>9}  log"]
    for run in found.runs:
        took = f"{run.seconds or 0:9.1f}" if run.reached else "no target"
        last = run.last_evaluation
        epoch, wer = (last.number, last.wer) if last else (0, math.nan)
        lines.append(f"{run.seed:>6}  {epoch:>6}  {wer:6.2f}  {took}  {run.path}")
    reached = len(found.runs) - len(found.unreached)
    if found.time is not None:
        lines.append(f"seconds to target of {reached} runs, mean +- standard deviation: {found.time}")
        lines.append(f"epochs to target of {reached} runs, mean +- standard deviation:  {found.epochs}")
    lines.append(f"runs that did not reach the target: {len(found.unreached)}")
    return "\n".join([*lines, *verdict(found)])


def verdict(found: Score) -> list[str]:
    """The score itself or why there is none, and what a reader must know beside it."""
    runs = found.runs
    if len(runs) < FEWEST_RUNS:
        lines = [f"No score: it drops the fastest and the slowest run, so it needs {FEWEST_RUNS} runs."]
    elif found.seconds is None:
        lines = [f"No score: {len(found.unreached)} runs did not reach the target; at most {MOST_UNREACHED} may."]
    else:
        lines = [f"Score: {found.seconds:.1f} s, the mean without the fastest and the slowest of {len(runs)} runs."]
    if len(runs) != RUNS:
        lines.append(f"Note: the rules ask for {RUNS} runs; these are {len(runs)}.")
    commits = dict.fromkeys(f"{run.commit}{' with changes' * bool(run.dirty)}" for run in runs)
    if len(commits) > 1 or any(run.dirty for run in runs):
        lines.append(f"Note: the runs are of {', '.join(commits)}.")
    if uncleared := sum(run.cache_cleared is False for run in runs):
        lines.append(f"Note: in {uncleared} runs the data set may have been in memory: it was not dropped.")
    if why := why_no_librispeech_result(min(runs, key=lambda run: not run.reached)):
        lines.append(f"Note: no LibriSpeech result: {why}.")
    return [*lines, f"On {runs[0].value('submission_platform')}."]
