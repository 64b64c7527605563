"""What the rules allow before the clock starts: device, ranks, model, warm-up, checkpoint. No audio is read."""

import os
import sys
import time
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

from data.packed import PackedDataset, open_dataset
from pytorch import checkpoint, machine, mllog
from pytorch.checkpoint import TrainState
from pytorch.config import Config, fields_of
from pytorch.device import explain_oom, select_device, select_precision, set_device
from pytorch.distributed import StopSignal, World, torchrun_env
from pytorch.errors import RunError
from pytorch.layers import gru
from pytorch.mllog import Clock
from pytorch.trainer import Trainer
from pytorch.warmup import warm_up


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

    @property
    def target_reached(self) -> bool:
        """Whether the last evaluation's WER is the target or less."""
        return self.state.wer is not None and self.state.wer <= self.config.target_wer

    def save(self, state: TrainState | None = None) -> None:
        """Write a checkpoint, by default of `self.state`, on the first rank; RunError if it cannot be written."""
        started, state = time.monotonic(), state or self.state
        state.elapsed_seconds = self.clock.seconds()
        if self.world.is_main:
            checkpoint.save(self.config, self.dataset.digest, state, self.trainer.state_dict())
            self.log.event("checkpoint", time.monotonic() - started, metadata={"step_num": state.step})
        self.last_save_time = time.monotonic()

    def mark_if_best(self) -> None:
        """Keep the newest checkpoint as the best one if its WER is the lowest so far."""
        if self.world.is_main and self.state.wer == self.state.best_wer:
            checkpoint.keep_newest_as(checkpoint.BEST, self.config.output_dir)


def setup(config: Config, cache_clear: str) -> TrainingRun:
    """Set up everything that the rules allow before the clock starts. Of the data set, only dataset.json is read.

    Args:
        config: of the command line.
        cache_clear: why this node's page cache may still hold the data set; empty if it does not.

    Raises:
        RunError: the run cannot start.
        UserError: there is no data set.
        RankFailure: the other ranks did not connect.
    """
    stop = StopSignal()
    log = mllog.make_logger(config.output_dir if torchrun_env("RANK", 0) == 0 else None)
    log.start(constants.INIT_START)

    # The kind of device decides how ranks connect. Asking for the last one checks that every local rank has one.
    device = select_device(config.device, torchrun_env("LOCAL_WORLD_SIZE", 1) - 1)
    world = World.init(device.type, config.dist_timeout_seconds)
    device = select_device(config.device, world.local_rank)
    set_device(device)

    dataset = open_dataset(config.dataset_dir)
    config = replace(config, precision=select_precision(config.precision, device))
    check_agreement(world, config, dataset)
    check_batches(world, config, dataset)
    reasons = "; ".join(dict.fromkeys(filter(None, world.all_gather_object(cache_clear))))
    log.event(constants.CACHE_CLEAR, not reasons, metadata={"reason": reasons} if reasons else {})
    resumed_from = checkpoint.find_resumable(config, dataset.digest, world)

    torch.manual_seed(config.seed)
    with explain_oom(f"a model of --hidden-size {config.hidden_size} does not fit into memory"):
        trainer = Trainer(config, device, world)
    mllog.log_submission(log, config, dataset, machine.describe_machine(device), world.size)
    log.event("gru_implementation", gru.agreed_implementation(world, device, config))
    warm_up(trainer, max_train_samples(dataset))

    run = TrainingRun(config, world, dataset, trainer, log, TrainState(), stop, Clock(), time.monotonic())
    if resumed_from is not None:
        restore(run, resumed_from)
    if config.tensorboard is not None and world.is_main:
        curves = mllog.TensorBoard(config.tensorboard, run.state.step)
        log.logger.addHandler(mllog.Sink(f"--tensorboard {config.tensorboard}", curves.write))
    if world.is_main and not run.target_reached:
        put_away_earlier_run(config.output_dir, resumed_from)
    if resumed_from is None:
        run.save()  # proves that the disk can be written
    log.end(constants.INIT_STOP)
    return run


