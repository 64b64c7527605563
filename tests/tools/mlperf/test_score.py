"""Scores, reference convergence points and comparisons, on logs whose figures are known because they are made up."""

import dataclasses
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from mlperf_logging.rcp_checker import rcp_checker

from pytorch.config import CONFIGS, Config
from pytorch.errors import RunError
from tests.conftest import ROOT
from tests.tools.mlperf.forged import Forged, made_up
from tests.tools.mlperf.made_up_logs import add
from tests.tools.mlperf.test_check import COMMITTED
from tools.mlperf.__main__ import main
from tools.mlperf.rcp import EPOCHS, describe, make_points, read_points
from tools.mlperf.runlog import RunLog
from tools.mlperf.score import score

RCPS = ROOT / "results" / "rcps"


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


def texts(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths]


# --- score


def test_the_score_is_the_mean_time_without_the_fastest_and_the_slowest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = [50.0, 130.0, 90.0, 70.0]
    paths = write(tmp_path, [log_of(small(seed), seconds_of_epoch=time) for seed, time in enumerate(times)])
    found = score(paths)
    assert found.seconds == pytest.approx(2 * (80.0 + 10))  # two epochs, with their evaluations
    assert main(["score", *texts(paths)]) == 0
    output = capsys.readouterr().out
    assert "seconds to target of 4 runs, mean +- standard deviation: 190.0 +- 68.3 (120.0 to 280.0)" in output
    assert "epochs to target of 4 runs, mean +- standard deviation: 2.0 +- 0.0 (2.0 to 2.0)" in output
    assert "Score: 180.0 s" in output
    assert "the rules ask for 10 runs; these are 4" in output
    assert "not a LibriSpeech result: the corpus is tones" in output


def test_a_score_of_a_machine_that_others_used_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [log_of(small(seed), epochs=2) for seed in (1, 2, 3)]
    add(logs[1], "run_stop", "cpu_taken", 0.5, stolen=0.02, involuntary_context_switches=7)
    assert main(["score", *texts(write(tmp_path, logs))]) == 0
    said = "other programs took 50% of the CPU time, the hypervisor 2%: the run's time is not a valid benchmark result"
    assert said in capsys.readouterr().out


