"""The embedded corpus: short sentences spoken by eSpeak NG, as LibriSpeech-layout archives of FLAC files.

    python -m data.download --corpus synthetic      makes the archives and prepares them like any other corpus

It is synthetic speech, made so that the whole benchmark can run in minutes anywhere: its figures are no results.
Every speaker is a voice with an accent. Voices and sentences of the validation and test sets never occur in training;
accents do. The same bytes come out of every run, for which three things are needed:

- One process per speaker (speaking.py).
- Integers wherever possible. Only the resampling is done in floating point, in double precision, where the last bits,
  which may differ between processors, practically never reach the rounded 16-bit sample.
- A fixed version of espeakng-loader. Its library is compiled per platform; the reference checksum was made on x86-64.

The FLAC encoder's bytes may change with its version, so the reference is that of the packed data set, not of archives.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import espeakng_loader
import numpy as np
import soundfile
import soxr

from data.cli import DataError, progress_bar
from data.packed import SAMPLE_RATE
from data.synthetic.sentences import make_sentences

ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc")
# Chosen for being clear: nothing whispering, creaking, robotic or clipped. Voices defined much alike are in one subset.
# None uses eSpeak NG's `breath`, the noise of which is not the same from run to run.
VOICES = {
    "synthetic-train": (
        "m1 m3 m4 m6 m7 m8 f1 Andy Annie Denis Diogo Gene Henrique Hugo Mario Michael Nguyen adam anika antonio "
        "aunty belinda benjamin david ed edward gustave iven4 john linda max michel miguel mike2 norbert pedro robert "
        "steph"
    ),
    "synthetic-validation": "m5 f4 Lee grandma marcelo paul rob travis",
    "synthetic-test": "m2 Alex Andrea boris kaukovalta pablo quincy shelby",
}
SENTENCES = {"synthetic-train": 1800, "synthetic-validation": 240, "synthetic-test": 200}
ACCENTS_PER_VOICE = 2
EDGE_SAMPLES = 800  # of noise alone before and after the speech
GAIN = 0.7  # leaves room for what resampling and noise add


@dataclass(frozen=True)
class Line:
    """A sentence to speak: `rate` in words per minute, `pitch` 0-99, `noise` about the amplitude in 16-bit steps."""

    id: str
    text: str
    rate: int
    pitch: int
    noise: int
    seed: int


@dataclass(frozen=True)
class Speaker:
    """A voice with an accent, by a LibriSpeech-like number, and what it says."""

    number: int
    voice: str
    accent: str
    lines: tuple[Line, ...]


@cache
def build_speakers() -> dict[str, list[Speaker]]:
    """Return who says what in each subset: a pure function of this module's constants."""
    taken: set[str] = set()
    speakers: dict[str, list[Speaker]] = {}
    for index, (subset, voices) in enumerate(VOICES.items()):
        sentences = make_sentences(SENTENCES[subset], seed=index + 1, taken=taken)
        pairs = [
            (voice, ACCENTS[(position + ACCENTS_PER_VOICE * turn) % len(ACCENTS)])
            for turn in range(ACCENTS_PER_VOICE)
            for position, voice in enumerate(voices.split())
        ]
        speakers[subset] = []
        for place, (voice, accent) in enumerate(pairs):
            number, spoken = 1000 * (index + 1) + place, sentences[place :: len(pairs)]
            lines = tuple(_line(number, position, text) for position, text in enumerate(spoken))
            speakers[subset].append(Speaker(number, voice, accent, lines))
    return speakers


def write_archive(subset: str, target: Path, jobs: int) -> None:
    """Speak one subset and write it as <target>, a .tar.gz in LibriSpeech layout. DataError if a voice fails."""
    speakers = build_speakers()[subset]
    with (
        ThreadPoolExecutor(jobs) as pool,
        progress_bar(f"speaking {subset}", len(speakers), " speakers") as bar,
        target.open("xb") as file,
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar,
    ):
        for speaker, audio in zip(speakers, pool.map(synthesize, speakers), strict=True):
            for name, content in archive_members(subset, speaker, audio):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                entry.mode = 0o644
                tar.addfile(entry, BytesIO(content))
            bar.update(1)


def synthesize(speaker: Speaker) -> list[np.ndarray]:
    """Return what a speaker says, by line: int16 [samples] at 16 kHz. DataError names a voice or a line that fails."""
    voice = f"{speaker.accent}+{speaker.voice}"
    request = {
        "library": espeakng_loader.get_library_path(),
        "data": espeakng_loader.get_data_path(),
        "voice": voice,
        "lines": [asdict(line) for line in speaker.lines],
    }
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("speaking.py"))]
    run = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True)
    if run.returncode != 0:
        reason = run.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {run.returncode}"]
        raise DataError(f"eSpeak NG failed for the voice {voice}: {reason[-1]}")
    head, _, sound = run.stdout.partition(b"\n")
    answer = json.loads(head)
    ends = np.cumsum(answer["samples"])
    spoken = np.split(np.frombuffer(sound, dtype="<i2"), ends[:-1])
    waveforms = [postprocess(speech, answer["rate"], line) for speech, line in zip(spoken, speaker.lines, strict=True)]
    if failed := [line.text for line, waveform in zip(speaker.lines, waveforms, strict=True) if waveform.std() < 300]:
        raise DataError(f"eSpeak NG made next to no sound of '{failed[0]}' with the voice {voice}")
    return waveforms


def postprocess(speech: np.ndarray, rate: int, line: Line) -> np.ndarray:
    """Resample synthesized speech, int16 [samples] at `rate`, and add light noise: int16 [samples] at 16 kHz."""
    resampled = soxr.resample(speech.astype(np.float64) * GAIN, rate, SAMPLE_RATE, quality="VHQ")
    waveform = np.pad(np.rint(resampled).astype(np.int64), EDGE_SAMPLES)
    # A bit generator's raw output, unlike numpy's distributions, is guaranteed never to change.
    raw = np.random.PCG64(line.seed).random_raw((len(waveform) + 1) // 2).view("<i2").astype(np.int64)
    uniform = raw.reshape(-1, 2)[: len(waveform)].sum(axis=1)
    waveform += (uniform * line.noise) >> 16
    return np.clip(waveform, -32768, 32767).astype(np.int16)


def _line(number: int, position: int, text: str) -> Line:
    # Numbers that vary from line to line without a random generator, by multiplication with odd constants.
    mixed = (number * 7919 + position * 104729) % 65521
    return Line(
        id=f"{number}-1-{position:04d}",
        text=text,
        rate=150 + mixed % 36,
        pitch=38 + mixed // 36 % 25,
        noise=10 + mixed // 900 % 50,
        seed=number * 10000 + position,
    )


def archive_members(subset: str, speaker: Speaker, audio: Sequence[np.ndarray]) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of a speaker's files in the archive."""
    folder = f"LibriSpeech/{subset}/{speaker.number}/1"
    for line, waveform in zip(speaker.lines, audio, strict=True):
        encoded = BytesIO()
        soundfile.write(encoded, waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        yield f"{folder}/{line.id}.flac", encoded.getvalue()
    transcripts = "".join(f"{line.id} {line.text}\n" for line in speaker.lines)
    yield f"{folder}/{speaker.number}-1.trans.txt", transcripts.encode()
