"""The page's figures besides charts: how the runs did, where their time went, what they ran, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from tools.mlperf.runlog import RunLog
from tools.report.charts import WER, epoch_rows
from tools.report.runs import Run, Series, file_names

Table = tuple[list[str], list[list[str]]]  # header and rows
INIT, TRAINING, EVALUATION, CHECKPOINTS, OTHER = "init, off the clock", "training", "evaluation", "checkpoints", "other"
MOST_VALUES = 5  # of a fact that differs within a series; of more it says how many


def duration(seconds: float) -> str:
    """Return a time as a person says it: 12.6 s, 26 min 41 s, 95 h 47 min."""
    if seconds < 600:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def headline(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Return the figures that a reader looks for first: value and what it is."""
    runs = [run for each in series for run in each.runs]
    if len(runs) == 1:
        return _of_one(runs[0])
    scores = [(each.score, f" of {each.label}" if len(series) > 1 else "") for each in series]
    figures = [(duration(score), f"score{of}") for score, of in scores if score is not None]
    times = [run.seconds_to_target for run in runs if run.seconds_to_target is not None]
    figures.append((f"{len(times)} of {len(runs)}", "runs reached the target"))
    if len(series) == 1 and times:
        spread = f" ({duration(min(times))} to {duration(max(times))})"
        figures.append((duration(median(times)), f"median time to the target{spread}"))
    return figures


def _of_one(run: Run) -> list[tuple[str, str]]:
    log = run.log
    figures = []
    if run.wer is not None:
        target = "" if log.target_wer is None else f", target {log.target_wer:g}"
        figures.append((f"{run.wer:.2f} %", f"{'' if log.reached else 'lowest '}word error rate{target}"))
    if run.seconds is not None:
        figures.append((duration(run.seconds), "to the target" if log.reached else run.outcome))
    count, unit = (run.epochs, "epoch") if run.epochs else (len(log.steps), "step")
    figures.append((str(count), unit if count == 1 else f"{unit}s"))
    name = "audio_seconds_per_second"
    if speeds := [epoch.throughput[name] for epoch in log.epochs if name in epoch.throughput]:
        figures.append((f"{fmean(speeds):,.0f} x", "real time in training"))
    return figures


def result_table(series: Sequence[Series]) -> Table:
    """Return a row for each series: medians, and from the lowest to the highest."""
    header = ["Series", "Result", WER, "Time to target (s)", "Epochs", "Evaluation share", "Score (s)"]
    return header, [[each.label, *_results(each.runs), _shown(each.score, "{:.1f}")] for each in series]


def run_table(series: Sequence[Series]) -> Table:
    """Return a row for each run."""
    runs = [run for each in series for run in each.runs]
    names = file_names([run.log.path for run in runs])
    header = ["Run", "Result", WER, "Time to target (s)", "Epochs", "Evaluation share", "Log"]
    return header, [[run.label, *_results([run]), name] for run, name in zip(runs, names, strict=True)]


def _results(runs: Sequence[Run]) -> list[str]:
    result = f"{sum(run.log.reached for run in runs)} of {len(runs)} reached"
    if len(runs) == 1:
        (run,) = runs
        result = run.outcome + (", resumed" if run.log.resumed else "") + (", refused" if run.refusals else "")
    shares = [
        100 * spent[EVALUATION] / (sum(spent.values()) - spent[INIT])
        for run in runs
        if (spent := parts([run])) and sum(spent.values()) > spent[INIT]
    ]
    return [
        result,
        _spread([run.wer for run in runs], "{:.2f}"),
        _spread([run.seconds_to_target for run in runs], "{:.1f}"),
        _spread([run.epochs for run in runs], "{:g}"),
        _spread(shares, "{:.1f}%"),
    ]


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    middle, low, high = (form.format(value) for value in (median(known), min(known), max(known)))
    return middle if low == high else f"{middle} ({low} to {high})"


def epoch_table(series: Sequence[Series]) -> Table:
    """Return a row for each epoch of each run: what the charts show."""
    rows = [(run.label, row) for each in series for run in each.runs for row in epoch_rows(run)]
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    return ["Run", *names], [[label, *(_shown(row.get(name), "{:.6g}") for name in names)] for label, row in rows]


def parts(runs: Sequence[Run]) -> dict[str, float]:
    """Return the mean seconds of each part of the runs' time; empty where it is not known.

    They are those of the process that wrote the log, without what was before it resumed.
    """
    known = [_parts(run.log) for run in runs if run.has_times]
    return {name: fmean(spent[name] for spent in known) for name in known[0]} if known else {}


def _parts(log: RunLog) -> dict[str, float]:
    end = log.clock(log.events[-1]) if log.seconds is None else log.seconds  # a log may be cut off
    saves = [(log.clock(event), float(event.value)) for event in log.all("checkpoint")]
    saved = sum(seconds for at, seconds in saves if 0 <= at <= end)  # the first and the last may be off the clock

    def without_saves(start: float, stop: float) -> float:
        return stop - start - sum(seconds for at, seconds in saves if start < at <= stop)

    train = evaluate = 0.0
    for epoch in log.epochs:
        trained = end if epoch.trained is None else epoch.trained
        train += without_saves(epoch.started, trained)
        evaluate += without_saves(trained, end if epoch.evaluated is None else epoch.evaluated)
    other = max(0.0, end - train - evaluate - saved)
    return {INIT: log.init_seconds or 0.0, TRAINING: train, EVALUATION: evaluate, CHECKPOINTS: saved, OTHER: other}


def facts(series: Sequence[Series]) -> dict[str, list[str]]:
    """Return what was run, of each series: every field of the configuration, the data, hardware, software and the code.

    A fact that a log does not hold is "".
    """
    known = [[_known(run.log) for run in each.runs] for each in series]
    found = {}
    for name in dict.fromkeys(name for runs in known for of_run in runs for name in of_run):
        values = [list(dict.fromkeys(of_run.get(name, "") for of_run in runs)) for runs in known]
        found[name] = [", ".join(each) if len(each) <= MOST_VALUES else f"{len(each)} values" for each in values]
    return found


def _known(log: RunLog) -> dict[str, str]:
    configuration = {name: "none" if value is None else value for name, value in log.configuration.items()}
    known = {
        **configuration,
        "data set's digest": log.dataset and log.dataset.digest[:16],
        **log.environment,
        "platform": log.value("submission_platform"),
        "recurrent layers": log.value("gru_implementation"),
        "processes": log.value("number_of_ranks"),
        "container image": log.value("container_image"),
        "commit": log.commit and log.commit[:12] + (" with uncommitted changes" if log.dirty else ""),
    }
    return {name.replace("_", " "): _shown(value) for name, value in known.items() if value is not None}


def _shown(value: Any, form: str = "{}") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else form.format(value)
