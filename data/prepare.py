"""From an archive to packed subsets: unpack, read the headers, allocate, decode in parallel into place.

Nothing has its final name before it is complete: a subset is built in `<dataset>/unfinished/`, flushed to disk, entered
into dataset.json and renamed. A run that was cut short is repeated from the last whole subset. Whatever has the name of
a subset that dataset.json does not name is somebody else's, and an error; but an empty folder is reused.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Self

import numpy as np

from data.cli import DataError, die_with_parent, first_of, progress_bar
from data.corpora import Corpus, CorpusSubset
from data.fetch import VerifiedArchive
from data.files import atomic_replace, not_ours
from data.packed import (
    AUDIO_FILE,
    AUDIO_HEADER_BYTES,
    DATASET_FILE,
    INDEX_FILE,
    PackedDataset,
    SubsetSummary,
    UtteranceRow,
    audio_header,
    dataset_digest,
    utterance_digest,
    write_dataset,
    write_index,
)
from data.readers import SPOKEN, Utterance, decode, read_utterances

CONTENT = (AUDIO_FILE, INDEX_FILE)
UTTERANCES_PER_TASK = 16
# Speech in FLAC or 16-bit samples hardly shrinks by gzip; what grows this much on unpacking is not speech.
MOST_EXPANSION, SMALL_BYTES = 20, 16 << 20


class StrictTarInfo(tarfile.TarInfo):
    """A member's header that must be one: tarfile takes a damaged header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


