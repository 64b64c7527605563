import dataclasses
import shutil
import subprocess
import tarfile
from typing import Any

import numpy as np
import pytest
import torch

from pytorch.config import CONFIGS
from pytorch.features import FREQUENCY_BINS, Augmentation, LogSpectrogram, draw_augmentation
from tests.conftest import SPEECH

CONFIG = CONFIGS["librispeech"]


def random_batch(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    waveforms = torch.randint(-5000, 5000, (len(lengths), max(lengths)), dtype=torch.int16, generator=generator)
    for waveform, length in zip(waveforms, lengths, strict=True):
        waveform[length:] = 0
    return waveforms, torch.tensor(lengths)


def nothing_drawn(count: int, **drawn: np.ndarray) -> Augmentation:
    """What leaves the features as they are, but for what is given."""
    masks, ones = np.zeros((count, 0, 2)), np.ones(count)
    return dataclasses.replace(Augmentation(ones, ones, masks, masks), **drawn)


def test_features_are_the_normalized_log1p_magnitude_of_torch_stft() -> None:
    waveforms, samples = random_batch([8000])
    features, frames = LogSpectrogram()(waveforms, samples)
    options: dict[str, Any] = {"window": torch.hamming_window(320), "pad_mode": "constant", "return_complex": True}
    expected = torch.log1p(torch.stft(waveforms[0].float() / 32768, 320, 160, **options).abs())
    expected = (expected - expected.mean()) / expected.std(correction=0)
    assert features.shape == (1, FREQUENCY_BINS, 51)
    assert frames.tolist() == [51]
    torch.testing.assert_close(features[0], expected, rtol=1e-4, atol=1e-4)


def test_features_of_an_utterance_do_not_depend_on_the_others_in_its_batch() -> None:
    lengths = [3000, 16000, 9999, 320]
    waveforms, samples = random_batch(lengths)
    together, frames = LogSpectrogram()(waveforms, samples)
    for row, length in enumerate(lengths):
        alone, _ = LogSpectrogram()(waveforms[row : row + 1, :length], samples[row : row + 1])
        torch.testing.assert_close(together[row, :, : frames[row]], alone[0], rtol=1e-5, atol=1e-5)
        assert together[row, :, frames[row] :].abs().sum() == 0


def test_digital_silence_gives_finite_features() -> None:
    features, _ = LogSpectrogram()(torch.zeros(1, 4000, dtype=torch.int16), torch.tensor([4000]))
    assert torch.isfinite(features).all()


def draw(seeds: list[list[int]], limit: float = np.inf) -> Augmentation:
    return draw_augmentation(CONFIG, seeds, np.full(len(seeds), limit))


def test_augmentation_is_a_function_of_each_utterances_seed_alone() -> None:
    together, alone = draw([[1, 2, 3], [1, 2, 4]]), draw([[1, 2, 4]])
    for field in dataclasses.fields(Augmentation):
        first, second = getattr(together, field.name)
        assert np.array_equal(second, getattr(alone, field.name)[0])
        assert not np.array_equal(first, second)


def test_augmentation_stays_within_its_ranges() -> None:
    drawn = draw([[7, 1, index] for index in range(300)])
    assert CONFIG.tempo_min <= drawn.tempo.min() and drawn.tempo.max() <= CONFIG.tempo_max
    decibels = 20 * np.log10(drawn.gain)
    assert CONFIG.gain_min_db <= decibels.min() and decibels.max() <= CONFIG.gain_max_db
    assert drawn.frequency_masks[..., 1].max() <= CONFIG.frequency_mask_bins
    assert drawn.frequency_masks.sum(-1).max() <= FREQUENCY_BINS
    assert drawn.time_masks[..., 1].max() <= CONFIG.time_mask_fraction
    assert drawn.time_masks.sum(-1).max() <= 1
    assert draw([[7, 1, index] for index in range(50)], limit=1.01).tempo.max() <= 1.01


def test_masks_hide_what_was_drawn_and_nothing_else() -> None:
    waveforms, samples = random_batch([16000, 16000])
    frequency, time = np.zeros((2, 1, 2)), np.zeros((2, 1, 2))
    frequency[0, 0], time[1, 0] = (10, 5), (0.5, 0.1)
    plain, _ = LogSpectrogram()(waveforms, samples, nothing_drawn(2))
    masked, _ = LogSpectrogram()(waveforms, samples, nothing_drawn(2, frequency_masks=frequency, time_masks=time))
    hidden = torch.zeros_like(plain, dtype=torch.bool)
    hidden[0, 10:15] = True
    hidden[1, :, 50:60] = True  # of 101 frames
    assert (masked[hidden] == 0).all()
    torch.testing.assert_close(masked[~hidden], plain[~hidden])


@pytest.mark.parametrize("gain", [0.5, 2.0])
def test_gain_scales_the_magnitude_before_the_logarithm(gain: float) -> None:
    waveforms, samples = random_batch([4000])
    louder, _ = LogSpectrogram()(waveforms, samples, nothing_drawn(1, gain=np.array([gain])))
    expected, _ = LogSpectrogram()((waveforms.float() * gain).to(torch.int16), samples)
    torch.testing.assert_close(louder, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(shutil.which("sox") is None, reason="sox is not installed")
@pytest.mark.skipif(not SPEECH.is_dir(), reason=f"no real speech in {SPEECH}")
@pytest.mark.parametrize("tempo", [0.85, 0.95, 1.0, 1.05, 1.15])
def test_tempo_gives_nearly_the_features_that_sox_gives(tempo: float) -> None:
    with tarfile.open(SPEECH / "an4" / "an4_raw.bigendian.tar.gz") as archive:
        members = [member for member in archive if member.name.endswith(".raw")][::200]
        files = [archive.extractfile(member) for member in members]
        waveforms = [np.frombuffer(file.read(), ">i2").astype(np.int16) for file in files if file is not None]
    assert len(waveforms) >= 5
    drawn = nothing_drawn(1, tempo=np.array([tempo]))
    raw = ["-t", "raw", "-r", "16000", "-e", "signed", "-b", "16", "-c", "1", "-"]
    for waveform in waveforms:
        command = ["sox", *raw, "-t", "raw", "-", "tempo", "-s", str(tempo)]
        faster = np.frombuffer(subprocess.run(command, input=waveform.tobytes(), capture_output=True).stdout, np.int16)
        ours, frames = features_of(waveform, drawn)
        theirs, frames_of_theirs = features_of(faster, None)
        assert abs(frames - frames_of_theirs) <= 1
        both = torch.stack([features[0, :, : min(frames, frames_of_theirs)].flatten() for features in (ours, theirs)])
        assert torch.corrcoef(both)[0, 1] > 0.9
        assert (both[0] - both[1]).abs().mean() < 0.2  # standard deviations


def features_of(waveform: np.ndarray, augmentation: Augmentation | None) -> tuple[torch.Tensor, int]:
    samples = torch.from_numpy(waveform.copy())[None]
    features, frames = LogSpectrogram()(samples, torch.tensor([samples.shape[1]]), augmentation)
    return features, int(frames)
