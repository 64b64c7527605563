"""Batches of utterances: which ones, in which order, read ahead in the background.

Epoch 1 takes the utterances in order of length (SortaGrad, arXiv 1512.02595, section 3.2), later epochs take batches of
like length in random order. Everything random is a function of (seed, epoch, utterance), so a run resumes in the middle
of an epoch as if it had never stopped, and the number of ranks does not change the data of a step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data.packed import Subset
from pytorch.cli import RunError
from pytorch.config import Config
from pytorch.ctc import encode, min_ctc_frames
from pytorch.distributed import World
from pytorch.features import Augmentation, draw_augmentation, frame_counts
from pytorch.model import TIME_STRIDE, output_frames

LENGTH_JITTER = 0.1  # later epochs sort lengths scaled by U(0.95, 1.05), so that their batches differ
PREFETCHED_BATCHES = 3


class Utterances:
    """Utterances of several subsets as one sequence, sorted by length (ties keep the order of the subsets)."""

    def __init__(self, subsets: Sequence[Subset]) -> None:
        self.subsets = list(subsets)
        samples = np.concatenate([subset.num_samples for subset in subsets])
        order = np.argsort(samples, kind="stable")
        self.num_samples: np.ndarray = samples[order]
        self.subset_of = np.repeat(np.arange(len(subsets)), [len(subset) for subset in subsets])[order]
        self._position = np.concatenate([np.arange(len(subset)) for subset in subsets])[order]

    def __len__(self) -> int:
        return len(self.num_samples)

    def waveform(self, index: int) -> np.ndarray:
        """Return int16 samples at 16 kHz."""
        return self.subsets[self.subset_of[index]].waveform(int(self._position[index]))

    def transcript(self, index: int) -> str:
        """Return the reference transcript."""
        return self.subsets[self.subset_of[index]].transcripts[int(self._position[index])]

    def id(self, index: int) -> str:
        """Return the utterance's id in its corpus."""
        return self.subsets[self.subset_of[index]].ids[int(self._position[index])]

    def speaker(self, index: int) -> str:
        """Return the id of the utterance's speaker."""
        return self.subsets[self.subset_of[index]].speakers[int(self._position[index])]

    def subset(self, index: int) -> str:
        """Return the name of the subset that the utterance is in."""
        return self.subsets[self.subset_of[index]].name

    def ctc_feasible(self) -> np.ndarray:
        """Return bool [N]: whether CTC can spell the transcript in the utterance's output frames."""
        frames = output_frames(frame_counts(torch.from_numpy(self.num_samples))).numpy()
        return np.array([min_ctc_frames(self.transcript(index)) for index in range(len(self))]) <= frames


@dataclass(frozen=True)
class Batch:
    """Utterances padded to the longest. `targets` are the label indices of all transcripts end to end."""

    indices: np.ndarray  # [B], positions in Utterances
    waveforms_BS: Tensor  # int16
    num_samples_B: Tensor  # int64, CPU
    targets: Tensor  # int64
    target_lengths_B: Tensor  # int64, CPU
    transcripts: list[str]
    augmentation: Augmentation | None

    def __len__(self) -> int:
        return len(self.indices)


class TrainingLoader:
    """This rank's microbatches of the training utterances, epoch by epoch.

    Args:
        utterances: all of them; those that are too short for CTC are left out, see `left_out`.
        config: batch size, accumulation, seed and augmentation.
        world: the ranks, which share every batch.
        pin_memory: whether waveforms are page-locked, from which a GPU copies without waiting.

    Raises:
        RunError: a batch would be too small to give every rank its microbatches.
    """

    def __init__(self, utterances: Utterances, config: Config, world: World, *, pin_memory: bool = False) -> None:
        self.utterances, self.config, self.world, self.pin_memory = utterances, config, world, pin_memory
        feasible = utterances.ctc_feasible()
        self.included, self.left_out = np.flatnonzero(feasible), np.flatnonzero(~feasible)
        self.data_wait_seconds = 0.0  # of the epoch that was begun last, waited for batches to be read
        if not len(self.included):
            raise RunError(f"all {len(utterances)} training utterances are too short for their transcripts")
        batches = split_evenly(self.included, config.batch_size)
        self._steps, smallest = len(batches), min(map(len, batches))
        parts = world.size * config.gradient_accumulation_steps
        if smallest < parts:
            raise RunError(
                f"{len(self.included)} training utterances in batches of at most {config.batch_size} leave one of "
                f"{smallest}, which cannot be divided into {parts} microbatches (ranks x accumulation)"
            )

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return self._steps

    def epoch(self, epoch: int, start: int, stop: int) -> Iterator[tuple[np.ndarray, list[Batch]]]:
        """Yield, for steps [start, stop) of an epoch, the global batch's utterances and this rank's microbatches."""
        config, world = self.config, self.world
        steps = epoch_batches(self.utterances, self.included, config.batch_size, config.seed, epoch)[start:stop]
        parts = config.gradient_accumulation_steps
        mine = [
            microbatch
            for indices in steps
            for microbatch in split_balanced(self.utterances, indices, parts * world.size)[world.rank :: world.size]
        ]
        augment = (config, epoch) if epoch >= config.augment_from_epoch else None
        make = partial(make_batch, self.utterances, augment=augment, pin_memory=self.pin_memory)
        self.data_wait_seconds = 0.0
        with closing(prefetch(mine, make)) as batches:
            for indices in steps:
                asked = time.monotonic()
                microbatches = [next(batches) for _ in range(parts)]
                self.data_wait_seconds += time.monotonic() - asked
                yield indices, microbatches


