"""Runs of several processes, by the command that a user types; torch.distributed with gloo on this machine."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from pytorch import checkpoint
from pytorch.errors import PREEMPTED
from tests.conftest import write_packed_dataset
from tests.processes import Popen
from tests.pytorch.test_train import ENVIRONMENT, SMALL, events, have_same_weights, metadata, values

Undisturbed: TypeAlias = Callable[[int, int], tuple[str, dict[str, Any]]]
STEPS, EPOCHS = 20, 4
STARTED: list[subprocess.Popen[str]] = []


def in_processes(processes: int) -> dict[str, str]:
    return ENVIRONMENT | {"NPROC_PER_NODE": str(processes), "OMP_NUM_THREADS": "1"}


def start(
    processes: int, dataset: Path, output: Path, *arguments: Any, forked: bool = True, **environment: str
) -> subprocess.Popen[str]:
    """The run in this many processes of one thread, in a process group of its own."""
    command = [sys.executable, "-m", "pytorch.run_and_time", *SMALL, "--dataset-dir", dataset, "--output-dir", output]
    pipe = subprocess.PIPE
    everything = in_processes(processes) | environment
    run = (Popen if forked else subprocess.Popen)(
        [*map(str, command), *map(str, arguments)], stdout=pipe, stderr=pipe, text=True, env=everything, process_group=0
    )
    STARTED.append(run)
    return run


@pytest.fixture(autouse=True)
def no_run_outlives_its_test() -> Iterator[None]:
    """A run that goes on after a test has failed would slow all others."""
    yield
    while STARTED:
        run = STARTED.pop()
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()


def finish(run: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    output, errors = run.communicate(timeout=300)
    return subprocess.CompletedProcess(run.args, run.returncode, output, errors)


def run_in(processes: int, dataset: Path, output: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return finish(start(processes, dataset, output, *arguments))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 training and 7 validation utterances: with batches of 7, shares are uneven everywhere."""
    return write_packed_dataset(tmp_path_factory.mktemp("uneven"), {"train": 43, "validation": 7})


@pytest.fixture(scope="module")
def by_processes(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, dict[str, Any]]]:
    """The same run in 1, 2 and 3 processes, and its last weights; bf16 would round differently in each."""
    options = ["--batch-size", "7", "--max-steps", STEPS, "--target-wer", "0", "--precision", "fp32"]
    runs = {}
    for processes in (1, 2, 3):
        output = tmp_path_factory.mktemp("run")
        run = run_in(processes, uneven, output, *options)
        assert (output / "last_run.log").read_text() == run.stdout
        assert (output / "report.html").exists()
        runs[processes] = run, checkpoint.load(output / checkpoint.LAST)["trained_model"]
    return runs


def test_losses_and_statistics_of_batch_norm_are_the_same_in_any_number_of_processes(by_processes: Any) -> None:
    losses = {processes: values(run.stdout, "train_loss") for processes, (run, _) in by_processes.items()}
    assert len(losses[1]) == STEPS, by_processes[1][0].stderr
    for processes in (2, 3):
        run, weights = by_processes[processes]
        assert losses[processes][:5] == pytest.approx(losses[1][:5], rel=1e-5), run.stderr
        # Each step amplifies the rounding of those before it.
        assert losses[processes] == pytest.approx(losses[1], rel=2e-3), run.stderr
        for name, value in by_processes[1][1].items():
            if "running" in name:
                torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-3)


def test_each_utterance_is_evaluated_once_and_one_process_logs_in_any_number_of_them(by_processes: Any) -> None:
    for processes, (run, _) in by_processes.items():
        assert run.returncode == 1  # the target was not reached
        assert set(metadata(run.stdout, "eval_accuracy", "utterances")) == {7}, processes
        assert values(run.stdout, "eval_accuracy") == values(by_processes[1][0].stdout, "eval_accuracy")
        assert values(run.stdout, "number_of_ranks") == [processes]
        assert len(values(run.stdout, "run_stop")) == 1
        assert run.stderr.count("was not reached") == 1
        assert "Traceback" not in run.stderr


