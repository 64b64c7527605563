"""Audio files of any format: how long they are, and their samples at 16 kHz mono.

libsndfile reads them, and what it does not know sox or ffmpeg, where they are installed (open_recording). Every command
reads by the same rules. Whatever cannot be read whole is an error that names the file: cut short by the sizes in its
header, damaged by the MD5 in a FLAC file's, or what the decoder finds.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import soundfile
import soxr

from data.cli import DataError
from data.packed import SAMPLE_RATE

LONGEST_S = 3600  # an utterance is decoded in memory; no acoustic model is trained on longer ones either
LOWEST_RATE, HIGHEST_RATE = 1000, 1_000_000  # Hz
HIGHEST_PEAK = 16.0  # of full scale: mastering and lossy codecs go beyond 1, but not that far
BLOCK_SAMPLES = 1 << 13  # read at once, of all channels together; what precedes damage by less than that is lost
# For which sox would guess rate or encoding.
HEADERLESS = (
    "raw pcm s8 u8 s16 s24 s32 u16 u24 u32 f32 f64 sb sw sl ub uw sln al ul la lu gsm vox cdr cdda cvs cvsd cvu "
    "fssd ima lpc lpc10 snd"
)
# By the first bytes of a file: where its chunks begin, the layout of name and size, the chunk of samples, alignment.
CHUNKS = {
    b"RIFF": (12, "<4sI", b"data", 2),
    b"RIFX": (12, ">4sI", b"data", 2),
    b"RF64": (12, "<4sI", b"data", 2),
    b"FORM": (12, ">4sI", b"SSND", 2),
    b"riff": (40, "<16sQ", b"data\xf3\xac\xd3\x11\x8c\xd1\0\xc0O\x8e\xdb\x8a", 8),
}
MOST_CHUNKS = 1000
# A page of Ogg that begins a stream after one that does not; the frame that tells the length of an MP3 stream; AAC.
OGG_CHAIN = re.compile(rb"OggS\0[\0\1\4\5].*OggS\0[\2\6]", re.DOTALL)
MP3_INFO = re.compile(rb"\xff[\xe2-\xfb].{2,4}?\0{9,32}(?:Xing|Info)\0\0\0(.)(.{8})", re.DOTALL)
ADTS = re.compile(rb"\xff[\xf0\xf1\xf8\xf9]")
# A frame of MPEG's layer III, and what in the first one may tell how many there are. kbit/s by number, in MPEG 1 and 2.
MP3_FRAME, MP3_COUNT = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]"), re.compile(rb"Xing|Info|VBRI")
MP3_KBITS_1 = (0, *range(32, 65, 8), *range(80, 129, 16), *range(160, 257, 32), 320, 0)
MP3_KBITS_2 = (0, *range(8, 57, 8), *range(64, 161, 16), 0)
# What the codes in the header of a FLAC frame stand for; 0: what the header of the file says.
FLAC_RATES = (0, 88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)
FLAC_BITS = (0, 8, 12, 0, 16, 20, 24, 32)
# What soundfile raises for files that it does not know, that are damaged, or whose headers ask for absurd memory.
SNDFILE_FAILURES = (soundfile.LibsndfileError, RuntimeError, MemoryError, ValueError)


def read_flac_header(file: Path) -> tuple[int, int, bytes]:
    """Return rate, bits and MD5 of a FLAC file's samples, by its header; 0, 0 and nothing for other files.

    The MD5 is zeros where the encoder left it out.
    """
    with file.open("rb") as stream:
        head = stream.read(42)
    if head[:4] != b"fLaC":
        return 0, 0, b""
    fields = int.from_bytes(head[18:22], "big")
    return fields >> 12, (fields >> 4 & 31) + 1, head[26:]


def _check_flac_frames(file: Path, frames: int) -> None:
    """Raise DataError if fewer FLAC frames than that many samples need have the rate and depth of the file's header.

    libsndfile would decode the others as if they had. What looks like a frame's header by chance, once in some
    megabytes, only adds to their number.
    """
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = max(0, content.find(b"fLaC"))
        fields = int.from_bytes(content[start + 18 : start + 26], "big")
        most, rate, bits = (
            int.from_bytes(content[start + 10 : start + 12], "big"),
            fields >> 44,
            (fields >> 36 & 31) + 1,
        )
        rates = {0, FLAC_RATES.index(rate)} if rate in FLAC_RATES else {0, 12, 13, 14}
        depths = {0, FLAC_BITS.index(bits)} if bits in FLAC_BITS else {0}
        third = bytes(byte for byte in range(16, 256) if byte & 15 in rates)
        fourth = bytes(byte for byte in range(0, 176, 2) if byte >> 1 & 7 in depths)
        alike = re.findall(rb"\xff[\xf8\xf9][%b][%b]" % (re.escape(third), re.escape(fourth)), content)
    if len(alike) * most < frames:
        raise DataError(f"{file}: not all of it has the rate and depth of its header, {rate} Hz and {bits} bits")


def resampled_length(frames: int, rate: int) -> int:
    """Return the length at 16 kHz, rounded, of this many frames."""
    return max(1, (2 * frames * SAMPLE_RATE + rate) // (2 * rate))


def num_samples(file: Path, convert: bool = True) -> int:
    """Return the length at 16 kHz of an audio file, by its header where that tells it.

    DataError for what is not audio, is empty, or is cut short. Without `convert`, neither sox nor ffmpeg is tried.
    """
    with open_recording(file, convert) as audio:
        _check_whole(file, audio.frames)
        frames, rate = audio.frames, audio.samplerate
        if not _tells_length(audio):
            frames = sum(map(len, _read_frames(file, audio)))
    if frames <= 0:
        raise DataError(f"{file} holds no audio, by its header")
    if frames > LONGEST_S * rate:
        raise DataError(f"{file} is {frames / rate:.0f} s long, by its header; cut it: {LONGEST_S} s are the most")
    return resampled_length(frames, rate)


def decode_audio(file: Path, convert: bool = True) -> tuple[np.ndarray, int]:
    """Return the samples of an audio file at 16 kHz mono, int16 [samples], and how many of them had to be clipped.

    DataError says what is wrong with it.
    """
    with open_recording(file, convert) as audio:
        mix = Mixer(file, audio.samplerate)
        waveform = np.concatenate([*map(mix, _read_frames(file, audio)), mix.end()])
    return waveform, mix.clipped


def read_blocks(file: Path) -> Iterator[np.ndarray]:
    """Yield the same samples in blocks. DataError may come after some of them."""
    with open_recording(file) as audio:
        mix = Mixer(file, audio.samplerate)
        yield from map(mix, _read_frames(file, audio))
        yield mix.end()


class Mixer:
    """Blocks of frames of any rate and number of channels -> blocks of int16 samples at 16 kHz; `clipped` counts."""

    def __init__(self, name: Path | str, rate: int) -> None:
        check_rate(name, rate)
        self._rate = rate
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
        missing = resampled_length(self._frames, self._rate) - self._samples
        return self._rounded(np.pad(rest[:missing], (0, max(0, missing - len(rest)))))

    def _rounded(self, block: np.ndarray) -> np.ndarray:
        self._samples += len(block)
        scaled = np.rint(block * 32768.0)
        clipped = np.clip(scaled, -32768, 32767)
        # A full scale of 1 is one step beyond what 16 bits hold; that is what every format does at its loudest.
        self.clipped += int((np.abs(scaled - clipped) > 1).sum())
        return clipped.astype(np.int16)


def check_rate(name: Path | str, rate: int) -> None:
    """Raise DataError for a rate that nobody records at."""
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise DataError(f"{name} has a rate of {rate} Hz; from {LOWEST_RATE} to {HIGHEST_RATE} Hz are understood")


@contextmanager
def open_recording(file: Path, convert: bool = True) -> Iterator[soundfile.SoundFile]:
    """Open an audio file of any format by libsndfile, or else what sox or ffmpeg make of it: 16 bits, 16 kHz, mono.

    DataError for what none of them reads, for headerless audio, and for rates that nobody records at.
    """
    if not file.is_file():
        raise DataError(f"{file} is missing or not a file")
    if file.stat().st_size == 0:
        raise DataError(f"{file} is empty (0 bytes)")
    with ExitStack() as opened:
        try:
            audio = opened.enter_context(soundfile.SoundFile(os.fsencode(file)))
            reason, programs = _misread(file, audio.format), ["ffmpeg"]  # sox may read no more of them either
        except (*SNDFILE_FAILURES, TypeError) as error:  # which soundfile raises for names of headerless audio
            reason, programs = getattr(error, "error_string", str(error)), ["sox", "ffmpeg"]
        if reason is not None and not convert:
            raise DataError(f"{file} cannot be decoded: {reason}")
        if reason is not None:
            folder = opened.enter_context(tempfile.TemporaryDirectory())
            audio = opened.enter_context(_convert(file, Path(folder), programs, reason))
        check_rate(file, audio.samplerate)
        yield audio


def _tells_length(audio: soundfile.SoundFile) -> bool:
    """Return whether the header tells the length exactly, as those of MP3 and Ogg and of FLAC from a pipe need not."""
    exact = audio.format not in ("MP3", "OGG") and not audio.subtype.startswith("MPEG_LAYER")
    return exact and audio.frames < 1 << 62


def _read_frames(file: Path, audio: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """Yield blocks [frames, channels]: int16 where the file has 16 bits, else float32 of full scale 1."""
    # Else soundfile seeks after each block, which is slow, and fails in a FLAC file of unknown length.
    audio.seekable = lambda: False
    _, bits, expected = read_flac_header(file) if audio.format == "FLAC" else (0, 0, b"")  # not of what sox made of it
    dtype = "int16" if audio.subtype == "PCM_16" else "float32"
    if audio.format == "FLAC" and _tells_length(audio):
        _check_flac_frames(file, audio.frames)
    frames, md5 = 0, hashlib.md5()
    while True:
        at = f"{frames / audio.samplerate:.2f} s"
        try:
            block = audio.read(max(1, BLOCK_SAMPLES // audio.channels), dtype=dtype, always_2d=True)
        except SNDFILE_FAILURES as error:
            raise DataError(f"{file} cannot be decoded after {at}: {error}") from error
        if len(block) == 0:
            break
        peak = float(np.abs(block).max()) if dtype == "float32" else 0.0
        if not math.isfinite(peak):
            raise DataError(f"{file} holds samples that are not finite numbers, after {at}")
        if peak > HIGHEST_PEAK:
            raise DataError(
                f"{file} has samples {peak:.0f} times full scale, after {at}: integers in a file of floats?"
            )
        frames += len(block)
        if any(expected):
            md5.update(_flac_bytes(block, bits))
        yield block
    _check_whole(file, frames)
    if frames == 0:
        raise DataError(f"{file} holds no audio")
    if audio.format == "FLAC" and not _tells_length(audio):
        _check_flac_frames(file, frames)
    if frames < audio.frames and _tells_length(audio):
        raise DataError(f"{file} is cut short: it holds {frames} of {audio.frames} frames")
    if any(expected) and md5.digest() != expected:
        raise DataError(f"{file}: the decoded samples do not have the MD5 of its header")


def _flac_bytes(block: np.ndarray, bits: int) -> bytes:
    """Return what the MD5 of a FLAC file is of: interleaved, little-endian samples, each in the fewest whole bytes."""
    if block.dtype == np.int16:
        return block.astype("<i2").tobytes()
    samples = (block * 2.0 ** (bits - 1)).astype("<i4")  # exact, as float32 has 24 bits and libsndfile reads no more
    return samples.view(np.uint8).reshape(-1, 4)[:, : (bits + 7) // 8].tobytes()


def _check_whole(file: Path, frames: int) -> None:
    """Raise DataError if a file has fewer bytes of audio than its header claims, or none where `frames` is 0."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start, claimed = _claimed_audio(content)
        present = len(content) - start
    if frames == 0 and claimed == 0 < present:
        raise DataError(f"{file} was not closed: its header says 0 bytes of audio, and {present} follow")
    # What is written into a pipe claims about the maximum, which says nothing.
    placeholder = 0x7F000000 <= claimed <= 0x80000000 or claimed >= 0xFFFFFF00
    if present < claimed and not placeholder:
        raise DataError(f"{file} is cut short: it has {present} of {claimed} bytes of audio")


