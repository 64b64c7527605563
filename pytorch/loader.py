"""Batches of utterances: which ones, in which order, read ahead in the background.

Epoch 1 goes through the utterances in order of length (SortaGrad, arXiv 1512.02595, section 3.2), later epochs through
batches of like length in random order. Everything random is a function of (seed, epoch, utterance), so a run goes on in
the middle of an epoch as if it had never stopped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.packed import Subset
from pytorch.config import Config
from pytorch.ctc import encode, min_ctc_frames
from pytorch.features import Augmentation, draw_augmentation, frame_counts
from pytorch.model import TIME_STRIDE, output_frames

LENGTH_JITTER = 0.1  # later epochs: lengths are compared after scaling by U(0.95, 1.05), so that batches differ
PREFETCHED_BATCHES = 3


class Utterances:
    """Utterances of several subsets as one sequence, sorted by length (ties keep the order of the subsets)."""

    def __init__(self, subsets: Sequence[Subset]) -> None:
        self.subsets = list(subsets)
        samples = np.concatenate([subset.samples for subset in subsets])
        order = np.argsort(samples, kind="stable")
        self.num_samples: np.ndarray = samples[order]
        self.subset_of = np.repeat(np.arange(len(subsets)), [len(subset) for subset in subsets])[order]
        self._position = np.concatenate([np.arange(len(subset)) for subset in subsets])[order]

    def __len__(self) -> int:
        return len(self.num_samples)

    def waveform(self, index: int) -> np.ndarray:
        """int16 samples at 16 kHz."""
        return self.subsets[self.subset_of[index]].waveform(int(self._position[index]))

    def transcript(self, index: int) -> str:
        """Reference transcript."""
        return self.subsets[self.subset_of[index]].transcripts[int(self._position[index])]

    def id(self, index: int) -> str:
        """The utterance's id in its corpus."""
        return self.subsets[self.subset_of[index]].ids[int(self._position[index])]

    def ctc_feasible(self) -> np.ndarray:
        """bool [N]: whether CTC can spell the transcript in the utterance's output frames."""
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


def epoch_batches(
    utterances: Utterances, included: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """Batches of one epoch, in order: every included utterance exactly once.

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
    """Consecutive batches, as few as possible, none of more than `batch_size`; their sizes differ by one at most."""
    return np.array_split(indices, -(-len(indices) // batch_size))


def split_balanced(utterances: Utterances, indices: np.ndarray, parts: int) -> list[np.ndarray]:
    """A batch in parts of like size and like total length: by length, dealt forth and back (1 2 3 3 2 1 1 2 ...)."""
    longest_first = indices[np.argsort(-utterances.num_samples[indices], kind="stable")]
    order = np.resize(np.concatenate([np.arange(parts), np.arange(parts)[::-1]]), len(indices))
    return [longest_first[order == part] for part in range(parts)]


def batch_by_padded_size(samples: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Consecutive batches of as many utterances as, padded to the longest, have no more than `capacity` samples in all.

    Args:
        samples: int [N], ascending; an utterance longer than `capacity` is a batch of its own.
        capacity: in samples.
    """
    batches, start = [], 0
    for end in range(1, len(samples) + 1):
        if end == len(samples) or (end + 1 - start) * samples[end] > capacity:
            batches.append(np.arange(start, end))
            start = end
    return batches


def make_batch(
    utterances: Utterances, indices: np.ndarray, *, augment: tuple[Config, int] | None = None, pinned: bool = False
) -> Batch:
    """Read a batch.

    Args:
        utterances: where from.
        indices: int [B], positions in `utterances`.
        augment: configuration and epoch to draw augmentation for; None for evaluation.
        pinned: put the waveforms into page-locked memory, from which a GPU copies without waiting.
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
        waveforms_BS.pin_memory() if pinned else waveforms_BS,
        torch.from_numpy(num_samples_B),
        torch.tensor([label for labels in encoded for label in labels], dtype=torch.int64),
        torch.tensor([len(labels) for labels in encoded], dtype=torch.int64),
        transcripts,
        augmentation,
    )


def _tempo_limits(num_samples_B: np.ndarray, transcripts: Sequence[str]) -> np.ndarray:
    """Fastest tempo at which CTC still has the frames that each transcript needs."""
    frames_B = frame_counts(torch.from_numpy(num_samples_B)).numpy()
    needed_B = np.array([min_ctc_frames(transcript) for transcript in transcripts])
    # needed <= output_frames(floor((frames - 1) / tempo) + 1); the last factor keeps rounding on the safe side
    return (frames_B - 1) / np.maximum(TIME_STRIDE * (needed_B - 1), 1) * (1 - 1e-9)


def prefetch(plan: Sequence[np.ndarray], make: Callable[[np.ndarray], Batch]) -> Iterator[Batch]:
    """The plan's batches in order, made in a background thread some batches ahead."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
        pending: deque[Future[Batch]] = deque()
        try:
            for indices in plan:
                pending.append(reader.submit(make, indices))
                if len(pending) > PREFETCHED_BATCHES:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
