"""The utterances of an unpacked archive or of a manifest, found without decoding them, and the decoding of one.

- LibriSpeech: a FLAC file per utterance, a `.trans.txt` per chapter.
- AN4: headerless big-endian 16-bit files, lists in `etc/`.
- A manifest, of your own speech: a line `path<TAB>transcript` per utterance, audio of any format, rate and channels.
  Paths are absolute or start from the manifest's own folder; a path is also the utterance's id, its folder the speaker.

Anything doubtful is an error that names file and utterance: nothing is skipped or repaired silently.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.audio import decode_audio, num_samples, read_flac_header
from data.cli import DataError, first_of
from data.corpora import CorpusSubset
from data.packed import SAMPLE_RATE, TRANSCRIPT_CHARACTERS

OTHER_AUDIO = {".wav", ".ogg", ".opus", ".mp3", ".m4a", ".aiff", ".raw", ".pcm", ".sph"}
SPOKEN = ("embedded", "rehearsal")  # modules of data/synthetic: layouts without archives, encodings without files
KNOWN_CHARACTERS = TRANSCRIPT_CHARACTERS + TRANSCRIPT_CHARACTERS.lower()
AN4_LIST = re.compile(r"^(?:<s> )?(?P<transcript>.*?)(?: </s>)? \((?P<id>[^()]+)\)$")


@dataclass(frozen=True, slots=True)
class Utterance:
    """An utterance and its file. `num_samples` is its length at 16 kHz, known before it is decoded.

    `file` is a str to save memory. `encoding` tells which decoder reads it: "flac", "raw" (headerless, 16 bits,
    big-endian) or "any"; or who speaks it, one of SPOKEN, and `file` is its subset.
    """

    id: str
    speaker: str
    transcript: str
    file: str
    num_samples: int
    encoding: str = "flac"


def read_utterances(folder: Path, layout: str, subset: CorpusSubset) -> list[Utterance]:
    """Return all utterances of `subset` in an unpacked archive, by id. DataError where audio and text do not match."""
    reader = {"librispeech": _read_librispeech, "an4": _read_an4}[layout]
    utterances: dict[str, Utterance] = {}
    for utterance in reader(folder, subset.name):
        if utterance.id in utterances:
            raise DataError(f"{utterance.file}: utterance {utterance.id} occurs twice in {subset.name}")
        utterances[utterance.id] = utterance
    if not utterances:
        raise DataError(f"{subset.archive.file} holds no utterance of {subset.name} in the layout of {layout}")
    return [utterances[name] for name in sorted(utterances)]


def decode(utterance: Utterance) -> tuple[np.ndarray, int]:
    """Return its samples at 16 kHz mono, int16 [utterance.num_samples], and how many of them had to be clipped.

    DataError for audio that is damaged.
    """
    file, clipped = Path(utterance.file), 0
    try:
        if utterance.encoding == "raw":
            waveform = np.fromfile(file, dtype=">i2").astype(np.int16)
        else:
            waveform, clipped = decode_audio(file, convert=utterance.encoding == "any")
    except DataError as error:
        raise DataError(f"utterance {utterance.id}: {error}") from error
    found, expected = len(waveform), utterance.num_samples
    if found != expected:
        raise DataError(f"utterance {utterance.id}: {utterance.file} has {found} samples, not {expected} as before")
    return waveform, clipped


def check_transcript(text: str, name: str, file: Path) -> str:
    """Return the transcript in upper case with single spaces. DataError if empty or with a character outside the 28."""
    if unknown := [character for character in text if character not in KNOWN_CHARACTERS]:
        raise DataError(
            f"{file}: the transcript of utterance {name} has the character {unknown[0]!r} (U+{ord(unknown[0]):04X}); "
            "only A-Z, apostrophe and space are known"
        )
    transcript = " ".join(text.upper().split())
    if not transcript:
        raise DataError(f"{file}: the transcript of utterance {name} is empty")
    return transcript


def _read_lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except FileNotFoundError:
        raise DataError(f"{file} is missing from the archive") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from error


def _read_librispeech(folder: Path, subset: str) -> Iterator[Utterance]:
    root = folder / "LibriSpeech" / subset
    for path, folders, names in os.walk(root):
        folders.sort()
        chapter = Path(path)
        if left := [name for name in names if name.startswith("._")]:
            raise DataError(f"{chapter / left[0]} is not in the corpus: macOS's tar adds it without COPYFILE_DISABLE=1")
        if other := [name for name in names if Path(name).suffix.lower() in OTHER_AUDIO]:
            raise DataError(f"{chapter / other[0]}: audio of this layout is FLAC; others are read by --corpus manifest")
        audio = {name[:-5]: f"{path}/{name}" for name in names if name.lower().endswith(".flac")}
        spoken = set()
        for list_file in sorted(chapter / name for name in names if name.endswith(".trans.txt")):
            for line in _read_lines(list_file):
                name, _, text = line.strip().partition(" ")
                if name in spoken:
                    raise DataError(f"{list_file}: utterance {name} occurs twice")
                spoken.add(name)
                transcript = check_transcript(text, name, list_file)
                if name not in audio:
                    raise DataError(f"{list_file}: utterance {name} has no audio file")
                file = Path(audio[name])
                if read_flac_header(file)[0] != SAMPLE_RATE:
                    raise DataError(f"{file}: utterance {name} is not a FLAC file at {SAMPLE_RATE} Hz, by its header")
                length = num_samples(file, convert=False)
                yield Utterance(name, name.split("-")[0], transcript, str(file), length)
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
        transcript = check_transcript(match["transcript"], name, transcription)
        yield Utterance(name, file.parent.name, transcript, str(file), size // 2, "raw")
    listed = {path.strip() for file in (root / "etc").glob("an4_*.fileids") for path in _read_lines(file)}
    for file in sorted((root / "wav").rglob("*.raw")):
        if str(file.relative_to(root / "wav").with_suffix("")) not in listed:
            raise DataError(f"{file} is not listed in {root / 'etc'}: audio without transcript")


def read_manifest(manifest: Path, jobs: int) -> list[Utterance]:
    """Return the utterances of a manifest, by id. DataError names all lines that are wrong, or the first of them."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the manifest {manifest}: {error}") from error
    found: dict[str, tuple[int, str]] = {}  # line and transcript by path
    problems: list[str] = []
    unknown: Counter[str] = Counter()
    first_lines: dict[str, int] = {}
    # Not splitlines: it would also split at characters that a file name may hold. Empty lines do not count.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        path, *transcripts = line.removesuffix("\r").split("\t")
        if len(transcripts) != 1 or not path.strip() or "\0" in path:
            columns = f"{len(transcripts) + 1} columns, not the two of path<TAB>transcript"
            problems.append(f"line {number}: {columns}: {line[:80]!r}")
        elif path in found:
            problems.append(f"line {number}: utterance {path} occurs twice, first in line {found[path][0]}")
        elif not transcripts[0].strip():
            problems.append(f"line {number}: the transcript of utterance {path} is empty")
        else:
            found[path] = number, transcripts[0]
            for character in filter(lambda each: each not in KNOWN_CHARACTERS, transcripts[0]):
                unknown[character] += 1
                first_lines.setdefault(character, number)
    characters = [
        f"line {first_lines[character]}: the first of {count} {character!r} (U+{ord(character):04X}) in transcripts; "
        "only A-Z, apostrophe and space are known"
        for character, count in unknown.most_common()
    ]

    def measure(path: str) -> Utterance | str:
        file, (number, transcript) = manifest.parent / path, found[path]
        try:
            length = num_samples(file)
        except (DataError, OSError) as error:
            spelled = "" if path.isascii() else f"; its name is spelled {path!a}"
            return f"line {number}: {error}{spelled}"
        return Utterance(path, Path(path).parent.name, " ".join(transcript.upper().split()), str(file), length, "any")

    with ThreadPoolExecutor(jobs) as pool:
        measured = list(pool.map(measure, found))
    problems = characters + problems + [problem for problem in measured if isinstance(problem, str)]
    if problems:
        raise DataError(f"{manifest} has {len(problems)} problems:\n{first_of(problems)}")
    if not found:
        raise DataError(f"{manifest} holds no utterance")
    return sorted((one for one in measured if isinstance(one, Utterance)), key=lambda utterance: utterance.id)