def _claimed_audio(content: mmap.mmap) -> tuple[int, int]:
    """Return where the audio of a file begins, and the bytes that its header claims; (its size, 0) without a claim."""
    if content[:7] == b"NIST_1A" and b",embedded" not in content[:1024]:  # which is compressed
        fields = dict(re.findall(rb"^(\w+) -i (\d+)", content[:1024], re.MULTILINE))
        names = (b"sample_count", b"channel_count", b"sample_n_bytes")
        return 1024, math.prod(int(fields.get(name, 0)) for name in names)
    if content[:4] == b".snd" and len(content) >= 12:
        start, claimed = struct.unpack(">II", content[4:12])
        return start, claimed
    if content[:4] in CHUNKS:
        at, layout, wanted, alignment = CHUNKS[content[:4]]
        length = struct.calcsize(layout)
        for _ in range(MOST_CHUNKS):
            if at + length > len(content):
                break
            name, size = struct.unpack(layout, content[at : at + length])
            size -= length if content[:4] == b"riff" else 0  # W64 counts the name and the size too
            if name in (wanted, b"BODY"):  # that of 8SVX, a kind of FORM
                # The sizes of RF64 are in its first chunk, as they may be larger than 32 bits hold.
                long = content[:4] == b"RF64" and size == 0xFFFFFFFF
                return at + length, int.from_bytes(content[28:36], "little") if long else size
            at += length + math.ceil(max(0, size) / alignment) * alignment
    elif content[:1] in b"I\xff" and (info := MP3_INFO.search(content)) and info[1][0] & 2:
        at = 4 if info[1][0] & 1 else 0
        return info.start(), int.from_bytes(info[2][at : at + 4], "big")
    return len(content), 0


