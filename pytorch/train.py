"""The timed run: train DeepSpeech2 until the validation set's corpus WER reaches the target.

    python -m pytorch.train --config synthetic
    python -m pytorch.train --config librispeech --recipe reference --seed 7
    python -m pytorch.train --config an4 --resume

Prints the MLPerf log on standard output and progress on standard error. Exit status: 0 the target was reached, 1 it was
not or something went wrong, 2 the command line was not understood, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import getpass
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial

import numpy as np
import torch
from mlperf_logging import mllog
from mlperf_logging.mllog import constants
from torch import Tensor
from tqdm import tqdm

from data.packed import PackedDataset, open_dataset
from pytorch import checkpoint, gru, mlperf
from pytorch.batches import Batch, Utterances, make_batch, plan_epoch, prefetch
from pytorch.checkpoint import Progress
from pytorch.command import exit_status, progress_bar
from pytorch.config import Config, RunError, parse_config
from pytorch.devices import choose_device, choose_precision
from pytorch.features import SAMPLE_RATE
from pytorch.learner import Learner, learning_rate
from pytorch.validation import Evaluation, evaluate

MAX_SKIPPED_IN_A_ROW = 10  # steps whose loss or gradient is not finite; more mean that the run has diverged
UNREAD_STEPS = {"cpu": 0, "cuda": 4}  # whose losses are still to be read, so that a GPU never waits for the CPU


@dataclass
class Run:
    """What a run works with."""

    learner: Learner
    dataset: PackedDataset
    log: mllog.mllog.MLLogger

    @property
    def config(self) -> Config:
        """The run's configuration, its precision chosen."""
        return self.learner.config


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""

    def work() -> bool:
        return train(
            parse_config(
                sys.argv[1:] if arguments is None else arguments,
                program="python -m pytorch.train",
                description="Train DeepSpeech2 until the corpus WER of the validation set reaches the target.",
            )
        )

    return exit_status(work, interrupted="interrupted; --resume goes on from the last finished epoch")


def train(config: Config) -> bool:
    """Train until the target, or until the configuration's limits. Returns whether the target was reached.

    Raises:
        RunError: the run cannot start or go on.
        DataError: the data set is absent or damaged.
    """
    log = mlperf.get_logger()
    log.start(constants.INIT_START)
    # Only the summary is read before the clock starts: sizes to warm up with, and errors that are better early.
    dataset = open_dataset(config.dataset_dir)
    for split in ("train", "validation"):
        if not dataset.splits[split]:
            raise RunError(f"{config.dataset_dir} has no {split} subset; 'sh download_dataset.sh --subsets' adds one")
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--output-dir {config.output_dir}: cannot be made: {error.strerror}") from error
    device = choose_device(config.device)
    config = dataclasses.replace(config, precision=choose_precision(config.precision, device))
    cache = mlperf.clear_cache(dataset.path)
    log.event(constants.CACHE_CLEAR, cache.pop("cleared"), metadata=cache)
    mlperf.log_submission(log, config, dataset, device, 1)

    torch.manual_seed(config.seed)
    learner = Learner.make(config, device)
    log.event("gru_implementation", "cuDNN" if device.type == "cuda" else gru.kernel_status())
    learner.warm_up(_longest_training_utterance(dataset))
    run = Run(learner, dataset, log)
    progress = _resume(run) if config.resume else Progress()
    log.end(constants.INIT_STOP)

    started_at = datetime.now()
    log.start(constants.RUN_START)
    clock = _Clock(progress.elapsed_seconds)
    reached = False
    try:
        reached, evaluation = _train_to_target(run, progress, clock)
    finally:
        seconds = clock.seconds()
        log.end(constants.RUN_STOP, metadata={"status": constants.SUCCESS if reached else constants.ABORTED})
    evaluation.log_transcripts(log)
    try:
        _save(run, progress)  # off the clock, and no reason to lose the result
    finally:
        if reached:
            resumed = " (resumed: no uninterrupted benchmark result)" if progress.resumed else ""
            print(f"Target WER of {config.target_wer:g} reached in {seconds:.0f} s{resumed}.", file=sys.stderr)
            when = f"{started_at:%Y-%m-%d %I:%M:%S %p}"
            print(f"RESULT,DEEPSPEECH2,{config.seed},{seconds:.0f},{getpass.getuser()},{when}", flush=True)
        else:
            print(
                f"The target WER of {config.target_wer:g} was not reached; best: {progress.best_wer:.2f}.",
                file=sys.stderr,
            )
    return reached


