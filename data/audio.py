"""Recordings of any format: how long they are, and their samples at 16 kHz mono.

libsndfile reads FLAC with an MD5 and uncompressed WAV; PyAV, which has FFmpeg in it, everything else. data/README.md
says what is promised of both. No other program is run, no other file read.
"""

import hashlib
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path

import numpy as np
import soundfile
import soxr

from data.cli import UserError
from data.packed import SAMPLE_RATE
from data.pyav import open_av

LONGEST_S = 3600  # an utterance is decoded in memory; no acoustic model is trained on longer ones either
LOWEST_RATE, HIGHEST_RATE = 1000, 1_000_000  # Hz
HIGHEST_PEAK = 16.0  # of full scale: mastering and lossy codecs go beyond 1, but not that far
BLOCK_SAMPLES = 1 << 13  # up to this many samples of all channels before damage are lost
BYTE_ORDERS = {b"RIFF": "<", b"RF64": "<", b"BW64": "<", b"RIFX": ">", b"FORM": ">"}
WAVE, UNCOMPRESSED = ("WAV", "WAVEX", "RF64"), ("PCM", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # of libsndfile
FLAC_BYTES = {"PCM_S8": 1, "PCM_16": 2, "PCM_24": 3}  # in a sample; libsndfile decodes no others
# What soundfile raises for files that are damaged, or whose headers ask for absurd memory.
SNDFILE_FAILURES = (soundfile.LibsndfileError, RuntimeError, MemoryError, ValueError, TypeError)


def resampled_length(frames: int, rate: int) -> int:
    """Return the length at 16 kHz, rounded, of this many frames."""
    return max(1, (2 * frames * SAMPLE_RATE + rate) // (2 * rate))


def num_samples(file: Path, only_rate: int | None = None) -> int:
    """Return the length at 16 kHz, by the header where that tells it. UserError if damaged, or of another rate."""
    with _open(file) as (mix, told, blocks):
        if only_rate not in (None, mix.rate):
            raise UserError(f"{file} has a rate of {mix.rate} Hz, not {only_rate} Hz")
        frames = sum(map(len, blocks)) if told is None else told
        if frames <= 0:
            raise UserError(f"{file} holds no audio, by its header")
        if frames > LONGEST_S * mix.rate:
            raise UserError(f"{file} is {frames / mix.rate:.0f} s long; cut it: {LONGEST_S} s are the most")
        return resampled_length(frames, mix.rate)


def decode_audio(file: Path) -> tuple[np.ndarray, int]:
    """Return the samples at 16 kHz mono, int16 [samples], and how many were clipped. UserError says what is wrong."""
    with _open(file, quiet=True) as (mix, _, blocks):
        return np.concatenate([*map(mix, blocks), mix.end()]), mix.clipped


def read_blocks(file: Path) -> Iterator[np.ndarray]:
    """Yield the same samples in blocks. UserError may come after some of them."""
    with _open(file) as (mix, _, blocks):
        yield from map(mix, blocks)
        yield mix.end()


class Mixer:
    """Blocks of frames of any rate and number of channels -> blocks of int16 samples at 16 kHz; `clipped` counts."""

    def __init__(self, name: Path | str, rate: int) -> None:
        """UserError for a rate that nobody records at."""
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise UserError(f"{name} has a rate of {rate} Hz; from {LOWEST_RATE} to {HIGHEST_RATE} Hz are understood")
        self.rate = rate
        self._stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, "float32", "VHQ")
        self._frames = self._samples = self.clipped = 0

    def __call__(self, block: np.ndarray) -> np.ndarray:
        """Average the channels of frames, int16 or float32 of full scale 1 [frames, channels], and resample them."""
        self._frames += len(block)
        if block.dtype == np.int16:
            if block.shape[1] == 1 and self._stream is None:
                return block[:, 0]
            block = block.astype(np.float32) / 32768
        mono = block.mean(axis=1)
        return self._rounded(mono if self._stream is None else self._stream.resample_chunk(mono))

    def end(self) -> np.ndarray:
        """Return the samples that the resampler still holds; all together are as many as resampled_length tells."""
        if self._stream is None:
            return np.zeros(0, dtype=np.int16)
        rest = self._stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)
        missing = resampled_length(self._frames, self.rate) - self._samples
        return self._rounded(np.pad(rest[:missing], (0, max(0, missing - len(rest)))))

    def _rounded(self, block: np.ndarray) -> np.ndarray:
        self._samples += len(block)
        scaled = np.rint(block * 32768.0)
        clipped = np.clip(scaled, -32768, 32767)
        # A full scale of 1 is one step beyond what 16 bits hold; that is what every format does at its loudest.
        self.clipped += int((np.abs(scaled - clipped) > 1).sum())
        return clipped.astype(np.int16)