def _misread(file: Path, format: str) -> str | None:
    """Return why libsndfile would not read all of a file that it opens as this format; None if it would."""
    if format not in ("MP3", "OGG"):
        return None
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if format == "OGG":
            more = OGG_CHAIN.search(content) is not None
        elif ADTS.match(content):
            return "it is AAC, not MP3"
        else:
            end = sum(_claimed_audio(content))
            if end == len(content):
                end = _end_of_equal_frames(content)
            more = re.match(rb"(?:TAG.{125})?(?:ID3|\xff[\xe2-\xfb])", content[end : end + 131], re.DOTALL) is not None
    return "it would read a part of it" if more else None


def _end_of_equal_frames(content: mmap.mmap) -> int:
    """Return where the size, rate or channels of an MP3 file's frames change, if its header does not count them.

    Of such a file libsndfile reads only as much as there would be if all were like the first one.
    """
    tag = 10 + sum((byte & 127) << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=False))
    first = MP3_FRAME.search(content, tag if content[:3] == b"ID3" else 0)
    if first is None or MP3_COUNT.search(content, first.end(), first.end() + 64):
        return len(content)

    def kind(at: int) -> tuple[int, bool]:
        header = int.from_bytes(content[at : at + 4], "big")
        return header & 0xFFFEFC00, header & 0xC0 == 0xC0  # version, kbit/s and rate; whether it has one channel

    at, like = first.start(), kind(first.start())
    halvings = (2, 2, 1, 0)[content[at + 1] >> 3 & 3]  # of the rate, in MPEG 2 and 2.5
    kbits = (MP3_KBITS_2 if halvings else MP3_KBITS_1)[content[at + 2] >> 4]
    rate = (44100, 48000, 32000, 0)[content[at + 2] >> 2 & 3] >> halvings
    while kbits and rate and kind(at) == like:
        at += (72_000 if halvings else 144_000) * kbits // rate + (content[at + 2] >> 1 & 1)
    return at if kbits and rate else len(content)


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
