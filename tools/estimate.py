"""How long training would take on this machine, from some real steps: what `python -m tools.bench --estimate` prints.

Batches, order, augmentation, read-ahead and precision are a run's own. Stretches of consecutive steps, at evenly spaced
places of an epoch, tell what a step and a second of speech take, and so the epoch. Without a data set, utterances are
noise of LibriSpeech's published durations.
"""

from __future__ import annotations

import ctypes
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.cli import progress_bar
from data.corpora import CORPORA, DURATIONS, utterance_seconds
from data.packed import Subset, open_dataset
from pytorch import launch
from pytorch.config import Config
from pytorch.device import explain_oom, faster_precision, select_device, select_precision, set_device
from pytorch.distributed import World
from pytorch.errors import RunError
from pytorch.evaluation import evaluate
from pytorch.features import SAMPLE_RATE
from pytorch.loader import TrainingLoader, Utterances
from pytorch.machine import describe_machine, memory_bytes
from pytorch.train import max_pending_steps, require_batches
from pytorch.trainer import Trainer

TEXT = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG "
CHARACTERS_PER_SECOND = 14  # counted in 249 utterances of train-clean-100
EPOCHS = {  # to the target, and where that is from
    "librispeech": (5, "extrapolated: 3 to 6, see docs/recipes.md"),
    "librispeech-2018": (9, "published for this optimizer with batch 64: WER 23.3 after 8"),
    "rehearsal": (2, "measured: one run on 5 h; docs/recipes.md"),
    "an4": (3, "measured: 17 of 20 runs with batch 6, the others 4; docs/recipes.md"),
    "synthetic": (2, "measured: all of 20 runs with batch 6; docs/recipes.md"),
}
UNKNOWN = "the most that a run takes; how many the target needs is not known"
# Where a step takes very long, MIN_ROUNDS of one step each take longer.
TRAINING_SECONDS, STRETCH_SECONDS, EVALUATION_SECONDS = 75, 2, 10
MIN_ROUNDS, MAX_ROUNDS = 3, 32


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
    require_batches(world, config, dataset)
    return Utterances(dataset.split("train")), Utterances(dataset.split("validation")), str(config.dataset_dir)


def processes_here(config: Config, dataset_dir: Path | None) -> int:
    """Return how many processes a run has on this machine.

    Raises:
        DataError: they could not start; each of them would say so.
    """
    if (machines := launch.variables()["NNODES"]) > 1:
        raise RunError(f"NNODES is {machines}; the time on one machine can be estimated: unset it")
    processes = launch.processes_here(config)
    if processes > 1:
        world, device = World(size=processes), select_device(config.device, processes - 1)
        TrainingLoader(open_utterances(config, dataset_dir, world)[0], config, world, device)
    return processes


