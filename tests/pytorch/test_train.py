"""The timed run, by the command that a user types, on a tiny data set of tones."""

import io
import json
import os
import shutil
import signal
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from data.files import locked
from pytorch import checkpoint, machine, train
from pytorch.config import Config
from pytorch.errors import PREEMPTED, RunError
from pytorch.evaluation import Evaluation, evaluate
from pytorch.layers import kernels
from tests.conftest import ROOT, write_packed_dataset
from tests.processes import run_module_for_text
from tools.mlperf.runlog import RunLog

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
SMALL = ["--config", "synthetic", "--hidden-size", "16", "--conv-channels", "2", "--batch-size", "4", "--device", "cpu"]
SMALL += ["--precision", "fp32"]  # auto would measure, and so small a model is about as fast in either


def small_run(dataset: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    options = [*SMALL, "--dataset-dir", dataset, "--output-dir", output, *arguments]
    return run_module_for_text("pytorch.run_and_time", *options, environment=ENVIRONMENT)


def run_here(dataset: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, which takes a second less."""
    options = [*SMALL, "--dataset-dir", str(dataset), "--output-dir", str(output), *arguments]
    with redirect_stdout(io.TextIOWrapper(io.BytesIO())) as log, redirect_stderr(io.StringIO()) as said:
        status = train.main(options)
        log.seek(0)
        return subprocess.CompletedProcess(options, status, log.read(), said.getvalue())


def events(output: str) -> list[dict[str, Any]]:
    lines = [line for line in output.splitlines() if line.startswith(":::MLLOG ")]
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in lines]


def values(output: str, key: str) -> list[Any]:
    return [event["value"] for event in events(output) if event["key"] == key]


def metadata(output: str, key: str, name: str) -> list[Any]:
    """The values that a field has in the events of a key."""
    return [event["metadata"][name] for event in events(output) if event["key"] == key]


def have_same_weights(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether two checkpoints have the same weights, evaluated and trained ones, to the bit."""
    pairs = [(left[kind][name], right[kind][name]) for kind in ("model", "trained_model") for name in left[kind]]
    return all(torch.equal(*pair) for pair in pairs)


@pytest.fixture(scope="module")
def run(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A run whose target is so high that the first evaluation reaches it."""
    return small_run(tones, tmp_path_factory.mktemp("reached"), "--target-wer", "1000", "--seed", "5")


def test_a_run_that_reaches_the_target_ends_with_status_zero_and_the_result_line(
    run: subprocess.CompletedProcess[str],
) -> None:
    assert run.returncode == 0, run.stderr
    assert "epoch   1" in run.stderr and "tones-validation" in run.stderr
    fields = run.stdout.splitlines()[-1].split(",")
    assert fields[:3] == ["RESULT", "DEEPSPEECH2", "5"]
    stamps = {event["key"]: event["time_ms"] for event in events(run.stdout)}
    assert int(fields[3]) == pytest.approx((stamps["run_stop"] - stamps["run_start"]) / 1000, abs=0.6)
    assert len(fields) == 6


def test_the_log_has_the_official_events_in_order(run: subprocess.CompletedProcess[str]) -> None:
    keys = [event["key"] for event in events(run.stdout)]
    assert all(line.startswith((":::MLLOG ", "RESULT,")) for line in run.stdout.splitlines())
    order = ["init_start", "init_stop", "run_start", "epoch_start", "epoch_stop", "eval_start", "eval_accuracy"]
    order += ["eval_stop", "run_stop"]
    assert [key for key in keys if key in order] == order
    assert values(run.stdout, "train_samples") == [21]
    assert values(run.stdout, "eval_samples") == [7]
    assert metadata(run.stdout, "run_stop", "status") == ["success"]
    assert metadata(run.stdout, "eval_accuracy", "epoch_num") == [1]
    assert metadata(run.stdout, "eval_accuracy", "utterances") == [7]
    assert 0 < metadata(run.stdout, "eval_stop", "evaluation_fraction_of_run")[0] < 1


def test_losses_that_are_read_late_are_the_same(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []
    for unread in (0, 4):
        monkeypatch.setattr(train, "max_pending_steps", lambda _, unread=unread: unread)
        run = run_here(tones, tmp_path, "--max-epochs", "2")
        assert metadata(run.stdout, "train_loss", "step_num") == list(range(1, 13))
        logged.append(values(run.stdout, "train_loss"))
    assert logged[0] == logged[1]


def test_bfloat16_trains_as_float32_does_but_for_rounding(tones: Path, tmp_path: Path) -> None:
    losses = {}
    for wanted in ("fp32", "auto", "bf16"):
        run = small_run(tones, tmp_path / wanted, "--precision", wanted, "--max-steps", "6")
        precision = "bf16" if wanted != "fp32" and kernels.has_native_bf16() else "fp32"
        assert metadata(run.stdout, "configuration", "precision") == [precision]
        assert ("the precision is fp32" in run.stderr) == (precision != wanted == "bf16")
        losses[wanted] = values(run.stdout, "train_loss")
        assert len(losses[wanted]) == 6
    assert losses["bf16"] == losses["auto"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert (losses["bf16"] != losses["fp32"]) == kernels.has_native_bf16()


def test_after_max_steps_all_is_evaluated_and_the_target_is_met_by_an_equal_wer_but_not_by_a_higher_one(
    tones: Path, tmp_path: Path
) -> None:
    run = run_here(tones, tmp_path / "a", "--max-steps", "1", "--target-wer", "0")
    assert run.returncode == 1
    assert len(values(run.stdout, "train_loss")) == 1
    assert metadata(run.stdout, "eval_accuracy", "utterances") == [7]
    assert metadata(run.stdout, "run_stop", "status") == ["aborted"]
    (wer,) = values(run.stdout, "eval_accuracy")
    assert run_here(tones, tmp_path / "b", "--max-steps", "1", "--target-wer", repr(wer)).returncode == 0
    assert run_here(tones, tmp_path / "c", "--max-steps", "1", "--target-wer", repr(wer - 1e-9)).returncode == 1


def test_two_runs_with_one_seed_have_the_same_losses_and_another_seed_has_others(tones: Path, tmp_path: Path) -> None:
    losses = [
        values(small_run(tones, tmp_path / str(n), "--max-steps", "8", "--seed", seed).stdout, "train_loss")
        for n, seed in enumerate(["1", "1", "2"])
    ]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="elsewhere it is that of the run so far")
def test_the_peak_of_memory_is_that_of_each_epoch(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learning_rate(_config: Config, step: int, _steps: int) -> float:
        torch.ones((step == 0) << 29, dtype=torch.uint8)  # half a GiB, once
        return 1e-3

    monkeypatch.setattr(train, "learning_rate", learning_rate)
    run = run_here(tones, tmp_path, "--max-epochs", "2", "--target-wer", "0")
    first, second = metadata(run.stdout, "epoch_stop", "peak_memory_gib")
    assert 0 < second < first - 0.4


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(tones: Path, tmp_path: Path) -> None:
    options = ["--target-wer", "0", "--ema-decay", "0.9"]
    whole = small_run(tones, tmp_path / "whole", "--max-epochs", "2", *options)
    first = small_run(tones, tmp_path / "parts", "--max-steps", "4", *options)  # in the middle of epoch 1
    second = small_run(tones, tmp_path / "parts", "--max-epochs", "2", *options, "--resume")
    assert "Resuming" in second.stderr
    assert values(second.stdout, "resumed") == [True]
    parts = values(first.stdout, "train_loss") + values(second.stdout, "train_loss")
    assert parts == values(whole.stdout, "train_loss")
    assert have_same_weights(*(checkpoint.load(tmp_path / name / checkpoint.LAST) for name in ("whole", "parts")))


def test_the_evaluated_weights_are_the_moving_average_of_the_trained_ones(tones: Path, tmp_path: Path) -> None:
    contents = []
    for steps in ("1", "2"):
        run_here(tones, tmp_path / steps, "--ema-decay", "0.75", "--max-steps", steps, "--target-wer", "0")
        contents.append(checkpoint.load(tmp_path / steps / checkpoint.LAST))
    first, second = (content["trained_model"] for content in contents)
    for name in ("grus.0.weight_hh_l0", "norm1.running_mean", "classifier.weight"):
        assert not torch.equal(first[name], second[name])
        torch.testing.assert_close(contents[0]["model"][name], first[name], rtol=0, atol=0)
        decay = 2 / 11  # it rises to 0.75
        torch.testing.assert_close(contents[1]["model"][name], decay * first[name] + (1 - decay) * second[name])


def test_a_checkpoint_that_cannot_be_written_is_found_out_before_training_and_costs_not_the_one_before(
    tones: Path, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint_last.pt").write_bytes(b"before")
    (tmp_path / "checkpoint_last.pt.partial").mkdir()  # stands in for a full disk
    run = run_here(tones, tmp_path)
    assert run.returncode == 1
    assert "could not be written" in run.stderr
    assert not values(run.stdout, "run_start")
    assert (tmp_path / "previous_run" / "checkpoint_last.pt").read_bytes() == b"before"


def test_a_disk_that_is_full_at_the_end_does_not_cost_the_result(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []

    def save(*arguments: Any, **options: Any) -> None:
        saves.append(options)
        if len(saves) == 3:  # the first is that of the setup, the second comes before the evaluation
            raise RunError("checkpoint_last.pt: the checkpoint could not be written: no space left")

    monkeypatch.setattr(checkpoint, "save", save)
    monkeypatch.setattr(checkpoint, "keep_newest_as", lambda *_: None)
    run = run_here(tones, tmp_path, "--target-wer", "1000")
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1].startswith("RESULT,")
    assert "no space left" in run.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset-dir", "nowhere"], "download_dataset.sh"),
        (["--dataset-dir", "only-train"], "no validation subset"),
        (["--dataset-dir", "only-validation"], "no train subset"),
        (["--output-dir", "only-train/dataset.json"], "only-train/dataset.json: File exists"),
        (["--batch-size", "100000000"], "use --gradient-accumulation-steps 2, or a smaller"),
    ],
)
def test_what_keeps_a_run_from_starting_is_an_error_that_says_what_to_do(
    options: list[str], said: str, tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "validation"):
        write_packed_dataset(tmp_path / f"only-{split}", {split: 3})
    run = run_here(tones, tmp_path / "results", *options)
    assert run.returncode == 1
    assert said in run.stderr
    assert not values(run.stdout, "run_start")


def test_diverging_runs_stop_with_an_error_that_names_utterances(tones: Path, tmp_path: Path) -> None:
    run = run_here(tones, tmp_path, "--weight-decay", "1e30", "--batch-size", "1")
    assert run.returncode == 1
    assert "not finite" in run.stderr
    assert "train-0" in run.stderr
    assert values(run.stdout, "skipped_step")


def test_no_start_deletes_anything_of_the_runs_before_it(tones: Path, tmp_path: Path) -> None:
    """Each is put away whole, whatever else lies there; a run that left only its first checkpoint holds no training."""
    (tmp_path / "previous_run").mkdir()
    (tmp_path / "previous_run" / "note.txt").write_text("of the user's")
    (tmp_path / "previous_run-3").write_text("a file of that name")
    for seed in range(1, 4):
        run = small_run(tones, tmp_path, "--max-steps", "1", "--target-wer", "1000", "--seed", str(seed))
        assert run.returncode == 0, run.stderr
    folders = {1: tmp_path / "previous_run-2", 2: tmp_path / "previous_run-4", 3: tmp_path}
    for seed, folder in folders.items():
        assert RunLog.read(folder / "last_run.log").result is not None
        assert RunLog.read(folder / "last_run.log").seed == seed
        for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST):
            assert checkpoint.load(folder / name)["config"]["seed"] == seed
        assert (folder / "report.html").exists()
    assert (tmp_path / "previous_run" / "note.txt").read_text() == "of the user's"

    again = small_run(tones, tmp_path, "--max-steps", "2", "--target-wer", "0", "--seed", "3", "--resume")
    assert values(again.stdout, "resumed") == [True], again.stderr
    assert RunLog.read(tmp_path / "previous_run-5" / "last_run.log").result is not None


def test_ranks_that_torchrun_restarts_continue_from_checkpoints_of_their_own_run_only(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[int]] = []
    for number, name in enumerate(("first", "first", "second")):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        given = {"TORCHELASTIC_RESTART_COUNT": number, "RANK": 0, "LOCAL_RANK": 0}
        given |= dict.fromkeys(("GROUP_WORLD_SIZE", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), 1)
        for variable, value in given.items():
            monkeypatch.setenv(variable, str(value))
        run = run_here(tones, tmp_path, "--max-steps", str(len(steps) + 2), "--target-wer", "0")
        steps.append(metadata(run.stdout, "train_loss", "step_num"))
    assert steps == [[1, 2], [3], [1, 2, 3, 4]]


def test_a_run_resumed_with_other_batches_trains_its_epoch_from_the_beginning(tones: Path, tmp_path: Path) -> None:
    """Its place in the epoch was counted in steps of the other batch size."""
    run_here(tones, tmp_path, "--target-wer", "0", "--max-steps", "5", "--max-epochs", "3")  # of 6 an epoch
    options = ["--batch-size", "12", "--target-wer", "0", "--max-epochs", "3", "--resume", "--resume-with-changes"]
    run = run_here(tones, tmp_path, *options)
    assert metadata(run.stdout, "epoch_stop", "epoch_num") == [1, 2, 3]
    assert len(values(run.stdout, "train_loss")) == 3 * 2
    assert "Epoch 1 starts from its beginning" in run.stderr


def test_a_run_told_to_stop_in_an_evaluation_ends_at_once_and_resumed_evaluates_that_epoch_first(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*arguments: Any, **options: Any) -> Evaluation | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments, **options)

    def log(run: subprocess.CompletedProcess[str]) -> list[Any]:
        found = events(run.stdout)
        return [event["value"] for event in found if event["key"] in ("train_loss", "eval_accuracy")]

    options = ["--target-wer", "0", "--max-epochs", "2"]
    whole = run_here(tones, tmp_path / "whole", *options)
    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate", told)
        first = run_here(tones, tmp_path / "parts", *options)
    assert first.returncode == PREEMPTED
    assert not values(first.stdout, "eval_accuracy")
    shutil.copytree(tmp_path / "parts", tmp_path / "reached")
    reached = run_here(tones, tmp_path / "reached", "--target-wer", "1000", "--resume")
    assert reached.stdout.splitlines()[-1].startswith("RESUMED,DEEPSPEECH2,") and "RESULT" not in reached.stdout
    assert log(first) + log(run_here(tones, tmp_path / "parts", *options, "--resume")) == log(whole)
    assert have_same_weights(*(checkpoint.load(tmp_path / name / checkpoint.LAST) for name in ("whole", "parts")))


def test_a_run_that_shares_its_cpus_says_so(tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = {"all": 100.0, "busy": 50.0, "stolen": 10.0, "own": 5.0}
    for others in (0.0, 0.5):
        ended = {"all": 200.0, "busy": 50.0 + 40.0 + 100 * others, "stolen": 11.0, "own": 45.0}
        monkeypatch.setattr(machine, "cpu_seconds", iter([begun, ended]).__next__)
        run = run_here(tones, tmp_path, "--max-steps", "1")
        assert values(run.stdout, "cpu_taken") == [pytest.approx(others)]
        assert metadata(run.stdout, "cpu_taken", "stolen") == [pytest.approx(0.01)]
        assert ("Other programs took 50%" in run.stderr) == (others > 0)


def test_two_runs_in_one_output_folder_do_not_disturb_each_other(tones: Path, tmp_path: Path) -> None:
    with locked(tmp_path, "run"):
        assert f"another run is working in {tmp_path}" in run_here(tones, tmp_path).stderr
    assert not list(tmp_path.iterdir())


def test_another_launchers_variables_do_not_cost_a_single_process_its_log(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "", "LOCAL_WORLD_SIZE": "x"}.items():
        monkeypatch.setenv(name, value)
    assert "RESULT,DEEPSPEECH2," in run_here(tones, tmp_path, "--target-wer", "1000").stdout


def test_resuming_a_run_that_has_reached_its_target_says_so_and_changes_nothing(tones: Path, tmp_path: Path) -> None:
    assert small_run(tones, tmp_path, "--target-wer", "1000").returncode == 0
    log = (tmp_path / "last_run.log").read_text()
    again = small_run(tones, tmp_path, "--target-wer", "1000", "--resume")
    assert again.returncode == 0
    assert "was already reached, in" in again.stderr
    assert (tmp_path / "last_run.log").read_text() == log
    assert not (tmp_path / "previous_run").exists()
    assert "has no effect without --resume; add it" in run_here(tones, tmp_path, "--resume-with-changes").stderr
