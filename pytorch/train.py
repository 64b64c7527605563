"""The timed run: train DeepSpeech2 until the corpus WER of the validation set reaches the target.

    python -m pytorch.train --config synthetic
    python -m pytorch.train --config librispeech-2018 --seed 7
    python -m pytorch.train --config an4 --resume

Prints the MLPerf log on standard output and progress on standard error. Exit status: 0 the target was reached, 1 it was
not or something went wrong, 2 the command line was not understood, 130 interrupted, 75 stopped by SIGTERM or SIGUSR1
after the step under way was saved, so that --resume continues from there; 74 lost another rank.

Started by torchrun (launch.py), it is one of several ranks (distributed.py) that take the same steps together.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger
from torch import Tensor

from data.cli import DataError, exit_status, progress_bar
from data.files import locked
from data.packed import PackedDataset, open_dataset
from pytorch import checkpoint, machine, memory, mllog
from pytorch.checkpoint import TrainState
from pytorch.config import BENCHMARK_WER, Config, Precision, fields_of, parse_config
from pytorch.device import explain_oom, faster_precision, select_device, select_precision, set_device
from pytorch.distributed import StopSignal, World, report_lost_ranks, shutdown
from pytorch.errors import Preempted, RunError
from pytorch.evaluation import Evaluation, evaluate
from pytorch.features import SAMPLE_RATE
from pytorch.layers import gru
from pytorch.loader import TrainingLoader, Utterances
from pytorch.optimizer import learning_rate
from pytorch.trainer import Trainer

MAX_SKIPPED_IN_A_ROW = 10  # steps whose loss or gradient is not finite; more mean that the run has diverged


@dataclass
class TrainingRun:
    """The objects of a run."""

    config: Config  # its precision is fp32 or bf16
    world: World
    dataset: PackedDataset
    trainer: Trainer
    log: MLLogger
    state: TrainState
    stop: StopSignal
    clock: Clock
    last_save_time: float  # time.monotonic() when the newest checkpoint was written


def train(config: Config, launch_id: str | None = None) -> bool:
    """Train until the target, or until the configuration's limits. Return whether the target was reached.

    `launch_id` names the launch that this process is a rank of, see `World`.

    Raises:
        RunError: the run cannot start or go on.
        DataError: the data set is absent or damaged.
        Preempted: the process was told to stop.
        RuntimeError: another rank was lost.
    """
    with ExitStack() as resources:  # the lock of the output folder
        run = setup(config, launch_id, resources)
        state, world = run.state, run.world
        if state.wer is not None and config.target_reached(state.wer):
            world.print_once(
                f"Target WER of {config.target_wer:g} was already reached, in {state.elapsed_seconds:.0f} s."
            )
            return True

        started_at, reached, cpu_before = datetime.now(), False, machine.cpu_seconds()
        run.log.start(constants.RUN_START)
        run.clock.start(before=state.elapsed_seconds)
        try:
            with explain_oom("memory ran out; use a smaller --batch-size, or more --gradient-accumulation-steps"):
                evaluation = train_to_target(run)
            reached = config.target_reached(evaluation.total.wer)
        finally:
            seconds = run.clock.stop()
            status = constants.SUCCESS if reached else constants.ABORTED
            raised = {"exception": type(error).__name__} if (error := sys.exception()) else {}
            run.log.end(constants.RUN_STOP, metadata={"status": status, **raised})
        log_cpu_taken(run, cpu_before)
        evaluation.log_transcripts(run.log)

        try:
            save(run)  # with the last WER
            mark_if_best(run)
        finally:  # a full disk does not cost the result
            print_result(run, reached, seconds, started_at)
        world.barrier()  # no rank leaves while another still needs it
        return reached


def train_to_target(run: TrainingRun) -> Evaluation:
    """Train and evaluate, on the clock, until the target or a limit is reached. Return the last evaluation."""
    config, state = run.config, run.state
    loader, validation = open_data(run)
    while True:
        stats = train_epoch(run, loader)
        save(run)  # first, so that an evaluation may be interrupted at any time
        evaluation = evaluate_epoch(run, validation, stats)
        if state.step_in_epoch == len(loader):
            state.begin_next_epoch()
        out_of_steps = config.max_steps is not None and state.step >= config.max_steps
        if config.target_reached(evaluation.total.wer) or out_of_steps or state.epoch > config.max_epochs:
            return evaluation
        mark_if_best(run)


def open_data(run: TrainingRun) -> tuple[TrainingLoader, Utterances]:
    """Open the audio, for the first time, and say which training utterances are left out."""
    train, validation = (Utterances(run.dataset.split(split)) for split in ("train", "validation"))
    loader = TrainingLoader(train, run.config, run.world, run.trainer.device)
    run.log.event(constants.TRAIN_SAMPLES, len(loader.included))
    run.log.event(constants.EVAL_SAMPLES, len(validation))
    left_out = {"reason": "too short for CTC", "ids": [train.id(index) for index in loader.left_out.tolist()]}
    run.log.event("train_samples_left_out", len(loader.left_out), metadata=left_out)
    return loader, validation


@dataclass(frozen=True)
class EpochStats:
    """Statistics of an epoch; times and rates are of what was left of it if the run was resumed."""

    loss: float  # mean over its steps, skipped ones left out
    seconds: float
    utterances_per_second: float
    audio_seconds_per_second: float  # of speech as it is in the corpus, before augmentation
    data_wait_fraction: float  # of the time, on the rank that waited most
    peak_memory_gib: float  # of the process that took most, see memory.peak
    skipped_steps: int  # of the run so far
    finished: bool  # False if max_steps cut it short


class PendingStep(NamedTuple):
    """A step that the device may still be working on."""

    step: int
    lr: float
    indices: np.ndarray  # of its utterances
    result: Callable[[], Tensor]


def train_epoch(run: TrainingRun, loader: TrainingLoader) -> EpochStats:
    """Train the rest of the epoch under way.

    Raises:
        RunError: see `log_step`.
        Preempted: a rank was told to stop; the state is saved.
    """
    config, state, trainer, world = run.config, run.state, run.trainer, run.world
    run.log.start(constants.EPOCH_START, metadata={constants.EPOCH_NUM: state.epoch})
    memory.reset_peak(trainer.device)
    started, utterances, samples = time.monotonic(), 0, 0
    pending: deque[PendingStep] = deque()
    trainer.model.train()
    first, last = state.step_in_epoch, len(loader)
    if config.max_steps is not None:
        last = min(last, first + max(0, config.max_steps - state.step))  # 0 where a lower limit was resumed with
    with progress_bar(f"epoch {state.epoch}", len(loader), initial=first, shown=world.is_main) as bar:
        for indices, microbatches in loader.epoch(state.epoch, first, last):
            lr = learning_rate(config, state.step, len(loader))
            save_due = world.is_main and time.monotonic() - run.last_save_time > 60 * config.checkpoint_interval_minutes
            # What one rank wants travels with the loss, so that all ranks know it after the same step.
            result = trainer.train_step(microbatches, len(indices), lr, flags=(run.stop.requested, save_due))
            state.step += 1
            state.step_in_epoch += 1
            pending.append(PendingStep(state.step, lr, indices, result))
            utterances += len(indices)
            samples += int(loader.utterances.num_samples[indices].sum())
            stop, save_now = log_finished_steps(run, loader, pending, keep=max_pending_steps(trainer.device))
            bar.set_postfix_str(f"mean loss {state.mean_loss:.2f}", refresh=False)
            bar.update()
            if stop or save_now:
                stop_late, _ = log_finished_steps(run, loader, pending, keep=0)
                save(run)
                if stop or stop_late:
                    raise_preempted(run)
        log_finished_steps(run, loader, pending, keep=0)
    seconds = time.monotonic() - started
    stats = EpochStats(
        loss=state.mean_loss,
        seconds=seconds,
        utterances_per_second=utterances / seconds,
        audio_seconds_per_second=samples / SAMPLE_RATE / seconds,
        data_wait_fraction=max(world.all_gather_object(loader.data_wait_seconds)) / seconds,
        peak_memory_gib=max(world.all_gather_object(memory.peak(trainer.device))) / 2**30,
        skipped_steps=state.skipped_steps,
        finished=state.step_in_epoch == len(loader),
    )
    metadata = {constants.EPOCH_NUM: state.epoch, "step": state.step, **dataclasses.asdict(stats)}
    run.log.end(constants.EPOCH_STOP, metadata=metadata)
    return stats


def max_pending_steps(device: torch.device) -> int:
    """Return how many steps late losses are read: some, so that an accelerator never waits."""
    return 0 if device.type == "cpu" else 4


def log_finished_steps(
    run: TrainingRun, loader: TrainingLoader, pending: deque[PendingStep], keep: int
) -> tuple[bool, bool]:
    """Wait for and log all pending steps but the newest `keep`. Return whether any rank wants to stop, and to save."""
    stop = save_now = False
    while len(pending) > keep:
        step, lr, indices, result = pending.popleft()
        loss, grad_norm, wants_stop, wants_save = result().tolist()  # see Trainer.train_step
        stop, save_now = stop or wants_stop > 0, save_now or wants_save > 0
        log_step(run, step, lr, loss, grad_norm, [loader.utterances.id(index) for index in indices])
    return stop, save_now


def log_step(run: TrainingRun, step: int, lr: float, loss: float, grad_norm: float, ids: list[str]) -> None:
    """Log a step, and count it as skipped if its loss or gradient was not finite.

    Raises:
        RunError: too many steps in a row were not finite.
    """
    state = run.state
    if math.isfinite(loss) and math.isfinite(grad_norm):
        state.skipped_in_a_row = 0
        state.losses_in_epoch += 1
        state.sum_of_losses_in_epoch += loss
        metadata = {"step_num": step, "learning_rate": lr, "gradient_norm": grad_norm}
        run.log.event("train_loss", loss, metadata=metadata)
        return
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    run.log.event("skipped_step", step, metadata={"reason": "not finite", "utterances": ids})
    if state.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise RunError(
            f"step {step}: loss or gradient was not finite {state.skipped_in_a_row} times in a row, last with the "
            f"utterances {', '.join(ids)}; try a lower --learning-rate"
        )


def evaluate_epoch(run: TrainingRun, validation: Utterances, stats: EpochStats) -> Evaluation:
    """Evaluate, log and print the result of the epoch under way.

    Raises:
        Preempted: a rank was told to stop. The resumed run has no step of this epoch left, and evaluates it.
    """
    config, state, trainer, world = run.config, run.state, run.trainer, run.world
    started = time.monotonic()
    run.log.start(constants.EVAL_START, metadata={constants.EPOCH_NUM: state.epoch})
    trainer.eval_model.eval()
    evaluation = evaluate(
        partial(trainer.logits, trainer.eval_model),
        validation,
        world,
        # What a rank computes at once in training is known to fit into memory, together with its gradients.
        max_batch_samples=config.max_microbatch_size(world.size) * max_train_samples(run.dataset),
        device=trainer.device,
        stop_requested=lambda: run.stop.requested,
    )
    if evaluation is None:
        raise_preempted(run)
    evaluation.log_errors(run.log, state.epoch)
    total = evaluation.total
    state.evaluation_seconds += time.monotonic() - started
    fraction = state.evaluation_seconds / run.clock.seconds()
    metadata = {constants.EPOCH_NUM: state.epoch, "evaluation_fraction_of_run": fraction}
    run.log.end(constants.EVAL_STOP, metadata=metadata)
    state.wer = total.wer
    state.best_wer = total.wer if state.best_wer is None else min(total.wer, state.best_wer)
    subsets = ", ".join(f"{name} {counts.wer:.2f}" for name, counts in evaluation.by_subset.items())
    world.print_once(
        f"epoch {state.epoch:3d}  loss {stats.loss:8.3f}  WER {total.wer:6.2f} ({subsets})  CER {total.cer:6.2f}  "
        f"train {stats.seconds:.0f} s (waited for data {stats.data_wait_fraction:.1%})  "
        f"clock {run.clock.seconds():.0f} s (evaluation {fraction:.0%})"
    )
    return evaluation


def save(run: TrainingRun) -> None:
    """Write a checkpoint on the first rank; RunError if it cannot be written."""
    started, state = time.monotonic(), run.state
    state.elapsed_seconds = run.clock.seconds()
    if run.world.is_main:
        tensors, folder = run.trainer.state_dict(), run.config.output_dir
        checkpoint.save(folder, run.config, run.dataset.digest, state, tensors, run.world.launch_id)
        run.log.event("checkpoint", time.monotonic() - started, metadata={"step_num": state.step})
    run.last_save_time = time.monotonic()


def mark_if_best(run: TrainingRun) -> None:
    """Keep the newest checkpoint as the best one if its WER is the lowest so far."""
    if run.world.is_main and run.state.wer == run.state.best_wer:
        checkpoint.mark_best(run.config.output_dir)


def log_cpu_taken(run: TrainingRun, before: dict[str, float]) -> None:
    """Log how much of this machine's CPU time went elsewhere on the clock; say so if that makes its time worthless."""
    spent = {name: value - before[name] for name, value in machine.cpu_seconds().items()}
    node = machine.told_by_torchrun("GROUP_RANK", 0)  # number of this machine
    ranks = [each for there, each in run.world.all_gather_object((node, spent)) if there == node]
    if not spent.get("all"):  # no Linux, or a sandbox that does not count
        return
    others = max(0.0, spent["busy"] - sum(each["own"] for each in ranks)) / spent["all"]
    stolen = spent["stolen"] / spent["all"]
    switches = sum(each["switches"] for each in ranks)
    metadata = {"stolen": stolen, "involuntary_context_switches": switches}
    run.log.event("cpu_taken", others, metadata=metadata)  # as fractions of all
    if others + stolen > machine.MAX_CPU_TAKEN:
        took = f"Other programs took {others:.0%} of this machine's CPU time, and its hypervisor {stolen:.0%}"
        run.world.print_once(f"{took}: the run's time is not a valid benchmark result.")


