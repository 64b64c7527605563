"""Which runs are one series, what they are called, and how they ended."""

from pathlib import Path
from typing import Any

import pytest

from tests.tools.mlperf.forged import Forged
from tests.tools.mlperf.made_up_logs import add, made_up_log, series_of
from tests.tools.mlperf.test_score import series
from tools.report.runs import Run, read_series


def run_of(log: Forged, folder: Path) -> Run:
    return series_of(folder, log)[0].runs[0]


def labels(folder: Path, *logs: Forged) -> list[str]:
    return [each.label for each in series_of(folder, *logs)]


def test_runs_that_differ_only_in_their_seeds_are_one_series_with_a_score(tmp_path: Path) -> None:
    (only,) = read_series(dict.fromkeys(reversed(series(tmp_path / "series", epochs=[2, 3, 7])), ""))  # of 110 s each
    assert [run.label for run in only.runs] == ["synthetic, seed 1", "synthetic, seed 2", "synthetic, seed 3"]
    assert (only.label, only.score, only.no_score) == ("synthetic", 330.0, "")


def test_a_series_without_a_score_says_why(tmp_path: Path) -> None:
    missed = series(tmp_path / "missed", epochs=[2, 2, 2], missed=2)
    (only,) = read_series(dict.fromkeys(missed, ""))
    assert only.score is None and "2 runs did not reach the target" in only.no_score
    (only,) = read_series(dict.fromkeys(missed[:2], ""))
    assert (only.score, only.no_score) == (None, "")


def test_series_are_called_by_what_differs_with_limits_last_and_never_by_a_digest(tmp_path: Path) -> None:
    made = [
        made_up_log(epochs=1, steps=2, config={"batch_size": batch, "target_wer": target})
        for batch, target in ((8, 23.0), (8, 50.0), (16, 23.0))
    ]
    for number, log in enumerate(made):
        log.edit("dataset", f"{number}" * 64)
    assert labels(tmp_path, *made) == [
        "librispeech, batch size 8, target wer 23.0",
        "librispeech, batch size 8, target wer 50.0",
        "librispeech, batch size 16",
    ]


def test_the_same_seed_another_commit_and_a_resumed_run_begin_series_of_their_own(tmp_path: Path) -> None:
    first, other, resumed = made_up_log(seed=1), made_up_log(seed=2), made_up_log(seed=3, resumed=100.0)
    other.edit("git_commit", "f" * 40)
    assert labels(tmp_path, first, other, resumed, made_up_log(seed=1), made_up_log(seed=4)) == [
        "librispeech, commit 01234567, resumed False, log 0",
        "librispeech, commit ffffffff",
        "librispeech, commit 01234567, resumed True",
        "librispeech, commit 01234567, resumed False, log 3",
    ]


def test_a_time_is_not_valid_if_others_had_the_cpu_or_the_log_is_refused(tmp_path: Path) -> None:
    assert run_of(made_up_log(), tmp_path).valid
    assert not run_of(made_up_log(others=0.5), tmp_path).valid
    assert not run_of(made_up_log(resumed=100.0), tmp_path).valid


SKIPPED = made_up_log()
add(SKIPPED, "train_loss", "skipped_step", 120, number=-1, reason="not finite", utterances=[])


def cut(log: Forged, last: str, *, status: str | None = "aborted", exception: str | None = None) -> Forged:
    """End a run after the last event of a kind."""
    del log.events[log.positions(last)[-1] + 1 :]
    if status is not None:
        raised: dict[str, Any] = {} if exception is None else {"exception": exception}
        add(log, log.events[-1]["key"], "run_stop", None, number=-1, status=status, **raised)
    log.result = None
    return log


@pytest.mark.parametrize(
    ("log", "outcome"),
    [
        (made_up_log(), "target reached"),
        (made_up_log(reached=False, config={"max_epochs": 3}), "max_epochs reached"),
        (made_up_log(reached=False, config={"max_steps": 120}), "max_steps reached"),
        (cut(SKIPPED, "skipped_step", exception="RunError"), "diverged: loss or gradient was not finite"),
        (cut(made_up_log(), "train_loss", exception="Preempted"), "interrupted by a signal, and saved"),
        (cut(made_up_log(), "train_loss", exception="OSError"), "crashed: OSError"),
        (cut(made_up_log(), "train_loss", exception="KeyboardInterrupt"), "stopped by Ctrl-C"),
        (cut(made_up_log(), "train_loss"), "crashed or stopped"),  # in older logs
        (cut(made_up_log(), "train_loss", status=None), "the log ends before the run did"),
    ],
)
def test_the_outcome_says_why_a_run_ended(log: Forged, outcome: str, tmp_path: Path) -> None:
    assert run_of(log, tmp_path).outcome == outcome


@pytest.mark.parametrize("hours", [-1, 1])
def test_if_the_clock_was_set_the_time_is_that_of_the_result_line(hours: int, tmp_path: Path) -> None:
    log = made_up_log()
    log.shift("train_loss", 3600 * hours, number=50)
    run = run_of(log, tmp_path)
    assert (run.seconds, run.valid) == (92.0, False)


def test_the_time_of_a_resumed_or_restarted_run_adds_up(tmp_path: Path) -> None:
    assert run_of(made_up_log(resumed=100.0), tmp_path).seconds == 100 + 3 * 30 + 3 * 0.5
    log = made_up_log(reached=False)
    log.events += made_up_log(resumed=50.0).events
    assert run_of(log, tmp_path).seconds == 50 + 91.5
