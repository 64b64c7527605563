"""What the page's charts draw, and the same figures as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from tools.mlperf.logs import Step
from tools.report.runs import Run, Series

POINTS = 2000  # that a chart draws of single steps: no screen shows more, and the page stays small
MEANS = 60  # points of a line that stands for many steps
WER, TIME, LOSS, RATE, NORM = "WER (%)", "time (s)", "loss", "learning rate", "gradient norm"
SPEED, WAIT = "utterances/s", "waiting for data (%)"

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
    targets: Sequence[float] = ()
    logarithmic: bool = False


def charts(series: Sequence[Series]) -> list[Chart]:
    """Return the charts for which some run has figures."""
    return [chart for chart in (*_epoch_charts(series), *_step_charts(series)) if chart.lines]


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
            "epoch": epoch.number,
            TIME: end if run.has_times else None,
            WER: epoch.wer,
            **{f"{WER} {name}": counts.wer for name, counts in epoch.errors.items() if name != "all"},
            LOSS: epoch.loss,
            RATE: last and last.learning_rate,
            NORM: last and last.gradient_norm,
            SPEED: epoch.throughput.get("utterances_per_second"),
            WAIT: None if waited is None else 100 * waited,
        }
        rows.append(row)
    return rows


def _epoch_charts(series: Sequence[Series]) -> Iterator[Chart]:
    rows = [[epoch_rows(run) for run in each.runs] for each in series]
    every = [row for runs in rows for epochs in runs for row in epochs]
    errors = [name for name in dict.fromkeys(name for row in every for name in row) if name.startswith(WER)]
    if len(series) > 1 or len(errors) == 2:
        errors = [WER]  # subsets of several series would be too many lines, and a single one is all there is
    longest = max((row[TIME] for row in every if row[TIME] is not None), default=0)
    unit, divisor = ("s", 1) if longest < 600 else ("min", 60) if longest < 4 * 3600 else ("h", 3600)

    note = "Corpus word error rate on the validation set after each epoch; the dashed line is the target."
    targets = sorted({target for each in series for run in each.runs if (target := run.log.target_wer) is not None})
    x = f"time on the clock ({unit})"
    lines = [line for name in errors for line in _lines(rows, "epoch", name, x=TIME, divisor=divisor)]
    yield Chart("wer-time", "Word error rate by time", x, WER, note, lines, targets)
    lines = [line for name in errors for line in _lines(rows, "epoch", name)]
    yield Chart("wer-epoch", "Word error rate by epoch", "epoch", WER, note, lines, targets)
    note = "Training only, without evaluation."
    yield Chart("throughput", "Throughput", "epoch", "utterances per second", note, _lines(rows, "epoch", SPEED))
    note = "Time that steps waited for their batches, of the time of training."
    yield Chart("wait", "Waiting for data", "epoch", "% of training time", note, _lines(rows, "epoch", WAIT))


def _step_charts(series: Sequence[Series]) -> Iterator[Chart]:
    def row(step: Step) -> Row:
        return {"step": step.number, LOSS: step.loss, RATE: step.learning_rate, NORM: step.gradient_norm}

    rows = [[[row(step) for step in run.log.steps] for run in each.runs] for each in series]
    note = "Each step faint, with the highest and lowest where they are many; the line is the mean of the steps around."
    if any(len(each.runs) > 1 for each in series):
        note = "Each run faint; the line is their median. Both are means of the steps around."
    for id, title, y, name in (
        ("loss", "Training loss", "CTC loss", LOSS),
        ("rate", "Learning rate", RATE, RATE),
        ("norm", "Gradient norm", "norm before clipping", NORM),
    ):
        yield Chart(id, title, "step", y, note, _lines(rows, "step", name), logarithmic=name == NORM)


def _lines(series: Sequence[Sequence[list[Row]]], by: str, y: str, *, x: str = "", divisor: int = 1) -> list[Line]:
    """Return a line for each series, the median of its runs, and behind it a faint one for each run.

    Args:
        series: rows of epochs or steps, by series and run.
        by: "epoch" or "step"; steps are many, so that lines are means of them.
        y: name of the figure to show.
        x: name of the figure along which lines run, which is divided by `divisor`; by default that of `by`.
    """
    limit = max(2, POINTS // sum(map(len, series)))
    lines = []
    for place, runs in enumerate(series):
        curves = []
        for rows in runs:
            known = [(row[by], row[x or by], row[y]) for row in rows if None not in (row[x or by], row.get(y))]
            curve = {number: (across / divisor, up) for number, across, up in known if math.isfinite(up)}
            curves += [curve] if curve else []
        if not curves:
            continue
        points = median_curve(curves)
        lines.append(Line(place, y, _rounded(means(points) if by == "step" else points), faint=False))
        for curve in curves:
            points = list(curve.values())
            if by == "step":
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