def peak_memory(device: torch.device) -> float:
    """Return the GiB that this process has held at most, of a GPU or else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_steps(
    trainer: Trainer, loader: TrainingLoader, epoch: int, start: int, stop: int, limit: float
) -> list[float]:
    """Take steps [start, stop) of an epoch as a run does, for `limit` seconds; return steps, samples and seconds.

    They are those of rank 0, so that what is decided by them is decided alike on every rank.
    """
    world = loader.world
    pending: deque[Callable[[], torch.Tensor]] = deque()
    steps, samples, started = 0, 0, 0.0
    trainer.model.train()
    batches = loader.epoch(epoch, start, stop)  # named, so that its end is not timed
    for indices, microbatches in batches:
        if not steps:
            world.barrier()  # the first batch is there, on every rank: a run's readers are ahead
            started = time.perf_counter()
        pending.append(trainer.train_step(microbatches, len(indices), trainer.config.learning_rate))
        if len(pending) > max_pending_steps(trainer.device):
            pending.popleft()()
        steps, samples = steps + 1, samples + int(loader.utterances.num_samples[indices].sum())
        if limit < math.inf and world.broadcast_object(time.perf_counter() - started > limit, source=0):
            break
    while pending:
        pending.popleft()()
    return world.broadcast_object([steps, samples, time.perf_counter() - started], source=0)


def time_epochs(trainer: Trainer, loader: TrainingLoader, epochs: Sequence[int]) -> list[tuple[float, float]]:
    """Return the seconds that each of these epochs takes, and two standard errors of that."""
    middle, longest = len(loader) // 2, math.ceil(len(loader) / 8)
    first = time_steps(trainer, loader, epochs[-1], middle, middle + longest, STRETCH_SECONDS)  # warms up, too
    steps, rounds = int(first[0]), int(np.clip(TRAINING_SECONDS / len(epochs) / first[2], MIN_ROUNDS, MAX_ROUNDS))
    starts = np.linspace(0, len(loader) - steps, rounds).astype(int).tolist()
    with progress_bar("training steps", len(epochs) * rounds * steps, shown=loader.world.is_main) as bar:
        stretches: list[list[list[float]]] = []
        for epoch in epochs:  # in the run's order: memory that one batch leaves serves the next, of similar length
            stretches.append([])
            for start in starts:
                stretches[-1].append(time_steps(trainer, loader, epoch, start, start + steps, math.inf))
                bar.update(steps)
    samples = int(loader.utterances.num_samples[loader.included].sum())
    return [extrapolate(np.array(timed), len(loader), samples) for timed in stretches]


def extrapolate(timed: np.ndarray, steps: int, samples: int) -> tuple[float, float]:
    """Return the seconds of an epoch of this many steps and samples, and two standard errors.

    Least squares over `timed`, rows of steps, samples and seconds, tell what a step and what a sample takes.
    """
    parts, seconds = timed[:, :2] / (steps, samples), timed[:, 2]
    solution = np.linalg.lstsq(parts, seconds, rcond=None)[0]
    variance = ((seconds - parts @ solution) ** 2).sum() / (len(timed) - 2)
    return float(solution.sum()), 2 * math.sqrt(variance * np.linalg.pinv(parts.T @ parts).sum())


def time_evaluation(trainer: Trainer, validation: Utterances, max_batch_samples: int, stride: int) -> float:
    """Return the seconds that an evaluation takes, from every stride-th utterance."""
    fields = "offsets", "num_samples", "ids", "speakers", "transcripts"
    part = [replace(each, **{name: getattr(each, name)[::stride] for name in fields}) for each in validation.subsets]
    utterances, forward = Utterances(part), partial(trainer.logits, trainer.eval_model.eval())
    started = time.perf_counter()
    evaluate(forward, utterances, trainer.world, max_batch_samples=max_batch_samples, device=trainer.device)
    return (time.perf_counter() - started) * validation.num_samples.sum() / utterances.num_samples.sum()


def estimate(
    config: Config, device: torch.device, dataset_dir: Path | None, epochs: int | None, world: World
) -> dict[str, Any]:
    """Return the figures by name, for a given number of epochs or what is known; `plus_minus`: two standard errors.

    All ranks must do this at the same time; the figures are those of rank 0, but memory is the largest of all.

    Raises:
        DataError: there is no data set where one is needed, training on it could not start, or memory does not suffice.
    """
    with suppress(AttributeError):  # the GNU C library keeps what is freed, as run_and_time.sh has it do
        for parameter, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)
    train, validation, source = open_utterances(config, dataset_dir, world)
    loader = TrainingLoader(train, config, world, device)
    set_device(device)
    here = describe_machine(device)
    if device.type == "cpu":  # else a process that needs more memory than there is would be killed without a word
        limit, hard_limit = memory_bytes() // world.size, resource.getrlimit(resource.RLIMIT_DATA)[1]
        limit = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard_limit))
    torch.manual_seed(config.seed)
    with explain_oom(f"a model of --hidden-size {config.hidden_size} does not fit into memory"):
        trainer = Trainer(replace(config, precision=select_precision(config.precision, device)), device, world)
    if trainer.config.precision == "auto":
        trainer.use_precision(faster_precision(world.broadcast_object(trainer.time_precisions(), source=0)))
    longest = int(train.num_samples.max())
    trainer.warm_up(longest)

    epochs, epochs_source = (epochs, "given") if epochs else EPOCHS.get(config.config, (config.max_epochs, UNKNOWN))
    firsts = sorted(epoch for epoch in {1, 2, config.augment_from_epoch} if epoch <= epochs)
    times = time_epochs(trainer, loader, firsts)
    samples, to_evaluate = int(train.num_samples[loader.included].sum()), int(validation.num_samples.sum())
    fastest = min(seconds for seconds, _ in times)
    stride = max(1, round(fastest / samples * to_evaluate / 3 / EVALUATION_SECONDS))  # it takes about a third
    evaluation = time_evaluation(trainer, validation, config.max_microbatch_size(world.size) * longest, stride)
    row = {
        "config": config.config,
        "hidden_size": config.hidden_size,
        "batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "precision": trainer.config.precision,
        "processes": trainer.world.size,
        **here,
        "speech": source,
        "training_utterances": len(loader.included),
        "training_hours": samples / SAMPLE_RATE / 3600,
        "largest_batch": f"{config.max_microbatch_size(world.size)} utterances of {longest / SAMPLE_RATE:.1f} s: fits",
        "peak_memory_gib": max(world.all_gather_object(peak_memory(device))),  # of a process
    }
    total = error = 0.0
    for first, after, (seconds, plus_minus) in zip(firsts, [*firsts[1:], epochs + 1], times, strict=True):
        name = f"epoch_{first}" if after == first + 1 else f"epochs_{first}_to_{after - 1}"
        row |= {f"{name}_seconds": seconds, f"{name}_plus_minus": plus_minus}
        total += (after - first) * (seconds + evaluation)
        error += (after - first) * plus_minus
    return row | {
        "evaluation_seconds": evaluation,
        "evaluation_share": epochs * evaluation / total,
        "read_mb_per_second": 2 * samples / fastest / 1e6,
        "epochs": epochs,
        "epochs_source": epochs_source,
        "seconds_to_target": total,
        "seconds_to_target_plus_minus": error,
        "time_to_target": str(timedelta(seconds=round(total))),
    }
