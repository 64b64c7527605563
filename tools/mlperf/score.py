"""The score of several runs, by MLPerf's rules: the mean time without the fastest and the slowest run."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mlperf_logging.mllog import constants

from pytorch.config import fields_of
from pytorch.errors import RunError
from tools.mlperf.check import notes
from tools.mlperf.runlog import RunLog

MIN_RUNS = 3  # fastest, slowest, and one that counts
RUNS = 10  # that the rules ask for of a speech benchmark
MAX_MISSED = 1  # of them; it is then the slowest

# What may differ between the runs of a series: the seed, where files lie (the data set has a digest), and what bears on
# runs that break off.
FREE = {"seed", *fields_of("machine", "session")}
EVENTS = constants.SUBMISSION_PLATFORM, constants.SUBMISSION_DIVISION, "number_of_ranks", "gru_implementation"
ENVIRONMENT = "torch", "cuda", "cudnn", "threads"  # of what a log knows of its machine, what bears on time and losses


@dataclass(frozen=True)
class Score:
    """MLPerf score of a series of runs."""

    runs: list[RunLog]  # by seed
    seconds: float | None  # the score; None where too many runs missed the target, or there are too few
    missed: list[RunLog]

    @property
    def verdict(self) -> str:
        """The score, or why there is none."""
        if len(self.runs) < MIN_RUNS:
            return f"No score: the fastest and the slowest run are dropped, so {MIN_RUNS} runs are needed."
        if self.seconds is None:
            return f"No score: {len(self.missed)} runs did not reach the target; at most {MAX_MISSED} may."
        return f"Score: {self.seconds:.1f} s, the mean without the fastest and the slowest of {len(self.runs)} runs."


def comparability_key(log: RunLog) -> dict[str, Any]:
    """Return what must be the same in all runs of a series; None where the log does not know it."""
    return {
        **{name: value for name, value in log.configuration.items() if name not in FREE},
        "data set": log.dataset and log.dataset.digest,
        **{key: log.value(key) for key in EVENTS},
        **{name: log.environment.get(name) for name in ENVIRONMENT},
    }


def differences(logs: Sequence[RunLog]) -> dict[str, list[Any]]:
    """Return what is not the same in all of these runs, each with its values: the seed, paths and the commit apart."""
    return differing([comparability_key(log) for log in logs])


def differing(keys: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the entries that are not the same in all of these, each with its values."""
    values = {name: [key.get(name) for key in keys] for name in dict.fromkeys(name for key in keys for name in key)}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def in_words(differences: dict[str, list[Any]]) -> str:
    """Return differences as part of a sentence."""
    return ", ".join(f"{name} ({', '.join(dict.fromkeys(map(str, found)))})" for name, found in differences.items())


def one_series(logs: list[RunLog], fewest: int = MIN_RUNS) -> list[RunLog]:
    """Return the valid logs of one series (check.load_valid), sorted by seed.

    RunError if runs share a seed or all losses, differ in more than the seed, or are fewer than `fewest`.
    """
    if len(logs) < fewest:
        raise RunError(f"{len(logs)} logs; a score drops the fastest and the slowest run, so it needs {fewest}")
    for log, other in combinations(logs, 2):
        if log.seed == other.seed:
            raise RunError(f"{other.path}: seed {log.seed} is also that of {log.path}; each run needs its own")
        if log.steps == other.steps:
            raise RunError(f"{other.path}: its losses are those of {log.path}: one run under two seeds")
    if found := in_words(differences(logs)):
        raise RunError(f"these are runs of several configurations; they differ in {found}")
    return sorted(logs, key=lambda log: log.seed or 0)


def score(logs: list[RunLog], fewest: int = MIN_RUNS) -> Score:
    """Score the runs of a series. Raises what `one_series` does."""
    runs = one_series(logs, fewest)
    missed = [run for run in runs if not run.reached]
    times = sorted(run.seconds if run.reached and run.seconds is not None else math.inf for run in runs)
    scored = len(missed) <= MAX_MISSED and len(runs) >= MIN_RUNS
    return Score(runs, statistics.fmean(times[1:-1]) if scored else None, missed)


def report(found: Score) -> str:
    """Return what a reader must know: a line for each run, the spread, the score or why there is none, and notes."""
    lines = [f"{'seed':>6}  {'epochs':>6}  {'last WER':>8}  {'seconds':>9}  log"]
    for run in found.runs:
        took = f"{run.seconds or 0:9.1f}" if run.reached else "no target"
        last = run.last_evaluation
        epochs, wer = (last.number, last.wer) if last else (0, math.nan)
        lines.append(f"{run.seed:>6}  {epochs:>6}  {wer:8.2f}  {took}  {run.path}")
    reached = [run for run in found.runs if run.reached]
    for name, values in (
        ("seconds", [run.seconds or 0 for run in reached]),
        ("epochs", [run.epochs_to_target or 0 for run in reached]),
    ):
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            spread = f"{statistics.fmean(values):.1f} +- {deviation:.1f} ({min(values):.1f} to {max(values):.1f})"
            lines.append(f"{name} to target of {len(values)} runs, mean +- standard deviation: {spread}")
    lines.append(found.verdict)
    if found.missed:
        lines.append(f"Runs that did not reach the target: {len(found.missed)}.")
    if len(found.runs) < RUNS:
        lines.append(f"Note: the rules ask for {RUNS} runs; these are {len(found.runs)}.")
    if len(commits := sorted({str(run.commit) for run in found.runs})) > 1:
        lines.append(f"Note: the runs are of several commits: {', '.join(commits)}.")
    for note, count in Counter(note for run in found.runs for note in notes(run)).items():
        lines.append(f"Note: {note}{'' if count == len(found.runs) else f' ({count} of {len(found.runs)} runs)'}.")
    return "\n".join([*lines, f"On {found.runs[0].value(constants.SUBMISSION_PLATFORM)}."])
