"""A trained model in use: waveforms -> label probabilities -> transcript, with the time and confidence of each word.

    recognizer = Recognizer.load(Path("results/synthetic/checkpoint_best.pt"), "auto")
    for log_probabilities_TV in recognizer.emissions([waveform]):
        words = align(greedy(log_probabilities_TV), log_probabilities_TV)

Axes: T output frames (20 ms each), V labels.

This is the outer ring: a timed run imports nothing of it.
"""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import forced_align
from tqdm import tqdm

from data.files import DataError
from data.packed import PackedDataset, Subset
from pytorch import checkpoint
from pytorch.cli import RunError
from pytorch.ctc import BLANK, encode, greedy_decode
from pytorch.device import explain_oom, select_device
from pytorch.features import HOP_LENGTH, SAMPLE_RATE, LogSpectrogram
from pytorch.layers import kernels
from pytorch.loader import Utterances, split_evenly
from pytorch.model import TIME_STRIDE, DeepSpeech2

FRAME_SECONDS = TIME_STRIDE * HOP_LENGTH / SAMPLE_RATE  # 0.02 s; output frame t is centred on t times that


@dataclass(frozen=True)
class Word:
    """A recognised word.

    `start` and `end` are seconds from the beginning of the waveform. `confidence`, in [0, 1], is the geometric mean of
    the probability of the aligned label, blanks included, over the output frames from the word's first character to
    its last. It orders words by how sure the network is of them; it is not a calibrated probability of being right.
    """

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Recognizer:
    """A model with the features that it was trained on, ready for use on one device."""

    name: str  # of the configuration that it was trained with
    dataset_digest: str  # of the data set that it was trained on
    device: torch.device
    spectrogram: LogSpectrogram
    model: DeepSpeech2

    @classmethod
    def load(cls, path: Path, device_name: str) -> Recognizer:
        """The model of a checkpoint.

        Raises:
            RunError: the checkpoint is absent, damaged or of another version; or the device is not there.
        """
        content: dict[str, Any] = checkpoint.load(path)
        device = select_device(device_name)
        try:
            config = content["config"]
            model = DeepSpeech2(config["conv_channels"], config["hidden_size"])
            model.load_state_dict(content["model"])
            recognizer = cls(
                config["config"], content["dataset_digest"], device, LogSpectrogram().to(device), model.to(device)
            )
        except (KeyError, TypeError, RuntimeError) as error:
            problem = str(error).splitlines()[0]
            raise RunError(f"{path}: its weights are not those of a model of this project ({problem})") from error
        if device.type == "cpu":
            kernels.load()
        recognizer.model.eval()
        return recognizer

    @torch.inference_mode()
    def emissions(self, waveforms: Sequence[np.ndarray]) -> list[Tensor]:
        """Log probabilities of the labels, float32 [T, V] on the CPU, of each waveform.

        Args:
            waveforms: int16 [S] at 16 kHz, at least one sample each. Which ones share a call changes no result.

        Raises:
            RunError: they do not fit into memory together.
        """
        num_samples_B = torch.tensor([len(waveform) for waveform in waveforms])
        waveforms_BS = torch.zeros(len(waveforms), int(num_samples_B.max()), dtype=torch.int16)
        for row, waveform in enumerate(waveforms):
            waveforms_BS[row, : len(waveform)] = torch.from_numpy(np.array(waveform, dtype=np.int16))
        longest = int(num_samples_B.max()) / SAMPLE_RATE
        advice = f"{len(waveforms)} pieces of up to {longest:.0f} s do not fit into memory; use a smaller --batch-size"
        with explain_oom(advice):
            logits_TBV, frames_B = self.model(*self.spectrogram(waveforms_BS.to(self.device), num_samples_B))
        log_probabilities_BTV = logits_TBV.log_softmax(2).cpu().transpose(0, 1)
        return [
            emission_TV[:frames].contiguous()
            for emission_TV, frames in zip(log_probabilities_BTV, frames_B.tolist(), strict=True)
        ]


def greedy(log_probabilities_TV: Tensor) -> str:
    """Transcript by best path decoding, as in a timed run."""
    return greedy_decode(log_probabilities_TV[:, None], torch.tensor([len(log_probabilities_TV)]))[0]


def align(transcript: str, log_probabilities_TV: Tensor) -> list[Word]:
    """Words of a transcript with their times, from the most probable CTC path that spells it.

    Args:
        transcript: what was decoded from `log_probabilities_TV`, so that there are frames enough to spell it.
        log_probabilities_TV: float32 on the CPU.
    """
    if not transcript.strip():
        return []
    path_BT, score_BT = forced_align(log_probabilities_TV[None], torch.tensor([encode(transcript)]), blank=BLANK)
    path, scores = path_BT[0].tolist(), score_BT[0].tolist()
    # A label begins where the path leaves the one before it.
    starts = [t for t, label in enumerate(path) if label != BLANK and (t == 0 or path[t - 1] != label)]
    words = []
    for match in re.finditer(r"\S+", transcript):
        first, end = starts[match.start()], starts[match.end() - 1] + 1
        while end < len(path) and path[end] == path[end - 1]:
            end += 1
        confidence = math.exp(sum(scores[first:end]) / (end - first))
        words.append(Word(match[0], first * FRAME_SECONDS, end * FRAME_SECONDS, min(1.0, confidence)))
    return words


def select_subsets(dataset: PackedDataset, split: str) -> list[Subset]:
    """The subsets of a split, or those of these names; DataError if there is none."""
    if split not in dataset.splits:
        return [dataset.subset(name) for name in dict.fromkeys(part.strip() for part in split.split(","))]
    if not dataset.splits[split]:
        raise DataError(f"{dataset.path} has no {split} subset; it has: {', '.join(dataset.subsets)}")
    return dataset.split(split)


def speed(audio_seconds: float, seconds: float) -> str:
    """Real-time factor, and the most memory that this process ever held, in words."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    factor = f"real-time factor {seconds / audio_seconds:.4f}, {audio_seconds / seconds:.1f} x real time"
    return f"{factor}, {peak / 1024:.0f} MiB of memory at most"


def emissions(
    recognizer: Recognizer, utterances: Utterances, batch_size: int, rank: int = 0, processes: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Position and log probabilities [T, V] of every utterance that this one of the processes has to recognise."""
    plan = split_evenly(np.arange(len(utterances)), batch_size)[rank::processes]
    for indices in tqdm(plan, desc="recognising", unit="batch", leave=False, disable=None if rank == 0 else True):
        waveforms = [utterances.waveform(index) for index in indices.tolist()]
        yield from zip(indices.tolist(), recognizer.emissions(waveforms), strict=True)
