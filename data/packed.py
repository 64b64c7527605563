"""The packed data set: all knowledge of its format on disk, and how it is written, opened and read.

    <dataset>/dataset.json              corpus, splits, counts, archive sums, the digest of everything; written last
    <dataset>/<subset>/audio.npy        one-dimensional int16, 16 kHz mono, all utterances end to end, by length
    <dataset>/<subset>/utterances.csv   id, speaker, offset, samples, transcript, sha256 (RFC 4180), in the same order

The digest of a data set is the SHA-256 of one tarball of its files, names sorted, without times, owners and modes:

    cd LibriSpeech_dataset
    export LC_ALL=C
    tar --format=gnu --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=0644 -cf - $(ls */*.npy */*.csv) | sha256sum

so it is the same on every machine. It is computed as the files are read; the tarball is never written.
"""

import csv
import hashlib
import json
import mmap
import os
import tarfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from data.cli import UserError, progress_bar
from data.files import CHUNK_BYTES, atomic_open, file_digest

FORMAT_VERSION = 1
SAMPLE_RATE = 16000
TRANSCRIPT_CHARACTERS = "'ABCDEFGHIJKLMNOPQRSTUVWXYZ "
SPLITS = ("train", "validation", "test")
COLUMNS = ("id", "speaker", "offset", "samples", "transcript", "sha256")
AUDIO_FILE, INDEX_FILE, DATASET_FILE = "audio.npy", "utterances.csv", "dataset.json"
AUDIO_HEADER_BYTES = 128
IGNORED = "hours", "archive_sha256"  # in dataset.json: for people to read; of older versions


class UtteranceRow(NamedTuple):
    """A row of utterances.csv. `offset` is a sample of audio.npy; `sha256` is what utterance_digest returns."""

    id: str
    speaker: str
    offset: int
    num_samples: int
    transcript: str
    sha256: str


@dataclass(frozen=True)
class SubsetSummary:
    """A subset in dataset.json, by its keys. `index_sha256` is that of utterances.csv, which covers every utterance."""

    utterances: int
    speakers: int
    samples: int
    longest_samples: int  # those of the longest utterance
    index_sha256: str
    archive: str
    archive_md5: str
    official: bool  # whether the archive was the published one, by its MD5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is not self.__annotations__[name]:
                raise TypeError(f"{name} is {value!r}")

    @property
    def hours(self) -> float:
        return self.samples / SAMPLE_RATE / 3600


@dataclass(frozen=True)
class Subset:
    """One subset, sorted by length (ties by id). `audio` is memory-mapped: slicing it reads only what is used."""

    name: str
    audio: np.ndarray  # int16 [total samples]
    offsets: np.ndarray  # int64 [N], first sample of each utterance
    num_samples: np.ndarray  # int64 [N], ascending
    ids: Sequence[str]
    speakers: Sequence[str]
    transcripts: Sequence[str]

    def __len__(self) -> int:
        return len(self.ids)

    def waveform(self, index: int) -> np.ndarray:
        """Return the samples of utterance `index`: int16 [num_samples[index]], a view of the mapped file.

        The system starts to read them from the disk, as a whole. Without that, the first look at each of their pages
        would wait for it, and for what the system guesses is next: up to ten times as much.
        """
        start, count = int(self.offsets[index]), int(self.num_samples[index])
        if isinstance(self.audio.base, mmap.mmap):
            first_byte = AUDIO_HEADER_BYTES + 2 * start
            surplus = first_byte % mmap.PAGESIZE
            self.audio.base.madvise(mmap.MADV_WILLNEED, first_byte - surplus, surplus + 2 * count)
        return self.audio[start : start + count]


@dataclass(frozen=True)
class PackedDataset:
    """A data set by its dataset.json alone; `subset` and `split` open the audio when called.

    `splits` names the prepared subsets by split. `digest` is empty while a download that adds subsets is unfinished.
    """

    path: Path
    corpus: str
    synthetic: bool
    splits: dict[str, list[str]]
    digest: str = ""
    summary: dict[str, SubsetSummary] = field(default_factory=dict)

    @property
    def official(self) -> bool:
        """Return whether every subset comes from the published archive (synthetic speech never does)."""
        return all(subset.official for subset in self.summary.values())

    def subset(self, name: str) -> Subset:
        """Open one prepared subset; UserError where it is not there or does not fit dataset.json."""
        if name not in self.summary:
            raise UserError(f"{self.path} has no subset '{name}'; it has: {', '.join(self.summary)}")
        folder = self.path / name
        ids, speakers, transcripts, offsets, num_samples = [], [], [], array("q"), array("q")
        for row in read_index(folder / INDEX_FILE):
            ids.append(row.id)
            speakers.append(row.speaker)
            transcripts.append(row.transcript)
            offsets.append(row.offset)
            num_samples.append(row.num_samples)
        try:
            audio = np.load(folder / AUDIO_FILE, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header may be any error of Python's parser
            raise UserError(f"cannot open {folder / AUDIO_FILE}: {error}; run verify_dataset.sh") from error
        summary, size = self.summary[name], (folder / AUDIO_FILE).stat().st_size
        found = file_digest(folder / INDEX_FILE, "sha256"), len(ids), max(num_samples, default=0), audio.shape, size
        expected = summary.index_sha256, summary.utterances, summary.longest_samples, (summary.samples,)
        if audio.dtype != np.int16 or found != (*expected, AUDIO_HEADER_BYTES + 2 * summary.samples):
            raise UserError(f"{folder} is not what was prepared, by {DATASET_FILE}; run verify_dataset.sh")
        return Subset(name, audio, np.array(offsets), np.array(num_samples), ids, speakers, transcripts)

    def split(self, name: str) -> list[Subset]:
        """Open the prepared subsets of a split; an empty list where none was prepared."""
        return [self.subset(subset) for subset in self.splits[name]]


def read_dataset(path: Path) -> PackedDataset:
    """Read dataset.json, be the data set finished or not. UserError where it is absent or of another format."""
    file = path / DATASET_FILE
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if (version := content["format_version"]) != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}, not {FORMAT_VERSION}: give another --dataset-dir")
        summary = {
            name: SubsetSummary(**{key: value for key, value in entry.items() if key not in IGNORED})
            for name, entry in content["subsets"].items()
        }
        splits = {split: [name for name in content["splits"][split] if summary[name]] for split in SPLITS}
        return PackedDataset(path, str(content["corpus"]), content["synthetic"], splits, content["digest"], summary)
    except FileNotFoundError:
        corpus = path.name.removesuffix("_dataset").lower() if path.name.endswith("_dataset") else "NAME"
        command = f"sh download_dataset.sh --corpus {corpus} --dataset-dir {path}"
        raise UserError(f"no data set in {path}: run '{command}'") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged, or not of this program ({error!r}): give another --dataset-dir") from error