def restore(run: TrainingRun, content: dict[str, Any]) -> None:
    """Continue from a checkpoint's content.

    Raises:
        RunError: that run has reached its limits.
    """
    config = run.config
    run.state = state = TrainState(**{**content["progress"], "resumed": True})
    run.trainer.load_state_dict(content, state.step)
    if not (config.output_dir / checkpoint.BEST).exists():  # where only checkpoint_last.pt was copied
        state.best_wer = None
    run.log.event("resumed", True, metadata={k: v for k, v in vars(state).items() if v is not None})
    saved = content["config"]["batch_size"], content["config"]["seed"], content["dataset_digest"]
    if state.step_in_epoch and saved != (config.batch_size, config.seed, run.dataset.digest):
        run.world.print_once(f"Epoch {state.epoch} starts from its beginning: its batches have changed.")
        state.begin_epoch(state.epoch)
    if run.target_reached:
        return
    if config.max_steps is not None and state.step >= config.max_steps and not state.step_in_epoch:
        raise RunError(f"--max-steps {config.max_steps}: already reached; increase it to continue")
    if state.epoch > config.max_epochs:
        raise RunError(f"--max-epochs {config.max_epochs}: already reached; increase it to continue")


def put_away_earlier_run(folder: Path, resumed_from: dict[str, Any] | None) -> None:
    """Move an earlier run's files into a folder of their own, or only its log and report if it is continued here."""
    if resumed_from is not None and checkpoint.is_of_this_run(resumed_from):
        return  # torchrun has restarted the ranks: the log continues, too
    checkpoints = [checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST] if resumed_from is None else []
    files = [folder / name for name in (*checkpoints, mllog.LOG, mllog.REPORT) if os.path.lexists(folder / name)]
    if not files:
        return
    names = (f"previous_run{f'-{number}' if number > 1 else ''}" for number in count(1))
    away = next(folder / name for name in names if not os.path.lexists(folder / name))
    away.mkdir()
    for file in files:
        file.rename(away / file.name)
    what, hint = ("run", f"; --resume --output-dir {away} continues it") if checkpoints else ("log", "")
    print(f"The earlier {what} in this folder is now in {away}{hint}.", file=sys.stderr)


def check_agreement(world: World, config: Config, dataset: PackedDataset) -> None:
    """Check that all ranks have the same configuration and data set.

    Raises:
        RunError: names each difference from rank 0.
    """
    mine = {key: value for key, value in config.to_dict().items() if key not in fields_of("machine")}
    everyone = world.all_gather_object({**mine, "data_set": dataset.digest})
    differences = [
        f"{key.replace('_', '-')} {other[key]} on rank {rank}, {first} on rank 0"
        for rank, other in enumerate(everyone)
        for key, first in everyone[0].items()
        if other[key] != first
    ]
    if differences:
        raise RunError(f"ranks disagree on the configuration: {'; '.join(differences)}")


def check_batches(world: World, config: Config, dataset: PackedDataset) -> None:
    """Raise RunError where a split is missing, or a batch cannot give every rank its microbatches."""
    for split in ("train", "validation"):
        if not dataset.splits[split]:
            given = f" --manifest LIST --subsets {split}" if dataset.corpus == "manifest" else ""
            command = f"sh download_dataset.sh --corpus {dataset.corpus}{given} --dataset-dir {config.dataset_dir}"
            raise RunError(f"{config.dataset_dir} has no {split} subset; '{command}' adds it")
    shards = config.num_microbatches(world.size)
    if config.batch_size < shards:
        raise RunError(f"--batch-size {config.batch_size} cannot be divided into {shards} (ranks x accumulation) parts")


def max_train_samples(dataset: PackedDataset) -> int:
    """Return the samples of the longest training utterance."""
    return max(dataset.summary[name].longest_samples for name in dataset.splits["train"])
