"""What lies in an unpacked archive: its utterances, without decoding them, and the decoding of one utterance.

Two layouts: LibriSpeech (a FLAC file per utterance, a `.trans.txt` per chapter) and AN4 (headerless big-endian 16-bit
files, lists in `etc/`). Every doubt is an error that names file and utterance: nothing is skipped or repaired silently.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from data.corpora import CorpusSubset
from data.packed import SAMPLE_RATE, TRANSCRIPT_CHARACTERS, DataError

AN4_LIST = re.compile(r"^(?:<s> )?(?P<transcript>.*?)(?: </s>)? \((?P<id>[^()]+)\)$")


@dataclass(frozen=True)
class Utterance:
    """An utterance in an unpacked archive. `samples` is its length at 16 kHz, known before it is decoded."""

    id: str
    speaker: str
    transcript: str
    file: Path
    samples: int


@dataclass(frozen=True)
class FlacHeader:
    """The STREAMINFO block of a FLAC file. `md5` is that of the decoded samples; all zero where it was not recorded."""

    rate: int
    channels: int
    bits: int
    frames: int
    md5: bytes


def read_utterances(folder: Path, layout: str, subset: CorpusSubset) -> list[Utterance]:
    """All utterances of `subset` in an unpacked archive, by id. DataError where audio and transcripts do not match."""
    reader = {"librispeech": _read_librispeech, "an4": _read_an4}[layout]
    utterances: dict[str, Utterance] = {}
    for utterance in reader(folder, subset.name):
        if utterance.id in utterances:
            raise DataError(f"{utterance.file}: utterance {utterance.id} occurs twice in {subset.name}")
        utterances[utterance.id] = utterance
    if not utterances:
        raise DataError(f"{subset.archive.file} holds no utterance of {subset.name} in the layout of {layout}")
    return [utterances[name] for name in sorted(utterances)]


def decode(utterance: Utterance) -> np.ndarray:
    """Its samples at 16 kHz mono: int16 [utterance.samples]. DataError for audio that is damaged."""
    if utterance.file.suffix == ".raw":
        return np.fromfile(utterance.file, dtype=">i2").astype(np.int16)
    header = read_flac_header(utterance.file)
    try:
        # libsndfile left-justifies in int32, so that any depth comes out without loss.
        frames, rate = soundfile.read(utterance.file, dtype="int16" if header.bits == 16 else "int32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise DataError(f"{utterance.file}: utterance {utterance.id} cannot be decoded: {error}") from error
    if len(frames) != header.frames:
        raise DataError(
            f"{utterance.file}: utterance {utterance.id} holds {len(frames)} of {header.frames} frames: cut short"
        )
    # The FLAC format lets an encoder leave the sum out, which it then writes as zeros.
    if any(header.md5) and _flac_md5(frames, header.bits) != header.md5:
        raise DataError(
            f"{utterance.file}: the decoded samples of utterance {utterance.id} do not have the MD5 of its header"
        )
    if rate == SAMPLE_RATE and header.channels == 1 and header.bits == 16:
        return frames[:, 0]
    scale = 32768.0 if header.bits == 16 else 2.0**31
    mono = frames.mean(axis=1, dtype=np.float64) / scale
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="VHQ")[: utterance.samples]
        mono = np.pad(mono, (0, utterance.samples - len(mono)))
    return np.clip(np.rint(mono * 32768.0), -32768, 32767).astype(np.int16)


def check_transcript(text: str, name: str, file: Path) -> str:
    """The transcript in upper case with single spaces. DataError if empty or with a character outside the 28."""
    for character in text:
        if character not in TRANSCRIPT_CHARACTERS and character not in TRANSCRIPT_CHARACTERS.lower():
            raise DataError(
                f"{file}: the transcript of utterance {name} has the character {character!r} (U+{ord(character):04X}); "
                "only A-Z, apostrophe and space are known"
            )
    transcript = " ".join(text.upper().split())
    if not transcript:
        raise DataError(f"{file}: the transcript of utterance {name} is empty")
    return transcript


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
    if header.rate == 0 or header.frames == 0:
        raise DataError(f"{file} holds no audio, by its header")
    return header


def _flac_md5(frames: np.ndarray, bits: int) -> bytes:
    """MD5 as FLAC defines it: samples interleaved, little-endian, in the fewest whole bytes that hold `bits`."""
    if bits == 16:
        return hashlib.md5(np.ascontiguousarray(frames, dtype="<i2").data).digest()
    width = (bits + 7) // 8
    samples = np.ascontiguousarray(frames >> (32 - bits), dtype="<i4")
    return hashlib.md5(samples.view(np.uint8).reshape(-1, 4)[:, :width].tobytes()).digest()


def _samples_at_16k(header: FlacHeader) -> int:
    return max(1, (2 * header.frames * SAMPLE_RATE + header.rate) // (2 * header.rate))


def _read_lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{file} is missing from the archive") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error


def _read_librispeech(folder: Path, subset: str) -> Iterator[Utterance]:
    root = folder / "LibriSpeech" / subset
    for chapter in sorted({file.parent for file in root.rglob("*") if file.suffix in (".flac", ".txt")}):
        audio = {file.stem: file for file in chapter.glob("*.flac")}
        spoken = set()
        for list_file in sorted(chapter.glob("*.trans.txt")):
            for line in _read_lines(list_file):
                name, _, text = line.rstrip("\r").partition(" ")
                if name in spoken:
                    raise DataError(f"{list_file}: utterance {name} occurs twice")
                spoken.add(name)
                transcript = check_transcript(text, name, list_file)
                if name not in audio:
                    raise DataError(f"{list_file}: utterance {name} has no audio file")
                header = read_flac_header(audio[name])
                yield Utterance(name, name.split("-")[0], transcript, audio[name], _samples_at_16k(header))
        if silent := sorted(audio.keys() - spoken):
            raise DataError(f"{audio[silent[0]]}: utterance {silent[0]} has no transcript")


def _read_an4(folder: Path, subset: str) -> Iterator[Utterance]:
    root = folder / "an4"
    transcription = root / "etc" / f"an4_{subset}.transcription"
    paths = _read_lines(root / "etc" / f"an4_{subset}.fileids")
    lines = _read_lines(transcription)
    if len(paths) != len(lines):
        raise DataError(f"{transcription} has {len(lines)} transcripts for {len(paths)} audio files")
    for path, line in zip(paths, lines, strict=True):
        match = AN4_LIST.match(line.strip())
        name = path.strip().rsplit("/", 1)[-1]
        if match is None or match["id"] != name:
            raise DataError(f"{transcription}: the line {line.strip()!r} does not belong to utterance {name}")
        file = root / "wav" / f"{path.strip()}.raw"
        if not file.resolve().is_relative_to(root.resolve()) or not file.is_file():
            raise DataError(f"{transcription}: utterance {name} has no audio file {file}")
        size = file.stat().st_size
        if size == 0 or size % 2:
            raise DataError(f"{file}: utterance {name} has {size} bytes, not a whole number of 16-bit samples")
        yield Utterance(name, file.parent.name, check_transcript(match["transcript"], name, file), file, size // 2)