def open_dataset(path: Path) -> PackedDataset:
    """Open a finished data set, reading dataset.json only. UserError says what to run where there is none."""
    dataset = read_dataset(path)
    if not dataset.digest:
        raise UserError(f"{path} is unfinished: repeat 'sh download_dataset.sh --corpus {dataset.corpus} ...'")
    return dataset


def write_dataset(dataset: PackedDataset, scratch: Path | None = None) -> None:
    """Write dataset.json, whole or not at all, by way of a file in `scratch` (atomic_open)."""
    subsets = {name: asdict(summary) | {"hours": round(summary.hours, 4)} for name, summary in dataset.summary.items()}
    content = {
        "format_version": FORMAT_VERSION,
        "corpus": dataset.corpus,
        "synthetic": dataset.synthetic,
        "splits": dataset.splits,
        "digest": dataset.digest,
        "subsets": subsets,
    }
    with atomic_open(dataset.path / DATASET_FILE, scratch) as stream:
        stream.write(json.dumps(content, indent=2) + "\n")


def audio_header(num_samples: int) -> bytes:
    """Return the header of an .npy file of `num_samples` int16."""
    # Made here because numpy's own padding changes with its version.
    text = f"{{'descr': '<i2', 'fortran_order': False, 'shape': ({num_samples},), }}"
    prefix = b"\x93NUMPY\x01\x00" + (AUDIO_HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + text.ljust(AUDIO_HEADER_BYTES - 11).encode("latin1") + b"\n"


def write_index(file: Path, rows: Iterable[UtteranceRow]) -> str:
    """Write utterances.csv and return its SHA-256."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
        stream.flush()
        os.fsync(stream.fileno())
    return file_digest(file, "sha256")


def read_index(file: Path) -> Iterator[UtteranceRow]:
    """Yield the rows of utterances.csv. UserError names the line of a row that is not one."""
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            next(reader, None)  # the names of the columns
            for row in reader:
                try:
                    name, speaker, offset, samples, transcript, digest = row
                    numbers = int(offset), int(samples)
                    if max(map(abs, numbers)) >= 1 << 62:  # their sum must fit into 64 bits
                        raise ValueError(f"{max(numbers, key=abs)} is not a number of samples")
                    yield UtteranceRow(name, speaker, *numbers, transcript, digest)
                except ValueError as error:
                    raise UserError(f"{file}, line {reader.line_num}: not an utterance ({error})") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {error}; run verify_dataset.sh") from error


def utterance_digest(waveform: np.ndarray, transcript: str) -> str:
    """Return the SHA-256 (hex) of an utterance: its int16 samples, little-endian, then its transcript."""
    digest = hashlib.sha256(np.ascontiguousarray(waveform, dtype="<i2").data)
    digest.update(transcript.encode("utf-8"))
    return digest.hexdigest()


def content_files(subsets: Iterable[str]) -> list[str]:
    """Return the names of the files that a data set's digest covers, in its order."""
    return sorted(f"{subset}/{file}" for subset in subsets for file in (AUDIO_FILE, INDEX_FILE))


def dataset_digest(path: Path, subsets: Iterable[str]) -> str:
    """Return the SHA-256 (hex) of the GNU-format tarball of the subsets' files."""
    files, digest = content_files(subsets), hashlib.sha256()
    with progress_bar("checksum", sum((path / name).stat().st_size for name in files), "B") as bar:

        def write(content: bytes) -> None:
            digest.update(content)
            bar.update(len(content))

        sink: Any = SimpleNamespace(write=write, tell=lambda: 0)
        # The GNU format, unlike ustar, has room for members of 8 GiB and more.
        with tarfile.TarFile(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT, copybufsize=CHUNK_BYTES) as tar:
            for name in files:
                entry = tarfile.TarInfo(name)
                try:
                    with (path / name).open("rb") as stream:
                        entry.size = os.fstat(stream.fileno()).st_size
                        tar.addfile(entry, stream)
                except OSError as error:
                    raise UserError(f"{path / name} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
