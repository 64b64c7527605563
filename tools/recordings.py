"""Recordings of any length, format, rate and number of channels, in pieces that the network can take.

    pieces = cut(recording.blocks())

Memory does not grow with the recording: it is read in blocks, mixed and resampled as a stream, and cut at pauses. Each
piece also holds what is around it, so that no word is heard by halves alone; `seam` says where, in the overlap of two
pieces, the words of the first end and those of the second begin.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from data.audio import CUT_SHORT, HIGHEST_RATE, LOWEST_RATE, SNDFILE_FAILURES, open_recording, tells_length
from data.files import DataError
from data.packed import SAMPLE_RATE
from tools.recognizer import Word

SHORTEST_S, LONGEST_S = 3.0, 12.0  # between two cuts; an utterance of LibriSpeech has 12 s on average
CONTEXT_S = 0.5  # that a piece hears before and after its cuts
PAUSE_S = 0.3  # a cut is made in the middle of the quietest stretch of this length
_BLOCK_SAMPLES = 1 << 19  # read at once, of all channels together
_ENERGY_SAMPLES = SAMPLE_RATE // 100


@dataclass(frozen=True)
class Piece:
    """A part of a recording, which overlaps its neighbours by CONTEXT_S on either side of the cuts between them.

    `waveform`, int16 [S] at 16 kHz, begins at `start` (s); `cut` (s) is that to the next piece, None in the last one.
    """

    waveform: np.ndarray
    start: float
    cut: float | None

    @property
    def end(self) -> float:
        """Where `waveform` ends (s)."""
        return self.start + len(self.waveform) / SAMPLE_RATE

    @property
    def silent(self) -> bool:
        """Whether it is digital silence: then there is nothing to hear, and nothing to normalise features by."""
        return bool((self.waveform == self.waveform[0]).all())


def read_file(path: Path) -> Iterator[np.ndarray]:
    """Blocks of int16 samples at 16 kHz mono of an audio file: by libsndfile, or what it does not know by sox.

    Raises:
        DataError: it is no audio, or damaged, which may turn out after some blocks. The message names the file.
    """
    try:
        with open_recording(path) as audio:
            yield from _read_sound(path, audio)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def file_seconds(path: Path) -> float:
    """Length by the header; 0 where it tells none."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return 0.0
        info = soundfile.info(path)
        return info.frames / info.samplerate if info.frames < 1 << 62 else 0.0
    except (*SNDFILE_FAILURES, OSError, ZeroDivisionError):
        return 0.0


def read_raw(stream: BinaryIO, name: str, rate: int) -> Iterator[np.ndarray]:
    """The same of headerless little-endian 16-bit mono audio, as it arrives."""
    resample = _Resampler(name, rate)
    rest = b""
    while chunk := stream.read1(_BLOCK_SAMPLES):  # type: ignore[attr-defined]
        chunk = rest + chunk
        whole = len(chunk) // 2 * 2
        rest = chunk[whole:]
        yield resample(np.frombuffer(chunk[:whole], dtype="<i2").astype(np.float32) / 32768)
    yield resample(np.zeros(0, dtype=np.float32), last=True)
    if rest:
        raise DataError(f"{name} ends in the middle of a 16-bit sample")


