"""From an archive to packed subsets: unpack, read the headers, allocate, decode in parallel into place.

Nothing has its final name before it is complete: a subset is built in `<dataset>/unfinished/`, flushed to disk, entered
into dataset.json and renamed. A run that was cut short is repeated from the last whole subset. Whatever has the name of
a subset that dataset.json does not name is somebody else's, and an error; but an empty folder is reused.
"""

import gzip
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data import packed
from data.cli import UserError, first_of, progress_bar
from data.corpora import Archive, Corpus, CorpusSubset
from data.files import atomic_replace, not_ours
from data.readers import Utterance, decode, read_utterances
from data.synthetic import embedded, rehearsal

CONTENT = (packed.AUDIO_FILE, packed.INDEX_FILE)
UTTERANCES_PER_TASK = 16
SYNTHESIZERS = {"embedded": embedded, "rehearsal": rehearsal}  # layouts without archives, encodings without files


@dataclass
class Preparation:
    """A data set to which subsets are added; `work` is a work_folder in it, `jobs` the number of decoding threads."""

    dataset: packed.PackedDataset
    corpus: Corpus
    work: Path
    jobs: int

    def add_archive(self, archive: Archive, file: Path, subsets: Sequence[CorpusSubset]) -> None:
        """Add the subsets that lie in an archive, which is this file, to the data set, which is unfinished then."""
        unpacked = self.work / "unpacked"
        unpacked.mkdir()
        unpack(file, unpacked)
        for subset in subsets:
            self.add_subset(archive, subset.name, read_utterances(unpacked, self.corpus.layout, subset))
        shutil.rmtree(unpacked)

    def add_subset(self, archive: Archive, name: str, utterances: Sequence[Utterance]) -> None:
        """Add one subset."""
        partial, final = self.work / name, self.dataset.path / name
        partial.mkdir()
        summary = self._pack(partial, archive, utterances)
        check_place(self.dataset, [name])
        known = {**self.dataset.summary, name: summary}
        summaries = {each.name: known[each.name] for each in self.corpus.subsets if each.name in known}
        self.dataset = replace(self.dataset, digest="", splits=self.corpus.splits(list(known)), summary=summaries)
        # Entered before it has its name: a kill in between leaves nothing there that is not known to be ours.
        packed.write_dataset(self.dataset, self.work)
        if final.is_dir():  # check_place has seen that only these two files can be in it
            for file in CONTENT:
                (final / file).unlink(missing_ok=True)
            final.rmdir()
        atomic_replace(partial, final)
        print(f"{name}: prepared {summary.utterances} utterances", file=sys.stderr)

    def _pack(self, folder: Path, archive: Archive, utterances: Sequence[Utterance]) -> packed.SubsetSummary:
        """Write audio.npy and utterances.csv of the subset of the folder's name."""
        ordered = sorted(utterances, key=lambda utterance: (utterance.num_samples, utterance.id))
        samples = sum(utterance.num_samples for utterance in ordered)
        audio = folder / packed.AUDIO_FILE
        audio.write_bytes(packed.audio_header(samples))
        # To its full size: a limit of file size is met before anything is decoded.
        os.truncate(audio, packed.AUDIO_HEADER_BYTES + 2 * samples)
        rows: list[packed.UtteranceRow] = []
        notes: list[str] = []
        with progress_bar(f"preparing {folder.name}", len(ordered), " utterances") as bar:
            for row, note in _decode_all(audio, ordered, self.jobs):
                rows.append(row)
                notes += [note] if note else []
                bar.update(1)
        if notes:
            print(f"warning: {folder.name}: {len(notes)} utterances to check:\n{first_of(notes)}", file=sys.stderr)
        with audio.open("rb") as stream:
            os.fsync(stream.fileno())
        return packed.SubsetSummary(
            utterances=len(ordered),
            speakers=len({utterance.speaker for utterance in ordered}),
            samples=samples,
            longest_samples=ordered[-1].num_samples,
            index_sha256=packed.write_index(folder / packed.INDEX_FILE, sorted(rows, key=lambda row: row.offset)),
            archive=Path(archive.file).name,
            archive_md5=archive.md5,
            official=archive.md5 in {subset.archive.md5 for subset in self.corpus.subsets} - {""},
        )

    def finish(self) -> packed.PackedDataset:
        """Compute the digest of everything and with it declare the data set finished."""
        self.dataset = replace(self.dataset, digest=packed.dataset_digest(self.dataset.path, self.dataset.summary))
        packed.write_dataset(self.dataset, self.work)
        return self.dataset


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .tar.gz of plain files and folders. UserError names a member that is anything else or lies outside."""
    try:
        with (
            progress_bar(f"unpacking {archive.name}", archive.stat().st_size, "B") as bar,
            archive.open("rb") as compressed,
            gzip.GzipFile(fileobj=compressed) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            # Python 3.11.2, Debian 12's, has no filters. What they refuse is refused below; newer ones warn.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            for member in tar:
                outside = member.name.startswith("/") or ".." in member.name.split("/")
                twice = member.isfile() and os.path.lexists(folder / member.name)
                if outside or twice or not (member.isfile() or member.isdir()):
                    why = "it occurs twice" if twice else "it is no file or folder inside of the archive"
                    raise UserError(f"{archive}: refused member '{member.name}': {why}")
                tar.extract(member, folder, set_attrs=False)
                tar.members.clear()  # type: ignore[attr-defined]  # or it would remember every member
                bar.update(compressed.tell() - bar.n)
            # The gzip checksum stands at the end, beyond the last member.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise UserError(f"{archive} is damaged or cut short: {error}") from error
    except OSError as error:
        raise UserError(f"{archive} cannot be unpacked into {folder}: {error}") from error


def _decode_all(audio: Path, ordered: Sequence[Utterance], jobs: int) -> Iterator[tuple[packed.UtteranceRow, str]]:
    """Decode all utterances into audio.npy, in `jobs` threads; yield the row of each and a warning."""
    tasks: dict[str | int, list[tuple[int, Utterance]]] = {}  # of successive utterances, or of one synthetic speaker
    offset = 0
    for place, utterance in enumerate(ordered):
        task = utterance.speaker if utterance.encoding in SYNTHESIZERS else place // UTTERANCES_PER_TASK
        tasks.setdefault(task, []).append((offset, utterance))
        offset += utterance.num_samples
    pool = ThreadPoolExecutor(jobs)  # decoding, resampling and digests let other threads run
    try:
        for decoded in pool.map(partial(_decode_task, audio), tasks.values()):
            yield from decoded
    finally:
        pool.shutdown(cancel_futures=True)  # the first error is enough


def _decode_task(audio: Path, task: Sequence[tuple[int, Utterance]]) -> list[tuple[packed.UtteranceRow, str]]:
    """Decode some utterances, each to its offset; return the row of each and a warning."""
    utterances, decoded = [utterance for _, utterance in task], []
    if (encoding := utterances[0].encoding) in SYNTHESIZERS:
        waveforms: Iterable = ((waveform, 0) for waveform in SYNTHESIZERS[encoding].speak_utterances(utterances))
    else:
        waveforms = map(decode, utterances)
    # Written, not memory-mapped: a full disk is then an error and not a bus fault.
    with audio.open("r+b") as stream:
        for (offset, spoken), (samples, clipped) in zip(task, waveforms, strict=True):
            name, transcript = spoken.id, spoken.transcript
            waveform = np.ascontiguousarray(samples, dtype="<i2")
            note = f"{name}: {clipped} samples were beyond full scale and were clipped" if clipped else ""
            if waveform.min() == waveform.max():
                note = f"{name}: nothing but silence; do its channels cancel each other?"
            digest = packed.utterance_digest(waveform, transcript)
            decoded.append((packed.UtteranceRow(name, spoken.speaker, offset, len(waveform), transcript, digest), note))
            stream.seek(packed.AUDIO_HEADER_BYTES + 2 * offset)
            stream.write(waveform.data)
    return decoded


def check_place(dataset: packed.PackedDataset, subsets: Iterable[str]) -> None:
    """Raise UserError where something that is not this program's lies where these subsets are to be prepared."""
    if (dataset.path / packed.DATASET_FILE).is_symlink():
        raise not_ours(dataset.path / packed.DATASET_FILE)
    for folder in (dataset.path / name for name in subsets):
        known = set(CONTENT if folder.name in dataset.summary else ())
        other = folder.is_symlink() or (folder.exists() and not folder.is_dir())
        if other or (folder.exists() and {entry.name for entry in folder.iterdir()} - known):
            raise not_ours(folder)