def raise_preempted(run: TrainingRun) -> NoReturn:
    """Tell the user how to continue, and end the run."""
    run.world.print_once(f"Told to stop: checkpoint saved at step {run.state.step}. Continue with --resume.")
    raise Preempted


def print_result(run: TrainingRun, reached: bool, seconds: float, started_at: datetime) -> None:
    """Say how the run ended; a success has a last line of the log that MLPerf's scripts expect."""
    config, state = run.config, run.state
    if not reached:
        run.world.print_once(f"The target WER of {config.target_wer:g} was not reached; best: {state.best_wer:.2f}.")
        return
    resumed = " (resumed: not an uninterrupted benchmark result)" if state.resumed else ""
    own = f" A LibriSpeech result needs {BENCHMARK_WER:g}." if config.target_wer > BENCHMARK_WER else ""
    run.world.print_once(f"Target WER of {config.target_wer:g} reached in {seconds:.0f} s{resumed}.{own}")
    kind, when = "RESUMED" if state.resumed else "RESULT", f"{started_at:%Y-%m-%d %I:%M:%S %p}"
    run.log.logger.info(f"{kind},DEEPSPEECH2,{config.seed},{seconds:.0f},{machine.user_name()},{when}")


def setup(config: Config, launch_id: str | None, resources: ExitStack) -> TrainingRun:
    """Do all that may be done before the clock starts: of the data, only the summary is read."""
    stop = StopSignal()
    log, log_file = mllog.make_logger(config.output_dir / mllog.LOG)
    log.start(constants.INIT_START)
    local_world_size = machine.told_by_torchrun("LOCAL_WORLD_SIZE", 1)
    # The kind of device decides how ranks connect. Asking for the last one checks that every local rank has one.
    device = select_device(config.device, local_world_size - 1)
    world = World.init(device.type, config.dist_timeout_seconds, launch_id)
    device = select_device(config.device, world.local_rank)
    set_device(device)
    dataset = open_dataset(config.dataset_dir)
    config = dataclasses.replace(config, precision=select_precision(config.precision, device))
    require_agreement(world, config, dataset)
    require_batches(world, config, dataset)
    lock_output_dir(world, config, resources)
    cache = machine.clear_cache(dataset) if world.local_rank == 0 else None
    mllog.log_cache_clear(log, [reason for reason in world.all_gather_object(cache) if reason is not None])
    resumed_from = checkpoint.find_resumable(config, dataset.digest, world)

    torch.manual_seed(config.seed)
    with explain_oom(f"a model of --hidden-size {config.hidden_size} does not fit into memory"):
        trainer = Trainer(config, device, world)
    if config.precision == "auto":
        trainer.use_precision(measured_precision(trainer, log, resumed_from))
        config = trainer.config
    mllog.log_submission(log, config, dataset, machine.describe_machine(device), world.size)
    log.event("gru_implementation", gru.implementation(device, config.precision, config.hidden_size))
    trainer.warm_up(max_train_samples(dataset))

    run = TrainingRun(config, world, dataset, trainer, log, TrainState(), stop, Clock(), time.monotonic())
    if resumed_from is not None:
        run.state = TrainState(**{**resumed_from["progress"], "resumed": True})
        trainer.load_state_dict(resumed_from, run.state.step)
        log.event("resumed", True, metadata={k: v for k, v in vars(run.state).items() if v is not None})
        # torchrun has restarted lost ranks: the same run continues, and so does its log
        log_file.append = resumed_from["launch"] is not None and resumed_from["launch"] == world.launch_id
    require_steps_left(run)
    if config.tensorboard is not None and world.is_main:
        log.logger.addHandler(mllog.TensorBoard(config.tensorboard, run.state.step))
    if resumed_from is None:
        previous = (mllog.LOG, mllog.REPORT)
        if world.is_main and (archive := checkpoint.archive_previous_run(config.output_dir, previous)):
            world.print_once(f"The earlier run in this folder is now in {archive}; --resume would have continued it.")
        save(run)  # proves that the disk can be written
    log.end(constants.INIT_STOP)
    mllog.require_sinks(log)
    return run


