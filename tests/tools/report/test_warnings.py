"""What the page says before its figures."""

from pathlib import Path

import pytest

from tests.tools.mlperf.forged import Forged
from tests.tools.mlperf.made_up_logs import made_up_log, series_of
from tests.tools.mlperf.test_score import series
from tools.report.runs import read_series
from tools.report.warnings import warnings


def warned(folder: Path, *logs: Forged) -> list[tuple[str, str]]:
    return warnings(series_of(folder, *logs))


@pytest.mark.parametrize(
    ("made", "warning"),
    [
        ({"reached": False}, "The target WER of 23 was not reached"),
        ({"resumed": 100.0}, "Resumed after 100 s"),
        ({"dirty": True}, "Files differed from the commit"),
        ({"cleared": False}, "audio.npy is still cached"),
        ({"others": 0.5}, "Other programs took 50% of the CPU time, the hypervisor 2%"),
        ({"synthetic": True}, "Not a LibriSpeech result"),
    ],
)
def test_what_is_no_plain_result_is_warned_of(made: dict, warning: str, tmp_path: Path) -> None:
    assert warned(tmp_path, made_up_log()) == []
    assert any(whom == "" and warning in text for whom, text in warned(tmp_path, made_up_log(**made)))


def test_warnings_that_differ_only_in_numbers_are_one_with_a_range(tmp_path: Path) -> None:
    made = [made_up_log(seed=seed, epochs=1, steps=2, dirty=True, others=0.4 + seed / 100) for seed in range(1, 21)]
    for log in made[:9]:
        log.edit("cache_clear", False, reason=f"{1000 * log.events[log.positions('seed')[0]]['value']:,} pages of x-1")
    found = [(whom, text) for whom, text in warned(tmp_path, *made) if "checker" not in text]
    assert len(found) == 3
    assert {(whom, text[:49]) for whom, text in found} >= {("", "Other programs took 41 to 60% of the CPU time, th")}
    ((whom, text),) = [(whom, text) for whom, text in found if "pages" in text]
    assert whom == "9 of 20 runs"
    assert "1,000 to 9,000 pages of x-1" in text


def test_a_few_runs_are_named(tmp_path: Path) -> None:
    made = [made_up_log(seed=seed, config={"augment": seed < 3}, dirty=seed in (1, 2, 5)) for seed in range(1, 6)]
    ((whom, _),) = [found for found in warned(tmp_path, *made) if "commit" in found[1]]
    assert whom == "; ".join(f"librispeech, augment {seed < 3}, seed {seed}" for seed in (1, 2, 5))


@pytest.mark.parametrize("count", [3, 10, 12])
def test_the_rules_ask_for_ten_runs_only_below_ten(count: int, tmp_path: Path) -> None:
    found = warnings(read_series(dict.fromkeys(series(tmp_path / "series", [2] * count), "")))
    assert any("ask for 10 runs" in text for _, text in found) is (count < 10)


def test_other_data_and_other_targets_are_not_comparable(tmp_path: Path) -> None:
    other = made_up_log(config={"target_wer": 50.0})
    other.edit("dataset", "1" * 64)
    found = [text for whom, text in warned(tmp_path, made_up_log(), other) if whom == "" and "not comparable" in text]
    assert len(found) == 2