def _read_sound(path: Path, audio: soundfile.SoundFile) -> Iterator[np.ndarray]:
    resample = _Resampler(path, audio.samplerate)
    frames = 0
    try:
        while len(block := audio.read(max(1, _BLOCK_SAMPLES // audio.channels), dtype="float32", always_2d=True)):
            if not np.isfinite(block).all():
                at = (frames + int(np.flatnonzero(~np.isfinite(block).all(1))[0])) / audio.samplerate
                raise DataError(f"{path} holds samples that are not finite numbers, the first at {at:.2f} s")
            frames += len(block)
            yield resample(block.mean(1))
    except SNDFILE_FAILURES as error:
        raise DataError(f"{path} cannot be decoded after {frames / audio.samplerate:.2f} s: {error}") from error
    yield resample(np.zeros(0, dtype=np.float32), last=True)
    if not frames:
        raise DataError(f"{path} holds no audio")
    cut = CUT_SHORT.search(audio.extra_info)
    if cut or (frames < audio.frames and tells_length(audio)):
        raise DataError(f"{path} is cut short: it ends after {frames / audio.samplerate:.2f} s, before its header says")


class _Resampler:
    """Blocks of float32 samples at any rate -> blocks of int16 samples at 16 kHz."""

    def __init__(self, name: Path | str, rate: int) -> None:
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise DataError(f"{name} has a rate of {rate} Hz; from {LOWEST_RATE} to {HIGHEST_RATE} Hz are understood")
        self._stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "VHQ") if rate != SAMPLE_RATE else None

    def __call__(self, block: np.ndarray, last: bool = False) -> np.ndarray:
        if self._stream is not None:
            block = self._stream.resample_chunk(block, last)
        return np.clip(np.rint(block * 32768.0), -32768, 32767).astype(np.int16)


def cut(blocks: Iterable[np.ndarray]) -> Iterator[Piece]:
    """Pieces of a recording, in order, from its blocks of int16 samples.

    Raises:
        DataError: what reading the blocks raised, after the pieces of all that came before.
    """
    context, longest = int(CONTEXT_S * SAMPLE_RATE), int(LONGEST_S * SAMPLE_RATE)
    held = np.zeros(0, dtype=np.int16)  # from `begin` on, which is `context` before `position`, the last cut
    begin = position = 0
    arrived: list[np.ndarray] = []
    waiting = 0
    problem = None
    try:
        for block in blocks:
            arrived.append(block)
            waiting += len(block)
            if begin + len(held) + waiting <= position + longest + context:
                continue
            held, arrived, waiting = np.concatenate([held, *arrived]), [], 0
            while begin + len(held) > position + longest + context:
                pause = position + _quietest(held[position - begin : position - begin + longest])
                yield Piece(held[: pause + context - begin].copy(), begin / SAMPLE_RATE, pause / SAMPLE_RATE)
                held = held[pause - context - begin :]
                begin, position = pause - context, pause
    except DataError as error:
        problem = error
    held = np.concatenate([held, *arrived])
    if len(held):
        yield Piece(held, begin / SAMPLE_RATE, None)
    if problem is not None:
        raise problem


def _quietest(waveform: np.ndarray) -> int:
    """Sample, SHORTEST_S or more from the start, in the middle of the quietest stretch of PAUSE_S."""
    frames = len(waveform) // _ENERGY_SAMPLES
    samples = waveform[: frames * _ENERGY_SAMPLES].astype(np.float64).reshape(frames, _ENERGY_SAMPLES)
    energy = np.concatenate([[0.0], np.cumsum(samples.var(axis=1))])
    width = round(PAUSE_S * SAMPLE_RATE / _ENERGY_SAMPLES)
    first = round(SHORTEST_S * SAMPLE_RATE / _ENERGY_SAMPLES)
    stretches = energy[first + width :] - energy[first:-width]
    return (first + int(stretches.argmin())) * _ENERGY_SAMPLES + width * _ENERGY_SAMPLES // 2


def seam(cut: float, before: Sequence[Word], after: Sequence[Word]) -> float:
    """The time, within CONTEXT_S of a cut, in the middle of the longest time in which neither piece has a word.

    Words, with times in the recording, belong to the piece before if their middle comes earlier, else to the one after.
    """
    low, high = cut - CONTEXT_S, cut + CONTEXT_S
    spans = sorted((word.start, word.end) for word in (*before, *after) if word.end > low and word.start < high)
    best, length, free = cut, 0.0, low
    for start, end in [*spans, (high, high)]:
        if start - free > length:
            best, length = (free + start) / 2, start - free
        free = max(free, end)
    return best
