"""The figures that charts and the table of epochs show."""

import math
from pathlib import Path
from typing import Any

import pytest

from tests.tools.mlperf.forged import Forged
from tests.tools.mlperf.made_up_logs import SUBSETS, add, made_up_log, series_of
from tests.tools.mlperf.test_score import series
from tools.report.charts import POINTS, charts, epoch_rows
from tools.report.runs import read_series


def charts_of(folder: Path, *logs: Forged) -> dict[str, dict[str, Any]]:
    return {chart["title"]: chart for chart in charts(series_of(folder, *logs))}


def rows_of(log: Forged, folder: Path) -> list[dict[str, Any]]:
    return list(epoch_rows(series_of(folder, log)[0].runs[0]).values())


def points(chart: dict[str, Any]) -> list[list[float]]:
    (line,) = chart["lines"]
    return line["points"]


def test_a_runs_curves_show_its_epochs_and_steps(tmp_path: Path) -> None:
    found = charts_of(tmp_path, made_up_log())
    assert list(found) == ["Word error rate by time", "Word error rate by epoch", "Training loss"]
    by_time, by_epoch, loss = map(points, found.values())
    assert by_time[0] == [30.5, pytest.approx(55, abs=0.01)]  # trained in 20 s, saved, evaluated in 10 s
    assert [epoch for epoch, _ in by_epoch] == [1, 2, 3]
    assert [wer for _, wer in by_epoch] == pytest.approx([55, 35, 15], abs=0.01)
    assert len(loss) == len(made_up_log().positions("train_loss")) < POINTS
    assert [chart["targets"] for chart in found.values()] == [[23.0], [23.0], []]


def test_a_series_is_a_median_with_a_band_as_far_as_half_of_its_runs_go(tmp_path: Path) -> None:
    read = read_series(dict.fromkeys(series(tmp_path / "series", epochs=[2, 3, 7]), ""))
    found = {chart["title"]: points(chart) for chart in charts(read)}
    assert found["Word error rate by epoch"] == [[1, 90, 90, 90], [2, 89, 20, 89], [3, 54, 20, 88]]
    assert [x for x, *_ in found["Word error rate by time"]] == [110, 220, 330]
    assert [x for x, _ in found["Epochs to the target"]] == [2, 3, 7]
    assert [x for x, _ in found["Time to the target"]] == [220, 330, 770]
    assert len({y for _, y in found["Epochs to the target"]}) == 3


def test_many_steps_are_few_points_that_hold_their_means(tmp_path: Path) -> None:
    found = points(charts_of(tmp_path, made_up_log(epochs=1, steps=5000))["Training loss"])
    assert POINTS / 2 < len(found) <= POINTS + 1
    assert all(loss == pytest.approx(100 / step, rel=0.1) for step, loss in found[5:])


def test_steps_without_a_loss_are_left_out_of_the_curve(tmp_path: Path) -> None:
    log = made_up_log(epochs=1, steps=3)
    add(log, "train_loss", "skipped_step", 4, number=2, reason="not finite", utterances=[])
    add(log, "skipped_step", "train_loss", math.nan, step_num=5)
    assert [x for x, _ in points(charts_of(tmp_path, log)["Training loss"])] == [1, 2, 3]


def test_without_times_that_can_be_believed_there_is_no_chart_over_time(tmp_path: Path) -> None:
    log = made_up_log()
    log.shift("train_loss", 3600, number=50)
    assert list(charts_of(tmp_path, log)) == ["Word error rate by epoch", "Training loss"]


def test_times_of_a_resumed_run_go_on_and_an_epoch_that_was_only_evaluated_has_no_rate(tmp_path: Path) -> None:
    log = made_up_log(resumed=100.0, epochs=2)
    log.edit("epoch_stop", peak_memory_gib=1.5, number=1)
    stop = log.positions("epoch_stop")[0]
    log.events = [event for place, event in enumerate(log.events) if place > stop or event["key"] != "train_loss"]
    log.edit("epoch_stop", seconds=0.0, utterances_per_second=0.0, audio_seconds_per_second=0.0)
    first, second = rows_of(log, tmp_path)
    assert first["time (s)"] == 130.5
    assert "utterances/s" not in first
    assert second["utterances/s"] > 0
    assert second.keys() - first.keys() == {"utterances/s", "waiting for data (fraction)", "peak memory (GiB)"}
    assert {f"WER (%) {name}" for name in SUBSETS} <= first.keys()
