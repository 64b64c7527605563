"""The benchmark: train DeepSpeech2 until the corpus WER of the validation set reaches the target.

    python -m pytorch.train --config synthetic          # without the parent's work: see run_and_time.py
    torchrun --nproc-per-node 2 -m pytorch.train --config an4 --device cpu

Prints the MLPerf log on standard output and progress on standard error. Exit status: 0 the target was reached, 1 it was
not or something went wrong, 2 the command line was not understood, 130 interrupted, 75 stopped by SIGTERM or SIGUSR1
after the step under way was saved, so that --resume continues from there; 74 lost another rank.

It is one rank of the run; torchrun starts several, which take the same steps together (distributed.py).
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from typing import NamedTuple, NoReturn

import torch
from mlperf_logging.mllog import constants
from torch import Tensor

from data.cli import exit_status, progress_bar
from data.files import locked
from pytorch import machine, memory
from pytorch.config import Config, parse_config
from pytorch.device import explain_oom
from pytorch.distributed import report_lost_ranks, shutdown, torchrun_env
from pytorch.errors import Preempted, RunError
from pytorch.evaluation import Evaluation, evaluate
from pytorch.features import SAMPLE_RATE
from pytorch.loader import TrainingLoader, Utterances
from pytorch.optimizer import learning_rate
from pytorch.setup import TrainingRun, max_train_samples, setup

MAX_SKIPPED_IN_A_ROW = 10  # steps whose loss or gradient is not finite; more mean that the run has diverged


def train(config: Config, cache_clear: str) -> bool:
    """Train until the target, or until the configuration's limits. Return whether the target was reached.

    Args:
        config: of the command line, the same on all ranks but for fields of the scope `machine`.
        cache_clear: why this node's page cache may still hold the data set; empty if it does not.

    Raises:
        RunError: the run cannot start or go on.
        UserError: the data set is absent or damaged.
        Preempted: the process has received SIGTERM or SIGUSR1.
        RuntimeError: another rank was lost.
    """
    run = setup(config, cache_clear)
    config, state, world = run.config, run.state, run.world
    if run.target_reached:
        world.print_once(f"Target WER of {config.target_wer:g} was already reached, in {state.elapsed_seconds:.0f} s.")
        return True

    # The clock's start is one instant in RESULT and in the log, however long its line takes to write; so is its stop.
    # RESULT has the clock's seconds; MLPerf's tools take the difference of the two time stamps as the run's time.
    reached, started_at, cpu_before = False, datetime.now(), machine.cpu_seconds()
    run.log.start(constants.RUN_START, time_ms=run.clock.start(before=state.elapsed_seconds))
    try:
        with explain_oom("memory ran out; use a smaller --batch-size, or more --gradient-accumulation-steps"):
            evaluation = train_to_target(run)
        reached = run.target_reached
    finally:
        stopped_ms = run.clock.stop()
        status = constants.SUCCESS if reached else constants.ABORTED
        raised = {"exception": type(error).__name__} if (error := sys.exception()) else {}
        run.log.end(constants.RUN_STOP, metadata={"status": status, **raised}, time_ms=stopped_ms)
    log_cpu_taken(run, cpu_before)
    evaluation.log_transcripts(run.log)

    try:
        run.save()  # with the last WER
        run.mark_if_best()
    finally:  # a full disk does not cost the result
        print_result(run, reached, started_at)
    world.all_gather_object(None)  # no rank leaves while another still needs it
    return reached


def train_to_target(run: TrainingRun) -> Evaluation:
    """Train and evaluate, on the clock, until the target or a limit is reached. Return the last evaluation."""
    config, state = run.config, run.state
    loader, validation = open_data(run)
    while True:
        stats = train_epoch(run, loader)
        # An evaluation changes no weights, and may be interrupted at any time. What is saved beside it has not its WER
        # yet: resumed from there, the run evaluates again. The clock waits for both.
        with ThreadPoolExecutor(1) as writer:
            saving = writer.submit(run.save, replace(state))
            try:
                evaluation = evaluate_epoch(run, validation, stats)
            finally:
                saving.result()  # its error counts even if the evaluation was interrupted
        if state.step_in_epoch == len(loader):
            state.begin_epoch(state.epoch + 1)
        out_of_steps = config.max_steps is not None and state.step >= config.max_steps
        if run.target_reached or out_of_steps or state.epoch > config.max_epochs:
            return evaluation
        run.mark_if_best()


def open_data(run: TrainingRun) -> tuple[TrainingLoader, Utterances]:
    """Open the audio, for the first time, and log which training utterances are excluded."""
    train, validation = (Utterances(run.dataset.split(split)) for split in ("train", "validation"))
    loader = TrainingLoader(train, run.config, run.world, run.trainer.device)
    run.log.event(constants.TRAIN_SAMPLES, len(loader.included))
    run.log.event(constants.EVAL_SAMPLES, len(validation))
    excluded = {"reason": "too short for CTC", "ids": [train.id(index) for index in loader.excluded.tolist()]}
    run.log.event("train_samples_left_out", len(loader.excluded), metadata=excluded)
    return loader, validation


class PendingStep(NamedTuple):
    """A step that the device may still be working on."""

    number: int  # of the run, from 1
    lr: float
    utterances: list[str]  # their ids
    result: Callable[[], Tensor]  # waits for it; see Trainer.train_step


def train_epoch(run: TrainingRun, loader: TrainingLoader) -> dict[str, float]:
    """Train the rest of the epoch under way. Return what is logged of it.

    Raises:
        RunError: see `record_step`.
        Preempted: a rank has received a signal to stop; the state is saved.
    """
    config, state, trainer, world = run.config, run.state, run.trainer, run.world
    run.log.start(constants.EPOCH_START, metadata={constants.EPOCH_NUM: state.epoch})
    memory.reset_peak(trainer.device)
    started, utterances, samples = time.monotonic(), 0, 0
    pending: deque[PendingStep] = deque()
    trainer.model.train()
    first, last = state.step_in_epoch, len(loader)
    if config.max_steps is not None:
        last = min(last, first + max(0, config.max_steps - state.step))  # no steps if resumed with a lower --max-steps
    with progress_bar(f"epoch {state.epoch}", len(loader), initial=first, shown=world.is_main) as bar:
        for indices, microbatches in loader.epoch(state.epoch, first, last):
            # 1. Queue one optimizer step. What this rank wishes travels with its loss, so that all ranks know of every
            #    wish after the same step, without a message more.
            lr = learning_rate(config, state.step, len(loader))
            save_due = world.is_main and time.monotonic() - run.last_save_time > 60 * config.checkpoint_interval_minutes
            result = trainer.train_step(microbatches, len(indices), lr, flags=(run.stop.requested, save_due))
            state.step += 1
            state.step_in_epoch += 1
            utterances += len(indices)
            samples += int(loader.utterances.num_samples[indices].sum())

            # 2. Read the results of earlier steps. To read the newest would make the device wait for the host.
            ids = [loader.utterances.id(index) for index in indices]
            pending.append(PendingStep(state.step, lr, ids, result))
            stop, save_now = drain(run, pending, keep=max_pending_steps(trainer.device))
            bar.set_postfix_str(f"mean loss {state.mean_loss:.2f}", refresh=False)
            bar.update()

            # 3. Save if any rank wishes to, or stop. The weights are those after the newest step, so its result has to
            #    be in the state that is saved with them.
            if stop or save_now:
                stop_late, _ = drain(run, pending, keep=0)
                run.save()
                if stop or stop_late:
                    raise_preempted(run)
        drain(run, pending, keep=0)
    seconds = time.monotonic() - started
    stats = {  # times and rates cover only the steps since the run was resumed
        constants.EPOCH_NUM: state.epoch,
        "step": state.step,
        "loss": state.mean_loss,  # over the epoch's steps, skipped ones left out
        "seconds": seconds,
        "data_wait_fraction": max(world.all_gather_object(loader.data_wait_seconds)) / seconds,
        "peak_memory_gib": max(world.all_gather_object(memory.peak(trainer.device))) / 2**30,
        "skipped_steps": state.skipped_steps,  # of the run so far
        "finished": state.step_in_epoch == len(loader),  # False if max_steps cut it short
    }
    if utterances:
        stats["utterances_per_second"] = utterances / seconds
        stats["audio_seconds_per_second"] = samples / SAMPLE_RATE / seconds  # of speech before augmentation
    run.log.end(constants.EPOCH_STOP, metadata=stats)
    return stats


def max_pending_steps(device: torch.device) -> int:
    """Return how many steps the host may run ahead of the device before it reads a loss."""
    return 0 if device.type == "cpu" else 4


def drain(run: TrainingRun, pending: deque[PendingStep], keep: int) -> tuple[bool, bool]:
    """Wait for and record all pending steps but the newest `keep`. Return whether any rank wishes to stop, to save."""
    stop = save_now = False
    while len(pending) > keep:
        step = pending.popleft()
        loss, grad_norm, wants_stop, wants_save = step.result().tolist()
        stop, save_now = stop or wants_stop > 0, save_now or wants_save > 0
        record_step(run, step, loss, grad_norm)
    return stop, save_now


def record_step(run: TrainingRun, step: PendingStep, loss: float, grad_norm: float) -> None:
    """Log a step, or count it as skipped if its loss or gradient was not finite.

    Raises:
        RunError: too many steps in a row were not finite.
    """
    state = run.state
    if math.isfinite(loss) and math.isfinite(grad_norm):
        state.skipped_in_a_row = 0
        state.losses_in_epoch += 1
        state.sum_of_losses_in_epoch += loss
        detail = {"step_num": step.number, "learning_rate": step.lr, "gradient_norm": grad_norm}
        run.log.event("train_loss", loss, metadata=detail)
        return
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    run.log.event("skipped_step", step.number, metadata={"reason": "not finite", "utterances": step.utterances})
    if state.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise RunError(
            f"step {step.number}: loss or gradient was not finite {state.skipped_in_a_row} times in a row, last with "
            f"the utterances {', '.join(step.utterances)}; try a lower --learning-rate"
        )


def evaluate_epoch(run: TrainingRun, validation: Utterances, stats: dict[str, float]) -> Evaluation:
    """Evaluate, log and print the result of the epoch under way.

    Raises:
        Preempted: a rank has received a signal to stop. The resumed run has no step of this epoch left: it evaluates.
    """
    config, state, trainer, world = run.config, run.state, run.trainer, run.world
    started = time.monotonic()
    run.log.start(constants.EVAL_START, metadata={constants.EPOCH_NUM: state.epoch})
    trainer.eval_model.eval()
    evaluation = evaluate(
        trainer.evaluate_logits,
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
        f"epoch {state.epoch:3d}  loss {stats['loss']:8.3f}  WER {total.wer:6.2f} ({subsets})  CER {total.cer:6.2f}  "
        f"train {stats['seconds']:.0f} s (waited for data {stats['data_wait_fraction']:.1%})  "
        f"clock {run.clock.seconds():.0f} s (evaluation {fraction:.0%})"
    )
    return evaluation


def log_cpu_taken(run: TrainingRun, before: dict[str, float]) -> None:
    """Log the share of rank 0's node's CPU time used by others while the clock ran; warn if the time is invalid."""
    used = {name: value - before.get(name, value) for name, value in machine.cpu_seconds().items()}
    own = sum(run.world.all_gather_object(used.get("own", 0.0))[: torchrun_env("LOCAL_WORLD_SIZE", 1)])
    if not used.get("all"):  # no Linux, or a sandbox that does not count
        return
    others, stolen = max(0.0, used["busy"] - own) / used["all"], used["stolen"] / used["all"]
    run.log.event("cpu_taken", others, metadata={"stolen": stolen})  # as fractions of all
    if others + stolen > machine.MAX_CPU_TAKEN:
        took = f"Other programs took {others:.0%} of this machine's CPU time, and its hypervisor {stolen:.0%}"
        run.world.print_once(f"{took}: the run's time is not a valid benchmark result.")


def raise_preempted(run: TrainingRun) -> NoReturn:
    """Say what is saved, and end the run."""
    saved = f"checkpoint saved at step {run.state.step}; --resume continues from it."
    run.world.print_once(f"Received SIGTERM or SIGUSR1: {saved}")
    raise Preempted


def print_result(run: TrainingRun, reached: bool, started_at: datetime) -> None:
    """Say how the run ended; a success has a last line of the log that MLPerf's scripts expect."""
    config, state, seconds = run.config, run.state, run.clock.seconds()
    if not reached:
        run.world.print_once(f"The target WER of {config.target_wer:g} was not reached; best: {state.best_wer:.2f}.")
        return
    resumed = " (resumed: not an uninterrupted benchmark result)" if state.resumed else ""
    run.world.print_once(f"Target WER of {config.target_wer:g} reached in {seconds:.0f} s{resumed}.")
    kind, when = "RESUMED" if state.resumed else "RESULT", f"{started_at:%Y-%m-%d %I:%M:%S %p}"
    run.log.logger.info(f"{kind},DEEPSPEECH2,{config.seed},{seconds:.0f},{machine.user_name()},{when}")


def run_rank(config: Config, cache_clear: str) -> int:
    """Train as one rank; return the exit status, after whatever was raised is printed as one line."""
    said = "Interrupted; --resume continues from the last checkpoint." if torchrun_env("RANK", 0) == 0 else ""

    def work() -> bool:
        with report_lost_ranks():
            return train(config, cache_clear)

    status = exit_status(work, interrupted=said)
    shutdown()
    return status


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return the exit status."""

    def work() -> int:
        given = sys.argv[1:] if arguments is None else arguments
        config = parse_config(given, program="python -m pytorch.train", description=(__doc__ or "").splitlines()[0])
        config.output_dir.mkdir(parents=True, exist_ok=True)
        # torchrun's other ranks would be refused
        with locked(config.output_dir, "run") if torchrun_env("RANK", 0) == 0 else nullcontext():
            return run_rank(config, cache_clear="pytorch.train leaves the page cache as it is")

    return exit_status(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
