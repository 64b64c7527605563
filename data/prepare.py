"""From an archive to packed subsets: unpack, read the headers, allocate, decode in parallel into place.

Nothing has its final name before it is complete: a subset is built in `<dataset>/unfinished/`, flushed to disk, entered
into dataset.json and renamed. A run that was cut short is repeated from the last whole subset.

Nothing is removed or replaced that was not made here. A subset's folder is ours if dataset.json names it, and
`unfinished/` if it holds the file MARK; an empty folder is nobody's loss. Anything else in their place is an error.
"""

from __future__ import annotations

import gzip
import multiprocessing
import os
import shutil
import sys
import tarfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Self

import numpy as np

from data.corpora import Corpus, CorpusSubset
from data.fetch import VerifiedArchive
from data.files import DataError, atomic_replace, die_with_parent, progress_bar
from data.packed import (
    AUDIO_FILE,
    AUDIO_HEADER_BYTES,
    INDEX_FILE,
    PackedDataset,
    SubsetSummary,
    UtteranceRow,
    audio_header,
    content_files,
    dataset_digest,
    utterance_digest,
    write_dataset,
    write_index,
)
from data.readers import Utterance, decode, read_utterances

UNFINISHED, MARK = "unfinished", "made-by-download_dataset.txt"
UTTERANCES_PER_TASK = 16
# Speech in FLAC or 16-bit samples hardly shrinks by gzip; what grows this much on unpacking is no speech.
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


def prepare_archive(
    dataset: PackedDataset,
    corpus: Corpus,
    archive: VerifiedArchive,
    subsets: Sequence[CorpusSubset],
    work: Path,
    jobs: int,
) -> PackedDataset:
    """Add the subsets that lie in one archive to a data set, which is unfinished then; return its new state."""
    unpacked = work / "unpacked"
    unpacked.mkdir()
    unpack(archive.file, unpacked)
    for subset in subsets:
        utterances = read_utterances(unpacked, corpus.layout, subset)
        if archive.official and subset.utterances not in (None, len(utterances)):
            raise DataError(f"{archive.file}: {len(utterances)} utterances in {subset.name}, not {subset.utterances}")
        dataset = prepare_subset(dataset, corpus, archive, subset.name, utterances, work, jobs)
    shutil.rmtree(unpacked)
    return dataset


def prepare_subset(
    dataset: PackedDataset,
    corpus: Corpus,
    archive: VerifiedArchive,
    name: str,
    utterances: Sequence[Utterance],
    work: Path,
    jobs: int,
) -> PackedDataset:
    """Add one subset to a data set, which is unfinished then; return its new state. `work` is work_folder's."""
    partial = work / name
    partial.mkdir()
    summary = _pack(utterances, partial, name, archive, jobs)
    check_place(dataset, [name])
    summaries = {**dataset.summary, name: summary}
    prepared = [known.name for known in corpus.subsets if known.name in summaries]
    dataset = replace(
        dataset,
        digest="",
        splits=corpus.splits(prepared),
        summary={name: summaries[name] for name in prepared},
    )
    # Entered before it has its name: a kill in between leaves nothing at the final place that is not known to be ours.
    write_dataset(dataset, work)
    final = dataset.path / name
    if final.is_dir():  # check_place has seen that only these two files can be in it
        for file in (AUDIO_FILE, INDEX_FILE):
            (final / file).unlink(missing_ok=True)
        final.rmdir()
    atomic_replace(partial, final)
    print(f"{name}: prepared {summary.utterances} utterances", file=sys.stderr)
    return dataset


def finish_dataset(dataset: PackedDataset, work: Path | None = None) -> PackedDataset:
    """Compute the digest of everything and with it declare the data set finished."""
    total = sum((dataset.path / name).stat().st_size for name in content_files(dataset.subsets))
    with progress_bar("checksum", total, "B") as bar:
        dataset = replace(dataset, digest=dataset_digest(dataset.path, dataset.subsets, bar.update))
    write_dataset(dataset, work)
    return dataset


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
    utterances: Sequence[Utterance], folder: Path, name: str, archive: VerifiedArchive, jobs: int
) -> SubsetSummary:
    """Write audio.npy and utterances.csv of one subset into `folder`."""
    ordered = sorted(utterances, key=lambda utterance: (utterance.num_samples, utterance.id))
    offsets = array("q", accumulate((utterance.num_samples for utterance in ordered), initial=0))
    audio = folder / AUDIO_FILE
    _allocate(audio, offsets[-1])

    def rows() -> Iterator[UtteranceRow]:
        with progress_bar(f"preparing {name}", len(ordered), " utterances") as bar:
            digests = chain.from_iterable(_decode_all(audio, ordered, offsets, jobs))
            # The digests first, so that their processes have ended when this has.
            for digest, utterance, offset in zip(digests, ordered, offsets, strict=False):
                bar.update(1)
                yield UtteranceRow(
                    utterance.id, utterance.speaker, offset, utterance.num_samples, utterance.transcript, digest
                )

    index_sha256 = write_index(folder / INDEX_FILE, rows())
    with audio.open("rb") as stream:
        os.fsync(stream.fileno())
    return SubsetSummary(
        name=name,
        utterances=len(ordered),
        speakers=len({utterance.speaker for utterance in ordered}),
        num_samples=offsets[-1],
        max_samples=ordered[-1].num_samples,
        index_sha256=index_sha256,
        archive=archive.file.name,
        archive_md5=archive.md5,
        archive_sha256=archive.sha256,
        official=archive.official,
    )