@contextmanager
def _open(file: Path, quiet: bool = False) -> Iterator[tuple[Mixer, int | None, Iterator[np.ndarray]]]:
    """Open a recording: a Mixer for its rate, its frames by a header that tells them exactly, and its blocks.

    A block is [frames, channels] of int16, or of float32 of full scale 1. Unless `quiet`, print which stream of several
    is used. UserError for what nothing reads, and as Mixer has it; later for what is damaged.
    """
    try:
        if not file.is_file():
            raise UserError(f"{file} is missing or not a file")
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty (0 bytes)")
        with file.open("rb", buffering=0) as stream, ExitStack() as opened:
            problem = _wrong_sizes(stream, file.stat().st_size)
            stream.seek(0)
            head = stream.read(42)
            md5 = head[26:] if head.startswith(b"fLaC") else b""
            stream.seek(0)
            try:
                audio = opened.enter_context(soundfile.SoundFile(stream.fileno(), closefd=False))
            except SNDFILE_FAILURES as error:
                if md5:
                    raise UserError(f"{file} cannot be decoded: {error}") from error
                audio = None
            uncompressed = audio is not None and audio.format in WAVE and audio.subtype.startswith(UNCOMPRESSED)
            checked = audio is not None and audio.format == "FLAC" and any(md5)  # a change of rate, too
            if audio is not None and (checked or uncompressed):
                known = audio.frames < 1 << 62 and not problem  # not of FLAC that was written into a pipe
                frames = audio.frames if known else None
                rate, blocks = audio.samplerate, _sndfile_blocks(file, audio, md5)
            else:
                frames, (rate, blocks, note) = None, opened.enter_context(open_av(file, stream))
                if note and not quiet:
                    print(f"{file}: {note}", file=sys.stderr)
            yield Mixer(file, rate), frames, _checked(file, rate, blocks, problem)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def _checked(file: Path, rate: int, blocks: Iterator[np.ndarray], problem: str) -> Iterator[np.ndarray]:
    """Yield the blocks; UserError where samples or their number cannot be right, or sizes have told a problem."""
    frames = 0
    for block in blocks:
        peak = 0.0 if block.dtype == np.int16 else float(np.abs(block).max())
        if not peak <= HIGHEST_PEAK:  # nor is it NaN
            wrong = f"samples {peak:.0f} times full scale, after {frames / rate:.2f} s"
            raise UserError(f"{file} has {wrong}: damaged, or integers in a file of floats?")
        frames += len(block)
        yield block
    if problem or frames == 0:
        raise UserError(f"{file} {problem or 'holds no audio'}")


def _wrong_sizes(stream: FileIO, size: int) -> str:
    """Return what is wrong with the chunks of a WAV or AIFF file; nothing for other files."""
    head = stream.read(36)
    order, at = BYTE_ORDERS.get(head[:4]), 12
    while order and head[8:12] in (b"WAVE", b"AIFF", b"AIFC") and at + 8 <= size:
        stream.seek(at)
        name, length = struct.unpack(f"{order}4sI", stream.read(8))
        if name in BYTE_ORDERS or not re.fullmatch(rb"[ -~]{4}", name):
            return f"has {size - at} bytes behind its last chunk: was it not closed, is it beyond 4 GiB, or joined?"
        if length == 0xFFFFFFFF and head[12:16] == b"ds64":
            length = int.from_bytes(head[28:36], "little")
        present = size - at - 8
        if present < length < 1 << 32 and (length >= 0xFFFFFF00 or 0x7F000000 <= length <= 0x80000000):
            return ""  # written into a pipe: a number about the maximum says nothing
        if present < length:
            return f"is cut short: it has {present} of {length} bytes"
        at += 8 + length + length % 2
    return ""


def _sndfile_blocks(file: Path, audio: soundfile.SoundFile, md5: bytes) -> Iterator[np.ndarray]:
    """Yield blocks of FLAC, whose samples must have this MD5, or of uncompressed WAV, which has none."""
    audio.seekable = lambda: False  # else soundfile seeks after each block, and fails where the length is unknown
    dtype = "int16" if audio.subtype == "PCM_16" else "int32" if md5 else "float32"
    frames, digest = 0, hashlib.md5()
    while True:
        try:
            block = audio.read(max(1, BLOCK_SAMPLES // audio.channels), dtype=dtype, always_2d=True)
        except SNDFILE_FAILURES as error:
            raise UserError(f"{file} cannot be decoded after {frames / audio.samplerate:.2f} s: {error}") from error
        if len(block) == 0:
            break
        frames += len(block)
        if md5:  # of little-endian samples in the fewest bytes, which are the upper ones here
            content = block.view(np.uint8).reshape(-1, block.itemsize)
            digest.update(content[:, block.itemsize - FLAC_BYTES[audio.subtype] :].tobytes())
        yield (block / 2.0**31).astype(np.float32) if dtype == "int32" else block
    if frames < audio.frames < 1 << 62:
        raise UserError(f"{file} is cut short: it holds {frames} of {audio.frames} frames")
    if md5 and digest.digest() != md5:
        raise UserError(f"{file}: the decoded samples do not have the MD5 of its header")
