"""Your own speech: a list or a folder in one of the shapes that tools for speech write, which data/README.md lists.

What it is follows from the content, and is printed. A path is also the utterance's id, its folder the speaker unless
the list names one. Nothing is skipped or repaired silently.
"""

import csv
import hashlib
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data.audio import num_samples
from data.cli import UserError, first_of
from data.files import MARK, file_digest, files_below, read_lines, read_text
from data.packed import SAMPLE_RATE
from data.readers import AUDIO_SUFFIXES, KNOWN, KNOWN_CHARACTERS, Utterance

# What tools for speech call the columns of a list; the first that is there counts.
PATH_NAMES = "path", "file_name", "audio_filepath", "audio", "wav_filename", "wav", "file", "filename", "audio_path"
TRANSCRIPT_NAMES = "transcript", "transcription", "text", "sentence", "txt", "wrd", "normalized_text"
SPEAKER_NAMES = "speaker", "speaker_id", "client_id", "spk_id"
DURATION_TOLERANCE_S = 0.2  # a recording that is longer has words that the transcript lacks


class Row(NamedTuple):
    """A line of a list of one's own speech. `place` is where it stands, `problem` why it is no utterance."""

    place: str
    path: str
    transcript: str
    speaker: str = ""
    problem: str = ""
    seconds: float = math.inf  # that the list says it lasts


def digest(source: Path) -> str:
    """Return the MD5 of a list of one's own speech, or of what a folder of it lists; the audio is not read."""
    if source.is_file():
        return file_digest(source, "md5")
    content = re.sub(r", seconds=[\w.+-]+\)", ")", repr(_read_folder(source)[1]))  # which are not packed
    return hashlib.md5(content.encode("utf-8", "backslashreplace")).hexdigest()


def read_own_speech(source: Path, jobs: int) -> list[Utterance]:
    """Return the utterances of a list or a folder, by id. UserError says all that is wrong, equal complaints once."""
    folder, (form, rows) = (source, _read_folder(source)) if source.is_dir() else (source.parent, _read_list(source))
    found: dict[str, Row] = {}
    complaints: dict[str, list[str]] = defaultdict(list)  # by what they have in common
    for row in rows:
        unknown = [character for character in row.transcript if character not in KNOWN_CHARACTERS]
        problems = [f"{each!r} (U+{ord(each):04X}) in the transcript: {KNOWN}" for each in unknown]
        if re.search("[\ud800-\udfff]", row.path + row.speaker):  # what Python makes of other bytes
            problems.append(f"a name that is not UTF-8: {row.path!a} {row.speaker!a}")
        elif row.problem:
            problems.append(row.problem)
        elif row.path in found:
            problems.append(f"the same utterance twice: {row.path}, first in {found[row.path].place}")
        elif not row.transcript.strip():
            problems.append(f"the transcript is empty: {row.path}")
        else:
            found[row.path] = row
        for problem in problems:
            complaints[problem.partition(": ")[0]].append(f"{row.place}: {problem}")
    order, files, utterances = sorted(found), _find_files(folder, list(found)), []

    def measure(path: str) -> int | UserError:
        try:
            return num_samples(files[path])
        except UserError as error:
            return error

    with ThreadPoolExecutor(jobs) as pool:
        for path, length in zip(order, pool.map(measure, order), strict=True):
            row, file = found[path], files[path]
            speaker, transcript = row.speaker or Path(path).parent.name, " ".join(row.transcript.upper().split())
            if isinstance(length, UserError):
                spelled = "" if path.isascii() else f"; its name is spelled {path!a}"
                kind = re.sub(r"\d+", "", str(length).replace(str(file), ""))
                complaints[kind].append(f"{row.place}: {length}{spelled}")
            elif length > (row.seconds + DURATION_TOLERANCE_S) * SAMPLE_RATE:
                part = f"part of a recording, {row.seconds:g} s of {length / SAMPLE_RATE:g}: cut it out first"
                complaints["part of a recording"].append(f"{row.place}: {part}")
            else:
                utterances.append(Utterance(path, speaker, transcript, str(file), length))
    if complaints:
        lines = [equal[0] + (f" (first of {len(equal)})" if equal[1:] else "") for equal in complaints.values()]
        count = sum(map(len, complaints.values()))
        raise UserError(f"{source}, read as {form}, has {count} problem{'s' * (count > 1)}:\n{first_of(lines)}")
    if not utterances:
        raise UserError(f"{source}, read as {form}, holds no utterance")
    print(f"{source}: {len(utterances)} utterances, read as {form}", file=sys.stderr)
    return utterances


def _find_files(folder: Path, paths: Sequence[str]) -> dict[str, Path]:
    """Return the files of paths from `folder` on. A name without a folder, with or without suffix, may lie deeper."""
    files = {path: folder / path for path in paths}
    deeper = {path for path, file in files.items() if Path(path).name == path and not file.is_file()}
    by_name: dict[str, list[Path]] = {path: [] for path in deeper}
    for file in files_below(folder) if deeper else ():
        for name in {file.name, file.stem} & deeper:
            if file.suffix.lower() in AUDIO_SUFFIXES:
                by_name[name].append(file)
    return files | {path: places[0] for path, places in by_name.items() if len(places) == 1}


