"""Two runs side by side, on logs whose figures are known because they are made up."""

import re
from pathlib import Path

import pytest

from tests.tools.mlperf.made_up_logs import add
from tests.tools.mlperf.test_score import log_of, small, write
from tools.mlperf.__main__ import main


def test_runs_with_equal_losses_are_the_same_also_where_one_is_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path, [log_of(small(), epochs=2), log_of(small(), epochs=3)])
    assert main(["compare", str(a), str(a)]) == 0
    assert "losses: the same in all 8 steps of both\n" in capsys.readouterr().out
    assert main(["compare", str(a), str(b)]) == 0
    assert "8 steps of both\nlosses: 4 more steps are in one log only\n" in capsys.readouterr().out


def test_the_first_and_the_largest_difference_are_shown_with_their_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right = log_of(small()), log_of(small(2, hidden_size=80), seconds_of_epoch=50.0)
    for number, value, other in ((2, 1.0, 1.5), (5, 8.0, 16.0)):
        left.edit("train_loss", value, number=number)
        right.edit("train_loss", other, number=number)
    for number in (0, 1, 3, 4, 6, 7):
        right.edit("train_loss", left.events[left.positions("train_loss")[number]]["value"], number=number)
    a, b = write(tmp_path, [left, right])
    assert main(["compare", str(a), str(b)]) == 1
    output = capsys.readouterr().out
    assert "losses: first differ in step 3: 1.0 and 1.5, relative difference 0.5\n" in output
    assert "losses: differ most in step 6: 8.0 and 16.0, relative difference 1\n" in output
    assert "losses: differ in 2 of 8 steps of both\n" in output
    assert "hidden_size: 168 and 80" in output
    assert "seed: 1 and 2" in output
    assert "A: target WER 23.0 reached in 220.0 s, 2 epochs" in output
    assert "B takes -45.5% compared with A" in output
    assert "    1     90.00     110.0     90.00      60.0" in output


def test_epochs_of_a_resumed_run_are_those_of_the_same_number_and_its_time_is_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, resumed = log_of(small(), epochs=3), log_of(small(), epochs=3)
    del resumed.events[resumed.positions("epoch_start")[0] : resumed.positions("epoch_start")[1]]
    add(resumed, "git_commit", "resumed", True, elapsed_seconds=110.0)
    a, b = write(tmp_path, [whole, resumed])
    assert main(["compare", str(a), str(b)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^ +1 +90\.00 +110\.0 +- +-$", output, re.MULTILINE)
    assert re.search(r"^ +2 +89\.00 +220\.0 +89\.00 ", output, re.MULTILINE)
    assert "compared with A" not in output


def test_of_a_run_whose_ranks_were_restarted_the_outcome_of_the_last_start_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, again = log_of(small(), epochs=2), log_of(small(), epochs=2)
    del log.events[log.positions("epoch_stop")[0] :]
    add(log, log.events[-1]["key"], "run_stop", None, number=-1, status="aborted")
    add(again, "git_commit", "resumed", True, elapsed_seconds=60.0)
    log.events += again.events
    log.result = None
    a, b = write(tmp_path, [log_of(small(), epochs=2), log])
    assert main(["compare", str(a), str(b)]) == 0
    output = capsys.readouterr().out
    assert "B: target WER 23.0 reached in 280.0 s, 2 epochs, resumed: no uninterrupted result" in output
