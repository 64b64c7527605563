"""The page's tables: how the runs did, where their time went, what they ran, and where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from tools.report.charts import duration
from tools.report.runs import Run


class Row(NamedTuple):
    """A fact of each run; "" where its log does not hold it."""

    name: str
    values: list[str]

    @property
    def differs(self) -> bool:
        """Whether those runs disagree that hold it."""
        return len(set(filter(None, self.values))) > 1


@dataclass(frozen=True)
class Parts:
    """Where a run's seconds went; only `init` is off the clock."""

    init: float
    train: float
    evaluate: float
    checkpoint: float
    other: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def parts(run: Run) -> Parts:
    """Of this process, without what was before it resumed. A run that was cut off counts to its last event."""
    log = run.log
    end = log.clock(log.events[-1]) if log.seconds is None else log.seconds
    train = evaluate = saved = 0.0
    for epoch in log.epochs:
        train += (end if epoch.trained is None else epoch.trained) - epoch.started
        if epoch.trained is not None:
            evaluate += (end if epoch.evaluated is None else epoch.evaluated) - epoch.trained
    for checkpoint in log.all("checkpoint"):
        at = log.clock(checkpoint)
        if 0 <= at <= end:  # the first and the last may be off the clock
            saved += float(checkpoint.value)
            if any(epoch.started < at <= (end if epoch.trained is None else epoch.trained) for epoch in log.epochs):
                train -= float(checkpoint.value)
    return Parts(log.init_seconds or 0.0, train, evaluate, saved, max(0.0, end - train - evaluate - saved))


def scores(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Header, and a row for each run."""
    header = ["Run", "Seed", "Configuration", "Status", "Epochs", "WER (%)", "Time to target (s)", "Of it evaluation"]
    return header, [_score(run) for run in runs]


def _score(run: Run) -> list[str]:
    log, spent = run.log, parts(run)
    status = {"success": "target reached", "aborted": "not reached", None: "not finished"}.get(log.status, log.status)
    clock = spent.total - spent.init
    return [
        run.label,
        _shown(log.seed),
        _shown(log.config_name),
        f"{status}, resumed" if log.resumed else _shown(status),
        str(max((epoch.number for epoch in log.epochs), default=0)),
        "" if run.final_wer is None else f"{run.final_wer:.2f}",
        "" if run.seconds_to_target is None else f"{run.seconds_to_target:.1f}",
        f"{spent.evaluate / clock:.1%}" if clock > 0 else "",
    ]


def headline(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The figures that a reader looks for first: value and what it is."""
    return _of_one(runs[0]) if len(runs) == 1 else _of_several(runs)


def _of_one(run: Run) -> list[tuple[str, str]]:
    log = run.log
    figures = []
    if run.final_wer is not None:
        target = "" if run.target is None else f", target {run.target:g}"
        figures.append((f"{run.final_wer:.2f} %", f"word error rate{target}"))
    if run.seconds_to_target is not None:
        figures.append((duration(run.seconds_to_target), "to the target"))
    elif log.seconds is not None:
        figures.append((duration(log.seconds + run.seconds_before), "without reaching the target"))
    if log.epochs:
        number = log.epochs[-1].number
        figures.append((str(number), "epoch" if number == 1 else "epochs"))
    name = "audio_seconds_per_second"
    speeds = [epoch.throughput[name] for epoch in log.epochs if name in epoch.throughput]
    if speeds:
        figures.append((f"{sum(speeds) / len(speeds):,.0f} x", "real time in training"))
    return figures


def _of_several(runs: Sequence[Run]) -> list[tuple[str, str]]:
    times = [run.seconds_to_target for run in runs if run.seconds_to_target is not None]
    figures = [(f"{len(times)} of {len(runs)}", "runs reached the target")]
    if len(times) > 1 and not any(row.differs for row in settings(runs) if row.name == "config"):
        figures += [(duration(min(times)), "the fastest"), (duration(max(times)), "the slowest")]
    return figures


def settings(runs: Sequence[Run]) -> list[Row]:
    """What the runs were told to do: every field of their configurations, and their data."""
    configurations = [run.log.configuration for run in runs]
    rows = _rows(configurations)
    datasets = [run.log.dataset for run in runs]
    if any(dataset is not None for dataset in datasets):
        rows.append(Row("data set's digest", ["" if dataset is None else dataset.digest[:16] for dataset in datasets]))
    return rows


def environment(runs: Sequence[Run]) -> list[Row]:
    """Hardware, software and the state of this repository."""
    rows = _rows([run.log.environment for run in runs])
    for name, key in (
        ("platform", "submission_platform"),
        ("recurrent layers", "gru_implementation"),
        ("processes", "number_of_ranks"),
        ("container image", "container_image"),
    ):
        rows.append(Row(name, [_shown(run.log.value(key)) for run in runs]))
    rows.append(Row("commit", [_commit(run) for run in runs]))
    return [row for row in rows if any(row.values)]


def _commit(run: Run) -> str:
    return _shown(run.log.commit)[:12] + (" with uncommitted changes" if run.log.dirty else "")


def _rows(by_run: Sequence[dict[str, Any]]) -> list[Row]:
    names = dict.fromkeys(name for known in by_run for name in known)
    return [Row(name.replace("_", " "), [_known(known, name) for known in by_run]) for name in names]


def _known(known: dict[str, Any], name: str) -> str:
    return "none" if name in known and known[name] is None else _shown(known.get(name))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
