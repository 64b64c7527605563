"""How long training would take on this machine, and whether it fits into memory, from real steps; before a download.

    python -m tools.estimate                                          for LibriSpeech; needs no data set
    python -m tools.estimate --config librispeech-2018 --epochs 12
    python -m tools.estimate --config an4 --dataset-dir AN4_dataset

Batches, order, augmentation, read-ahead and precision are a run's own, and so is the number of processes: one for each
GPU, or NPROC_PER_NODE. Steps at evenly spaced places of an epoch tell what a second of speech takes, and so the epoch.
Without a data set, utterances are noise of LibriSpeech's published durations.
"""

import json
import logging
import math
import os
import statistics
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.cli import progress_bar
from data.corpora import CORPORA, DURATIONS, utterance_seconds
from data.packed import Subset, open_dataset
from pytorch import machine, memory, run_and_time
from pytorch.config import ROOT, Config, Device
from pytorch.device import explain_oom, select_device, select_precision, set_device
from pytorch.distributed import World, report_lost_ranks, shutdown
from pytorch.errors import RunError
from pytorch.evaluation import evaluate
from pytorch.features import SAMPLE_RATE
from pytorch.loader import TrainingLoader, Utterances
from pytorch.setup import check_batches
from pytorch.train import max_pending_steps
from pytorch.trainer import Trainer
from pytorch.warmup import warm_up
from tools.cli import command, config_of, print_figures, require_positive

TEXT = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG "
CHARACTERS_PER_SECOND = 14  # counted in 249 utterances of train-clean-100
EPOCHS = {  # to the target, at which batch size, and where that is from
    "librispeech": (5, 128, "extrapolated: 3 to 6 with batch 128, see docs/recipes.md"),
    "librispeech-2018": (9, 64, "published for this optimizer with batch 64: WER 23.3 after 8"),
    "rehearsal": (2, 8, "measured: five runs on 5 h, see docs/recipes.md"),
}
BATCH_OF_TWICE_THE_EPOCHS = 3600  # epochs grow as 1 + batch size / this, see docs/scaling.md
TRAINING_SECONDS, STRETCH_SECONDS, EVALUATION_SECONDS = 75, 2, 10
MIN_STRETCHES, MAX_STRETCHES = 3, 32  # of an epoch


@dataclass(frozen=True)
class Options:
    """What to estimate."""

    config: str = "librispeech"
    """named configuration"""
    hidden_size: int | None = None
    """units per direction of a GRU layer; None: the configuration's"""
    batch_size: int | None = None
    """utterances of a batch; None: the configuration's"""
    gradient_accumulation_steps: int | None = None
    """microbatches into which the batch is split; None: the configuration's"""
    epochs: int | None = None
    """epochs to the target; None: the number known for the configuration"""
    dataset_dir: Path | None = None
    """a prepared data set, whose utterances are used instead of noise"""
    device: Device = "auto"
    """where to compute; auto: the GPU if there is one"""
    json: bool = False
    """print one JSON object instead of a table"""


def published_utterances(names: Sequence[str]) -> Utterances:
    """Return subsets of LibriSpeech as noise, with as many utterances as published and durations as in DURATIONS."""
    subsets = []
    for subset in (each for each in CORPORA["librispeech"].subsets if each.name in names):
        count = subset.utterances or 0
        seconds = utterance_seconds(subset.name, count)
        num_samples = (seconds * SAMPLE_RATE).astype(np.int64)
        noise = np.random.default_rng(0).integers(-1000, 1000, num_samples.max(), dtype=np.int16)
        text = TEXT * int(seconds.max())
        texts = [text[: int(each * CHARACTERS_PER_SECOND)] for each in seconds]
        nobody = [""] * count
        subsets.append(Subset(subset.name, noise, np.zeros(count, np.int64), num_samples, nobody, nobody, texts))
    return Utterances(subsets)


def open_utterances(config: Config, dataset_dir: Path | None, world: World) -> tuple[Utterances, Utterances, str]:
    """Return training and validation utterances, random or from a data set, and their source."""
    corpus = next(corpus for corpus in CORPORA.values() if corpus.folder == config.dataset_dir.name)
    splits = corpus.splits([each.name for each in corpus.subsets])
    train, validation = splits["train"], splits["validation"]
    if dataset_dir is None and not corpus.synthetic and DURATIONS.keys() >= {*train, *validation}:
        return published_utterances(train), published_utterances(validation), "published durations (tools/estimate.py)"
    config = replace(config, dataset_dir=dataset_dir or config.dataset_dir)
    dataset = open_dataset(config.dataset_dir)
    check_batches(world, config, dataset)
    return Utterances(dataset.split("train")), Utterances(dataset.split("validation")), str(config.dataset_dir)


