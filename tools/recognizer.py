"""A trained model in use: waveforms -> label probabilities -> transcript, with the time and confidence of each word.

    recognizer = Recognizer.load(Path("results/synthetic/checkpoint_best.pt"), "auto")
    for emission_TV in recognizer.emissions([waveform]):
        words = align(greedy(emission_TV), emission_TV)

An emission is the log probability of each label at each output frame. Axes: T output frames (20 ms each), V labels.
"""

import math
import re
import resource
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import forced_align

from data.cli import UserError
from data.packed import PackedDataset, Subset
from pytorch import checkpoint
from pytorch.config import Precision
from pytorch.ctc import BLANK, collapse, encode
from pytorch.device import copy_to_cpu_async, explain_oom, select_device, select_precision, set_device
from pytorch.distributed import World
from pytorch.errors import RunError
from pytorch.evaluation import Decoder, Evaluation, evaluate, greedy_decoder
from pytorch.features import HOP_LENGTH, SAMPLE_RATE, LogSpectrogram
from pytorch.layers import kernels
from pytorch.loader import Utterances
from pytorch.model import TIME_STRIDE, DeepSpeech2

FRAME_SECONDS = TIME_STRIDE * HOP_LENGTH / SAMPLE_RATE  # 0.02 s; output frame t is centered on t times that


@dataclass(frozen=True)
class Word:
    """A recognized word.

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
    """A trained model with its features, ready for use on one device."""

    device: torch.device
    precision: Precision
    spectrogram: LogSpectrogram
    model: DeepSpeech2

    @classmethod
    def load(cls, path: Path, device_name: str, precision: Precision | None = None, local_rank: int = 0) -> Self:
        """Load the model of a checkpoint.

        Args:
            path: of the checkpoint.
            device_name: see `select_device`.
            precision: None for the one that its run was evaluated with, if the device has arithmetic for it.
            local_rank: number of the GPU.

        Raises:
            RunError: the checkpoint is absent, damaged or of another version; or the device is not there.
        """
        content: dict[str, Any] = checkpoint.load(path)
        device = select_device(device_name, local_rank)
        set_device(device)
        try:
            config = content["config"]
            model = DeepSpeech2(config["conv_channels"], config["hidden_size"])
            model.load_state_dict(content["model"])
            precision = select_precision(precision or config["precision"], device)
            recognizer = cls(device, precision, LogSpectrogram().to(device), model.to(device).eval())
        except (KeyError, TypeError, RuntimeError) as error:
            problem = str(error).splitlines()[0]
            raise RunError(f"{path}: its weights are not those of a model of this project ({problem})") from error
        if device.type == "cpu":
            kernels.load()
        return recognizer

    def forward(self, waveforms_BS: Tensor, num_samples_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [T, B, V] on the device and output frames [B] on the CPU, of padded int16 waveforms at 16 kHz.

        RunError if they do not fit into memory together.
        """
        batch, longest = len(num_samples_B), int(num_samples_B.max()) / SAMPLE_RATE
        with explain_oom(f"{batch} x {longest:.0f} s of audio do not fit into memory; use a smaller --batch-size"):
            features = self.spectrogram(waveforms_BS.to(self.device, non_blocking=True), num_samples_B)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                return self.model(*features)

    @torch.inference_mode()
    def emissions(self, waveforms: Sequence[np.ndarray]) -> list[Tensor]:
        """Return the emission, float32 [T, V] on the CPU, of each waveform: int16 [S] at 16 kHz, one sample or more.

        RunError if they do not fit into memory together.
        """
        if not waveforms:
            return []
        rows = [torch.from_numpy(np.array(waveform, dtype=np.int16)) for waveform in waveforms]
        num_samples_B = torch.tensor([len(row) for row in rows])
        return copy_emissions(*self.forward(pad_sequence(rows, batch_first=True), num_samples_B))()

    def evaluate(
        self, utterances: Utterances, batch_size: int, decoder: Decoder = greedy_decoder, world: World | None = None
    ) -> Evaluation:
        """Decode and count every utterance, in batches whose memory `batch_size` of the longest utterances would take.

        RunError if a batch does not fit into memory.
        """
        evaluation = evaluate(
            lambda batch: self.forward(batch.waveforms_BS, batch.num_samples_B),
            utterances,
            world or World(),
            max_batch_samples=batch_size * int(utterances.num_samples.max()),
            device=self.device,
            decoder=decoder,
        )
        assert evaluation is not None  # which is what a run that is stopped gets
        return evaluation


def copy_emissions(logits_TBV: Tensor, frames_B: Tensor) -> Callable[[], list[Tensor]]:
    """Start to copy emissions to the CPU; what is returned waits for them: float32 [T, V] of each utterance."""
    emissions_TBV = copy_to_cpu_async(logits_TBV.log_softmax(2))
    return lambda: [
        emission_TV[:frames].contiguous()
        for emission_TV, frames in zip(emissions_TBV().transpose(0, 1), frames_B.tolist(), strict=True)
    ]


def greedy(emission_TV: Tensor) -> str:
    """Return the transcript by best-path decoding, as in a timed run."""
    return collapse(emission_TV.argmax(dim=1)[:, None], torch.tensor([len(emission_TV)]))[0]


def align(transcript: str, emission_TV: Tensor) -> list[Word]:
    """Return the words of a transcript with their times, from the most probable CTC path that spells it.

    Args:
        transcript: what was decoded from the emission, so that there are frames enough to spell it.
        emission_TV: float32 on the CPU.
    """
    if not transcript.strip():
        return []
    path_BT, score_BT = forced_align(emission_TV[None], torch.tensor([encode(transcript)]), blank=BLANK)
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
    """Return the subsets of a split, or those of these names; raise UserError if there is none."""
    if split not in dataset.splits or (not dataset.splits[split] and split in dataset.summary):
        return [dataset.subset(name) for name in dict.fromkeys(part.strip() for part in split.split(","))]
    if not dataset.splits[split]:
        raise UserError(f"{dataset.path} has no {split} subset; it has: {', '.join(dataset.summary)}")
    return dataset.split(split)


def speed(audio_seconds: float, seconds: float) -> str:
    """Return the real-time factor, and the most memory that this process ever held, in words."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    factor = f"real-time factor {seconds / audio_seconds:.4f}, {audio_seconds / seconds:.1f} x real time"
    return f"{factor}, {peak / 1024:.0f} MiB of memory at most"
