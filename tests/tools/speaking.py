"""A language of tones, one pitch a word, and a model that has learned it: for tests that need right transcripts."""

from pathlib import Path

import numpy as np

from data.download import Options, download
from tests.conftest import WORDS
from tests.processes import run_module_for_text

RATE = 16000
TRAINING = ["--config", "synthetic", "--hidden-size", "40", "--conv-channels", "4", "--batch-size", "8"]
TRAINING += ["--learning-rate", "3e-3", "--warmup-steps", "20", "--lr-decay-epochs", "20", "--max-epochs", "40"]
TRAINING += ["--ema-decay", "0.98"]  # lags, so that training continues for long after the first good epoch
TRAINING += ["--frequency-masks", "0", "--time-masks", "0", "--tempo-min", "1", "--tempo-max", "1"]
TRAINING += ["--target-wer", "0.5"]


def speak(words: list[str], seed: int) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """int16 samples at 16 kHz with pauses between the words, and the start and end of each word in seconds."""
    random = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    times = []
    length = 0
    for word in words:
        pause = np.zeros(int(RATE * random.uniform(0.15, 0.45)))
        samples = int(RATE * random.uniform(0.3, 0.4))
        tone = 8000 * np.sin(np.arange(samples) * 2 * np.pi * 200 * (1 + WORDS.index(word)) / RATE)
        times.append(((length + len(pause)) / RATE, (length + len(pause) + samples) / RATE))
        parts += [pause, tone]
        length += len(pause) + samples
    parts.append(np.zeros(int(RATE * 0.2)))
    waveform = np.concatenate(parts)
    return (waveform + random.normal(0, 30, len(waveform))).astype(np.int16), times


def random_words(count: int, seed: int) -> list[str]:
    return [str(word) for word in np.random.default_rng([seed, count]).choice(WORDS, size=count)]


def write_spoken_dataset(folder: Path, counts: dict[str, int]) -> Path:
    """A data set of sentences of 1 to 6 words, by the command's own way: a manifest of WAV files."""
    import soundfile

    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(count):
            words = random_words(1 + number % 6, 1000 * len(split) + number)
            file = folder / split / f"{number:03d}.wav"
            soundfile.write(file, speak(words, 77 * len(split) + number)[0], RATE)
            lines.append(f"{file}\t{' '.join(words)}\n")
        manifest = folder / f"{split}.tsv"
        manifest.write_text("".join(lines))
        download(Options(corpus="manifest", subsets=split, manifest=manifest, dataset_dir=folder / "dataset", jobs=1))
    return folder / "dataset"


def train(dataset: Path, output: Path) -> Path:
    """Trains until hardly an error is left: some tens of seconds. Returns the checkpoint, with the log beside it."""
    run = run_module_for_text("pytorch.train", *TRAINING, "--dataset-dir", dataset, "--output-dir", output, timeout=600)
    assert run.returncode == 0, run.stderr
    (output / "mlperf_ds2.log").write_text(run.stdout)
    return output / "checkpoint_best.pt"