def epochs_to_target(config: Config) -> tuple[int, str]:
    """Return how many epochs the target needs with the configuration's batch size, and where that is from."""
    if config.config in EPOCHS:
        epochs, batch_size, source = EPOCHS[config.config]
        if config.batch_size == batch_size:
            return epochs, source
        growth = (1 + config.batch_size / BATCH_OF_TWICE_THE_EPOCHS) / (1 + batch_size / BATCH_OF_TWICE_THE_EPOCHS)
        return round(epochs * growth), f"{source}; for batch {config.batch_size} extrapolated again"
    file = ROOT / "results" / "rcps" / f"{config.config}.json"
    points = json.loads(file.read_text()).values() if file.exists() else []
    for point in points:
        if point["BS"] == config.batch_size:
            runs = point["Epochs to converge"]
            return math.ceil(statistics.median(runs)), f"measured: the median of {len(runs)} runs; results/rcps"
    return config.max_epochs, "the most that a run takes; how many the target needs with this batch size is not known"


def time_steps(trainer: Trainer, loader: TrainingLoader, epoch: int, start: int, stop: int) -> tuple[int, float]:
    """Take steps [start, stop) of an epoch as a run does; return their samples and rank 0's seconds."""
    pending: deque[Callable[[], torch.Tensor]] = deque()
    samples, started = 0, 0.0
    trainer.model.train()
    batches = loader.epoch(epoch, start, stop)  # named, so that its end is not timed
    for indices, microbatches in batches:
        if not samples:
            loader.world.all_gather_object(None)  # the first batch is there, on every rank: a run's readers are ahead
            started = time.perf_counter()
        pending.append(trainer.train_step(microbatches, len(indices), trainer.config.learning_rate))
        if len(pending) > max_pending_steps(trainer.device):
            pending.popleft()()
        samples += int(loader.utterances.num_samples[indices].sum())
    while pending:
        pending.popleft()()
    return samples, loader.world.broadcast_object(time.perf_counter() - started, src=0)


def time_epochs(trainer: Trainer, loader: TrainingLoader, epochs: Sequence[int]) -> list[float]:
    """Return the seconds that each of these epochs takes, from stretches of steps that are evenly spaced in it."""
    middle, longest = len(loader) // 2, math.ceil(len(loader) / 8)
    step_seconds = time_steps(trainer, loader, epochs[-1], middle, middle + 1)[1]  # warms up, too
    steps = int(np.clip(STRETCH_SECONDS / step_seconds, 1, longest))
    stretches = int(np.clip(TRAINING_SECONDS / len(epochs) / (steps * step_seconds), MIN_STRETCHES, MAX_STRETCHES))
    starts = np.linspace(0, len(loader) - steps, stretches).astype(int).tolist()
    whole, found = int(loader.utterances.num_samples[loader.included].sum()), []
    with progress_bar("training steps", len(epochs) * stretches * steps, shown=loader.world.is_main) as bar:
        for epoch in epochs:  # in the run's order: memory that one batch leaves serves the next, of similar length
            samples, seconds = 0, 0.0
            for start in starts:
                more_samples, more_seconds = time_steps(trainer, loader, epoch, start, start + steps)
                samples, seconds = samples + more_samples, seconds + more_seconds
                bar.update(steps)
            found.append(seconds / samples * whole)
    return found


def time_evaluation(trainer: Trainer, validation: Utterances, max_batch_samples: int, stride: int) -> float:
    """Return the seconds that an evaluation takes, from every stride-th utterance."""
    fields = "offsets", "num_samples", "ids", "speakers", "transcripts"
    part = [replace(each, **{name: getattr(each, name)[::stride] for name in fields}) for each in validation.subsets]
    utterances, forward = Utterances(part), trainer.evaluate_logits
    trainer.eval_model.eval()
    started = time.perf_counter()
    evaluate(forward, utterances, trainer.world, max_batch_samples=max_batch_samples, device=trainer.device)
    return (time.perf_counter() - started) * validation.num_samples.sum() / utterances.num_samples.sum()


