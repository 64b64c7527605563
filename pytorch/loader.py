"""Batches of utterances: which ones, in which order, read ahead in the background.

Epoch 1 takes the utterances in order of length (SortaGrad, arXiv 1512.02595, section 3.2), later epochs take batches of
similar length in random order. All randomness is a function of (seed, epoch, utterance), so a run resumes in the middle
of an epoch as if it had never stopped, and the number of ranks does not change the data of a step.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from data.packed import Subset
from pytorch.config import Config
from pytorch.ctc import encode, min_ctc_frames
from pytorch.distributed import World
from pytorch.errors import RunError
from pytorch.features import HOP_LENGTH, Augmentation, draw_augmentation, frame_counts, padded_frames
from pytorch.model import TIME_STRIDE, output_frames

LENGTH_JITTER = 0.1  # later epochs sort lengths scaled by U(0.95, 1.05), so that their batches differ
PREFETCHED_BATCHES = 3
CPU = torch.device("cpu")
Augment: TypeAlias = Callable[[np.ndarray], Augmentation]  # of utterances by their positions


class Utterances:
    """Utterances of several subsets as one sequence, sorted by length (ties keep the order of the subsets)."""

    def __init__(self, subsets: Sequence[Subset]) -> None:
        self.subsets = list(subsets)
        samples = np.concatenate([subset.num_samples for subset in subsets])
        order = np.argsort(samples, kind="stable")
        self.num_samples: np.ndarray = samples[order]
        self._subset = np.repeat(np.arange(len(subsets)), [len(subset) for subset in subsets])[order]
        self._position = np.concatenate([np.arange(len(subset)) for subset in subsets])[order]
        self.min_ctc_frames = np.concatenate([min_ctc_frames(subset.transcripts) for subset in subsets])[order]

    def __len__(self) -> int:
        return len(self.num_samples)

    def waveform(self, index: int) -> np.ndarray:
        """Return int16 samples at 16 kHz."""
        return self.subsets[self._subset[index]].waveform(int(self._position[index]))

    def transcript(self, index: int) -> str:
        """Return the reference transcript."""
        return self.subsets[self._subset[index]].transcripts[int(self._position[index])]

    def id(self, index: int) -> str:
        """Return the utterance's id in its corpus."""
        return self.subsets[self._subset[index]].ids[int(self._position[index])]

    def speaker(self, index: int) -> str:
        """Return the id of the utterance's speaker."""
        return self.subsets[self._subset[index]].speakers[int(self._position[index])]

    def subset(self, index: int) -> str:
        """Return the name of the subset that the utterance is in."""
        return self.subsets[self._subset[index]].name

    def ctc_feasible(self) -> np.ndarray:
        """Return bool [N]: whether CTC can spell the transcript in the utterance's output frames."""
        return self.min_ctc_frames <= output_frames(frame_counts(torch.from_numpy(self.num_samples))).numpy()


@dataclass(frozen=True)
class Batch:
    """Utterances padded to the longest. `targets` are the label indices of all transcripts end to end."""

    indices: np.ndarray  # [B], positions in Utterances
    waveforms_BS: Tensor  # int16
    num_samples_B: Tensor  # int64, CPU
    targets: Tensor  # int64
    target_lengths_B: Tensor  # int64, CPU
    augmentation: Augmentation | None  # None for evaluation

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> Self:
        """Return the batch with waveforms and targets on a device. The host waits only for pageable memory."""
        waveforms_BS, targets = (x.to(device, non_blocking=x.is_pinned()) for x in (self.waveforms_BS, self.targets))
        return replace(self, waveforms_BS=waveforms_BS, targets=targets)


class TrainingLoader:
    """This rank's microbatches of the training utterances, epoch by epoch.

    Utterances that are too short for CTC are left out, see `excluded`. The ranks of `world` share every batch.

    Raises:
        RunError: a batch would be too small to give every rank its microbatches.
    """

    def __init__(self, utterances: Utterances, config: Config, world: World, device: torch.device = CPU) -> None:
        self.utterances, self.config, self.world, self.device = utterances, config, world, device
        feasible = utterances.ctc_feasible()
        self.included, self.excluded = np.flatnonzero(feasible), np.flatnonzero(~feasible)
        self.data_wait_seconds = 0.0  # time spent waiting for batches in the current epoch
        if not len(self.included):
            raise RunError(f"all {len(utterances)} training utterances are too short for their transcripts")
        smallest, parts = len(self.included) // len(self), config.num_microbatches(world.size)  # see global_batches
        if smallest < parts:
            raise RunError(
                f"{len(self.included)} training utterances in batches of at most {config.batch_size} leave one of "
                f"{smallest}, which cannot be divided into {parts} microbatches (ranks x accumulation)"
            )

    def __len__(self) -> int:
        """Return the steps of an epoch."""
        return math.ceil(len(self.included) / self.config.batch_size)

    def epoch(self, epoch: int, start: int, stop: int) -> Iterator[tuple[np.ndarray, list[Batch]]]:
        """Yield, for steps [start, stop) of an epoch, the global batch's utterances and this rank's microbatches."""
        config, world = self.config, self.world
        steps = self.global_batches(epoch)[start:stop]
        # A step's batch is split into ranks x accumulation microbatches. Rank r has those numbered r, r + ranks, ...,
        # so the same utterances are in a step for any number of ranks. With 2 ranks and accumulation over 2:
        #   step 0:  0 rank 0 | 1 rank 1 | 2 rank 0 | 3 rank 1        step 1:  0 rank 0 | ...
        parts = config.num_microbatches(world.size)
        mine = [split_balanced(self.utterances, step, parts)[world.rank :: world.size] for step in steps]
        augment = partial(augmentation, self.utterances, config, epoch) if epoch >= config.augment_from_epoch else None
        self.data_wait_seconds = 0.0
        # The reader works through all microbatches of the epoch in one row, ahead of the step that is being computed;
        # each step takes its own from the front.
        with closing(prefetch(self.utterances, chain.from_iterable(mine), self.device, augment)) as batches:
            for step, own in zip(steps, mine, strict=True):
                asked = time.monotonic()
                microbatches = [next(batches) for _ in own]
                self.data_wait_seconds += time.monotonic() - asked
                yield step, microbatches

    def global_batches(self, epoch: int) -> list[np.ndarray]:
        """Return the batches of an epoch, in order: every included utterance once. Sizes differ by one at most."""
        if epoch == 1:
            return np.array_split(self.included, len(self))
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.config.seed, epoch])))
        jitter = random.uniform(1 - LENGTH_JITTER / 2, 1 + LENGTH_JITTER / 2, len(self.included))
        order = np.argsort(self.utterances.num_samples[self.included] * jitter, kind="stable")
        batches = np.array_split(self.included[order], len(self))
        return [batches[position] for position in random.permutation(len(self))]


