"""The page's charts: what is drawn, the same figures as a table, and as a sentence for those who hear the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from tools.mlperf.runlog import Epoch, RunLog, Step
from tools.report.points import Point, running_mean, thin
from tools.report.runs import Run

POINTS = 2000  # that a chart draws of all runs' steps together: no screen shows more, and the page stays small
ALL = "all"  # what a log calls the validation subsets together


@dataclass(frozen=True)
class Series:
    """A line of a run. A faint one lies behind the others, without markers."""

    run: int
    points: list[Point]
    subset: str | None = None
    faint: bool = False
    markers: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart in every form that it takes."""

    id: str
    title: str
    x: str
    y: str
    series: list[Series]
    summary: str
    note: str
    header: list[str]
    rows: list[list[str]]
    logarithmic: bool = False
    targets: Sequence[float] = ()

    def drawn(self) -> dict[str, Any]:
        """What the page's script needs."""
        series = [
            {**vars(line), "points": [(_short(x), _short(y)) for x, y in line.points if _drawable(x, y)]}
            for line in self.series
        ]
        chosen = {"id": self.id, "x": self.x, "y": self.y, "logarithmic": self.logarithmic, "targets": self.targets}
        return {**chosen, "series": series}


def charts(runs: Sequence[Run]) -> list[Chart]:
    """All charts for which some run has figures."""
    drawn = [*_error_charts(runs), *_step_charts(runs), *_epoch_charts(runs)]
    return [chart for chart in drawn if any(series.points for series in chart.series)]


def subsets(runs: Sequence[Run]) -> list[str]:
    """Names of the validation subsets in the logs, "all" first."""
    names = [name for run in runs for epoch in run.log.epochs for name in epoch.errors]
    return list(dict.fromkeys([ALL, *names]))


def duration(seconds: float) -> str:
    """As a person says it: 126 s, 26 min 41 s, 95 h 47 min."""
    if seconds < 600:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _short(value: float) -> float:
    return float(f"{value:.5g}") if abs(value) < 1e5 else value


