"""Audio files: which can be read, how long they are, and their samples at 16 kHz mono.

FLAC carries the MD5 of its samples, which is checked. Other formats are read by libsndfile, and what it does not know
by sox, where that is installed (open_recording). Whatever cannot be read whole is an error that names the file.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from data.files import DataError
from data.packed import SAMPLE_RATE

LONGEST_S = 3600  # an utterance is decoded in memory; no acoustic model is trained on longer ones either
LOWEST_RATE, HIGHEST_RATE = 1000, 1_000_000  # Hz
# For which sox would guess rate or encoding.
HEADERLESS = (
    "raw pcm s8 u8 s16 s24 s32 u16 u24 u32 f32 f64 sb sw sl ub uw sln al ul la lu gsm vox cdr cdda cvs cvsd cvu "
    "fssd ima lpc lpc10 snd"
)
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
    """Read the STREAMINFO block, which the format requires to come first. DataError for a file that has none."""
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


def resampled_length(frames: int, rate: int) -> int:
    """Return the length at 16 kHz, rounded, of so many frames."""
    return max(1, (2 * frames * SAMPLE_RATE + rate) // (2 * rate))


def decode_flac(file: Path) -> np.ndarray:
    """Return the samples of a FLAC file at 16 kHz mono: int16 [samples]. DataError if its header has another MD5."""
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
    if rate == SAMPLE_RATE and header.channels == 1 and header.bits == 16:
        return frames[:, 0]
    return _mono_at_16k(file, frames, rate, 32768.0 if header.bits == 16 else 2.0**31)


def decode_raw(file: Path) -> np.ndarray:
    """Return the samples of a headerless big-endian 16-bit file at 16 kHz: int16 [samples]."""
    return np.fromfile(file, dtype=">i2").astype(np.int16)


@contextmanager
def open_recording(file: Path) -> Iterator[soundfile.SoundFile]:
    """Open an audio file of any format by libsndfile, or else what sox makes of it: 16 bits, 16 kHz, mono.

    DataError for what neither reads, for headerless audio, and for rates that nobody records at.
    """
    if not file.is_file():
        raise DataError(f"{file} is missing or not a file")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty (0 bytes)")
    with ExitStack() as opened:
        try:
            audio = opened.enter_context(soundfile.SoundFile(file))
        except (*SNDFILE_FAILURES, TypeError) as error:  # which soundfile raises for names of headerless audio
            folder = opened.enter_context(tempfile.TemporaryDirectory())
            audio = opened.enter_context(_convert_by_sox(file, Path(folder), str(error).strip()))
        if not LOWEST_RATE <= audio.samplerate <= HIGHEST_RATE:
            raise DataError(
                f"{file} has a rate of {audio.samplerate} Hz; from {LOWEST_RATE} to {HIGHEST_RATE} Hz are understood"
            )
        yield audio


def tells_length(audio: soundfile.SoundFile) -> bool:
    """Return whether the header must tell the length exactly, as those of MP3 and Ogg need not."""
    return audio.format not in ("MP3", "OGG") and not audio.subtype.startswith("MPEG_LAYER")


def any_num_samples(file: Path) -> int:
    """Return the length at 16 kHz of an audio file. DataError for what is no audio, or empty, or cut short."""
    with open_recording(file) as audio:
        if audio.format == "FLAC":
            header = read_flac_header(file)
            return resampled_length(header.frames, header.rate)
        if cut := CUT_SHORT.search(audio.extra_info):
            raise DataError(f"{file} is cut short: it has {cut[2]} of {cut[1]} bytes of audio")
        _check_length(file, audio.frames, audio.samplerate)
        frames, rate = audio.frames, audio.samplerate
        if not tells_length(audio):
            frames = len(_read(file, audio, "int16"))
            _check_length(file, frames, rate)
    return resampled_length(frames, rate)


def decode_any(file: Path) -> np.ndarray:
    """Return the samples of an audio file of any format at 16 kHz mono: int16 [samples]."""
    with open_recording(file) as audio:
        if audio.format == "FLAC":
            return decode_flac(file)
        exact, rate = audio.subtype == "PCM_16", audio.samplerate
        frames = _read(file, audio, "int16" if exact else "float64")
    if exact and rate == SAMPLE_RATE and frames.shape[1] == 1:
        return frames[:, 0]
    return _mono_at_16k(file, frames, rate, 32768.0 if exact else 1.0)


def _read(file: Path, audio: soundfile.SoundFile, dtype: str) -> np.ndarray:
    try:
        return audio.read(dtype=dtype, always_2d=True)
    except SNDFILE_FAILURES as error:
        raise DataError(f"{file} cannot be decoded: {error}") from error


def _check_length(file: Path, frames: int, rate: int) -> None:
    if rate <= 0 or frames <= 0:
        raise DataError(f"{file} holds no audio, by its header")
    if frames > LONGEST_S * rate:
        raise DataError(f"{file} is {frames / rate:.0f} s long, by its header; cut it: {LONGEST_S} s are the most")


def _mono_at_16k(file: Path, frames: np.ndarray, rate: int, scale: float) -> np.ndarray:
    """Average channels and resample: `frames` [frames, channels] of full scale `scale` become int16 [samples]."""
    mono = frames.mean(axis=1, dtype=np.float64) / scale
    if not np.isfinite(mono).all():
        raise DataError(f"{file} holds samples that are not finite numbers")
    if rate != SAMPLE_RATE:
        samples = resampled_length(len(mono), rate)
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="VHQ")[:samples]
        mono = np.pad(mono, (0, samples - len(mono)))
    return np.clip(np.rint(mono * 32768.0), -32768, 32767).astype(np.int16)


def _flac_md5(frames: np.ndarray, bits: int) -> bytes:
    """Return the MD5 as FLAC defines it: of interleaved, little-endian samples, each in the fewest whole bytes."""
    if bits == 16:
        return hashlib.md5(np.ascontiguousarray(frames, dtype="<i2").data).digest()
    width = (bits + 7) // 8
    samples = np.ascontiguousarray(frames >> (32 - bits), dtype="<i4")
    return hashlib.md5(samples.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()).digest()


def _convert_by_sox(file: Path, folder: Path, reason: str) -> soundfile.SoundFile:
    """Open the WAV file that sox makes of another in `folder`; `reason` is why libsndfile does not read that."""
    if file.suffix.lower().removeprefix(".") in HEADERLESS.split():
        raise DataError(f"{file} has no header that tells rate and encoding; convert it, such as to WAV")
    if shutil.which("sox") is None:
        raise DataError(
            f"{file} is in no format that libsndfile reads ({reason}), and sox, which knows more of them, is not "
            "installed; on Debian and Ubuntu: apt-get install sox libsox-fmt-all"
        )
    converted = folder / "audio.wav"
    # An absolute path, and no globbing: sox would take '|...' for a command and '*' for a pattern.
    command = ["sox", "-V1", "--no-dither", "--no-glob", str(file.absolute())]
    command += ["-r", str(SAMPLE_RATE), "-c", "1", "-b", "16", "-e", "signed-integer", str(converted)]
    run = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    with suppress(*SNDFILE_FAILURES):
        if run.returncode == 0:
            return soundfile.SoundFile(converted)
    told = run.stderr.decode(errors="replace").strip().splitlines() or ["no audio"]
    raise DataError(f"{file} can be read neither by libsndfile ({reason}) nor by sox ({told[-1]})")
