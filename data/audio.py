"""Audio files: which can be read, how long they are, and their samples at 16 kHz mono.

FLAC carries the MD5 of its samples, which is checked. Other formats are read by libsndfile, and what it does not know
by sox or ffmpeg, where they are installed (open_recording). Whatever cannot be read whole is an error that names the
file.
"""

from __future__ import annotations

import hashlib
import mmap
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
# A page of Ogg that begins a stream behind one that does not; the frame that tells the length of an MP3 stream.
OGG_CHAIN = re.compile(rb"OggS\0[\0\1\4\5].*OggS\0[\2\6]", re.DOTALL)
MP3_INFO = re.compile(rb"\xff[\xe2-\xfb].{2,4}?\0{9,32}(?:Xing|Info)\0\0\0(.)(.{8})", re.DOTALL)
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
    """Open an audio file of any format by libsndfile, or else what sox or ffmpeg make of it: 16 bits, 16 kHz, mono.

    DataError for what none of them reads, for headerless audio, and for rates that nobody records at.
    """
    if not file.is_file():
        raise DataError(f"{file} is missing or not a file")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty (0 bytes)")
    with ExitStack() as opened:
        try:
            audio = opened.enter_context(soundfile.SoundFile(file))
            reason = "it reads the first of several streams" if _has_more_streams(file, audio.format) else None
            programs = ["ffmpeg"]  # sox may read no more of them either
        except (*SNDFILE_FAILURES, TypeError) as error:  # which soundfile raises for names of headerless audio
            reason, programs = getattr(error, "error_string", str(error)), ["sox", "ffmpeg"]
        if reason is not None:
            folder = opened.enter_context(tempfile.TemporaryDirectory())
            audio = opened.enter_context(_convert(file, Path(folder), programs, reason))
        if not LOWEST_RATE <= audio.samplerate <= HIGHEST_RATE:
            raise DataError(
                f"{file} has a rate of {audio.samplerate} Hz; from {LOWEST_RATE} to {HIGHEST_RATE} Hz are understood"
            )
        yield audio


def tells_length(audio: soundfile.SoundFile) -> bool:
    """Return whether the header tells the length exactly, as those of MP3 and Ogg and of FLAC from a pipe need not."""
    exact = audio.format not in ("MP3", "OGG") and not audio.subtype.startswith("MPEG_LAYER")
    return exact and audio.frames < 1 << 62


def find_cut(audio: soundfile.SoundFile) -> re.Match[str] | None:
    """Return the bytes of audio that the header claims and those that there are, as groups, if the file is cut short.

    What is written into a pipe claims 0 or the most there can be, or thereabouts: that is no claim.
    """
    cut = CUT_SHORT.search(audio.extra_info)
    claimed = int(cut[1]) if cut else 0
    return None if claimed == 0 or 0x7F000000 <= claimed <= 0x80000000 or claimed >= 0xFFFFFF00 else cut


def any_num_samples(file: Path) -> int:
    """Return the length at 16 kHz of an audio file. DataError for what is no audio, or empty, or cut short."""
    with open_recording(file) as audio:
        if audio.format == "FLAC":
            header = read_flac_header(file)
            return resampled_length(header.frames, header.rate)
        if cut := find_cut(audio):
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


def _has_more_streams(file: Path, format: str) -> bool:
    """Return whether a file of MP3 or Ogg goes on behind the stream that libsndfile reads, as where two are joined."""
    if format not in ("MP3", "OGG"):
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if format == "OGG":
            return OGG_CHAIN.search(content) is not None
        info = MP3_INFO.search(content)
        if info is None or not info[1][0] & 2:  # without the number of its bytes all frames are read
            return False
        at = 4 if info[1][0] & 1 else 0
        end = info.start() + int.from_bytes(info[2][at : at + 4], "big")
        return re.match(rb"(?:TAG.{125})?(?:ID3|\xff[\xe2-\xfb])", content[end : end + 131], re.DOTALL) is not None


def _convert(file: Path, folder: Path, programs: list[str], reason: str) -> soundfile.SoundFile:
    """Open the WAV file that the first able program makes of another; `reason` is why libsndfile does not read it."""
    if file.suffix.lower().removeprefix(".") in HEADERLESS.split():
        raise DataError(f"{file} has no header that tells rate and encoding; convert it, such as to WAV")
    converted = folder / "audio.wav"
    # An absolute path, and no globbing: sox would take '|...' for a command and '*' for a pattern.
    sox = ["-V1", "--no-dither", "--no-glob", str(file.absolute()), "-r", str(SAMPLE_RATE), "-c", "1", "-b", "16"]
    ffmpeg = ["-v", "error", "-i", f"file:{file.absolute()}", "-map", "0:a:0", "-ar", str(SAMPLE_RATE), "-ac", "1"]
    options = {"sox": [*sox, "-e", "signed-integer"], "ffmpeg": [*ffmpeg, "-c:a", "pcm_s16le"]}
    failures = []
    for program in programs:
        if shutil.which(program) is None:
            failures.append(f"{program} (not installed)")
            continue
        command = [program, *options[program], str(converted)]
        run = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
        with suppress(*SNDFILE_FAILURES):
            if run.returncode == 0:
                return soundfile.SoundFile(converted)
        told = run.stderr.decode(errors="replace").strip().splitlines() or ["no audio"]
        failures.append(f"{program} ({told[-1]})")
    advice = f"; convert it: ffmpeg -i {file.name} {file.stem}.wav" if shutil.which("ffmpeg") is None else ""
    raise DataError(f"{file} can be read neither by libsndfile ({reason}) nor by {' nor by '.join(failures)}{advice}")