@dataclass
class Preparation:
    """A data set to which subsets are added; `work` is a work_folder in it, `jobs` the number of decoding processes."""

    dataset: PackedDataset
    corpus: Corpus
    work: Path
    jobs: int

    def add_archive(self, archive: VerifiedArchive, subsets: Sequence[CorpusSubset]) -> None:
        """Add the subsets that lie in one archive to the data set, which is unfinished then."""
        unpacked = self.work / "unpacked"
        unpacked.mkdir()
        unpack(archive.file, unpacked)
        for subset in subsets:
            utterances = read_utterances(unpacked, self.corpus.layout, subset)
            if self.corpus.published(archive.md5) and subset.utterances not in (None, len(utterances)):
                raise DataError(
                    f"{archive.file}: {subset.name} has {len(utterances)}, not {subset.utterances} utterances"
                )
            self.add_subset(archive, subset.name, utterances)
        shutil.rmtree(unpacked)

    def add_subset(self, archive: VerifiedArchive, name: str, utterances: Sequence[Utterance]) -> None:
        """Add one subset to the data set, which is unfinished then."""
        partial, final = self.work / name, self.dataset.path / name
        partial.mkdir()
        summary = _pack(utterances, partial, name, archive, self.corpus.published(archive.md5), self.jobs)
        check_place(self.dataset, [name])
        known = {**self.dataset.summary, name: summary}
        summaries = {each.name: known[each.name] for each in self.corpus.subsets if each.name in known}
        self.dataset = replace(self.dataset, digest="", splits=self.corpus.splits(list(known)), summary=summaries)
        # Entered before it has its name: a kill in between leaves nothing there that is not known to be ours.
        write_dataset(self.dataset, self.work)
        if final.is_dir():  # check_place has seen that only these two files can be in it
            for file in CONTENT:
                (final / file).unlink(missing_ok=True)
            final.rmdir()
        atomic_replace(partial, final)
        print(f"{name}: prepared {summary.utterances} utterances", file=sys.stderr)

    def finish(self) -> PackedDataset:
        """Compute the digest of everything and with it declare the data set finished."""
        digest = dataset_digest(self.dataset.path, self.dataset.subsets)
        self.dataset = replace(self.dataset, digest=digest)
        write_dataset(self.dataset, self.work)
        return self.dataset


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .tar.gz of plain files and folders. DataError names a member that is anything else or lies outside."""
    room = MOST_EXPANSION * archive.stat().st_size + SMALL_BYTES
    try:
        with (
            progress_bar(f"unpacking {archive.name}", archive.stat().st_size, "B") as bar,
            archive.open("rb") as compressed,
            gzip.GzipFile(fileobj=compressed) as stream,
            tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as tar,
        ):
            # Python 3.11.2, Debian 12's, has no filters. What they refuse is refused below; newer ones warn.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            for member in tar:
                if not (member.isfile() or member.isdir()):
                    raise DataError(f"{archive}: refused member '{member.name}': neither a file nor a folder")
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise DataError(f"{archive}: refused member '{member.name}': it lies outside the archive's folder")
                if member.isfile() and os.path.lexists(folder / member.name):
                    raise DataError(f"{archive}: refused member '{member.name}': it occurs twice")
                room -= member.size
                if room < 0:
                    raise DataError(f"{archive}: refused member '{member.name}': too large for so small an archive")
                tar.extract(member, folder, set_attrs=False)
                tar.members.clear()  # type: ignore[attr-defined]  # or it would remember every member
                bar.update(compressed.tell() - bar.n)
            # The gzip checksum stands at the end, beyond the last member.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DataError(f"{archive} is damaged or cut short: {error}") from error
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked into {folder}: {error}") from error


def _pack(
    utterances: Sequence[Utterance], folder: Path, name: str, archive: VerifiedArchive, official: bool, jobs: int
) -> SubsetSummary:
    """Write audio.npy and utterances.csv of one subset into `folder`."""
    ordered = sorted(utterances, key=lambda utterance: (utterance.num_samples, utterance.id))
    offsets = list(accumulate((utterance.num_samples for utterance in ordered), initial=0))
    audio = folder / AUDIO_FILE
    with audio.open("wb") as stream:
        stream.write(audio_header(offsets[-1]))
        if hasattr(os, "posix_fallocate"):  # a disk that is too small is then noticed before anything is decoded
            try:
                os.posix_fallocate(stream.fileno(), 0, AUDIO_HEADER_BYTES + 2 * offsets[-1])
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(audio)) from error
    digests = [""] * len(ordered)
    notes: list[str] = []
    with progress_bar(f"preparing {name}", len(ordered), " utterances") as bar:
        for place, digest, note in _decode_all(audio, ordered, offsets, jobs):
            digests[place] = digest
            notes += [note] if note else []
            bar.update(1)
    if notes:
        print(f"warning: {name}: {len(notes)} utterances to check:\n{first_of(notes)}", file=sys.stderr)
    index_sha256 = write_index(
        folder / INDEX_FILE,
        (
            UtteranceRow(spoken.id, spoken.speaker, offset, spoken.num_samples, spoken.transcript, digest)
            for spoken, offset, digest in zip(ordered, offsets[:-1], digests, strict=True)
        ),
    )
    with audio.open("rb") as stream:
        os.fsync(stream.fileno())
    return SubsetSummary(
        name=name,
        utterances=len(ordered),
        speakers=len({utterance.speaker for utterance in ordered}),
        samples=offsets[-1],
        longest_samples=ordered[-1].num_samples,
        index_sha256=index_sha256,
        archive=archive.file.name,
        archive_md5=archive.md5,
        archive_sha256=archive.sha256,
        official=official,
    )


def _decode_all(
    audio: Path, ordered: Sequence[Utterance], offsets: Sequence[int], jobs: int
) -> Iterator[tuple[int, str, str]]:
    """Decode all utterances into audio.npy, in `jobs` processes; yield of each its place, digest and a warning."""
    tasks = list(_tasks(ordered))
    decode_some = partial(_decode_into, audio)
    utterances = ([ordered[place] for place in places] for places in tasks)
    starts = ([offsets[place] for place in places] for places in tasks)
    jobs = min(jobs, len(tasks))
    if jobs == 1:
        for places, decoded in zip(tasks, map(decode_some, utterances, starts), strict=True):
            yield from ((place, *each) for place, each in zip(places, decoded, strict=True))
        return
    # Spawned, not forked: forking a process that has threads (the progress bar has one) can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=die_with_parent, initargs=(os.getpid(),)) as pool:
        try:
            for places, decoded in zip(tasks, pool.map(decode_some, utterances, starts), strict=True):
                yield from ((place, *each) for place, each in zip(places, decoded, strict=True))
        except BrokenProcessPool:
            raise DataError("a decoding process was killed; if memory ran out, fewer --jobs help") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first error is enough
            raise


def _tasks(ordered: Sequence[Utterance]) -> Iterator[Sequence[int]]:
    """Yield the places of some utterances at a time: successive ones, or of speech to be made those of one speaker."""
    groups: dict[str, list[int]] = {}
    for place, utterance in enumerate(ordered):
        groups.setdefault(utterance.speaker if utterance.encoding in SPOKEN else "", []).append(place)
    for speaker, places in groups.items():
        size = len(places) if speaker else UTTERANCES_PER_TASK
        yield from (places[start : start + size] for start in range(0, len(places), size))


def _decode_into(audio: Path, utterances: Sequence[Utterance], offsets: Sequence[int]) -> list[tuple[str, str]]:
    """Decode utterances into audio.npy, from the samples `offsets` on; return of each the digest and a warning."""
    decoded = []
    # Written, not memory-mapped: a full disk is then an error and not a bus fault.
    with audio.open("r+b") as stream:
        for utterance, offset, (samples, clipped) in zip(utterances, offsets, _waveforms(utterances), strict=True):
            waveform = np.ascontiguousarray(samples, dtype="<i2")
            note = f"{utterance.id}: {clipped} samples were beyond full scale and were clipped" if clipped else ""
            if waveform.min() == waveform.max():
                note = f"{utterance.id}: nothing but silence; do its channels cancel each other?"
            decoded.append((utterance_digest(waveform, utterance.transcript), note))
            stream.seek(AUDIO_HEADER_BYTES + 2 * offset)
            stream.write(waveform.data)
    return decoded


def _waveforms(utterances: Sequence[Utterance]) -> Iterable[tuple[np.ndarray, int]]:
    if utterances[0].encoding not in SPOKEN:
        return map(decode, utterances)
    return ((waveform, 0) for waveform in synthesizer(utterances[0].encoding).speak_utterances(utterances))


def synthesizer(layout: str) -> ModuleType:
    """Return the module that speaks a corpus. It is imported here, so that eSpeak NG is needed for these alone."""
    from data.synthetic import embedded, rehearsal

    return {"embedded": embedded, "rehearsal": rehearsal}[layout]


def check_place(dataset: PackedDataset, subsets: Iterable[str]) -> None:
    """Raise DataError where something that is not this program's lies where these subsets are to be prepared."""
    if (dataset.path / DATASET_FILE).is_symlink():
        raise not_ours(dataset.path / DATASET_FILE)
    for name in subsets:
        folder = dataset.path / name
        if os.path.lexists(folder) and not _holds_only(folder, CONTENT if name in dataset.summary else ()):
            raise not_ours(folder)


def _holds_only(folder: Path, names: Collection[str]) -> bool:
    """Return whether this is a folder, no link to one, with no entries but files of these names."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(entry.name in names and entry.is_file() and not entry.is_symlink() for entry in folder.iterdir())
