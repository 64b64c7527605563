"""Scores, on logs whose figures are known because they are made up."""

import dataclasses
import re
from pathlib import Path

import pytest

from pytorch.config import CONFIGS, Config
from pytorch.errors import RunError
from tests.tools.mlperf.forged import Forged, made_up
from tests.tools.mlperf.test_runlog import COMMITTED
from tools.mlperf.__main__ import main
from tools.mlperf.check import load_valid
from tools.mlperf.score import Score, score


def small(seed: int = 1, **changes: object) -> Config:
    """A configuration whose epochs have 4 steps, with the 40 utterances of `log_of`."""
    base = dataclasses.replace(CONFIGS["synthetic"], batch_size=10, precision="fp32")
    return dataclasses.replace(base, seed=seed, **changes)  # type: ignore[arg-type]


def log_of(config: Config, *, epochs: int = 2, seconds_of_epoch: float = 100.0, reached: bool = True) -> Forged:
    """A run that takes this many epochs, with 10 s of evaluation in each."""
    wers = [90.0 - number for number in range(epochs - 1)] + [20.0 if reached else 50.0]
    return made_up(
        config,
        wers=wers,
        corpus="tones",
        train_samples=40,
        validation={"tones-validation": 240},
        seconds_of_epoch=seconds_of_epoch,
    )


def write(folder: Path, logs: list[Forged]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [log.write(folder / f"result_{number}.txt") for number, log in enumerate(logs)]


def series(folder: Path, epochs: list[int], batch_size: int = 10, missed: int = 0) -> list[Path]:
    """Runs with seeds from 1 that take this many epochs; the last ones of them miss the target."""
    logs = []
    for number, count in enumerate(epochs):
        config = small(number + 1, batch_size=batch_size)
        logs.append(log_of(config, epochs=count, reached=number < len(epochs) - missed))
    return write(folder, logs)


def scored(paths: list[Path]) -> Score:
    return score(load_valid(paths))


def texts(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths]


def test_the_score_is_the_mean_time_without_the_fastest_and_the_slowest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = [50.0, 130.0, 90.0, 70.0]
    paths = write(tmp_path, [log_of(small(seed), seconds_of_epoch=time) for seed, time in enumerate(times)])
    found = scored(paths)
    assert found.seconds == pytest.approx(2 * (80.0 + 10))  # two epochs, with their evaluations
    assert main(["score", *texts(paths)]) == 0
    output = capsys.readouterr().out
    assert "seconds to target of 4 runs, mean +- standard deviation: 190.0 +- 68.3 (120.0 to 280.0)" in output
    assert "epochs to target of 4 runs, mean +- standard deviation: 2.0 +- 0.0 (2.0 to 2.0)" in output
    assert "Score: 180.0 s" in output
    assert "the rules ask for 10 runs; these are 4" in output
    assert "not a LibriSpeech result: the corpus is tones" in output


def test_one_run_that_misses_the_target_counts_as_the_slowest_and_two_leave_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = series(tmp_path / "one", [2, 3, 4, 2], missed=1)
    assert scored(one).seconds == pytest.approx((3 + 4) / 2 * 110)
    assert main(["score", *texts(one)]) == 0
    assert "Runs that did not reach the target: 1." in capsys.readouterr().out
    two = series(tmp_path / "two", [2, 3, 4, 2], missed=2)
    assert main(["score", *texts(two)]) == 1
    assert "No score: 2 runs did not reach the target; at most 1 may." in capsys.readouterr().out


def test_runs_with_one_seed_or_one_run_under_two_seeds_are_refused(tmp_path: Path) -> None:
    paths = series(tmp_path, [2, 2, 2])
    with pytest.raises(RunError, match=r"result_0.txt: seed 1 is also that of .*result_0.txt"):
        scored([*paths, paths[0]])
    forged = Forged.of(paths[0])
    forged.edit("seed", 9)
    forged.edit("configuration", seed=9)
    forged.result = (forged.result or "").replace(",1,", ",9,", 1)
    with pytest.raises(RunError, match="one run under two seeds"):
        scored([*paths, forged.write(tmp_path / "again.txt")])


def test_runs_of_several_configurations_are_refused_and_it_says_how_they_differ(tmp_path: Path) -> None:
    logs = [log_of(small(1)), log_of(small(2, hidden_size=80)), log_of(small(3))]
    logs[2].edit("number_of_ranks", 8)
    logs[2].edit("dataset", "1" * 64)
    differing = r"differ in hidden_size \(168, 80\), data set \(0+, 1+\), number_of_ranks \(1, 8\)"
    with pytest.raises(RunError, match=differing):
        scored(write(tmp_path, logs))


def test_runs_of_several_commits_are_scored_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [log_of(small(seed)) for seed in (1, 2, 3)]
    logs[2].edit("git_commit", "1" * 40)
    logs[0].edit("cache_clear", False, reason="not permitted")
    assert main(["score", *texts(write(tmp_path, logs))]) == 0
    output = capsys.readouterr().out
    assert f"Note: the runs are of several commits: {'0' * 40}, {'1' * 40}." in output
    assert "the page cache was not cleared (not permitted) (1 of 3 runs)." in output


def test_a_run_that_broke_off_in_its_second_epoch_has_missed_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [log_of(small(seed)) for seed in (1, 2, 3)]
    broken = logs[1]
    del broken.events[broken.positions("epoch_stop")[1] : broken.positions("run_stop")[0]]
    broken.edit("run_stop", status="aborted")
    broken.result = None
    assert main(["score", *texts(write(tmp_path, logs))]) == 0
    assert re.search(r"^ +2 +1 +90\.00  no target", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.skipif(len(COMMITTED) < 3, reason="no series of results is committed")
def test_the_commands_work_on_committed_results(capsys: pytest.CaptureFixture[str]) -> None:
    folders = sorted({path.parent for path in COMMITTED})
    for folder in folders:
        paths = sorted(folder.glob("result_*.txt"))
        assert main(["check", *texts(paths)]) == 0
        if len(paths) >= 3:
            assert main(["score", *texts(paths)]) == 0
            assert "Score: " in capsys.readouterr().out
        assert main(["compare", str(paths[0]), str(paths[-1])]) == int(len(paths) > 1)