class _Clock:
    """Seconds since it was made, plus those of the run before it was resumed."""

    def __init__(self, before: float) -> None:
        self._start = time.monotonic() - before

    def seconds(self) -> float:
        return time.monotonic() - self._start


def _longest_training_utterance(dataset: PackedDataset) -> int:
    return max(dataset.summary[name].longest_samples for name in dataset.splits["train"])


def _train_to_target(run: Run, progress: Progress, clock: _Clock) -> tuple[bool, Evaluation]:
    """The part on the clock. Returns whether the target was reached, and the last evaluation."""
    config, dataset, log = run.config, run.dataset, run.log
    utterances = Utterances(dataset.split("train"))
    validation = Utterances(dataset.split("validation"))
    alignable = utterances.alignable()
    included = np.flatnonzero(alignable)
    log.event(constants.TRAIN_SAMPLES, len(included))
    log.event(constants.EVAL_SAMPLES, len(validation))
    left_out = [utterances.id(index) for index in np.flatnonzero(~alignable).tolist()]
    log.event("train_samples_left_out", len(left_out), metadata={"reason": "too short for CTC", "ids": left_out})
    if len(included) == 0:
        raise RunError(f"{dataset.path}: no training utterance is long enough for its transcript")

    capacity = config.batch_size * _longest_training_utterance(dataset)
    for epoch in range(progress.epoch, config.max_epochs + 1):
        log.start(constants.EPOCH_START, metadata={constants.EPOCH_NUM: epoch})
        trained = _train_epoch(run, utterances, included, progress)
        metadata = {constants.EPOCH_NUM: epoch, "step": progress.step, **dataclasses.asdict(trained)}
        log.end(constants.EPOCH_STOP, metadata=metadata)

        evaluation_started = time.monotonic()
        log.start(constants.EVAL_START, metadata={constants.EPOCH_NUM: epoch})
        evaluation = evaluate(run.learner, validation, capacity)
        evaluation.log_errors(log, epoch)
        total = evaluation.total
        progress.evaluation_seconds += time.monotonic() - evaluation_started
        fraction = progress.evaluation_seconds / clock.seconds()
        log.end(constants.EVAL_STOP, metadata={constants.EPOCH_NUM: epoch, "evaluation_fraction_of_run": fraction})
        reached = total.wer <= config.target_wer
        each = ", ".join(f"{name} {counts.wer:.2f}" for name, counts in evaluation.by_subset().items())
        tqdm.write(
            f"epoch {epoch:3d}  loss {trained.loss:8.3f}  WER {total.wer:6.2f} ({each})  CER {total.cer:6.2f}  "
            f"train {trained.seconds:.0f} s (waited for data {trained.data_wait_fraction:.1%})  "
            f"clock {clock.seconds():.0f} s (evaluation {fraction:.0%})",
            file=sys.stderr,
        )
        if trained.finished:
            progress.epoch, progress.step_in_epoch = epoch + 1, 0
        progress.wer = total.wer
        progress.best_wer = min(total.wer, progress.best_wer if progress.best_wer is not None else math.inf)
        progress.elapsed_seconds = clock.seconds()
        if reached or not trained.finished or epoch == config.max_epochs:
            return reached, evaluation
        _save(run, progress)
    raise RunError(f"--max-epochs {config.max_epochs}: all of them are done already; give a larger number to go on")


def _save(run: Run, progress: Progress) -> None:
    learner, started = run.learner, time.monotonic()
    for name in [checkpoint.LAST] + [checkpoint.BEST] * (progress.wer == progress.best_wer):
        checkpoint.save(
            run.config.output_dir / name,
            run.config,
            run.dataset.digest,
            progress,
            learner.evaluated,
            learner.model,
            learner.optimizer,
        )
    run.log.event("checkpoint", time.monotonic() - started, metadata={"step_num": progress.step})