def _allocate(audio: Path, num_samples: int) -> None:
    """Make audio.npy in its full size, so that a disk that is too small is noticed before anything is decoded."""
    with audio.open("wb") as stream:
        stream.write(audio_header(num_samples))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, AUDIO_HEADER_BYTES + 2 * num_samples)


def _decode_all(audio: Path, ordered: Sequence[Utterance], offsets: Sequence[int], jobs: int) -> Iterator[list[str]]:
    """Decode all utterances into audio.npy, in `jobs` processes; yield their digests, in order."""
    starts = range(0, len(ordered), UTTERANCES_PER_TASK)
    tasks = [ordered[start : start + UTTERANCES_PER_TASK] for start in starts]
    arguments = [audio] * len(tasks), tasks, [offsets[start] for start in starts]
    jobs = min(jobs, len(tasks))
    if jobs == 1:
        yield from map(_decode_into, *arguments)
        return
    # Spawned, not forked: forking a process that has threads (the progress bar has one) can deadlock.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=die_with_parent, initargs=(os.getpid(),)) as pool:
        try:
            yield from pool.map(_decode_into, *arguments)
        except BrokenProcessPool:
            raise DataError("a decoding process was killed; if memory ran out, fewer --jobs help") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first error is enough
            raise


def _decode_into(audio: Path, utterances: Sequence[Utterance], offset: int) -> list[str]:
    """Decode successive utterances into audio.npy from sample `offset` on; return their digests."""
    digests = []
    # Written, not memory-mapped: a full disk is then an error and not a bus fault.
    with audio.open("r+b") as stream:
        stream.seek(AUDIO_HEADER_BYTES + 2 * offset)
        for utterance in utterances:
            waveform = np.ascontiguousarray(decode(utterance), dtype="<i2")
            digests.append(utterance_digest(waveform, utterance.transcript))
            stream.write(waveform.data)
    return digests


def check_place(dataset: PackedDataset, subsets: Iterable[str]) -> None:
    """Raise DataError where the folder of a subset that is to be prepared is there already, and not this program's."""
    for name in subsets:
        folder = dataset.path / name
        ours = {AUDIO_FILE, INDEX_FILE} if name in dataset.summary else set()
        if os.path.lexists(folder) and not _holds_only(folder, ours):
            raise _not_ours(folder)


@contextmanager
def work_folder(dataset: Path) -> Iterator[Path]:
    """Make a folder in the data set's for all that is unfinished, empty but for a mark, and remove it at the end.

    What an earlier, killed run left in it goes first. DataError where something else has its name.
    """
    folder = dataset / UNFINISHED
    if os.path.lexists(folder):
        if not (_holds_only(folder, set()) or (not folder.is_symlink() and (folder / MARK).is_file())):
            raise _not_ours(folder)
        _remove_work_folder(folder)
    folder.mkdir()
    try:
        (folder / MARK).write_text("Made by download_dataset.sh. Its next run removes this folder.\n", encoding="utf-8")
        yield folder
    finally:
        with suppress(OSError):
            _remove_work_folder(folder)


def _remove_work_folder(folder: Path) -> None:
    """Remove a work folder, its mark last, so that a folder that is half removed is still known."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()
    (folder / MARK).unlink(missing_ok=True)
    folder.rmdir()


def _holds_only(folder: Path, names: set[str]) -> bool:
    """Return whether this is a folder, no link to one, with no entries but files of these names."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(entry.name in names and entry.is_file() and not entry.is_symlink() for entry in folder.iterdir())


def _not_ours(path: Path) -> DataError:
    return DataError(f"{path} exists and was not made by this program; give another --dataset-dir")