def test_one_run_that_misses_the_target_counts_as_the_slowest_and_two_leave_no_score(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = series(tmp_path / "one", [2, 3, 4, 2], missed=1)
    assert score(one).seconds == pytest.approx((3 + 4) / 2 * 110)
    assert main(["score", *texts(one)]) == 0
    assert "runs that did not reach the target: 1" in capsys.readouterr().out
    two = series(tmp_path / "two", [2, 3, 4, 2], missed=2)
    assert main(["score", *texts(two)]) == 1
    assert "No score: 2 runs did not reach the target; at most 1 may." in capsys.readouterr().out


def test_runs_with_one_seed_or_one_run_under_two_seeds_are_refused(tmp_path: Path) -> None:
    paths = series(tmp_path, [2, 2, 2])
    with pytest.raises(RunError, match=r"result_0.txt: seed 1 is also that of .*result_0.txt"):
        score([*paths, paths[0]])
    forged = Forged.of(paths[0])
    forged.edit("seed", 9)
    forged.edit("configuration", seed=9)
    forged.result = (forged.result or "").replace(",1,", ",9,", 1)
    with pytest.raises(RunError, match="one run under two seeds"):
        score([*paths, forged.write(tmp_path / "again.txt")])


def test_runs_of_several_configurations_are_refused_and_it_says_how_they_differ(tmp_path: Path) -> None:
    logs = [log_of(small(1)), log_of(small(2, hidden_size=80)), log_of(small(3))]
    logs[2].edit("number_of_ranks", 8)
    logs[2].edit("dataset", "1" * 64)
    with pytest.raises(
        RunError, match=r"differ in hidden_size \(168, 80\), data set \(0+, 1+\), number_of_ranks \(1, 8\)"
    ):
        score(write(tmp_path, logs))


@pytest.mark.parametrize(
    ("key", "value", "metadata", "said"),
    [
        ("environment", ..., {"torch": "2.11.0"}, r"torch \(2.14.1, 2.11.0\)"),
        ("environment", ..., {"threads": 8}, r"threads \(None, 8\)"),
        ("gru_implementation", "plain PyTorch", {}, r"gru_implementation \(fused kernel \(AVX2\), plain PyTorch\)"),
    ],
)
def test_runs_of_other_software_or_threads_are_refused(
    key: str, value: object, metadata: dict, said: str, tmp_path: Path
) -> None:
    logs = [log_of(small(seed)) for seed in (1, 2, 3)]
    for log in logs:
        add(log, "number_of_ranks", "gru_implementation", "fused kernel (AVX2)")
    logs[1].edit(key, value, **metadata)
    with pytest.raises(RunError, match=f"they differ in {said}"):
        score(write(tmp_path, logs))


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


def test_a_score_needs_three_sound_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = series(tmp_path, [2, 2, 2])
    assert main(["score", *texts(paths[:2])]) == 1
    assert "needs 3" in capsys.readouterr().err
    forged = Forged.of(paths[1])
    forged.edit("eval_accuracy", 1.0, number=-1)
    forged.write(paths[1])
    assert main(["score", *texts(paths)]) == 1
    assert "result_1.txt:" in (error := capsys.readouterr().err)
    assert "the WER is 1.0, but" in error


# --- reference convergence points


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """Points at three batch sizes, as the command writes them."""
    paths = []
    for batch_size, epochs in ((10, [4, 4, 5, 4, 5]), (20, [5, 6, 6, 5, 5]), (40, [8, 8, 9, 8, 8])):
        paths += series(tmp_path / f"of_{batch_size}", epochs, batch_size)
    assert main(["rcp", *texts(paths), "-o", str(tmp_path / "deep" / "rcp.json")]) == 0
    return tmp_path / "deep" / "rcp.json"


def test_points_have_the_keys_that_the_packages_checker_reads_and_what_they_were_made_of(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(reference.read_text())
    assert list(content) == ["deepspeech2_ref_10", "deepspeech2_ref_20", "deepspeech2_ref_40"]
    point = content["deepspeech2_ref_20"]
    assert (point["Benchmark"], point["BS"], point[EPOCHS]) == ("deepspeech2", 20, [5, 6, 6, 5, 5])
    assert point["Seeds"] == [1, 2, 3, 4, 5]
    assert point["Hyperparams"]["learning_rate"] == CONFIGS["synthetic"].learning_rate
    assert not {"seed", "output_dir"} & set(point["Hyperparams"])
    assert point["Subject"]["corpus"] == "tones"
    text = describe(content)
    assert "5.33" in text  # the package's mean of 5, 5, 5, 6, 6 without the lowest and the highest
    assert "the rules ask for 20 runs at each of three batch sizes; here it is 3, and at least 5 runs" in text
    assert "deepspeech2" not in rcp_checker.submission_runs["training"]  # the package is left as it was


@pytest.mark.parametrize(
    ("batch_size", "epochs", "status", "said"),
    [
        (20, [5, 6, 6], 0, "passed: RCP found"),
        (20, [9, 9, 9], 0, "passed: RCP found"),
        (20, [2, 2, 2], 1, "FAILED: RCP found"),
        (30, [7, 7, 7], 0, "passed: RCP Interpolation"),
        (80, [9, 9, 9], 1, "FAILED: Missing RCP, please submit RCP with BS = 80"),
    ],
)
def test_runs_are_checked_against_points_by_the_packages_checker(
    batch_size: int,
    epochs: list[int],
    status: int,
    said: str,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = series(tmp_path / "runs", epochs, batch_size)
    capsys.readouterr()
    assert main(["rcp", *texts(paths), "--against", str(reference)]) == status
    assert said in capsys.readouterr().out


def test_points_of_another_corpus_or_target_are_no_reference(reference: Path, tmp_path: Path) -> None:
    content = json.loads(reference.read_text())
    for record in content.values():
        record["Subject"]["corpus"] = "an4"
    other = tmp_path / "an4.json"
    other.write_text(json.dumps(content))
    paths = series(tmp_path / "runs", [5, 5, 5], 20)
    assert main(["rcp", *texts(paths), "--against", str(other)]) == 1


def test_a_reference_has_no_run_that_missed_its_target_and_no_point_of_fewer_than_three(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="every seed of a reference must"):
        make_points(series(tmp_path / "a", [2, 2, 2], missed=1))
    with pytest.raises(RunError, match=r"batch size 10: 2 logs; .* so 3 are needed"):
        make_points(series(tmp_path / "b", [2, 2, 2])[:2])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": 1}', '{"a": {"Epochs to converge": [1]}}'])
def test_a_file_that_holds_no_points_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "rcp.json").write_text(content)
    with pytest.raises(RunError, match="no file of reference convergence points"):
        read_points(tmp_path / "rcp.json")


def test_the_file_for_librispeech_says_that_nobody_has_made_its_points_and_how_to() -> None:
    with pytest.raises(
        RunError, match=r"Nobody has made .* python -m tools.mlperf series --runs 20 .*--config librispeech"
    ):
        read_points(RCPS / "librispeech.json")


@pytest.mark.parametrize("path", [path for path in RCPS.glob("*.json") if path.stem != "librispeech"], ids=str)
def test_committed_points_are_read_by_the_packages_checker_and_are_those_of_committed_runs(
    path: Path, tmp_path: Path
) -> None:
    content = read_points(path)
    assert describe(content)
    (precision,) = {point["Precision"] for point in content.values()}
    configuration = {"config": path.stem, "precision": precision}
    for archive in (ROOT / "results" / "2-cores-zen4").glob("*.tar.xz"):  # longer series than those of single logs
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / archive.stem, filter="data")
    archived, single = (
        [run for run in map(RunLog.read, logs) if configuration.items() <= run.configuration.items()]
        for logs in (sorted(tmp_path.rglob("result_*.txt")), (log for log in COMMITTED if "2-cores-zen5" in log.parts))
    )
    sizes = {run.configuration["batch_size"] for run in archived}
    mine = [*archived, *(run for run in single if run.configuration["batch_size"] not in sizes)]
    assert make_points([run.path for run in mine]) == content


def test_an_output_that_is_a_log_is_refused_and_a_link_is_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`-o *.txt`, the name forgotten, would be the loss of a log."""
    paths = series(tmp_path, [2, 2, 2, 2])
    link, target = tmp_path / "link", tmp_path / "rcp.json"
    link.symlink_to(target)
    before = [path.read_bytes() for path in paths]
    for output, said in ((paths[0], "the log of a run"), (tmp_path, "Is a directory")):
        assert main(["rcp", "-o", str(output), *texts(paths[1:])]) == 1
        assert said in capsys.readouterr().err
    assert [path.read_bytes() for path in paths] == before
    for _ in range(2):  # points may be made anew
        assert main(["rcp", "-o", str(link), *texts(paths)]) == 0
    assert link.is_symlink()
    assert list(json.loads(target.read_text())) == ["deepspeech2_ref_10"]


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ('"$@" >/dev/full; echo $? >&2', "error: standard output cannot be written: No space left on device\n1\n"),
        ('{ "$@"; echo $? >&2; } | true', "141\n"),  # as of `| head` that has ended
    ],
)
def test_points_are_written_although_their_table_cannot_be(shell: str, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.mlperf", "rcp", *texts(series(tmp_path, [2, 2, 2])), "-o"]
    command = ["sh", "-c", shell, "sh", *command, str(tmp_path / "rcp.json")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.stderr == said
    assert read_points(tmp_path / "rcp.json")


# --- comparison


def test_runs_with_equal_losses_are_the_same_also_where_one_is_longer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path, [log_of(small(), epochs=2), log_of(small(), epochs=3)])
    assert main(["compare", str(a), str(a)]) == 0
    assert "losses: the same in all 8 steps of both\n" in capsys.readouterr().out
    assert main(["compare", str(a), str(b)]) == 0
    assert "losses: the same in all 8 steps of both; 4 more steps are in one log only" in capsys.readouterr().out


def test_the_first_and_the_largest_difference_are_shown_with_their_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, right = log_of(small()), log_of(small(2, hidden_size=80), seconds_of_epoch=50.0)
    for number, value in ((2, 1.0), (5, 8.0)):
        left.edit("train_loss", value, number=number)
        right.edit("train_loss", value * 1.5, number=number)
    for number in (0, 1, 3, 4, 6, 7):
        right.edit("train_loss", left.events[left.positions("train_loss")[number]]["value"], number=number)
    a, b = write(tmp_path, [left, right])
    assert main(["compare", str(a), str(b)]) == 1
    output = capsys.readouterr().out
    assert "losses: first differ in step 3: 1 and 1.5 (+0.5, relative 0.5)" in output
    assert "losses: differ in 2 of 8 steps of both, most in step 6: 8 and 12 (+4, relative 0.5)" in output
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
    assert "B: target WER 23.0 reached in 280.0 s, 2 epochs, resumed: not an uninterrupted result" in output


@pytest.mark.parametrize(
    ("key", "value", "metadata"),
    [
        ("global_batch_size", [8], {}),
        ("eval_accuracy", "low", {}),
        ("train_loss", "low", {}),
        ("train_loss", 1.0, {"step_num": [1]}),
        ("a_new_event", 1, {"epoch_num": [1]}),
        ("seed", {}, {}),
        ("seed", 10**40, {}),
        ("train_samples", "all", {}),
    ],
)
@pytest.mark.parametrize("command", ["check", "score", "rcp", "compare"])
def test_a_value_of_another_type_is_an_error_of_one_line(
    command: str, key: str, value: object, metadata: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = [log_of(small(seed)) for seed in (1, 2, 3)]
    if key == "a_new_event":
        add(logs[0], "epoch_start", key, 0)
    logs[0].edit(key, value, **metadata)
    paths = write(tmp_path, logs)
    assert main([command, *texts(paths[: 2 if command == "compare" else 3])]) == 1
    output = "".join(capsys.readouterr())
    (said,) = [line for line in output.splitlines() if f"{paths[0]}:" in line]
    assert "damaged event: " in said


def test_runs_without_a_common_step_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left, right = log_of(small()), log_of(small())
    right.events = [event for event in right.events if event["key"] != "train_loss"]
    a, b = write(tmp_path, [left, right])
    assert main(["compare", str(a), str(b)]) == 1
    assert "no training step in common" in capsys.readouterr().err


@pytest.mark.skipif(len(COMMITTED) < 3, reason="no series of results is committed")
def test_the_commands_work_on_committed_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = sorted({path.parent for path in COMMITTED})
    for folder in folders:
        paths = sorted(folder.glob("result_*.txt"))
        assert main(["check", *texts(paths)]) == 0
        if len(paths) >= 3:
            assert main(["score", *texts(paths)]) == 0
            assert "Score: " in capsys.readouterr().out
            assert main(["rcp", *texts(paths), "-o", str(tmp_path / "rcp.json")]) == 0
            assert main(["rcp", *texts(paths), "--against", str(tmp_path / "rcp.json")]) == 0
        assert main(["compare", str(paths[0]), str(paths[-1])]) == int(len(paths) > 1)
