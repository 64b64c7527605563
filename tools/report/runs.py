"""The runs of a page: their logs, how they ended, and which of them are one series."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.files import files_below
from pytorch.config import fields_of
from pytorch.errors import Preempted, RunError
from pytorch.machine import MAX_CPU_TAKEN
from tools.mlperf.check import Violation, check, clock_problem
from tools.mlperf.runlog import TOKEN, RunLog
from tools.mlperf.score import MIN_RUNS, comparability_key, differences, score

ENDS = {Preempted.__name__: "interrupted by a signal, and saved", "KeyboardInterrupt": "stopped by Ctrl-C"}


@dataclass(frozen=True, eq=False)
class Run:
    """A run. `refusals` are the checker's reasons to refuse its log, except that the target was not reached."""

    label: str
    log: RunLog
    refusals: list[Violation]

    @property
    def seconds(self) -> float | None:
        """Time on the clock, including the time before the run was resumed; None while it is not over.

        If the machine's clock was set, it is that of the RESULT line, which the monotonic clock has measured.
        """
        log = self.log
        seconds = log.result.seconds if log.result is not None and clock_problem(log) else log.seconds
        return None if seconds is None else seconds + log.seconds_before

    @property
    def valid(self) -> bool:
        """Whether its time may be quoted: the log is accepted, and other programs left it the CPUs."""
        return not self.refusals and self.log.cpu_taken + self.log.cpu_stolen <= MAX_CPU_TAKEN

    @property
    def outcome(self) -> str:
        """How the run ended, as far as its log shows it."""
        log, last = self.log, self.log.last_evaluation
        if log.reached:
            return "target reached"
        if log.status is None:
            return "the log ends before the run did"
        if log.exception in (None, RunError.__name__) and log.steps and log.steps[-1].loss is None:
            return "diverged: loss or gradient was not finite"
        if log.exception is not None:
            return ENDS.get(log.exception, f"crashed: {log.exception}")
        limits = {"max_epochs": last and last.number, "max_steps": last and last.step}
        reached = [name for name, value in limits.items() if value is not None and value == log.configuration.get(name)]
        return f"{reached[0]} reached" if reached else "crashed or stopped"


@dataclass(frozen=True)
class Series:
    """Runs that differ only in their seeds, sorted by seed."""

    label: str
    runs: list[Run]
    score: float | None  # seconds
    no_score: str  # why runs that are enough for a score have none


def find_logs(path: Path) -> list[Path]:
    """Return the path of a log, or of all logs in a folder; RunError if it has none."""
    if not path.is_dir():
        return [path]
    texts = [file for file in files_below(path) if file.suffix in (".log", ".txt") and file.is_file()]
    found = [text for text in texts if TOKEN.encode() in text.read_bytes()]
    if not found:
        raise RunError(f"{path}: no log: no .log or .txt file in this folder has a '{TOKEN.strip()}' line")
    return found


def read_series(logs: Mapping[Path, str]) -> list[Series]:
    """Read logs and sort them into series, in the order of their first runs; RunError if one is no log, or damaged.

    A seed that a series has already begins another one. So does another commit or name, or that the run was resumed.
    `logs` has what to call the run of each log; "" stands for the name of its configuration.
    """
    repeats: Counter[str] = Counter()
    groups: dict[tuple[str, int], list[Run]] = {}
    for path, name in logs.items():
        log, violations = check(path)
        refusals = [each for each in violations if not each.missed_target]
        run = Run(name or str(log.config_name or "unknown configuration"), log.last_start(), refusals)
        key = repr((run.label, log.commit, log.resumed, comparability_key(log)))
        groups.setdefault((key, repeats[f"{key}{log.seed}"]), []).append(run)
        repeats[f"{key}{log.seed}"] += 1
    series = []
    for label, group in zip(_labels([group[0] for group in groups.values()]), groups.values(), strict=True):
        group.sort(key=lambda run: run.log.seed or 0)
        runs = [replace(run, label=f"{label}, seed {run.log.seed}" if len(group) > 1 else label) for run in group]
        series.append(Series(label, runs, *_score(runs)))
    return series


def _score(runs: list[Run]) -> tuple[float | None, str]:
    if len(runs) < MIN_RUNS:
        return None, ""
    if refusals := [each for run in runs for each in run.refusals]:
        return None, f"No score: {refusals[0]}."
    try:
        found = score([run.log for run in runs])
    except RunError as error:
        return None, f"No score: {error}."
    return found.seconds, found.verdict if found.seconds is None else ""


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names and as few of the fields in which they differ as tell them apart; else files' names."""
    labels, logs, limits = [run.label for run in runs], [run.log for run in runs], fields_of("limit")
    fields = {**differences(logs), "data set": [log.dataset and log.dataset.corpus for log in logs]}  # not its digest
    fields = {name: fields[name] for name in sorted(fields, key=limits.__contains__)}  # limits come last
    fields |= {"commit": [str(log.commit)[:8] for log in logs], "resumed": [log.resumed for log in logs]}
    for name, values in {**fields, "log": file_names(logs)}.items():
        for label in set(labels):
            same = [number for number, other in enumerate(labels) if other == label]
            if len({str(values[number]) for number in same}) > 1:
                for number in same:
                    labels[number] += f", {name.replace('_', ' ')} {values[number]}"
    return labels


def file_names(logs: Sequence[RunLog]) -> list[str]:
    """Return the logs' names, with those folders that they do not share."""
    paths = [log.path.resolve().with_suffix("") for log in logs]
    shared = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(shared)) for path in paths]
