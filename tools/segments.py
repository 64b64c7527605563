"""Recordings of any length, format, rate and number of channels, in segments that the network can take.

    for segment in segments(read_blocks(path)): ...

Memory does not grow with the recording: it is read in blocks (data/audio.py), and cut in pauses. Each segment also
holds what is around it, so that every word is whole in at least one of them; `join` says which words of two neighbors
are to be kept.
"""

import os
import select
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

import numpy as np

from data.audio import Mixer
from data.cli import UserError
from data.packed import SAMPLE_RATE
from tools.recognizer import Word

SHORTEST_S, LONGEST_S = 3.0, 12.0  # between two cuts; a LibriSpeech utterance lasts 12 s on average
CONTEXT_S = 0.5  # that a segment holds before and after its cuts
PAUSE_S = 0.3  # a cut is made in the middle of the quietest stretch of this length
PIPE_BYTES = 1 << 20  # the most that Linux lets a pipe hold
_ENERGY_SAMPLES = SAMPLE_RATE // 100


@dataclass(frozen=True)
class Segment:
    """A part of a recording, which overlaps its neighbors by CONTEXT_S on either side of the cuts between them.

    `waveform`, int16 [S] at 16 kHz, begins at `start` (s); `cut` (s) is that to the next segment, None in the last one.
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
        """Whether it is digital silence: then there is nothing to hear, and nothing to normalize features by."""
        return bool((self.waveform == self.waveform[0]).all())


def read_until_interrupt(stream: BinaryIO) -> Iterator[bytes]:
    """Yield what arrives until it ends or SIGINT comes. After that, SIGINT raises KeyboardInterrupt as before."""
    wake, waker = os.pipe()

    def stop(number: int, _: object) -> None:
        signal.signal(number, earlier)
        os.write(waker, b"!")

    earlier = signal.signal(signal.SIGINT, stop)
    try:
        while (ready := select.select([stream.fileno(), wake], [], [])[0]) != [wake]:
            if not (chunk := os.read(stream.fileno(), PIPE_BYTES)):
                return
            yield chunk
            if wake in ready:
                break
        print("Interrupted: the rest is recognized. Ctrl-C again ends at once.", file=sys.stderr)
    finally:
        signal.signal(signal.SIGINT, earlier)
        os.close(wake)
        os.close(waker)


def read_raw(stream: BinaryIO, name: str, rate: int) -> Iterator[np.ndarray]:
    """Yield blocks of int16 samples at 16 kHz of headerless little-endian 16-bit mono audio, as it arrives.

    It ends with the stream or SIGINT; UserError if there was nothing, or half a sample at the end.
    """
    mix = Mixer(name, rate)
    rest, empty = b"", True
    for arrived in read_until_interrupt(stream):
        chunk, empty = rest + arrived, False
        whole = len(chunk) // 2 * 2
        rest = chunk[whole:]
        yield mix(np.frombuffer(chunk[:whole], dtype="<i2")[:, None])
    yield mix.end()
    if empty:
        raise UserError(f"{name} holds no audio")
    if rest:
        raise UserError(f"{name} ends in the middle of a 16-bit sample")


def segments(blocks: Iterable[np.ndarray]) -> Iterator[Segment]:
    """Yield the segments of a recording, in order, from its blocks of int16 samples.

    A UserError that reading the blocks raises comes after the segments of all that came before.
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
                pause = position + _find_pause(held[position - begin : position - begin + longest])
                yield Segment(held[: pause + context - begin].copy(), begin / SAMPLE_RATE, pause / SAMPLE_RATE)
                held = held[pause - context - begin :]
                begin, position = pause - context, pause
    except UserError as error:
        problem = error
    held = np.concatenate([held, *arrived])
    if len(held):
        yield Segment(held, begin / SAMPLE_RATE, None)
    if problem is not None:
        raise problem


def _find_pause(waveform: np.ndarray) -> int:
    """Return the sample, SHORTEST_S or more from the start, in the middle of the quietest stretch of PAUSE_S."""
    frames = len(waveform) // _ENERGY_SAMPLES
    samples = waveform[: frames * _ENERGY_SAMPLES].astype(np.float64).reshape(frames, _ENERGY_SAMPLES)
    energy = np.concatenate([[0.0], np.cumsum(samples.var(axis=1))])
    width = round(PAUSE_S * SAMPLE_RATE / _ENERGY_SAMPLES)
    first = round(SHORTEST_S * SAMPLE_RATE / _ENERGY_SAMPLES)
    stretches = energy[first + width :] - energy[first:-width]
    return (first + int(stretches.argmin())) * _ENERGY_SAMPLES + width * _ENERGY_SAMPLES // 2


def join(cut: float, before: Sequence[Word], after: Sequence[Word]) -> tuple[list[Word], list[Word]]:
    """Return the words to keep of two neighbors, so that each sound is in one word, and none begins before one ends.

    A word is kept if its middle lies on its own segment's side of a joint near the cut, and it is clipped there. Times
    are seconds in the recording.
    """
    joint = _find_joint(cut, [(word.start, word.end) for word in (*before, *after)])
    kept = [replace(word, end=min(word.end, joint)) for word in before if word.start + word.end < 2 * joint]
    return kept, [replace(word, start=max(word.start, joint)) for word in after if word.start + word.end >= 2 * joint]


def _find_joint(cut: float, words: Sequence[tuple[float, float]]) -> float:
    """Return the middle of the longest time, within CONTEXT_S of a cut, in which no word lies.

    Where there is none, the segments heard the same sound as different words: then return the start or end of a word
    that cuts off least of another one.
    """
    low, high = cut - CONTEXT_S, cut + CONTEXT_S
    near = sorted((start, end) for start, end in words if end > low and start < high)
    best, length, free = cut, 0.0, low
    for start, end in [*near, (high, high)]:
        if start - free > length:
            best, length = (free + start) / 2, start - free
        free = max(free, end)
    if length > 0:
        return best

    def cut_off(time: float) -> float:
        return sum(min(time - start, end - time) for start, end in near if start < time < end)

    edges = [min(max(edge, low), high) for word in near for edge in word]
    return min(edges, key=lambda edge: (cut_off(edge), abs(edge - cut)))