def _drawable(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _wers(epoch: Epoch) -> dict[str, float]:
    found = {ALL: epoch.wer} if epoch.wer is not None else {}
    return {**found, **{name: errors.wer for name, errors in epoch.errors.items()}}


def _error_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    names = subsets(runs)
    wers = [(run, epoch, _wers(epoch)) for run in runs for epoch in run.log.epochs]
    measured = [(run, epoch, of) for run, epoch, of in wers if of]
    # Where one subset is all there is, its own column says nothing more.
    columns = [ALL] if len(names) == 2 else names
    targets = sorted({run.target for run in runs if run.target is not None})
    ends = [run.seconds_before + _evaluated_at(epoch) for run, epoch, _ in measured]
    unit, divisor = _time_unit(max(ends, default=0.0))

    def series(x: Callable[[Run, Epoch], float]) -> list[Series]:
        lines = []
        for run in runs:
            for name in columns:
                points = [(x(run, epoch), of[name]) for r, epoch, of in measured if r is run and name in of]
                if points:
                    lines.append(Series(run.number, points, name, markers=True))
        return lines

    def summary() -> str:
        parts = []
        for run in runs:
            of_run = [(epoch, of[ALL]) for r, epoch, of in measured if r is run and ALL in of]
            if of_run:
                (first, before), (last, after) = of_run[0], of_run[-1]
                when = duration(run.seconds_before + _evaluated_at(last))
                parts.append(
                    f"{run.label}: {before:.2f} after epoch {first.number}, "
                    f"{after:.2f} after epoch {last.number}, at {when}"
                )
        return "Word error rate in percent. " + ". ".join(parts) + "."

    header = ["Run", "Epoch", "Time (s)", *(("all utterances" if name == ALL else name) for name in columns)]
    rows = [
        [
            run.label,
            str(epoch.number),
            f"{run.seconds_before + _evaluated_at(epoch):.0f}",
            *(f"{of[name]:.2f}" if name in of else "" for name in columns),
        ]
        for run, epoch, of in measured
    ]
    shared: dict[str, Any] = {"y": "WER (%)", "header": header, "rows": rows, "targets": targets, "summary": summary()}
    note = "Corpus word error rate on the validation set after each epoch; the dashed line is the target."
    yield Chart(
        id="wer-time",
        title="Word error rate by time",
        x=f"time on the clock ({unit})",
        series=series(lambda run, epoch: (run.seconds_before + _evaluated_at(epoch)) / divisor),
        note=note,
        **shared,
    )
    yield Chart(
        id="wer-epoch",
        title="Word error rate by epoch",
        x="epoch",
        series=series(lambda run, epoch: epoch.number),
        note=note,
        **shared,
    )


def _evaluated_at(epoch: Epoch) -> float:
    """Seconds on this process's clock; the log of a run that is cut off right there lacks the last of these."""
    return next(time for time in (epoch.evaluated, epoch.trained, epoch.started) if time is not None)


def _time_unit(longest: float) -> tuple[str, int]:
    if longest < 600:
        return "s", 1
    return ("min", 60) if longest < 4 * 3600 else ("h", 3600)


def _step_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    def values(run: Run, of: Callable[[Step], float | None]) -> list[Point]:
        points = [(float(step.number), of(step)) for step in run.log.steps]
        return [(number, value) for number, value in points if value is not None and math.isfinite(value)]

    limit = max(2, POINTS // len(runs))
    steps = max(len(run.log.steps) for run in runs)
    thinned = "" if steps <= limit else f" Of up to {steps:,} steps at most {limit:,} points are drawn, "
    extremes = thinned and thinned + "the lowest and the highest of each stretch."

    def with_running_mean(of: Callable[[Step], float | None]) -> list[Series]:
        points = {run.number: values(run, of) for run in runs}
        faint = [Series(number, thin(them, limit), faint=True) for number, them in points.items()]
        return faint + [Series(number, thin(running_mean(them), limit)) for number, them in points.items()]

    yield _of_steps(
        runs,
        id="loss",
        title="Training loss",
        y="CTC loss",
        series=with_running_mean(lambda step: step.loss),
        note="Each step's mean over its batch, faint; the line is the mean of the steps around." + extremes,
        column="mean loss",
        of_epoch=lambda epoch, of: _mean([step.loss for step in of]) if epoch.loss is None else epoch.loss,
    )
    yield _of_steps(
        runs,
        id="rate",
        title="Learning rate",
        y="learning rate",
        series=[Series(run.number, thin(values(run, lambda step: step.learning_rate), limit)) for run in runs],
        note="Of each step." + extremes,
        column="at its end",
        of_epoch=lambda epoch, of: of[-1].learning_rate if of else None,
    )
    yield _of_steps(
        runs,
        id="norm",
        title="Gradient norm",
        y="gradient norm, before clipping",
        series=with_running_mean(lambda step: step.gradient_norm),
        note="Of each step, faint; the line is the mean of the steps around. Logarithmic." + extremes,
        column="median",
        of_epoch=lambda epoch, of: _median([step.gradient_norm for step in of]),
        logarithmic=True,
    )


def _of_steps(
    runs: Sequence[Run], column: str, of_epoch: Callable[[Epoch, list[Step]], float | None], **chart: Any
) -> Chart:
    """A chart over steps, whose table and summary are over epochs."""
    figures = [
        (run, epoch, value)
        for run in runs
        for epoch, of in _steps_by_epoch(run.log)
        if (value := of_epoch(epoch, of)) is not None
    ]
    parts = []
    for run in runs:
        of_run = [(epoch.number, value) for r, epoch, value in figures if r is run]
        if of_run:
            (first, before), (last, after) = of_run[0], of_run[-1]
            parts.append(f"{run.label}: {before:.3g} in epoch {first}, {after:.3g} in epoch {last}")
    return Chart(
        x="step",
        summary=f"{chart['title']}, {column} of an epoch. {'. '.join(parts)}.",
        header=["Run", "Epoch", f"{chart['title']}, {column}"],
        rows=[[run.label, str(epoch.number), f"{value:.4g}"] for run, epoch, value in figures],
        **chart,
    )


def _steps_by_epoch(log: RunLog) -> Iterator[tuple[Epoch, list[Step]]]:
    rest = log.steps
    for epoch in log.epochs:
        end = math.inf if epoch.step is None else epoch.step
        yield epoch, [step for step in rest if step.number <= end]
        rest = [step for step in rest if step.number > end]


def _epoch_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    for id, title, y, of, note in (
        (
            "throughput",
            "Throughput",
            "utterances per second",
            lambda epoch: epoch.throughput.get("utterances_per_second"),
            "Training only, without evaluation.",
        ),
        (
            "wait",
            "Waiting for data",
            "% of training time",
            lambda epoch: _percent(epoch.throughput.get("data_wait_fraction")),
            "How long a step waited for its batch, of the time of training.",
        ),
    ):
        found = {
            run.number: [(epoch.number, value) for epoch in run.log.epochs if (value := of(epoch)) is not None]
            for run in runs
        }
        means = [f"{run.label}: {_mean([y for _, y in found[run.number]]):.3g}" for run in runs if found[run.number]]
        yield Chart(
            id=id,
            title=title,
            x="epoch",
            y=y,
            series=[Series(number, list(points), markers=True) for number, points in found.items()],
            summary=f"{title}, {y}, mean of epochs. {'. '.join(means)}.",
            note=note,
            header=["Run", "Epoch", y],
            rows=[[run.label, str(epoch), f"{value:.4g}"] for run in runs for epoch, value in found[run.number]],
        )


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