def estimate(config: Config, options: Options, device: torch.device, world: World) -> dict[str, Any]:
    """Return the figures by name; those of rank 0, but memory is that of the rank that takes most.

    All ranks must do this at the same time. UserError if there is no data set where one is needed, training on it could
    not start, or memory does not suffice.
    """
    train, validation, source = open_utterances(config, options.dataset_dir, world)
    loader = TrainingLoader(train, config, world, device)
    set_device(device)
    torch.manual_seed(config.seed)
    with explain_oom(f"a model of --hidden-size {config.hidden_size} does not fit into memory"):
        trainer = Trainer(replace(config, precision=select_precision(config.precision, device)), device, world)
    longest = int(train.num_samples.max())
    warm_up(trainer, longest)
    peak = max(world.all_gather_object(memory.peak(device)))

    epochs, epochs_source = (options.epochs, "given") if options.epochs else epochs_to_target(config)
    firsts = sorted(epoch for epoch in {1, 2, config.augment_from_epoch} if epoch <= epochs)
    before = machine.cpu_seconds()
    times = time_epochs(trainer, loader, firsts)
    spent = {name: value - before[name] for name, value in machine.cpu_seconds().items()}
    ours = sum(world.all_gather_object(spent.get("own", 0.0)))
    samples, to_evaluate = int(train.num_samples[loader.included].sum()), int(validation.num_samples.sum())
    stride = max(1, round(min(times) / samples * to_evaluate / 3 / EVALUATION_SECONDS))  # it takes about a third
    evaluation = time_evaluation(trainer, validation, config.max_microbatch_size(world.size) * longest, stride)
    row = {
        "config": config.config,
        "hidden_size": config.hidden_size,
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "precision": trainer.config.precision,
        "processes": world.size,
        **machine.describe_machine(device),
        "speech": source,
        "training_utterances": len(loader.included),
        "training_hours": samples / SAMPLE_RATE / 3600,
        "largest_batch": f"{config.max_microbatch_size(world.size)} utterances of {longest / SAMPLE_RATE:.1f} s: fits",
        "peak_memory_gib": peak / 2**30,
    }
    total = 0.0
    for first, after, seconds in zip(firsts, [*firsts[1:], epochs + 1], times, strict=True):
        row[f"epoch_{first}_seconds" if after == first + 1 else f"epochs_{first}_to_{after - 1}_seconds"] = seconds
        total += (after - first) * (seconds + evaluation)
    if spent.get("all"):
        row["cpu_taken_by_others"] = (max(0.0, spent["busy"] - ours) + spent["stolen"]) / spent["all"]
    return row | {
        "evaluation_seconds": evaluation,
        "evaluation_share": epochs * evaluation / total,
        "read_mb_per_second": 2 * samples / min(times) / 1e6,
        "epochs": epochs,
        "epochs_source": epochs_source,
        "seconds_to_target": total,
    }


def sentence(row: dict[str, Any]) -> str:
    """Return what a person wants to know of the figures."""
    taken = row.get("cpu_taken_by_others", 0.0)
    busy = f" Other programs took {taken:.0%} of the CPU time meanwhile." if taken > machine.MAX_CPU_TAKEN else ""
    duration = timedelta(seconds=round(row["seconds_to_target"]))
    return (
        f"{row['config']} with batch {row['batch_size']} would take {duration} (h:mm:ss) for {row['epochs']} epochs "
        f"({row['epochs_source']}) and {row['peak_memory_gib']:.1f} GiB in each process ({row['processes']}).{busy}"
    )


def start_ranks(processes: int) -> int:
    """Run this command line in several processes of torchrun's; return the exit status."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks print their own errors
    here: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
    config = LaunchConfig(1, 1, processes, run_id=uuid.uuid4().hex, max_restarts=0, **here)
    try:
        elastic_launch(config, sys.executable)("-m", "tools.estimate", *sys.argv[1:])
    except ChildFailedError:
        return 1
    return 0


def run(options: Options) -> int:
    """Estimate, in as many processes as a run would have here, and print; return the exit status."""
    require_positive(epochs=1 if options.epochs is None else options.epochs)
    config = config_of(options)
    device = select_device(config.device)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if (machines := run_and_time.variables()["NNODES"]) > 1:
            raise RunError(f"NNODES is {machines}; the time on one machine can be estimated: unset it")
        if (processes := run_and_time.nproc_per_node(config)) > 1:
            last = select_device(config.device, processes - 1)
            world = World(size=processes)  # what would keep each of them from starting is said once
            TrainingLoader(open_utterances(config, options.dataset_dir, world)[0], config, world, last)
            return start_ranks(processes)
    try:
        with report_lost_ranks():
            world = World.init(device.type, config.dist_timeout_seconds)
            row = estimate(config, options, select_device(config.device, world.local_rank), world)
    finally:
        shutdown()
    if world.is_main:
        print_figures(row, options.json)
        if not options.json:
            print(f"\n{sentence(row)}")
    return 0


main = command("tools.estimate", __doc__, Options, run)

if __name__ == "__main__":
    sys.exit(main())