def test_accumulated_gradients_are_those_of_the_whole_batch_but_for_batch_norm(uneven: Path, tmp_path: Path) -> None:
    # Large parts over few steps: with parts of two utterances, batch norm's statistics alone move a loss by 12 %.
    options = ["--batch-size", "42", "--max-steps", 7, "--target-wer", "0"]
    whole = values(run_in(1, uneven, tmp_path / "1", *options).stdout, "train_loss")
    for processes in (1, 2):
        run = run_in(processes, uneven, tmp_path / f"{processes} x 2", *options, "--gradient-accumulation-steps", 2)
        assert values(run.stdout, "gradient_accumulation_steps") == [2]
        assert values(run.stdout, "train_loss") == pytest.approx(whole, rel=0.05), run.stderr


@pytest.mark.parametrize(
    ("batch_size", "said"),
    [
        ("3", "--batch-size 3 cannot be divided into 4"),
        ("4", "leave one of 3, which cannot be divided into 4 microbatches"),  # 21 = 3 x 4 + 3 x 3
    ],
)
def test_a_batch_with_fewer_utterances_than_parts_is_refused(
    batch_size: str, said: str, tones: Path, tmp_path: Path
) -> None:
    run = run_in(2, tones, tmp_path, "--batch-size", batch_size, "--gradient-accumulation-steps", "2")
    assert run.returncode == 1
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_a_loss_that_goes_wrong_in_one_process_makes_all_skip_the_step(uneven: Path, tmp_path: Path) -> None:
    """Process 1 makes its fifth loss infinite: two steps are those of the warm-up. It is slow, so process 0 waits."""
    sabotage = tmp_path / "sitecustomize.py"
    sabotage.write_text(
        "import os, sys, time\n"
        "if any('forkserver' in word for word in sys.orig_argv):\n"  # which all ranks are forked from
        "    from pytorch import trainer\n"
        "    proper, losses = trainer.ctc_loss, []\n"
        "    def broken(*arguments):\n"
        "        losses.append(proper(*arguments))\n"
        "        if os.environ['RANK'] == '1':\n"
        "            time.sleep(0.05)\n"
        "            return losses[-1] * (float('inf') if len(losses) == 5 else 1)\n"
        "        return losses[-1]\n"
        "    trainer.ctc_loss = broken\n"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    # Not forked, for Python reads sitecustomize.py when it starts.
    options = ["--max-steps", 7, "--target-wer", "0"]
    run = finish(start(2, uneven, tmp_path / "run", *options, forked=False, PYTHONPATH=path))
    assert values(run.stdout, "skipped_step") == [3], run.stderr
    assert metadata(run.stdout, "train_loss", "step_num") == [1, 2, 4, 5, 6, 7]
    content = checkpoint.load(tmp_path / "run" / checkpoint.LAST)
    assert all(bool(value.isfinite().all()) for value in content["model"].values())


def _wait_for(run: subprocess.Popen[str], key: str, count: int) -> None:
    """Read the run's log until an event has come this many times."""
    assert run.stdout is not None
    while count:
        line = run.stdout.readline()
        assert line, run.communicate()[1]
        count -= f'"key": "{key}"' in line


def _workers(run: subprocess.Popen[str]) -> list[int]:
    """Process ids of the workers of a run, in the order in which they were started."""

    def children(process: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]

    forked = children(run.pid)
    return forked if isinstance(run, Popen) else [worker for server in forked for worker in children(server)]


@pytest.mark.parametrize(
    ("whose", "number"), [("launcher", signal.SIGTERM), ("launcher", signal.SIGUSR1), ("worker", signal.SIGTERM)]
)
def test_a_run_told_to_stop_saves_after_its_step_and_says_so_by_its_exit_status(
    whose: str, number: signal.Signals, uneven: Path, tmp_path: Path
) -> None:
    run = start(2, uneven, tmp_path, "--target-wer", "0", "--max-epochs", "200")
    _wait_for(run, "train_loss", 8)
    os.kill(run.pid if whose == "launcher" else _workers(run)[1], number)
    ended = finish(run)
    assert ended.returncode == PREEMPTED, ended.stderr
    done = checkpoint.load(tmp_path / checkpoint.LAST)["progress"]["step"]
    assert f"checkpoint saved at step {done}; --resume continues from it." in ended.stderr
    assert "Traceback" not in ended.stderr
    last = events(ended.stdout)[-1]
    assert last["key"] == "run_stop"
    assert (last["metadata"]["status"], last["metadata"]["exception"]) == ("aborted", "Preempted")


def test_a_run_told_to_stop_while_its_processes_start_says_so_by_its_exit_status(uneven: Path, tmp_path: Path) -> None:
    # Not forked, for they start faster than a signal comes.
    run = start(2, uneven, tmp_path, "--target-wer", "0", "--max-epochs", "200", forked=False)
    while len(_workers(run)) < 2:
        assert run.poll() is None
        time.sleep(0.1)
    os.kill(run.pid, signal.SIGTERM)
    ended = finish(run)
    assert ended.returncode == PREEMPTED, ended.stderr


def test_nohup_protects_a_run_of_several_processes(uneven: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a child inherits, as from nohup
    try:
        run = start(2, uneven, tmp_path, "--target-wer", "0", "--max-epochs", "3", forked=False)
    finally:
        signal.signal(signal.SIGHUP, before)
    _wait_for(run, "train_loss", 2)
    os.killpg(run.pid, signal.SIGHUP)
    ended = finish(run)
    assert ended.returncode == 1, ended.stderr  # the target is out of reach
    log = (tmp_path / "last_run.log").read_text()  # of the output, reading up to some line may have taken more
    assert len(values(log, "eval_accuracy")) == 3


def to_epoch(epochs: int) -> list[str]:
    return ["--target-wer", "0", "--max-epochs", str(epochs)]


@pytest.fixture(scope="module")
def undisturbed(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A run to compare with, by its number of processes and of epochs: its log and its last checkpoint."""

    @cache
    def run(processes: int, epochs: int) -> tuple[str, dict[str, Any]]:
        output = tmp_path_factory.mktemp("undisturbed")
        log = run_in(processes, uneven, output, *to_epoch(epochs)).stdout
        return log, checkpoint.load(output / checkpoint.LAST)

    return run


def test_a_single_process_told_to_stop_saves_in_the_middle_of_the_epoch(
    uneven: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    whole, left = undisturbed(1, EPOCHS)
    run = start(1, uneven, tmp_path, *to_epoch(EPOCHS))
    _wait_for(run, "train_loss", 3)  # early: on a busy machine, the signal may come when the run is over
    os.kill(run.pid, signal.SIGTERM)
    first = finish(run)
    assert first.returncode == PREEMPTED, first.stderr
    second = run_in(1, uneven, tmp_path, *to_epoch(EPOCHS), "--resume")
    rest = values(second.stdout, "train_loss")
    assert rest == values(whole, "train_loss")[-len(rest) :]
    epochs = metadata(second.stdout, "epoch_stop", "loss")
    assert epochs == metadata(whole, "epoch_stop", "loss")[-len(epochs) :]
    right = checkpoint.load(tmp_path / checkpoint.LAST)
    assert have_same_weights(left, right)
    stamps = {event["key"]: event["time_ms"] for event in events(second.stdout)}
    assert right["progress"]["elapsed_seconds"] > (stamps["run_stop"] - stamps["run_start"]) / 1000


def test_a_damaged_newest_checkpoint_is_found_out_and_the_one_before_is_used(
    uneven: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run_in(1, uneven, tmp_path, *to_epoch(EPOCHS - 1))
    newest = tmp_path / checkpoint.LAST
    content = bytearray(newest.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    newest.unlink()  # the file may have other names
    newest.write_bytes(content)
    second = run_in(1, uneven, tmp_path, *to_epoch(EPOCHS), "--resume")
    assert "falling back to checkpoint_previous.pt" in second.stderr
    rest = values(second.stdout, "train_loss")
    assert len(rest) >= 11  # the checkpoint before it is of the end of that epoch, too: written before the evaluation
    assert rest == values(undisturbed(1, EPOCHS)[0], "train_loss")[-len(rest) :]


def test_checkpoints_come_by_time_as_well(uneven: Path, tmp_path: Path) -> None:
    options = ["--target-wer", "0", "--max-steps", "6", "--checkpoint-interval-minutes", "1e-9"]
    for processes in (1, 2):
        run = run_in(processes, uneven, tmp_path / str(processes), *options)
        assert metadata(run.stdout, "checkpoint", "step_num") == [0, 1, 2, 3, 4, 5, 6, 6, 6], run.stderr


def test_a_lost_worker_is_named_and_the_run_starts_again_from_the_last_checkpoint(
    uneven: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    whole, left = undisturbed(2, EPOCHS)
    options = [*to_epoch(EPOCHS), "--checkpoint-interval-minutes", "1e-9"]
    run = start(2, uneven, tmp_path, *options, MAX_RESTARTS="1")
    _wait_for(run, "init_stop", 1)
    worker = _workers(run)[1]
    _wait_for(run, "train_loss", 5)
    os.kill(worker, signal.SIGKILL)
    again = finish(run)
    assert again.returncode == 1, again.stderr  # the target is out of reach
    assert values(again.stdout, "resumed") == [True], again.stderr
    assert values(again.stdout, "train_loss")[-10:] == values(whole, "train_loss")[-10:]
    assert have_same_weights(left, checkpoint.load(tmp_path / checkpoint.LAST))


def test_a_worker_that_hangs_is_named(uneven: Path, tmp_path: Path) -> None:
    options = ["--target-wer", "0", "--max-epochs", "200", "--dist-timeout-seconds", "8"]
    run = start(2, uneven, tmp_path, *options)
    _wait_for(run, "train_loss", 5)
    hangs = _workers(run)[1]
    os.kill(hangs, signal.SIGSTOP)
    assert run.stderr is not None
    while "lost contact" not in (line := run.stderr.readline()):
        assert line
    assert "ranks that hang or are gone: 1 " in line
    os.kill(hangs, signal.SIGKILL)  # as torchrun does after 30 s
    assert finish(run).returncode not in (0, PREEMPTED)


def test_ranks_end_with_a_parent_that_is_killed(uneven: Path, tmp_path: Path) -> None:
    run = start(2, uneven, tmp_path, "--target-wer", "0", "--max-epochs", "200", forked=False)
    _wait_for(run, "train_loss", 2)
    run.kill()
    run.communicate(timeout=60)  # until nothing has its output open


@pytest.mark.parametrize("processes", [1, 2])
def test_runs_killed_at_any_moment_end_with_the_weights_of_an_undisturbed_one(
    processes: int, uneven: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """In turn in an evaluation, while a checkpoint is written, and at a random moment; KILLS sets how often."""
    kills, random_moment = int(os.environ.get("KILLS", "2")), random.Random(processes)
    epochs = EPOCHS if kills == 2 else 4 * kills
    options = [*to_epoch(epochs), "--checkpoint-interval-minutes", "0.002"]
    newest = tmp_path / checkpoint.LAST
    partial = tmp_path / f"{checkpoint.LAST}.partial"
    for number in range(kills):
        partial.unlink(missing_ok=True)
        run = start(processes, uneven, tmp_path, *options, *(["--resume"] if newest.exists() else []))
        _wait_for(run, "init_stop", 1)
        workers = _workers(run)
        assert len(workers) == processes
        if number % 3 == 0:
            _wait_for(run, "eval_start", 1)
        elif number % 3 == 1:
            while not partial.exists() and run.poll() is None:
                time.sleep(0.0005)  # it is there for some milliseconds
        else:
            time.sleep(random_moment.uniform(0, 1.5))
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            time.sleep(0.05)  # they end with the launcher
        assert newest.exists()
        for file in tmp_path.glob("*.pt"):
            checkpoint.load(file)  # whole, or it is refused
    ended = run_in(processes, uneven, tmp_path, *options, "--resume")
    assert ended.returncode == 1, ended.stderr
    left, right = undisturbed(processes, epochs)[1], checkpoint.load(newest)
    assert left["progress"]["step"] == right["progress"]["step"]
    assert have_same_weights(left, right)
