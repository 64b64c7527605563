"""Audio files: how long they are without decoding them, and their samples at 16 kHz mono.

FLAC carries the MD5 of its samples, which is checked. Other formats are read by libsndfile, and what it does not know
by sox, where that is installed. Whatever cannot be read whole is an error that names the file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from data.packed import SAMPLE_RATE, DataError

LONGEST_S = 3600  # an utterance is decoded in memory; no acoustic model is trained on longer ones either
SOX_TIMEOUT_S = 600
# By the code in a FLAC frame's header.
FLAC_RATES = (0, 88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000, 0, 0, 0, 0)
# What libsndfile logs of a file that is shorter than its header says; it then reads what is there without complaint.
CUT_SHORT = re.compile(r"^\s*(?:data|SSND|riff|Data Size)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
# What soundfile raises for files that it does not know, that are damaged, or whose headers ask for absurd memory.
SNDFILE_FAILURES = (soundfile.LibsndfileError, RuntimeError, MemoryError, ValueError)


@dataclass(frozen=True)
class FlacHeader:
    """The STREAMINFO block of a FLAC file. `md5` is that of the decoded samples; all zero where it was not recorded."""

    rate: int
    channels: int
    bits: int
    frames: int
    md5: bytes


def read_flac_header(file: Path) -> FlacHeader:
    """The STREAMINFO block, which the format requires to come first. DataError for a file that has none."""
    with file.open("rb") as stream:
        head = stream.read(42)
    if len(head) < 42 or head[:4] != b"fLaC" or head[4] & 0x7F != 0:
        raise DataError(f"{file} is not a FLAC file")
    fields = int.from_bytes(head[18:26], "big")
    header = FlacHeader(
        rate=fields >> 44,
        channels=(fields >> 41 & 7) + 1,
        bits=(fields >> 36 & 31) + 1,
        frames=fields & (1 << 36) - 1,
        md5=head[26:42],
    )
    _check_length(file, header.frames, header.rate)
    return header


def samples_at_16k(frames: int, rate: int) -> int:
    """The length at 16 kHz, rounded, of so many frames."""
    return max(1, (2 * frames * SAMPLE_RATE + rate) // (2 * rate))


def flac_samples(file: Path) -> int:
    """Length at 16 kHz of a FLAC file, by its header."""
    header = read_flac_header(file)
    return samples_at_16k(header.frames, header.rate)


def decode_flac(file: Path) -> np.ndarray:
    """The samples of a FLAC file at 16 kHz mono: int16 [samples]. DataError where they are not those of its header."""
    header = read_flac_header(file)
    try:
        # libsndfile left-justifies in int32, so that any depth comes out without loss.
        frames, rate = soundfile.read(file, dtype="int16" if header.bits == 16 else "int32", always_2d=True)
    except SNDFILE_FAILURES as error:
        raise DataError(f"{file} cannot be decoded: {error}") from error
    if len(frames) != header.frames:
        raise DataError(f"{file} holds {len(frames)} of {header.frames} frames: cut short")
    # The FLAC format lets an encoder leave the sum out, which it then writes as zeros.
    if any(header.md5) and _flac_md5(frames, header.bits) != header.md5:
        raise DataError(f"{file}: the decoded samples do not have the MD5 of its header")
    if _first_frame_rate(file) not in (0, rate):  # which the sum does not cover
        raise DataError(f"{file}: its header has a rate of {rate} Hz, its first frame another")
    if rate == SAMPLE_RATE and header.channels == 1 and header.bits == 16:
        return frames[:, 0]
    return _mono_at_16k(file, frames, rate, 32768.0 if header.bits == 16 else 2.0**31)


def decode_raw(file: Path) -> np.ndarray:
    """The samples of a headerless big-endian 16-bit file at 16 kHz: int16 [samples]."""
    return np.fromfile(file, dtype=">i2").astype(np.int16)


def any_samples(file: Path) -> int:
    """Length at 16 kHz of an audio file of any format. DataError for what is no audio, or empty, or cut short."""
    with _readable(file) as readable:
        if _is_flac(readable):
            return flac_samples(readable)
        info = soundfile.info(readable, verbose=True)
        if cut := CUT_SHORT.search(info.extra_info):
            raise DataError(f"{file} is cut short: it has {cut[2]} of {cut[1]} bytes of audio")
        frames, rate = info.frames, info.samplerate
        _check_length(file, frames, rate)
        if info.format == "MP3":  # the header of an MP3 file need not tell its length, or not exactly
            try:
                frames = len(soundfile.read(readable, dtype="int16", always_2d=True)[0])
            except SNDFILE_FAILURES as error:
                raise DataError(f"{file} cannot be decoded: {error}") from error
            _check_length(file, frames, rate)
    return samples_at_16k(frames, rate)


def decode_any(file: Path) -> np.ndarray:
    """The samples of an audio file of any format at 16 kHz mono: int16 [samples]."""
    with _readable(file) as readable:
        if _is_flac(readable):
            return decode_flac(readable)
        try:
            exact = soundfile.info(readable).subtype == "PCM_16"
            frames, rate = soundfile.read(readable, dtype="int16" if exact else "float64", always_2d=True)
        except SNDFILE_FAILURES as error:
            raise DataError(f"{file} cannot be decoded: {error}") from error
    if exact and rate == SAMPLE_RATE and frames.shape[1] == 1:
        return frames[:, 0]
    return _mono_at_16k(file, frames, rate, 32768.0 if exact else 1.0)


def _check_length(file: Path, frames: int, rate: int) -> None:
    if rate <= 0 or frames <= 0:
        raise DataError(f"{file} holds no audio, by its header")
    if frames > LONGEST_S * rate:
        raise DataError(f"{file} is {frames / rate / 3600:.1f} h long, by its header; cut it: an hour is the most")


def _mono_at_16k(file: Path, frames: np.ndarray, rate: int, scale: float) -> np.ndarray:
    """Channels averaged and resampled: `frames` [frames, channels] of full scale `scale` become int16 [samples]."""
    mono = frames.mean(axis=1, dtype=np.float64) / scale
    if not np.isfinite(mono).all():
        raise DataError(f"{file} holds samples that are not finite numbers")
    if rate != SAMPLE_RATE:
        samples = samples_at_16k(len(mono), rate)
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="VHQ")[:samples]
        mono = np.pad(mono, (0, samples - len(mono)))
    return np.clip(np.rint(mono * 32768.0), -32768, 32767).astype(np.int16)


def _first_frame_rate(file: Path) -> int:
    """The rate that the first audio frame of a FLAC file states; 0 where it does so by no code, or there is none."""
    with file.open("rb") as stream:
        stream.seek(4)
        last = False
        while not last and len(block := stream.read(4)) == 4:
            last = block[0] >= 0x80
            stream.seek(int.from_bytes(block[1:], "big"), os.SEEK_CUR)
        frame = stream.read(3)
    return FLAC_RATES[frame[2] & 15] if len(frame) == 3 and frame[0] == 0xFF else 0


def _flac_md5(frames: np.ndarray, bits: int) -> bytes:
    """MD5 as FLAC defines it: samples interleaved, little-endian, in the fewest whole bytes that hold `bits`."""
    if bits == 16:
        return hashlib.md5(np.ascontiguousarray(frames, dtype="<i2").data).digest()
    width = (bits + 7) // 8
    samples = np.ascontiguousarray(frames >> (32 - bits), dtype="<i4")
    return hashlib.md5(samples.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()).digest()


def _is_flac(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"fLaC"


@contextmanager
def _readable(file: Path) -> Iterator[Path]:
    """The file itself where libsndfile can open it, else a WAV file that sox makes of it."""
    if not file.is_file():
        raise DataError(f"{file} is missing or not a file")
    if file.suffix.lower() == ".raw":
        raise DataError(f"{file} has no header that tells rate and encoding; convert it, such as to WAV")
    try:
        soundfile.info(file)
    except SNDFILE_FAILURES as error:
        reason = error
    else:
        yield file
        return
    if _is_flac(file):  # its own checks say more about what is wrong with it than sox would
        read_flac_header(file)
        raise DataError(f"{file} cannot be decoded: {reason}")
    if shutil.which("sox") is None:
        raise DataError(
            f"{file} is in no format that libsndfile reads ({reason}), and sox, which knows more of them, is not "
            "installed; on Debian and Ubuntu: apt-get install sox libsox-fmt-all"
        )
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "audio.wav"
        # An absolute path, and no globbing: sox would take '|...' for a command and '*' for a pattern.
        command = ["sox", "-V1", "--no-dither", "--no-glob", str(file.absolute()), "-b", "32", str(converted)]
        try:
            run = subprocess.run(command, capture_output=True, timeout=SOX_TIMEOUT_S, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise DataError(f"{file}: sox was not done with it after {SOX_TIMEOUT_S} s") from None
        if run.returncode != 0 or not converted.exists():
            told = run.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {run.returncode}"]
            raise DataError(f"{file} can be read neither by libsndfile ({reason}) nor by sox ({told[-1]})")
        yield converted
