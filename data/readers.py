"""The utterances of an unpacked archive, found without decoding them, and the decoding of one.

- LibriSpeech: a FLAC file per utterance, a `.trans.txt` per chapter.
- AN4: headerless big-endian 16-bit files, lists in `etc/`.

Anything doubtful is an error that names file and utterance: nothing is skipped or repaired silently.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.audio import decode_audio, num_samples
from data.cli import UserError
from data.corpora import CorpusSubset
from data.files import read_lines
from data.packed import SAMPLE_RATE, TRANSCRIPT_CHARACTERS

SUFFIXES = (
    "3gp aac ac3 aif aifc aiff amr amr-nb amr-wb ape au avi awb caf flac flv gsm m4a m4b m4v mka mkv mov mp2 mp3 mp4 "
    "mpc mpeg mpg nist oga ogg ogv opus rf64 snd sph spx tta voc w64 wav wave webm wma wmv wv"
)
AUDIO_SUFFIXES = {f".{name}" for name in SUFFIXES.split()}
KNOWN_CHARACTERS = TRANSCRIPT_CHARACTERS + TRANSCRIPT_CHARACTERS.lower()
KNOWN = "only A-Z, apostrophe and space are known"
AN4_LIST = re.compile(r"^(?:<s> )?(?P<transcript>.*?)(?: </s>)? \((?P<id>[^()]+)\)$")


@dataclass(frozen=True, slots=True)
class Utterance:
    """An utterance and its file. `num_samples` is its length at 16 kHz, known before it is decoded.

    `file` is a str to save memory. `encoding` is "raw" where it has no header (16 bits, big-endian); or is the
    layout of a synthetic corpus that speaks it, and `file` is its subset.
    """

    id: str
    speaker: str
    transcript: str
    file: str
    num_samples: int
    encoding: str = "any"


def read_utterances(folder: Path, layout: str, subset: CorpusSubset) -> list[Utterance]:
    """Return all utterances of `subset` in an unpacked archive, by id. UserError where audio and text do not match."""
    reader = {"librispeech": _read_librispeech, "an4": _read_an4}[layout]
    utterances: dict[str, Utterance] = {}
    for utterance in reader(folder, subset.name):
        if utterance.id in utterances:
            raise UserError(f"{utterance.file}: utterance {utterance.id} occurs twice in {subset.name}")
        utterances[utterance.id] = utterance
    if not utterances:
        raise UserError(f"{subset.archive.file} holds no utterance of {subset.name} in the layout of {layout}")
    return [utterances[name] for name in sorted(utterances)]


def decode(utterance: Utterance) -> tuple[np.ndarray, int]:
    """Return its samples at 16 kHz mono, int16 [num_samples], and how many were clipped. UserError if damaged."""
    file, clipped = Path(utterance.file), 0
    try:
        if utterance.encoding == "raw":
            waveform = np.fromfile(file, dtype=">i2").astype(np.int16)
        else:
            waveform, clipped = decode_audio(file)
    except UserError as error:
        raise UserError(f"utterance {utterance.id}: {error}") from error
    if len(waveform) != (expected := utterance.num_samples):
        raise UserError(f"utterance {utterance.id}: {file} has {len(waveform)} samples, not {expected} as before")
    return waveform, clipped


def check_transcript(text: str, name: str, file: Path) -> str:
    """Return the transcript in upper case with single spaces. UserError if empty or with a character outside the 28."""
    if unknown := [character for character in text if character not in KNOWN_CHARACTERS]:
        character = f"{unknown[0]!r} (U+{ord(unknown[0]):04X})"
        raise UserError(f"{file}: the transcript of utterance {name} has the character {character}; {KNOWN}")
    transcript = " ".join(text.upper().split())
    if not transcript:
        raise UserError(f"{file}: the transcript of utterance {name} is empty")
    return transcript


def _read_librispeech(folder: Path, subset: str) -> Iterator[Utterance]:
    root = folder / "LibriSpeech" / subset
    for path, folders, names in os.walk(root):
        folders.sort()
        chapter = Path(path)
        audio = {Path(name).stem: f"{path}/{name}" for name in names if Path(name).suffix.lower() in AUDIO_SUFFIXES}
        for list_file in sorted(chapter / name for name in names if name.endswith(".trans.txt")):
            for line in read_lines(list_file):
                name, _, text = line.strip().partition(" ")
                transcript = check_transcript(text, name, list_file)
                if name not in audio:
                    raise UserError(f"{list_file}: utterance {name} has no audio file, or occurs twice")
                file = audio.pop(name)
                length = num_samples(Path(file), SAMPLE_RATE)
                yield Utterance(name, name.split("-")[0], transcript, file, length)
        if audio:
            raise UserError(f"{audio[min(audio)]}: utterance {min(audio)} has no transcript")


def _read_an4(folder: Path, subset: str) -> Iterator[Utterance]:
    root = folder / "an4"
    transcription = root / "etc" / f"an4_{subset}.transcription"
    paths = read_lines(root / "etc" / f"an4_{subset}.fileids")
    lines = read_lines(transcription)
    if len(paths) != len(lines):
        raise UserError(f"{transcription} has {len(lines)} transcripts for {len(paths)} audio files")
    for path, line in zip(paths, lines, strict=True):
        match = AN4_LIST.match(line.strip())
        name = path.strip().rsplit("/", 1)[-1]
        if match is None or match["id"] != name:
            raise UserError(f"{transcription}: the line {line.strip()!r} does not belong to utterance {name}")
        file = root / "wav" / f"{path.strip()}.raw"
        size = file.stat().st_size if file.is_file() else 0
        if size == 0 or size % 2:
            raise UserError(f"{file} of utterance {name} is missing, or its {size} bytes are no 16-bit samples")
        transcript = check_transcript(match["transcript"], name, transcription)
        yield Utterance(name, file.parent.name, transcript, str(file), size // 2, "raw")
    listed = {path.strip() for file in (root / "etc").glob("an4_*.fileids") for path in read_lines(file)}
    for file in sorted((root / "wav").rglob("*.raw")):
        if str(file.relative_to(root / "wav").with_suffix("")) not in listed:
            raise UserError(f"{file} is not listed in {root / 'etc'}: audio without transcript")
