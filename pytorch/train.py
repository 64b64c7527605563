"""The timed run: train DeepSpeech2 until the validation set's corpus WER reaches the target.

    python -m pytorch.train --config synthetic
    python -m pytorch.train --config librispeech-2018 --seed 7
    python -m pytorch.train --config an4 --resume

Prints the MLPerf log on standard output and progress on standard error. Exit status: 0 the target was reached, 1 it was
not or something went wrong, 2 the command line was not understood, 130 interrupted, 75 told to end by SIGTERM or
SIGUSR1: then the step under way was finished and saved, and --resume goes on from there; 74 lost another process.

Started by torchrun, it is one of several ranks (distributed.py) that take the same steps together: each computes a part
of every batch.
"""

from __future__ import annotations

import dataclasses
import getpass
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger
from torch import Tensor

from data.packed import PackedDataset, open_dataset
from pytorch import checkpoint, machine, mllog
from pytorch.checkpoint import TrainState
from pytorch.cli import RANK_FAILED, Preempted, RunError, exit_status, progress_bar
from pytorch.config import Config, fields_of, parse_config
from pytorch.device import select_device, select_precision, set_device
from pytorch.distributed import World, report_lost_ranks, seconds_waited, shutdown
from pytorch.evaluation import Evaluation, evaluate
from pytorch.features import SAMPLE_RATE
from pytorch.layers import kernels
from pytorch.loader import Utterances, epoch_batches, make_batch, prefetch, split_balanced, split_evenly
from pytorch.optimizer import learning_rate
from pytorch.tensorboard import Scalars
from pytorch.trainer import Trainer

MAX_SKIPPED_IN_A_ROW = 10  # steps whose loss or gradient is not finite; more mean that the run has diverged
STATUS_FILE = "DEEPSPEECH2_STATUS_FILE"  # where launch.py wants to find the exit status
PENDING_LOSSES = {"cpu": 0, "cuda": 4}  # whose losses are still to be read, so that a GPU never waits for the CPU


class Clock:
    """Seconds since it was made, plus those of the run before it was resumed."""

    def __init__(self, before: float = 0.0) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start


@dataclass
class TrainingRun:
    """What a run works with."""

    trainer: Trainer
    dataset: PackedDataset
    log: MLLogger
    scalars: Scalars = field(default_factory=Scalars)
    clock: Clock = field(default_factory=Clock)
    saved_at: float = field(default_factory=time.monotonic)  # time.monotonic() of the newest checkpoint
    stop_asked: bool = False  # by a signal, of this process

    def request_stop(self, *_: object) -> None:
        """Handle a signal: the step under way goes on."""
        self.stop_asked = True

    def told_to_end(self) -> bool:
        """Whether this process was asked to stop, or has heard that another one was."""
        if self.stop_asked:
            self.trainer.world.tell("end")
        return self.stop_asked or self.trainer.world.told("end")

    @property
    def config(self) -> Config:
        """The run's configuration, its precision chosen."""
        return self.trainer.config


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""

    def work() -> bool:
        config = parse_config(
            sys.argv[1:] if arguments is None else arguments,
            program="python -m pytorch.train",
            description="Train DeepSpeech2 until the corpus WER of the validation set reaches the target. "
            "(run_and_time.sh --runs N [--system NAME] trains N times, with seeds of their own, and scores.)",
        )
        with report_lost_ranks():
            return train(config)

    status = exit_status(work, interrupted="interrupted; --resume goes on from the last checkpoint")
    shutdown()
    if STATUS_FILE in os.environ and status != RANK_FAILED:
        Path(os.environ[STATUS_FILE]).write_text(str(status))
        return 0
    return status