def split_balanced(utterances: Utterances, indices: np.ndarray, parts: int) -> list[np.ndarray]:
    """Split a batch into parts of similar size and total length: sorted by length, in snake order (1 2 3 3 2 1 ...)."""
    longest_first = indices[np.argsort(-utterances.num_samples[indices], kind="stable")]
    order = np.resize(np.concatenate([np.arange(parts), np.arange(parts)[::-1]]), len(indices))
    return [longest_first[order == part] for part in range(parts)]


def batch_by_padded_size(num_samples: np.ndarray, max_samples: int) -> list[np.ndarray]:
    """Return consecutive batches, as large as `max_samples` allows once they are padded to the longest utterance.

    `num_samples` ascend; a longer utterance than `max_samples` is a batch of its own.
    """
    batches, start = [], 0
    for end in range(1, len(num_samples) + 1):
        if end == len(num_samples) or (end + 1 - start) * num_samples[end] > max_samples:
            batches.append(np.arange(start, end))
            start = end
    return batches


def make_batch(
    utterances: Utterances, indices: np.ndarray, device: torch.device = CPU, augment: Augment | None = None
) -> Batch:
    """Read a batch, on the CPU; it will be computed on `device`. Without `augment` it is one for evaluation."""
    num_samples_B = torch.from_numpy(utterances.num_samples[indices])
    frames = padded_frames(int(frame_counts(num_samples_B).max()), device)
    samples = max(int(num_samples_B.max()), (frames - 1) * HOP_LENGTH)
    pinned = device.type in ("cuda", "xpu")  # page-locked: these devices then copy while the host goes on
    waveforms_BS = torch.empty(len(indices), samples, dtype=torch.int16, pin_memory=pinned)
    views = [utterances.waveform(index) for index in indices]  # not read yet, but asked for (madvise)
    # NumPy, since a torch operation on this much in the reader's thread would start a second pool of OpenMP threads;
    # with more threads than cores, the pools' threads sleep at every barrier instead of spinning.
    for waveform, view in zip(waveforms_BS.numpy(), views, strict=True):
        waveform[: len(view)], waveform[len(view) :] = view, 0
    encoded = [encode(utterances.transcript(index)) for index in indices]
    return Batch(
        indices=indices,
        waveforms_BS=waveforms_BS,
        num_samples_B=num_samples_B,
        targets=torch.tensor(list(chain.from_iterable(encoded)), dtype=torch.int64, pin_memory=pinned),
        target_lengths_B=torch.tensor([len(labels) for labels in encoded], dtype=torch.int64),
        augmentation=augment(indices) if augment else None,
    )


def augmentation(utterances: Utterances, config: Config, epoch: int, indices: np.ndarray) -> Augmentation:
    """Draw the augmentation of utterances in an epoch. They keep the frames that CTC needs for their transcripts."""
    # A tempo leaves floor((frames - 1) / tempo) + 1 frames. Their output_frames suffice up to a tempo of
    # (frames - 1) / (stride (needed - 1)). The last factor keeps rounding on the safe side.
    needed_B, frames_but_one_B = utterances.min_ctc_frames[indices], utterances.num_samples[indices] // HOP_LENGTH
    limits_B = np.maximum(frames_but_one_B, 1) / np.maximum(TIME_STRIDE * (needed_B - 1), 1) * (1 - 1e-9)
    return draw_augmentation(config, [(config.seed, epoch, index) for index in indices.tolist()], limits_B)


def prefetch(
    utterances: Utterances, batches: Iterable[np.ndarray], device: torch.device, augment: Augment | None = None
) -> Generator[Batch, None, None]:
    """Yield batches in order, on a device, made in a background thread some batches ahead."""
    make = partial(make_batch, utterances, device=device, augment=augment)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        remaining = iter(batches)
        pending = deque(reader.submit(make, indices) for indices in islice(remaining, PREFETCHED_BATCHES))
        try:
            while pending:
                pending.extend(reader.submit(make, indices) for indices in islice(remaining, 1))
                yield pending.popleft().result().to(device)
        finally:
            reader.shutdown(cancel_futures=True)
