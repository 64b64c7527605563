"""Fixtures that several test modules share."""

import hashlib
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data import packed

# Tests send Ctrl-C to commands. Started by a shell in the background, pytest would have them ignore it, as it does.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SPEECH = ROOT.parent / "shared" / "speech"
WORDS = ["AN", "OLD", "BELL", "RINGS", "IT'S", "NOON"]


@pytest.fixture(autouse=True)
def signals_are_handled_as_before() -> Iterator[None]:
    """A run inside of a test handles signals or, when it was told to stop, ignores them; children inherit that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def write_packed_dataset(path: Path, counts: dict[str, int], *, seed: int = 0) -> Path:
    """A data set of tones, one pitch a word: `counts` utterances by split name, 0.3-1.2 s long."""
    random = np.random.default_rng(seed)
    summaries = {}
    for split, count in counts.items():
        name = f"tones-{split}"
        (path / name).mkdir(parents=True)
        spoken = []
        for number in range(count):
            words = random.choice(WORDS, size=random.integers(1, 4))
            tones = [
                np.sin(np.arange(random.integers(4800, 6400)) * 2 * np.pi * 200 * (1 + WORDS.index(word)) / 16000)
                for word in words
            ]
            waveform = (8000 * np.concatenate(tones) + random.normal(0, 50, sum(map(len, tones)))).astype(np.int16)
            spoken.append((waveform, f"{split}-{number:04d}", " ".join(words)))
        spoken.sort(key=lambda utterance: (len(utterance[0]), utterance[1]))
        rows, offset = [], 0
        for waveform, name_of_utterance, transcript in spoken:
            digest = packed.utterance_digest(waveform, transcript)
            rows.append(packed.UtteranceRow(name_of_utterance, "1", offset, len(waveform), transcript, digest))
            offset += len(waveform)
        audio = np.concatenate([waveform for waveform, _, _ in spoken])
        (path / name / packed.AUDIO_FILE).write_bytes(packed.audio_header(len(audio)) + audio.tobytes())
        index_sha256 = packed.write_index(path / name / packed.INDEX_FILE, rows)
        nothing, longest = hashlib.md5(b"").hexdigest(), len(spoken[-1][0])
        summaries[name] = packed.SubsetSummary(count, 1, offset, longest, index_sha256, "none", nothing, False)
    splits = {split: [f"tones-{split}"] if split in counts else [] for split in packed.SPLITS}
    digest = packed.dataset_digest(path, summaries)
    packed.write_dataset(packed.PackedDataset(path, "tones", True, splits, digest, summaries))
    return path


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny packed data set: 21 training and 7 validation utterances."""
    return write_packed_dataset(tmp_path_factory.mktemp("tones"), {"train": 21, "validation": 7})
