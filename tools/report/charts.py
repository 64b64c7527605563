"""What the page's charts draw, and the same figures as a table."""

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import fmean, median
from typing import Any

from tools.mlperf.check import clock_problem
from tools.report.runs import Run, Series

POINTS = 200  # of a line over steps, each the mean of its neighbors: no screen shows more, and the page stays small
EPOCH, STEP, TIME, WER, LOSS, MEMORY = "epoch", "step", "time (s)", "WER (%)", "loss", "peak memory (GiB)"
Row = dict[str, Any]  # figures of an epoch or of some steps, by name: those that the log has


def epoch_rows(run: Run) -> dict[int, Row]:
    """Return the figures of a run's epochs by their numbers."""
    has_times = clock_problem(run.log) is None
    rows = {}
    for epoch in run.log.epochs:
        figures = {
            EPOCH: epoch.number,
            TIME: run.log.seconds_before + epoch.evaluated if has_times and epoch.evaluated is not None else None,
            WER: epoch.wer,
            **{f"{WER} {name}": errors.wer for name, errors in epoch.errors.items() if len(epoch.errors) > 2},
            LOSS: epoch.loss,
            "utterances/s": epoch.throughput.get("utterances_per_second"),
            "waiting for data (fraction)": epoch.throughput.get("data_wait_fraction"),
            MEMORY: epoch.throughput.get("peak_memory_gib"),
        }
        rows[epoch.number] = {name: value for name, value in figures.items() if value is not None}
    return rows


def step_rows(run: Run, width: int) -> dict[int, Row]:
    """Return the mean loss of every `width` neighboring steps."""
    steps = [(step.number, step.loss) for step in run.log.steps if step.loss is not None]
    bins = {place: [*neighbors] for place, neighbors in groupby(steps, key=lambda step: step[0] // width)}
    return {place: {STEP: fmean(n for n, _ in bin), LOSS: fmean(y for _, y in bin)} for place, bin in bins.items()}


def charts(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Return the charts for which some run has figures, as page.js reads them."""
    runs = [run for each in series for run in each.runs]
    width = 1 + max((step.number for run in runs for step in run.log.steps), default=0) // POINTS
    epochs = [[epoch_rows(run) for run in each.runs] for each in series]
    steps = [[step_rows(run, width) for run in each.runs] for each in series]
    ends = [[_ends(each.runs, row)] for row, each in enumerate(series)] if len(series) < len(runs) else []
    targets = sorted({run.log.target_wer for run in runs if run.log.target_wer is not None})
    found = []
    for title, x, y, rows in (
        ("Word error rate by time", TIME, WER, epochs),
        ("Word error rate by epoch", EPOCH, WER, epochs),
        ("Training loss", STEP, LOSS, steps),
        ("Time to the target", TIME, "", ends),
        ("Epochs to the target", EPOCH, "", ends),
    ):
        lines = _lines(rows, x, y)
        found.append({"title": title, "x": x, "y": y, "lines": lines, "targets": targets if y == WER else []})
    return [chart for chart in found if chart["lines"]]


def _lines(series: Sequence[Sequence[dict[int, Row]]], x: str, y: str) -> list[dict[str, Any]]:
    """Return a line for each series, of points x and y; of several runs, medians, and the lowest and the highest y."""
    lines = []
    for number, runs in enumerate(series):
        points = []
        for place in sorted(set().union(*runs)):
            rows = [rows[place] for rows in runs if place in rows]
            found = [(row[x], row[y]) for row in rows if x in row and y in row and math.isfinite(row[y])]
            if found and 2 * len(found) >= len(runs):  # as far as half of the runs go
                xs, ys = zip(*found, strict=True)
                band = [min(ys), max(ys)] if len(runs) > 1 else []
                points.append([float(f"{value:.5g}") for value in (median(xs), median(ys), *band)])
        lines += [{"series": number, "points": points}] if points else []
    return lines


def _ends(runs: Sequence[Run], row: int) -> dict[int, Row]:
    """Return where runs reached the target, each at a height of its own in the row, so that no mark hides another."""
    ends = {}
    for place, run in enumerate(runs):
        if run.log.reached and run.seconds is not None:
            height = row + 0.8 * (place + 0.5) / len(runs) - 0.4
            ends[place] = {TIME: run.seconds, EPOCH: run.log.epochs_to_target, "": height}
    return ends