def _read_list(file: Path) -> tuple[str, list[Row]]:
    """Return what a list is by its first line, JSON or columns with or without header, and its rows."""
    text = read_text(file)
    start = text.lstrip("\n").partition("\n")[0]
    if start.startswith("{"):
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                if line.strip():
                    rows.append(_row(f"line {number}", dict(json.loads(line))))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{file}, line {number}: not a JSON object: {error}") from error
        return "JSON lines", rows
    delimiter = next((each for each in "\t|;" if each in start), ",")
    form = {"\t": "TSV", ",": "CSV"}.get(delimiter, f"columns with {delimiter} between")
    # In columns with tabs or bars between, a quotation mark is nothing special.
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter in ",;" else csv.QUOTE_NONE
    reader = csv.reader(StringIO(text, newline="\n"), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        table = [(f"line {reader.line_num}", cells) for cells in reader if any(map(str.strip, cells))]
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: {error}") from error
    names = [cell.strip().lower() for cell in table[0][1]] if table else []
    if not (set(names) & set(PATH_NAMES) and set(names) & set(TRANSCRIPT_NAMES)):
        columns = max(2, len(names)) if delimiter == "|" else 2  # LJ Speech's last one is the transcript in words
        names = ["path", *[""] * (columns - 2), "transcript"]
        form += " without header: path, transcript"
    else:
        form += f" with header: {', '.join(names)}"
        if len(named := list(filter(None, names))) > len(set(named)):
            raise UserError(f"{file}, {table[0][0]}: a column occurs twice")
        del table[0]
    wrong = f"not {len(names)} columns: "
    return form, [
        _row(place, dict(zip(names, cells, strict=True)))
        if len(cells) == len(names)
        else Row(place, "", "", problem=f"{wrong}{delimiter.join(cells)[:80]!r}")
        for place, cells in table
    ]


def _row(place: str, record: dict[str, Any]) -> Row:
    """Return the row of a record, whose fields have the names that tools for speech give them."""
    path, transcript, speaker = (
        next((record[name] for name in names if record.get(name)), "")
        for names in (PATH_NAMES, TRANSCRIPT_NAMES, SPEAKER_NAMES)
    )
    problem = "" if path else f"no path: one of the fields {', '.join(PATH_NAMES)} is needed"
    if (start := record.get("offset") or record.get("start")) not in (None, 0, "", "0", "0.0"):
        problem = f"part of a recording, from {start} on: cut it out first"
    if not isinstance(transcript, str):  # such as NaN, for pandas's missing ones
        transcript, problem = "", f"a transcript that is no text: {transcript!r:.40}"
    seconds = math.inf
    with suppress(TypeError, ValueError):
        seconds = float(record.get("duration") or math.inf)
    return Row(place, str(path), transcript, str(speaker), problem, seconds)


def _read_folder(folder: Path) -> tuple[str, list[Row]]:
    """Return what a folder is by the files in it, and the rows that they list."""
    if (folder / "wav.scp").is_file():
        return "a data folder of Kaldi", list(_read_kaldi(folder))
    for name in ("metadata.csv", "metadata.tsv", "metadata.jsonl"):
        if (folder / name).is_file():
            return _read_list(folder / name)
    files = [file for file in files_below(folder) if file.name != MARK]  # of a data set that is made in there
    lists = [file for file in files if file.name.endswith(".trans.txt")]
    recordings: dict[str, list[str]] = defaultdict(list)  # by their path without the suffix
    for file in files:
        if file.suffix.lower() in AUDIO_SUFFIXES:
            recordings[str(file.relative_to(folder).with_suffix(""))].append(str(file.relative_to(folder)))
    rows = []
    for file in lists or [file for file in files if file.suffix == ".txt"]:
        lines = read_lines(file)
        spoken = [line.strip().partition(" ")[::2] for line in lines] if lists else [(file.stem, " ".join(lines))]
        for name, transcript in spoken:
            paths = recordings.pop(str(file.relative_to(folder).parent / name), [])
            problem = "" if len(paths) == 1 else f"not one recording for a transcript: {len(paths)} for {name}"
            rows.append(Row(str(file.relative_to(folder)), "".join(paths[:1]), transcript, problem=problem))
    rows += [Row(path, path, "", problem="no transcript") for paths in recordings.values() for path in paths]
    return "a folder in LibriSpeech's layout" if lists else "a folder of recordings, each with a .txt", rows


def _read_kaldi(folder: Path) -> Iterator[Row]:
    if (folder / "segments").exists():
        raise UserError(f"{folder / 'segments'}: parts of recordings cannot be read; cut them out first")
    tables: dict[str, dict[str, str]] = defaultdict(dict)
    for name in ("wav.scp", "text", *(["utt2spk"] if (folder / "utt2spk").exists() else [])):
        lines = read_lines(folder / name)
        tables[name] = {line.split()[0]: " ".join(line.split(maxsplit=1)[1:]).strip() for line in lines}
        if len(tables[name]) < len(lines):
            raise UserError(f"{folder / name}: an utterance occurs twice")
    for utterance in tables["wav.scp"] | tables["text"]:
        path = tables["wav.scp"].get(utterance, "")
        problem = "a command: convert what it reads to files first" if path.endswith("|") else ""
        problem = problem if path else "no recording in wav.scp"
        transcript, speaker = (tables[name].get(utterance, "") for name in ("text", "utt2spk"))
        yield Row(f"utterance {utterance}", path, transcript, speaker, problem)