def epoch_batches(
    utterances: Utterances, included: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Return the batches of an epoch, in order: every included utterance exactly once.

    Args:
        utterances: sorted by length.
        included: int [M], ascending positions in `utterances`.
        batch_size: global batch size, see `split_evenly`.
        seed: the run's seed.
        epoch: from 1; the first is in order of length.
    """
    if epoch == 1:
        return split_evenly(included, batch_size)
    random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    jitter = random.uniform(1 - LENGTH_JITTER / 2, 1 + LENGTH_JITTER / 2, len(included))
    order = included[np.argsort(utterances.num_samples[included] * jitter, kind="stable")]
    batches = split_evenly(order, batch_size)
    return [batches[position] for position in random.permutation(len(batches))]


def split_evenly(indices: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Return consecutive batches, as few as possible, none larger than `batch_size`; sizes differ by one at most."""
    return np.array_split(indices, math.ceil(len(indices) / batch_size))


def split_balanced(utterances: Utterances, indices: np.ndarray, parts: int) -> list[np.ndarray]:
    """Split a batch into parts of like size and total length: sorted by length, in snake order (1 2 3 3 2 1 ...)."""
    longest_first = indices[np.argsort(-utterances.num_samples[indices], kind="stable")]
    order = np.resize(np.concatenate([np.arange(parts), np.arange(parts)[::-1]]), len(indices))
    return [longest_first[order == part] for part in range(parts)]


def batch_by_padded_size(num_samples: np.ndarray, max_samples: int) -> list[np.ndarray]:
    """Return consecutive batches, as large as `max_samples` allows once they are padded to the longest utterance.

    Args:
        num_samples: int [N], ascending; an utterance longer than `max_samples` is a batch of its own.
        max_samples: of a batch, padding included.
    """
    batches, start = [], 0
    for end in range(1, len(num_samples) + 1):
        if end == len(num_samples) or (end + 1 - start) * num_samples[end] > max_samples:
            batches.append(np.arange(start, end))
            start = end
    return batches


def make_batch(
    utterances: Utterances, indices: np.ndarray, *, augment: tuple[Config, int] | None = None, pin_memory: bool = False
) -> Batch:
    """Read a batch.

    Args:
        utterances: where from.
        indices: int [B], positions in `utterances`.
        augment: configuration and epoch to draw augmentation for; None for evaluation.
        pin_memory: put the waveforms into page-locked memory, from which a GPU copies without waiting.
    """
    num_samples_B = utterances.num_samples[indices]
    # NumPy, since a torch operation on this much in the reader's thread would start a second pool of OpenMP threads;
    # with more threads than cores, the pools' threads sleep at every barrier instead of spinning.
    waveforms = np.zeros((len(indices), int(num_samples_B.max())), dtype=np.int16)
    for row, index in enumerate(indices):
        waveforms[row, : num_samples_B[row]] = utterances.waveform(index)
    waveforms_BS = torch.from_numpy(waveforms)
    transcripts = [utterances.transcript(index) for index in indices]
    encoded = [encode(transcript) for transcript in transcripts]
    augmentation = None
    if augment is not None:
        config, epoch = augment
        seeds = np.stack([np.full(len(indices), config.seed), np.full(len(indices), epoch), indices], axis=1)
        augmentation = draw_augmentation(config, seeds, _tempo_limits(num_samples_B, transcripts))
    return Batch(
        indices,
        waveforms_BS.pin_memory() if pin_memory else waveforms_BS,
        torch.from_numpy(num_samples_B),
        torch.tensor([label for labels in encoded for label in labels], dtype=torch.int64),
        torch.tensor([len(labels) for labels in encoded], dtype=torch.int64),
        transcripts,
        augmentation,
    )


def _tempo_limits(num_samples_B: np.ndarray, transcripts: Sequence[str]) -> np.ndarray:
    """Return the fastest tempo at which CTC still has the frames that each transcript needs."""
    frames_B = frame_counts(torch.from_numpy(num_samples_B)).numpy()
    needed_B = np.array([min_ctc_frames(transcript) for transcript in transcripts])
    # needed <= output_frames(floor((frames - 1) / tempo) + 1); the last factor keeps rounding on the safe side
    return (frames_B - 1) / np.maximum(TIME_STRIDE * (needed_B - 1), 1) * (1 - 1e-9)


def prefetch(batches: Sequence[np.ndarray], make: Callable[[np.ndarray], Batch]) -> Generator[Batch, None, None]:
    """Yield batches in order, made in a background thread some batches ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        pending: deque[Future[Batch]] = deque()
        try:
            for indices in batches:
                pending.append(reader.submit(make, indices))
                if len(pending) > PREFETCHED_BATCHES:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
