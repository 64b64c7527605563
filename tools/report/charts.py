"""What the page's charts draw, and the same figures as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from tools.report.runs import Run, Series

POINTS = 2000  # that a chart draws of single steps: no screen shows more, and the page stays small
MEANS = 60  # points of a line that stands for many steps
EPOCH, STEP, TIME = "epoch", "step", "time (s)"
WER, LOSS, RATE, NORM = "WER (%)", "loss", "learning rate", "gradient norm"
SPEED, WAIT = "utterances/s", "waiting for data (%)"
ERRORS = "Corpus word error rate on the validation set after each epoch; the dashed line is the target."
STEPS = "Means over neighboring steps; single steps are faint."
CHARTS = (  # id, title, whether of epochs or steps, x, y, note
    ("wer-time", "Word error rate by time", EPOCH, TIME, WER, ERRORS),
    ("wer-epoch", "Word error rate by epoch", EPOCH, EPOCH, WER, ERRORS),
    ("throughput", "Throughput", EPOCH, EPOCH, SPEED, "Training only, without evaluation."),
    ("wait", "Waiting for data", EPOCH, EPOCH, WAIT, "Share of the training time that steps waited for their batches."),
    ("loss", "Training loss", STEP, STEP, LOSS, STEPS),
    ("rate", "Learning rate", STEP, STEP, RATE, STEPS),
    ("norm", "Gradient norm", STEP, STEP, NORM, f"Before clipping; logarithmic. {STEPS}"),
)

Row = dict[str, Any]  # figures of an epoch or step, by name; None where the log lacks them
Point = tuple[float, float]
Curve = dict[int, Point]  # of a run, by the numbers of its epochs or steps


@dataclass(frozen=True)
class Line:
    """A line of a series, which is given by its place. Faint ones, of each run or each step, lie behind the others."""

    series: int
    name: str  # of what is shown
    points: list[Point]
    faint: bool


@dataclass(frozen=True)
class Chart:
    """A chart over time, epochs or steps."""

    id: str
    title: str
    x: str
    y: str
    note: str
    lines: list[Line]
    targets: Sequence[float]
    logarithmic: bool


def epoch_rows(run: Run) -> list[Row]:
    """Return the figures of a run's epochs."""
    steps = {step.number: step for step in run.log.steps}
    rows = []
    for epoch in run.log.epochs:
        last = steps.get(epoch.step or 0)
        ends = epoch.evaluated, epoch.trained, epoch.started  # a log that is cut off right there lacks the first
        end = run.log.seconds_before + next(time for time in ends if time is not None)
        waited = epoch.throughput.get("data_wait_fraction")
        row = {
            EPOCH: epoch.number,
            TIME: end if run.has_times else None,
            WER: epoch.wer,
            **{
                f"{WER} {name}": counts.wer
                for name, counts in epoch.errors.items()
                if name != "all" and len(epoch.errors) > 2
            },
            LOSS: epoch.loss,
            RATE: last and last.learning_rate,
            NORM: last and last.gradient_norm,
            SPEED: epoch.throughput.get("utterances_per_second"),
            WAIT: None if waited is None else 100 * waited,
        }
        rows.append(row)
    return rows


def step_rows(run: Run) -> list[Row]:
    """Return the figures of a run's steps."""
    return [
        {STEP: step.number, LOSS: step.loss, RATE: step.learning_rate, NORM: step.gradient_norm}
        for step in run.log.steps
    ]


def charts(series: Sequence[Series]) -> list[Chart]:
    """Return the charts for which some run has figures."""
    runs = [run for each in series for run in each.runs]
    rows = {EPOCH: [list(map(epoch_rows, each.runs)) for each in series]}
    rows[STEP] = [list(map(step_rows, each.runs)) for each in series]
    epochs = [row for of_series in rows[EPOCH] for of_run in of_series for row in of_run]
    longest = max((row[TIME] for row in epochs if row[TIME] is not None), default=0)
    unit, divisor = ("s", 1) if longest < 600 else ("min", 60) if longest < 4 * 3600 else ("h", 3600)
    errors = [name for name in dict.fromkeys(name for row in epochs for name in row) if name.startswith(WER)]
    errors = errors if len(series) == 1 else [WER]  # subsets of several series would be too many lines
    targets = sorted({run.log.target_wer for run in runs if run.log.target_wer is not None})
    found = []
    for id, title, kind, x, y, note in CHARTS:
        lines = []
        for name in errors if y == WER else [y]:
            lines += _lines(rows[kind], kind, x, name, divisor if x == TIME else 1)
        across = f"time on the clock ({unit})" if x == TIME else x
        if lines:
            found.append(Chart(id, title, across, y, note, lines, targets if y == WER else [], y == NORM))
    return found


def _lines(series: Sequence[Sequence[list[Row]]], kind: str, x: str, y: str, divisor: int) -> list[Line]:
    """Return a line for each series, the median of its runs, and behind it a faint one for each run.

    Args:
        series: rows by series and run.
        kind: EPOCH or STEP, of which rows are; steps are many, so that lines are means of them.
        x: name of the figure along which lines run, which is divided by `divisor`.
        y: name of the figure to show.
        divisor: see x.
    """
    limit = max(2, POINTS // sum(map(len, series)))
    lines = []
    for place, runs in enumerate(series):
        curves = []
        for rows in runs:
            known = [(row[kind], row[x], row[y]) for row in rows if None not in (row[x], row.get(y))]
            curve = {number: (across / divisor, up) for number, across, up in known if math.isfinite(up)}
            curves += [curve] if curve else []
        if not curves:
            continue
        points = median_curve(curves)
        lines.append(Line(place, y, _rounded(means(points) if kind == STEP else points), faint=False))
        for curve in curves:
            points = list(curve.values())
            if kind == STEP:
                points = means(points) if len(curves) > 1 else downsample(points, limit)
            lines.append(Line(place, y, _rounded(points), faint=True))
    return lines


def median_curve(curves: Sequence[Curve]) -> list[Point]:
    """Return the median of some curves, as far as half of them go."""
    by_number: dict[int, list[Point]] = {}
    for curve in curves:
        for number, point in curve.items():
            by_number.setdefault(number, []).append(point)
    common = [points for _, points in sorted(by_number.items()) if 2 * len(points) >= len(curves)]
    return [(median(x for x, _ in points), median(y for _, y in points)) for points in common]


def downsample(points: list[Point], limit: int) -> list[Point]:
    """Return at most `limit` points: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= limit:
        return points
    found = []
    for stretch in _stretches(points, limit // 2):
        by_height = sorted(stretch, key=lambda point: point[1])
        found += sorted({by_height[0], by_height[-1]})
    return found


def means(points: list[Point]) -> list[Point]:
    """Return the mean of each stretch of a line."""
    return [(fmean(x for x, _ in each), fmean(y for _, y in each)) for each in _stretches(points, MEANS)]


def _stretches(points: list[Point], count: int) -> list[list[Point]]:
    count = min(count, len(points))
    return [points[start:end] for start, end in pairwise(number * len(points) // count for number in range(count + 1))]


def _rounded(points: list[Point]) -> list[Point]:
    return [(float(f"{x:.6g}"), float(f"{y:.5g}")) for x, y in points]
