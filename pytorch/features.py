"""Waveform -> normalized log-magnitude spectrogram, with augmentation; batched, on the device of the waveforms.

16 kHz, 20 ms Hamming window, hop length 10 ms, n_fft 320 -> 161 bins, log1p of the magnitude, mean and standard
deviation of each utterance over its own frames (Deep Speech 2, arXiv 1512.02595, section 3; settings of the MLPerf v0.5
reference). Axes: B batch, S samples, F frequency, T time (frames), M masks.

**Padding never changes a result**: an utterance ends in zeros whether or not others in the batch are longer (the
transform pads with zeros, not by reflection), and frames beyond its end count in no mean and are zero in the output.

Lengths stay on the CPU and follow from `num_samples_B` and the drawn tempo alone, so that no step waits for the device.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio
from torch import Tensor, nn

from pytorch.config import Config

SAMPLE_RATE = 16_000  # Hz
N_FFT = 320  # samples: 20 ms
HOP_LENGTH = 160  # samples: 10 ms
FREQUENCY_BINS = N_FFT // 2 + 1
FRAMES_MULTIPLE = 32  # that batches are padded to on accelerators


def frame_counts(num_samples: Tensor) -> Tensor:
    """Return the frames of this many samples: one every hop length, the first centered on the first sample."""
    return num_samples // HOP_LENGTH + 1


def padded_frames(frames: int, device: torch.device) -> int:
    """Round frames up on accelerators, whose libraries make a new plan for every shape; keep them on a CPU."""
    return frames if device.type == "cpu" else math.ceil(frames / FRAMES_MULTIPLE) * FRAMES_MULTIPLE


@dataclass(frozen=True)
class Augmentation:
    """What was drawn for each utterance of a batch."""

    tempo: np.ndarray  # [B]
    gain: np.ndarray  # [B], factor of the magnitude
    frequency_masks: np.ndarray  # [B, masks, 2]: first bin, width; in bins
    time_masks: np.ndarray  # [B, masks, 2]: first frame, length; as fractions of the utterance's frames


def draw_augmentation(config: Config, seeds: Iterable[Sequence[int]], tempo_limits: np.ndarray) -> Augmentation:
    """Draw the augmentation of a batch, each utterance from its own generator and seed, a sequence of integers.

    So it does not matter which others share the batch. An utterance's tempo is at most its limit.
    """
    tempo, gain, frequency, time = [], [], [], []
    for seed, limit in zip(seeds, tempo_limits, strict=True):
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        tempo.append(min(random.uniform(config.tempo_min, config.tempo_max), limit))
        gain.append(10 ** (random.uniform(config.gain_min_db, config.gain_max_db + 0.0) / 20))  # of -0, too
        widths = random.integers(0, config.frequency_mask_bins, config.frequency_masks, endpoint=True)
        frequency.append(np.stack([random.integers(0, FREQUENCY_BINS - widths, endpoint=True), widths], axis=-1))
        lengths = random.uniform(0, config.time_mask_fraction, config.time_masks)
        time.append(np.stack([random.uniform(0, 1 - lengths), lengths], axis=-1))
    return Augmentation(np.array(tempo), np.array(gain), np.stack(frequency), np.stack(time))


class LogSpectrogram(nn.Module):
    """int16 waveforms [B, S], zero beyond each utterance's end -> float32 features [B, F, T] and frames [B] (CPU)."""

    def __init__(self) -> None:
        super().__init__()
        self.magnitude = torchaudio.transforms.Spectrogram(
            n_fft=N_FFT, hop_length=HOP_LENGTH, window_fn=torch.hamming_window, power=1.0, pad_mode="constant"
        )

    @torch.no_grad()
    def forward(
        self, waveforms_BS: Tensor, num_samples_B: Tensor, augmentation: Augmentation | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return features and frames of utterances of `num_samples_B` samples (CPU). Augmentation is for training."""
        device = waveforms_BS.device
        magnitude_BFT = self.magnitude(waveforms_BS.float() / 32768)
        frames_B = frame_counts(num_samples_B)
        if augmentation is not None:
            magnitude_BFT, frames_B = change_tempo(magnitude_BFT, frames_B, torch.from_numpy(augmentation.tempo))
            magnitude_BFT = magnitude_BFT * _to(augmentation.gain, device)[:, None, None]
        features_BFT = (magnitude_BFT + 1).log_()  # log1p is ten times slower on a CPU, and has 6e-8 less error
        time_T = torch.arange(features_BFT.shape[-1], device=device)
        frames_on_device_B = frames_B.to(device, non_blocking=True)
        valid_B1T = (time_T < frames_on_device_B[:, None])[:, None]
        features_BFT = _normalize(features_BFT, valid_B1T, frames_on_device_B)
        if augmentation is not None:
            _mask(features_BFT, augmentation, frames_on_device_B)
        return features_BFT, frames_B


def change_tempo(magnitude_BFT: Tensor, frames_B: Tensor, tempo_B: Tensor) -> tuple[Tensor, Tensor]:
    """Play each utterance `tempo` times as fast without changing its pitch: interpolate its magnitudes along time.

    Return the magnitudes, padded as `padded_frames` says, and the new numbers of frames. Frames and tempo (float64) are
    on the CPU.
    """
    new_frames_B = ((frames_B - 1) / tempo_B).floor().long() + 1
    device, dtype = magnitude_BFT.device, torch.float64
    time_T = torch.arange(padded_frames(int(new_frames_B.max()), device), device=device, dtype=dtype)
    tempo_B1, last_B1 = (x.to(dtype).to(device, non_blocking=True)[:, None] for x in (tempo_B, frames_B - 1))
    position_BT = torch.minimum(time_T * tempo_B1, last_B1)
    before_BT = position_BT.floor()
    after_BT = torch.minimum(before_BT + 1, last_B1)
    fraction_B1T = (position_BT - before_BT).float()[:, None]
    indices = (x_BT.long()[:, None].expand(-1, magnitude_BFT.shape[1], -1) for x_BT in (before_BT, after_BT))
    before_BFT, after_BFT = (magnitude_BFT.gather(2, index_BFT) for index_BFT in indices)
    return torch.lerp(before_BFT, after_BFT, fraction_B1T), new_frames_B


def _normalize(features_BFT: Tensor, valid_B1T: Tensor, frames_B: Tensor) -> Tensor:
    """Give each utterance mean 0 and standard deviation 1 over its valid frames, and zeros elsewhere."""
    count_B11 = (frames_B * features_BFT.shape[1]).float()[:, None, None]
    mean_B11 = features_BFT.mul(valid_B1T).sum((1, 2), keepdim=True) / count_B11
    centered_BFT = (features_BFT - mean_B11).mul_(valid_B1T)
    variance_B11 = centered_BFT.square().sum((1, 2), keepdim=True) / count_B11
    return centered_BFT.mul_(torch.rsqrt(variance_B11 + 1e-10))  # digital silence stays zero


def _mask(features_BFT: Tensor, augmentation: Augmentation, frames_B: Tensor) -> None:
    """Apply SpecAugment (arXiv 1904.08779) without warping, in place: masked features become the mean, zero."""
    device = features_BFT.device
    _, bins, time = features_BFT.shape
    frequency_BM2 = _to(augmentation.frequency_masks, device)
    time_BM2 = _to(augmentation.time_masks, device) * frames_B[:, None, None]
    for size, masks_BM2, axis in ((bins, frequency_BM2, 2), (time, time_BM2, 1)):
        index = torch.arange(size, device=device)
        start_BM1, width_BM1 = masks_BM2.floor().split(1, dim=2)
        masked = ((index >= start_BM1) & (index < start_BM1 + width_BM1)).any(1)
        features_BFT.masked_fill_(masked.unsqueeze(axis), 0)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).float().to(device, non_blocking=True)