def require_agreement(world: World, config: Config, dataset: PackedDataset) -> None:
    """Check that all ranks have the same configuration and data set.

    Raises:
        RunError: names each difference from rank 0.
    """
    own = fields_of("machine")
    mine = {key: value for key, value in config.to_dict().items() if key not in own} | {"data_set": dataset.digest}
    first, *others = world.all_gather_object(mine)
    differences = [
        f"{key.replace('_', '-')} {other[key]} on rank {rank}, {first[key]} on rank 0"
        for rank, other in enumerate(others, start=1)
        for key in first
        if other[key] != first[key]
    ]
    if differences:
        raise RunError(f"ranks disagree on the configuration: {'; '.join(differences)}")


def require_batches(world: World, config: Config, dataset: PackedDataset) -> None:
    """Raise RunError where a split is missing, or a batch cannot give every rank its microbatches."""
    for split in ("train", "validation"):
        if not dataset.splits[split]:
            raise RunError(f"{config.dataset_dir} has no {split} subset; 'sh download_dataset.sh --subsets' adds one")
    parts = config.microbatches(world.size)
    if config.batch_size < parts:
        raise RunError(f"--batch-size {config.batch_size}: cannot be divided into {parts} parts (ranks x accumulation)")


def lock_output_dir(world: World, config: Config, resources: ExitStack) -> None:
    """Keep other runs out of the output folder as long as this process lives; RunError on all ranks if one is there."""
    failure = None
    if world.is_main:
        try:
            config.output_dir.mkdir(parents=True, exist_ok=True)
            resources.enter_context(locked(config.output_dir, "run"))
        except (OSError, DataError) as error:
            failure = f"--output-dir {config.output_dir}: {getattr(error, 'strerror', None) or error}"
    if failure := world.broadcast_object(failure, source=0):
        raise RunError(failure)


