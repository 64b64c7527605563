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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import torch
from mlperf_logging import mllog
from mlperf_logging.mllog import constants
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from data.packed import DataError, PackedDataset, open_dataset
from pytorch import checkpoint, gru, mlperf
from pytorch.batches import Batch, Utterances, make_batch, plan_epoch, prefetch, split_by_size
from pytorch.checkpoint import Progress
from pytorch.config import Config, Precision, RunError, parse_config
from pytorch.decoder import BLANK, spell
from pytorch.features import LogSpectrogram
from pytorch.metrics import ErrorCounts, count_errors
from pytorch.model import DeepSpeech2

MAX_SKIPPED_IN_A_ROW = 10  # steps whose loss or gradient is not finite; more mean that the run has diverged
UNREAD_STEPS = {"cpu": 0, "cuda": 4}  # whose losses are still to be read, so that a GPU never waits for the CPU


@dataclass
class Run:
    """What a run works with."""

    config: Config
    device: torch.device
    spectrogram: LogSpectrogram
    model: DeepSpeech2
    averaged: AveragedModel | None  # exponential moving average of the model's weights and batch-norm statistics
    optimizer: torch.optim.Optimizer
    log: mllog.mllog.MLLogger

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated and kept: the average if there is one."""
        return self.model if self.averaged is None else self.averaged.module


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    try:
        config = parse_config(
            sys.argv[1:] if arguments is None else arguments,
            program="python -m pytorch.train",
            description="Train DeepSpeech2 until the corpus WER of the validation set reaches the target.",
        )
        return 0 if train(config) else 1
    except (RunError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last finished epoch", file=sys.stderr)
        return 130


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
    log.event(constants.CACHE_CLEAR, mlperf.clear_cache(dataset.path))
    mlperf.log_submission(log, config, dataset, device)

    torch.manual_seed(config.seed)
    spectrogram = LogSpectrogram().to(device)
    model = DeepSpeech2(config.conv_channels, config.hidden_size).to(device)
    if device.type == "cpu":
        gru.build_kernel()
    log.event("gru_implementation", "cuDNN" if device.type == "cuda" else gru.kernel_status())
    warm_up(config, spectrogram, model, device, _longest_training_utterance(dataset))
    averaged = None
    if config.averaging_decay > 0:
        averaged = AveragedModel(model, use_buffers=True)
    run = Run(config, device, spectrogram, model, averaged, make_optimizer(config, model), log)
    progress = Progress()
    if config.resume:
        progress = _resume(run, dataset)
    log.end(constants.INIT_STOP)

    started_at = datetime.now()
    log.start(constants.RUN_START)
    clock = _Clock(progress.elapsed_seconds)
    reached = False
    try:
        reached = _train_to_target(run, dataset, progress, clock)
    finally:
        seconds = clock.seconds()
        log.end(constants.RUN_STOP, metadata={"status": constants.SUCCESS if reached else constants.ABORTED})
    try:
        _save(run, dataset, progress)  # off the clock, and no reason to lose the result
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


def choose_device(name: str) -> torch.device:
    """Device of that name; `auto` is the GPU if there is one.

    Raises:
        RunError: a GPU was asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch finds no CUDA device on this machine; use --device cpu or auto")
    return torch.device(name)


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """fp32 or bf16; `auto` is bf16 where the device multiplies it natively. Allows TF32 on a GPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = gru.multiplies_bfloat16()
    if name == "bf16" and not native:
        print("--precision bf16: this device has no bf16 arithmetic, so fp32 would be faster", file=sys.stderr)
    return name if name != "auto" else "bf16" if native else "fp32"


def precision_context(precision: Precision, device: torch.device) -> torch.autocast:
    """Inside it the model computes in that precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The configuration's optimizer; its learning rate is set before each step by `learning_rate`.

    The fused implementations leave everything as it is in a step whose `found_inf` is not zero.
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            config.learning_rate,
            momentum=config.beta1,
            nesterov=config.beta1 > 0,
            weight_decay=config.weight_decay,
            fused=True,
        )
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step.

    Args:
        config: schedule and its values.
        step: of the run, from 0.
        steps_per_epoch: in the whole epoch.
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "anneal":
        fall = config.learning_rate_anneal ** -(step // steps_per_epoch)
    else:
        way = min(1.0, step / (config.schedule_epochs * steps_per_epoch))
        end = config.final_learning_rate_fraction
        fall = end + (1 - end) * 0.5 * (1 + math.cos(math.pi * way))
    return config.learning_rate * rise * fall


def ctc_loss(logits_TBV: Tensor, frames_B: Tensor, targets: Tensor, target_lengths_B: Tensor) -> Tensor:
    """CTC loss in float32: mean over utterances of the negative log-likelihood (nats) of each transcript."""
    log_probabilities = logits_TBV.float().log_softmax(2)
    total = nn.functional.ctc_loss(log_probabilities, targets, frames_B, target_lengths_B, blank=BLANK, reduction="sum")
    return total / len(frames_B)


def forward_loss(
    model: DeepSpeech2, spectrogram: LogSpectrogram, batch: Batch, precision: Precision, device: torch.device
) -> Tensor:
    """Loss of a batch, augmented if the batch says so."""
    waveforms = batch.waveforms_BS.to(device, non_blocking=True)
    features = spectrogram(waveforms, batch.samples_B, batch.augmentation)
    with precision_context(precision, device):
        logits_TBV, frames_B = model(*features)
    return ctc_loss(logits_TBV, frames_B, batch.targets.to(device, non_blocking=True), batch.target_lengths_B)


def warm_up(
    config: Config, spectrogram: LogSpectrogram, model: DeepSpeech2, device: torch.device, longest_samples: int
) -> None:
    """One whole training step on made-up data as large as the largest batch, then everything as it was.

    Kernels are built and chosen, and memory is known to suffice, before the clock starts.

    Raises:
        RunError: the largest batch does not fit into memory.
    """
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = make_optimizer(config, model)
    count, samples = config.batch_size, int(longest_samples / min(1.0, config.tempo_min))
    noise = torch.randint(-1000, 1000, (count, samples), dtype=torch.int16)
    batch = Batch(
        np.arange(count),
        noise,
        torch.full((count,), samples),
        torch.full((count,), 1),
        torch.full((count,), 1),
        ["'"] * count,
        None,
    )
    try:
        forward_loss(model, spectrogram, batch, config.precision, device).backward()
        optimizer.step()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RunError(
            f"a batch of {count} utterances of {samples / 16000:.0f} s does not fit into memory; "
            f"use a smaller --batch-size than {count}"
        ) from error
    model.zero_grad(set_to_none=True)
    model.load_state_dict(before)


def _longest_training_utterance(dataset: PackedDataset) -> int:
    return max(dataset.summary[name].longest_samples for name in dataset.splits["train"])


def _train_to_target(run: Run, dataset: PackedDataset, progress: Progress, clock: _Clock) -> bool:
    """The part on the clock."""
    config, log = run.config, run.log
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

    for epoch in range(progress.epoch, config.max_epochs + 1):
        epoch_started = time.monotonic()
        log.start(constants.EPOCH_START, metadata={constants.EPOCH_NUM: epoch})
        finished, loss, waiting = _train_epoch(run, utterances, included, progress)
        log.end(
            constants.EPOCH_STOP,
            metadata={constants.EPOCH_NUM: epoch, "loss": loss, "data_wait_fraction": waiting, "step": progress.step},
        )
        training_seconds = time.monotonic() - epoch_started

        evaluation_started = time.monotonic()
        log.start(constants.EVAL_START, metadata={constants.EPOCH_NUM: epoch})
        errors = evaluate(run, validation, config.batch_size * _longest_training_utterance(dataset))
        total = sum(errors.values(), ErrorCounts())
        _log_accuracy(log, errors, total, epoch)
        progress.evaluation_seconds += time.monotonic() - evaluation_started
        fraction = progress.evaluation_seconds / clock.seconds()
        log.end(constants.EVAL_STOP, metadata={constants.EPOCH_NUM: epoch, "evaluation_fraction_of_run": fraction})
        reached = total.wer <= config.target_wer
        each = ", ".join(f"{name} {counts.wer:.2f}" for name, counts in errors.items())
        tqdm.write(
            f"epoch {epoch:3d}  loss {loss:8.3f}  WER {total.wer:6.2f} ({each})  CER {total.cer:6.2f}  "
            f"train {training_seconds:.0f} s (waited for data {waiting:.1%})  clock {clock.seconds():.0f} s "
            f"(evaluation {fraction:.0%})",
            file=sys.stderr,
        )
        if finished:
            progress.epoch, progress.step_in_epoch = epoch + 1, 0
        progress.wer = total.wer
        progress.best_wer = min(total.wer, progress.best_wer if progress.best_wer is not None else math.inf)
        progress.elapsed_seconds = clock.seconds()
        if reached or not finished or epoch == config.max_epochs:
            return reached
        _save(run, dataset, progress)
    raise RunError(f"--max-epochs {config.max_epochs}: all of them are done already; give a larger number to go on")


def _save(run: Run, dataset: PackedDataset, progress: Progress) -> None:
    names = [checkpoint.LAST] + [checkpoint.BEST] * (progress.wer == progress.best_wer)
    for name in names:
        models = run.evaluated, run.model
        checkpoint.save(run.config.output_dir / name, run.config, dataset.digest, progress, *models, run.optimizer)


def _train_epoch(
    run: Run, utterances: Utterances, included: np.ndarray, progress: Progress
) -> tuple[bool, float, float]:
    """The rest of the epoch under way.

    Returns:
        Whether the epoch was finished (max_steps may end it), mean loss of its steps here, fraction of its time spent
        waiting for data.
    """
    config = run.config
    plan = plan_epoch(utterances, included, config.batch_size, config.seed, progress.epoch)
    make = partial(make_batch, utterances, augment=(config, progress.epoch), pinned=run.device.type == "cuda")
    batches = prefetch(plan[progress.step_in_epoch :], make)
    losses: list[float] = []
    unread: deque[tuple[int, float, Batch, Callable[[], Tensor]]] = deque()
    started, waiting = time.monotonic(), 0.0
    run.model.train()

    def read(most_unread: int) -> None:
        while len(unread) > most_unread:
            step, rate, batch, result = unread.popleft()
            loss, norm = result().tolist()
            ids = [utterances.id(index) for index in batch.indices]
            if _account(run, progress, step, rate, loss, norm, ids):
                losses.append(loss)
                bar.set_postfix_str(f"loss {loss:.2f}", refresh=False)

    with _progress_bar(f"epoch {progress.epoch}", len(plan), progress.step_in_epoch) as bar:
        while progress.step_in_epoch < len(plan) and (config.max_steps is None or progress.step < config.max_steps):
            asked = time.monotonic()
            batch = next(batches)
            waiting += time.monotonic() - asked
            rate = learning_rate(config, progress.step, len(plan))
            result = _step(run, batch, rate)
            progress.step += 1
            progress.step_in_epoch += 1
            unread.append((progress.step, rate, batch, result))
            read(UNREAD_STEPS[run.device.type])
            bar.update()
        read(0)
    batches.close()  # type: ignore[attr-defined]  # stops the reader when max_steps ended the epoch early
    elapsed = time.monotonic() - started
    mean_loss = sum(losses) / len(losses) if losses else math.nan
    return progress.step_in_epoch == len(plan), mean_loss, waiting / elapsed if elapsed else 0.0


def _step(run: Run, batch: Batch, rate: float) -> Callable[[], Tensor]:
    """One optimizer step, which changes nothing if its loss or gradient is not finite.

    Returns:
        What waits for the step and gives loss and gradient norm [2].
    """
    run.optimizer.zero_grad(set_to_none=True)
    loss = forward_loss(run.model, run.spectrogram, batch, run.config.precision, run.device)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(run.model.parameters(), run.config.gradient_clip_norm)
    result = torch.stack([loss.detach(), norm])
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.found_inf = (~result.isfinite().all()).float()  # type: ignore[attr-defined]
    run.optimizer.step()
    if run.averaged is not None:
        steps = int(run.averaged.n_averaged)
        decay = min(run.config.averaging_decay, (1 + steps) / (10 + steps))  # the first steps are soon forgotten
        run.averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
        run.averaged.update_parameters(run.model)
    return read_later(result)


def read_later(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU. What is returned waits for that copy, not for what was started after it."""
    if tensor.device.type == "cpu":
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> Tensor:
        copied.synchronize()
        return copy

    return read


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


@torch.no_grad()
def evaluate(run: Run, utterances: Utterances, capacity: int) -> dict[str, ErrorCounts]:
    """Errors of greedy decoding, by subset, over **every** utterance.

    Args:
        run: the model and where it is.
        utterances: what to evaluate.
        capacity: samples of a batch, padding included. The largest training batch is known to fit into memory, together
            with its gradients.

    Raises:
        RunError: not every utterance was counted.
    """
    run.evaluated.eval()
    plan = split_by_size(utterances.samples, capacity)
    errors = {subset.name: ErrorCounts() for subset in utterances.subsets}

    def count(batch: Batch, best_TB: Callable[[], Tensor], frames_B: Tensor) -> None:
        hypotheses = spell(best_TB(), frames_B)
        for index, reference, hypothesis in zip(batch.indices, batch.transcripts, hypotheses, strict=True):
            errors[utterances.subsets[utterances.subset_of[index]].name] += count_errors([reference], [hypothesis])

    started: tuple[Batch, Callable[[], Tensor], Tensor] | None = None  # decoded while the device works on the next one
    with _progress_bar("evaluation", len(plan), 0) as bar:
        for batch in prefetch(plan, partial(make_batch, utterances, pinned=run.device.type == "cuda")):
            features = run.spectrogram(batch.waveforms_BS.to(run.device, non_blocking=True), batch.samples_B)
            with precision_context(run.config.precision, run.device):
                logits_TBV, frames_B = run.evaluated(*features)
            best_TB = read_later(logits_TBV.argmax(dim=2))
            if started is not None:
                count(*started)
            started = batch, best_TB, frames_B
            bar.update()
    if started is not None:
        count(*started)
    counted = sum(counts.utterances for counts in errors.values())
    if counted != len(utterances):
        raise RunError(f"evaluation counted {counted} of {len(utterances)} utterances")
    return errors


def _log_accuracy(log: mllog.mllog.MLLogger, errors: dict[str, ErrorCounts], total: ErrorCounts, epoch: int) -> None:
    detail: dict[str, Any] = {constants.EPOCH_NUM: epoch, "utterances": total.utterances, "words": total.words}
    log.event(constants.EVAL_ACCURACY, total.wer, metadata=detail)
    for name, counts in [("all", total), *errors.items()]:
        log.event(
            "validation_errors",
            name,
            metadata={
                constants.EPOCH_NUM: epoch,
                "wer": counts.wer,
                "cer": counts.cer,
                "mean_utterance_wer": counts.mean_utterance_wer,
                **dataclasses.asdict(counts),
            },
        )


def _resume(run: Run, dataset: PackedDataset) -> Progress:
    path = run.config.output_dir / checkpoint.LAST
    content = checkpoint.load(path)
    checkpoint.check_resumable(path, content, run.config, dataset.digest)
    progress = Progress(**{**content["progress"], "resumed": True})
    run.model.load_state_dict(content["trained_model"])
    if run.averaged is not None:
        run.averaged.module.load_state_dict(content["model"])
        run.averaged.n_averaged.fill_(progress.step)  # not zero, at which it would start with the model's weights
    run.optimizer.load_state_dict(content["optimizer"])
    run.log.event("resumed", True, metadata=dataclasses.asdict(progress))
    print(f"Resuming from {path}: epoch {progress.epoch}, step {progress.step}.", file=sys.stderr)
    return progress


@contextmanager
def _progress_bar(title: str, total: int, initial: int) -> Iterator[tqdm]:
    """Progress with time left on standard error, gone when done; silent where that is no terminal."""
    with tqdm(total=total, initial=initial, desc=title, leave=False, disable=None, unit="batch") as bar:
        yield bar


if __name__ == "__main__":
    sys.exit(main())