@dataclass(frozen=True)
class Trained:
    """What an epoch, or the rest of one, came to."""

    finished: bool  # whether to its end: max_steps may come before
    loss: float  # mean over its steps
    seconds: float
    utterances_per_second: float
    audio_seconds_per_second: float  # of speech as it is in the corpus, before augmentation
    data_wait_fraction: float  # of the time
    skipped_steps: int  # of the run so far


def _train_epoch(run: Run, utterances: Utterances, included: np.ndarray, progress: Progress) -> Trained:
    """The rest of the epoch under way."""
    config = run.config
    plan = plan_epoch(utterances, included, config.batch_size, config.seed, progress.epoch)
    make = partial(make_batch, utterances, augment=(config, progress.epoch), pinned=run.learner.device.type == "cuda")
    batches = prefetch(plan[progress.step_in_epoch :], make)
    losses: list[float] = []
    unread: deque[tuple[int, float, Batch, Callable[[], Tensor]]] = deque()
    started, waiting, done, samples = time.monotonic(), 0.0, 0, 0
    run.learner.model.train()

    def read(most_unread: int) -> None:
        while len(unread) > most_unread:
            step, rate, batch, result = unread.popleft()
            loss, norm = result().tolist()
            ids = [utterances.id(index) for index in batch.indices]
            if _account(run, progress, step, rate, loss, norm, ids):
                losses.append(loss)
                bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)

    with progress_bar(f"epoch {progress.epoch}", len(plan), progress.step_in_epoch) as bar:
        while progress.step_in_epoch < len(plan) and (config.max_steps is None or progress.step < config.max_steps):
            asked = time.monotonic()
            batch = next(batches)
            waiting += time.monotonic() - asked
            rate = learning_rate(config, progress.step, len(plan))
            result = run.learner.step(batch, rate)
            done, samples = done + len(batch), samples + int(batch.samples_B.sum())
            progress.step += 1
            progress.step_in_epoch += 1
            unread.append((progress.step, rate, batch, result))
            read(UNREAD_STEPS[run.learner.device.type])
            bar.update()
        read(0)
    batches.close()  # type: ignore[attr-defined]  # stops the reader when max_steps ended the epoch early
    seconds = time.monotonic() - started
    return Trained(
        finished=progress.step_in_epoch == len(plan),
        loss=sum(losses) / len(losses) if losses else math.nan,
        seconds=seconds,
        utterances_per_second=done / seconds,
        audio_seconds_per_second=samples / SAMPLE_RATE / seconds,
        data_wait_fraction=waiting / seconds,
        skipped_steps=progress.skipped_steps,
    )


def _account(run: Run, progress: Progress, step: int, rate: float, loss: float, norm: float, ids: list[str]) -> bool:
    """Log a step that is done. Returns whether its loss and gradient were finite.

    Raises:
        RunError: too many steps in a row were not.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        progress.skipped_in_a_row = 0
        run.log.event("train_loss", loss, metadata={"step_num": step, "learning_rate": rate, "gradient_norm": norm})
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


def _resume(run: Run) -> Progress:
    learner, path = run.learner, run.config.output_dir / checkpoint.LAST
    content = checkpoint.load(path)
    checkpoint.check_resumable(path, content, run.config, run.dataset.digest)
    progress = Progress(**{**content["progress"], "resumed": True})
    learner.model.load_state_dict(content["trained_model"])
    if learner.averaged is not None:
        learner.averaged.module.load_state_dict(content["model"])
        learner.averaged.n_averaged.fill_(progress.step)  # not zero, at which it would start with the model's weights
    learner.optimizer.load_state_dict(content["optimizer"])
    run.log.event("resumed", True, metadata=dataclasses.asdict(progress))
    print(f"Resuming from {path}: epoch {progress.epoch}, step {progress.step}.", file=sys.stderr)
    return progress


if __name__ == "__main__":
    sys.exit(main())