def measured_precision(trainer: Trainer, log: MLLogger, resumed_from: dict[str, Any] | None) -> Precision:
    """Return the precision of the run that is resumed, or the faster one on the first rank, and log both times."""
    if resumed_from is not None:
        return resumed_from["config"]["precision"]
    seconds = trainer.world.broadcast_object(trainer.time_precisions(), source=0)
    precision = faster_precision(seconds)
    log.event("auto_precision", precision, metadata={f"{name}_seconds": value for name, value in seconds.items()})
    return precision


def require_steps_left(run: TrainingRun) -> None:
    """Raise RunError where the run that is resumed has reached its limits."""
    config, state = run.config, run.state
    if config.max_steps is not None and state.step >= config.max_steps and not state.step_in_epoch:
        raise RunError(f"--max-steps {config.max_steps}: already reached; increase it to continue")
    if state.epoch > config.max_epochs:
        raise RunError(f"--max-epochs {config.max_epochs}: already reached; increase it to continue")


def max_train_samples(dataset: PackedDataset) -> int:
    """Return the samples of the longest training utterance."""
    return max(dataset.summary[name].max_samples for name in dataset.splits["train"])


class Clock:
    """The benchmark's clock: elapsed seconds, with those before the run was resumed."""

    def __init__(self) -> None:
        self._before, self._started = 0.0, math.nan

    def start(self, before: float) -> None:
        """Start from `before` seconds."""
        self._before, self._started = before, time.monotonic()

    def stop(self) -> float:
        """Stop, and return the elapsed seconds."""
        self._before, self._started = self.seconds(), math.nan
        return self._before

    def seconds(self) -> float:
        """Return the elapsed seconds."""
        return self._before + (0.0 if math.isnan(self._started) else time.monotonic() - self._started)


def parse(arguments: list[str]) -> Config:
    """Return the configuration of a command line."""
    description = "Train DeepSpeech2 until the corpus WER of the validation set reaches the target."
    return parse_config(arguments, program="python -m pytorch.train", description=description)


def main(arguments: list[str] | None = None, launch_id: str | None = None) -> int:
    """Run a command line; return the exit status."""

    def work() -> bool:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        with report_lost_ranks():
            return train(config, launch_id)

    status = exit_status(work, interrupted="Interrupted. --resume continues from the last checkpoint.")
    shutdown()
    return status


if __name__ == "__main__":
    sys.exit(main())