def train(config: Config) -> bool:
    """Train until the target, or until the configuration's limits. Returns whether the target was reached.

    Raises:
        RunError: the run cannot start or go on.
        DataError: the data set is absent or damaged.
        Preempted: the process was told to end.
        RuntimeError: another process was lost.
    """
    run, progress = setup(config)
    world, log = run.trainer.world, run.log
    handlers = {number: signal.signal(number, run.request_stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    started_at = datetime.now()
    log.start(constants.RUN_START)
    run.clock = Clock(progress.elapsed_seconds)
    reached = False
    try:
        reached, evaluation = _train_to_target(run, progress)
    finally:
        seconds = run.clock.seconds()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        log.end(constants.RUN_STOP, metadata={"status": constants.SUCCESS if reached else constants.ABORTED})
        run.scalars.close()
    evaluation.log_transcripts(log)
    try:
        _save(run, progress, best=progress.wer == progress.best_wer)  # off the clock, and no reason to lose the result
    finally:
        if reached:
            print_result(run, progress, seconds, started_at)
        else:
            world.print_once(f"The target WER of {config.target_wer:g} was not reached; best: {progress.best_wer:.2f}.")
    world.all_gather_object(None)  # none leaves while another is still busy
    return reached


def setup(config: Config) -> tuple[TrainingRun, TrainState]:
    """All that may be done before the clock starts: only the summary of the data is read."""
    log = mllog.get_logger()
    log.start(constants.INIT_START)
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's
    device = select_device(config.device, processes_here - 1)  # if there is one for the last, all go on
    world = World.start(device.type, config.dist_timeout_seconds)
    device = select_device(config.device, world.local_rank)
    set_device(device)
    dataset = open_dataset(config.dataset_dir)
    config = dataclasses.replace(config, precision=select_precision(config.precision, device))
    _check_agreement(world, config, dataset.digest)
    for split in ("train", "validation"):
        if not dataset.splits[split]:
            raise RunError(f"{config.dataset_dir} has no {split} subset; 'sh download_dataset.sh --subsets' adds one")
    parts = world.size * config.gradient_accumulation_steps
    if config.batch_size < parts:
        raise RunError(
            f"--batch-size {config.batch_size}: cannot be divided into {parts} parts (devices x accumulation)"
        )
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--output-dir {config.output_dir}: cannot be made: {error.strerror}") from error
    cache = machine.clear_cache(dataset) if world.local_rank == 0 else None
    mllog.log_cache_clear(log, [each for each in world.all_gather_object(cache) if each is not None])
    mllog.log_submission(log, config, dataset, device, world.size)

    torch.manual_seed(config.seed)
    trainer = Trainer.make(config, device, world)
    log.event("gru_implementation", "cuDNN" if device.type == "cuda" else kernels.status())
    trainer.warm_up(_longest_training_utterance(dataset))
    run = TrainingRun(trainer, dataset, log)
    progress = _resume(run) or TrainState()
    if config.max_steps is not None and progress.step >= config.max_steps and not progress.step_in_epoch:
        raise RunError(f"--max-steps {config.max_steps}: all of them are done already; give a larger number to go on")
    run.scalars = Scalars(config.tensorboard if world.is_main else None, progress.step)
    if not progress.resumed:
        if world.is_main and (earlier := checkpoint.archive_previous_run(config.output_dir)):
            world.print_once(
                f"Checkpoints of an earlier run are now in {earlier}; --resume would have gone on from them."
            )
        _save(run, progress, best=False)  # so that the disk is known to do
    log.end(constants.INIT_STOP)
    return run, progress


def _check_agreement(world: World, config: Config, dataset_digest: str) -> None:
    """Refuse to train together what differs between processes, such as after a mistake on one of many machines.

    Raises:
        RunError: names each difference from process 0.
    """
    own = fields_of("machine")
    mine = {key: value for key, value in config.to_dict().items() if key not in own} | {"data_set": dataset_digest}
    first, *others = world.all_gather_object(mine)
    differences = [
        f"{key.replace('_', '-')} {other[key]} on rank {rank}, {first[key]} on rank 0"
        for rank, other in enumerate(others, start=1)
        for key in first
        if other[key] != first[key]
    ]
    if differences:
        raise RunError(f"the processes of this run were not told the same: {'; '.join(differences)}")


def print_result(run: TrainingRun, progress: TrainState, seconds: float, started_at: datetime) -> None:
    target, resumed = run.config.target_wer, " (resumed: no uninterrupted benchmark result)" if progress.resumed else ""
    run.trainer.world.print_once(f"Target WER of {target:g} reached in {seconds:.0f} s{resumed}.")
    if run.trainer.world.is_main:
        kind, when = "RESUMED" if progress.resumed else "RESULT", f"{started_at:%Y-%m-%d %I:%M:%S %p}"
        line = f"{kind},DEEPSPEECH2,{run.config.seed},{seconds:.0f},{getpass.getuser()},{when}"
        mllog.print_result(run.log, line)


def _longest_training_utterance(dataset: PackedDataset) -> int:
    return max(dataset.summary[name].longest_samples for name in dataset.splits["train"])


def _train_to_target(run: TrainingRun, progress: TrainState) -> tuple[bool, Evaluation]:
    """The part on the clock. Returns whether the target was reached, and the last evaluation."""
    config, dataset, log, clock = run.config, run.dataset, run.log, run.clock
    utterances = Utterances(dataset.split("train"))
    validation = Utterances(dataset.split("validation"))
    ctc_feasible = utterances.ctc_feasible()
    included = np.flatnonzero(ctc_feasible)
    log.event(constants.TRAIN_SAMPLES, len(included))
    log.event(constants.EVAL_SAMPLES, len(validation))
    left_out = [utterances.id(index) for index in np.flatnonzero(~ctc_feasible).tolist()]
    log.event("train_samples_left_out", len(left_out), metadata={"reason": "too short for CTC", "ids": left_out})
    parts = run.trainer.world.size * config.gradient_accumulation_steps
    smallest = min(map(len, split_evenly(included, config.batch_size))) if len(included) else 0
    if smallest < parts:
        raise RunError(
            f"{len(included)} training utterances in batches of at most {config.batch_size} leave one of {smallest}, "
            f"which cannot be divided into {parts} parts (devices x accumulation)"
        )

    capacity = -(-config.batch_size // parts) * _longest_training_utterance(dataset)
    for epoch in range(progress.epoch, config.max_epochs + 1):
        log.start(constants.EPOCH_START, metadata={constants.EPOCH_NUM: epoch})
        trained = _train_epoch(run, utterances, included, progress)
        metadata = {constants.EPOCH_NUM: epoch, "step": progress.step, **dataclasses.asdict(trained)}
        log.end(constants.EPOCH_STOP, metadata=metadata)

        evaluation_started = time.monotonic()
        log.start(constants.EVAL_START, metadata={constants.EPOCH_NUM: epoch})
        evaluation = evaluate(run.trainer, validation, capacity, run.told_to_end)
        if evaluation is None:  # resumed, the run has no step of this epoch left, and evaluates it
            save_and_exit(run, progress)
        evaluation.log_errors(log, epoch)
        total = evaluation.total
        progress.evaluation_seconds += time.monotonic() - evaluation_started
        fraction = progress.evaluation_seconds / clock.seconds()
        log.end(constants.EVAL_STOP, metadata={constants.EPOCH_NUM: epoch, "evaluation_fraction_of_run": fraction})
        wers = {name: counts.wer for name, counts in {"all": total, **evaluation.by_subset()}.items()}
        run.scalars.epoch(progress.step, wers, trained.utterances_per_second, trained.data_wait_fraction)
        reached = total.wer <= config.target_wer
        each = ", ".join(f"{name} {counts.wer:.2f}" for name, counts in evaluation.by_subset().items())
        run.trainer.world.print_once(
            f"epoch {epoch:3d}  loss {trained.loss:8.3f}  WER {total.wer:6.2f} ({each})  CER {total.cer:6.2f}  "
            f"train {trained.seconds:.0f} s (waited for data {trained.data_wait_fraction:.1%})  "
            f"clock {clock.seconds():.0f} s (evaluation {fraction:.0%})"
        )
        if trained.finished:
            progress.epoch, progress.step_in_epoch = epoch + 1, 0
            progress.losses_in_epoch, progress.sum_of_losses_in_epoch = 0, 0.0
        progress.wer = total.wer
        progress.best_wer = min(total.wer, progress.best_wer if progress.best_wer is not None else math.inf)
        if reached or progress.step == config.max_steps or epoch == config.max_epochs:
            return reached, evaluation
        _save(run, progress, best=total.wer == progress.best_wer)
    raise RunError(f"--max-epochs {config.max_epochs}: all of them are done already; give a larger number to go on")


def save_and_exit(run: TrainingRun, progress: TrainState) -> NoReturn:
    _save(run, progress, best=False)
    run.trainer.world.print_once(f"Told to end: step {progress.step} is done and saved; --resume goes on from there.")
    raise Preempted


def _save(run: TrainingRun, progress: TrainState, *, best: bool) -> None:
    trainer, started = run.trainer, time.monotonic()
    progress.elapsed_seconds = run.clock.seconds()
    if trainer.world.is_main:
        models = trainer.eval_model, trainer.model
        folder, digest = run.config.output_dir, run.dataset.digest
        state = run.config, digest, progress, *models, trainer.optimizer
        checkpoint.save(folder, *state, launch=trainer.world.launch, best=best)
        run.log.event("checkpoint", time.monotonic() - started, metadata={"step_num": progress.step})
    run.saved_at = time.monotonic()


@dataclass(frozen=True)
class EpochStats:
    """What an epoch, or the rest of one, came to."""

    finished: bool  # whether to its end: max_steps may come before
    loss: float  # mean over its steps
    seconds: float
    utterances_per_second: float
    audio_seconds_per_second: float  # of speech as it is in the corpus, before augmentation
    data_wait_fraction: float  # of the time, in the process that waited most
    # Of the time, what each process stood still in messages, see distributed.seconds_waited (not measured on GPUs) ...
    rank_wait_fractions: list[float]
    # ... and what the messages themselves took: of each step, what the process that waited least stood still.
    communication_fraction: float
    skipped_steps: int  # of the run so far


def _train_epoch(run: TrainingRun, utterances: Utterances, included: np.ndarray, progress: TrainState) -> EpochStats:
    """The rest of the epoch under way.

    Raises:
        RunError: see `log_step`.
        Preempted: the process was told to end.
    """
    config, trainer, world = run.config, run.trainer, run.trainer.world
    plan = epoch_batches(utterances, included, config.batch_size, config.seed, progress.epoch)
    parts = config.gradient_accumulation_steps
    mine = [
        share
        for indices in plan[progress.step_in_epoch :]
        for share in split_balanced(utterances, indices, parts * world.size)[world.rank :: world.size]
    ]
    augment = (config, progress.epoch) if progress.epoch >= config.augment_from_epoch else None
    make = partial(make_batch, utterances, augment=augment, pinned=trainer.device.type == "cuda")
    batches = prefetch(mine, make)
    unread: deque[tuple[int, float, np.ndarray, Callable[[], Tensor]]] = deque()
    started, waiting, done, samples = time.monotonic(), 0.0, 0, 0
    waits: list[float] = []  # of each step
    trainer.model.train()
    stop = save = False

    def read(most_unread: int) -> None:
        nonlocal stop, save
        while len(unread) > most_unread:
            step, rate, indices, result = unread.popleft()
            loss, norm, asked_to_stop, asked_to_save = result().tolist()
            stop, save = stop or asked_to_stop > 0, save or asked_to_save > 0
            if log_step(run, progress, step, rate, loss, norm, [utterances.id(index) for index in indices]):
                progress.losses_in_epoch += 1
                progress.sum_of_losses_in_epoch += loss
                bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)

    with progress_bar(f"epoch {progress.epoch}", len(plan), progress.step_in_epoch, shown=world.is_main) as bar:
        while progress.step_in_epoch < len(plan) and (config.max_steps is None or progress.step < config.max_steps):
            asked = time.monotonic()
            shares = [next(batches) for _ in range(parts)]
            waiting += time.monotonic() - asked
            indices = plan[progress.step_in_epoch]
            rate = learning_rate(config, progress.step, len(plan))
            due = world.is_main and time.monotonic() - run.saved_at > 60 * config.checkpoint_interval_minutes
            waited = seconds_waited()
            result = trainer.step(shares, len(indices), rate, (run.stop_asked, due))
            waits.append(seconds_waited() - waited)
            done, samples = done + len(indices), samples + int(utterances.num_samples[indices].sum())
            progress.step += 1
            progress.step_in_epoch += 1
            unread.append((progress.step, rate, indices, result))
            read(PENDING_LOSSES[trainer.device.type])
            bar.update()
            if stop or save:
                read(0)
            if stop:
                save_and_exit(run, progress)
            if save:
                _save(run, progress, best=False)
                save = False
        read(0)
    batches.close()  # type: ignore[attr-defined]  # stops the reader when max_steps ended the epoch early
    seconds = time.monotonic() - started
    waits_RS = np.array(world.all_gather_object(waits))
    return EpochStats(
        finished=progress.step_in_epoch == len(plan),
        loss=progress.sum_of_losses_in_epoch / progress.losses_in_epoch if progress.losses_in_epoch else math.nan,
        seconds=seconds,
        utterances_per_second=done / seconds,
        audio_seconds_per_second=samples / SAMPLE_RATE / seconds,
        data_wait_fraction=max(world.all_gather_object(waiting)) / seconds,
        rank_wait_fractions=(waits_RS.sum(1) / seconds).tolist(),
        communication_fraction=float(waits_RS.min(0).sum() / seconds),
        skipped_steps=progress.skipped_steps,
    )


def log_step(
    run: TrainingRun, progress: TrainState, step: int, rate: float, loss: float, norm: float, ids: list[str]
) -> bool:
    """Log a step that is done. Returns whether its loss and gradient were finite.

    Raises:
        RunError: too many steps in a row were not.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        progress.skipped_in_a_row = 0
        run.log.event("train_loss", loss, metadata={"step_num": step, "learning_rate": rate, "gradient_norm": norm})
        run.scalars.step(step, loss, rate, norm)
        return True
    progress.skipped_steps += 1
    progress.skipped_in_a_row += 1
    run.log.event("skipped_step", step, metadata={"reason": "not finite", "utterances": ids})
    if progress.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise RunError(
            f"step {step}: loss or gradient was not finite {progress.skipped_in_a_row} times in a row, last with the "
            f"utterances {', '.join(ids)}; try a lower --learning-rate"
        )
    return False


def _resume(run: TrainingRun) -> TrainState | None:
    """Go on from a checkpoint, if that was asked for or torchrun has started the processes of this launch again.

    Processes of several machines may find different checkpoints, or none: the newest that one of them has is used, one
    of this launch before any other.
    """
    trainer, config, world = run.trainer, run.config, run.trainer.world
    if not (config.resume or world.launch):
        return None
    path, content, trouble = config.output_dir / checkpoint.LAST, None, None
    if world.local_rank == 0:
        try:
            path, content = checkpoint.load_newest(config.output_dir)
        except RunError as error:
            trouble = error
    ours = content is not None and content.get("launch") == world.launch
    if not (ours or config.resume):
        content = None  # of an earlier run
    found = world.all_gather_object((ours, content["progress"]["step"] if content is not None else -1))
    newest = found.index(max(found))
    nothing = found[newest][1] < 0
    if nothing and not config.resume:
        return None  # the processes start for the first time, or one was lost before the first checkpoint
    if nothing:
        raise trouble or RunError(f"{path}: there is no such checkpoint")
    content = world.broadcast_object(content, newest)
    assert content is not None
    checkpoint.check_resumable(path, content, config, run.dataset.digest)
    progress = TrainState(**{**content["progress"], "resumed": True})
    torch.set_rng_state(content["random_state"])
    trainer.model.load_state_dict(content["trained_model"])
    if trainer.ema is not None:
        trainer.ema.module.load_state_dict(content["model"])
        trainer.ema.n_averaged.fill_(progress.step)  # not zero, at which it would start with the model's weights
    # Hyperparameters are those of the configuration, which are others if it was resumed with changes.
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({**content["optimizer"], "param_groups": groups})
    known = {name: value for name, value in vars(progress).items() if value is not None}
    run.log.event("resumed", True, metadata=known)
    world.print_once(f"Resuming from {path}: epoch {progress.epoch}, step {progress.step}.")
    return progress


if __name__ == "__main__":
    sys.exit(main())
