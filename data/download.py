"""Downloads a corpus and prepares it: archives -> packed data set.

python -m data.download                                        all of LibriSpeech into ./LibriSpeech_dataset
python -m data.download --corpus synthetic                     the embedded corpus, made on this machine
python -m data.download --subsets dev-clean,test-clean         only these; others can be added later
python -m data.download --corpus an4 --mirror ~/archives       from a folder (read in place) or another address
python -m data.download --mirror part --checksums part/md5sum.txt      archives other than the published ones
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import shutil
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.corpora import CORPORA, Archive, Corpus, CorpusSubset, find_corpus
from data.packed import (
    AUDIO_FILE,
    CHUNK_BYTES,
    DATASET_FILE,
    INDEX_FILE,
    DataError,
    PackedDataset,
    read_dataset,
    replace_durably,
)
from data.prepare import CheckedArchive, finish_dataset, prepare_archive, progress_bar

TIMEOUT_S = 60.0
# Of an archive's size: unpacked FLAC is about as large as its archive, packed 16-bit samples about 1.85 times that.
UNPACKED_RATIO, PACKED_RATIO = 1.5, 1.9


@dataclass(frozen=True)
class Options:
    """Download a corpus and prepare it for training; what is there already is not done again."""

    corpus: Annotated[str, tyro.conf.arg(help=f"which one: {', '.join(CORPORA)}")] = "librispeech"
    subsets: str = ""
    """comma-separated subsets, such as train-clean-100,dev-clean; empty: all of the corpus"""
    mirror: str = ""
    """address or folder that holds the archives; empty: the corpus's own mirrors"""
    checksums: Path | None = None
    """md5sum-format file whose sums replace the official ones, for archives that are not the published ones"""
    dataset_dir: Path | None = None
    """where the data set goes; by default a folder in the repository, such as LibriSpeech_dataset"""
    jobs: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """processes that decode audio"""


def main() -> None:
    options = tyro.cli(Options, prog="download_dataset.sh", description=Options.__doc__)
    try:
        download(options)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


def download(options: Options) -> PackedDataset:
    """Brings the data set that `options` describe to completion; DataError where that is impossible."""
    corpus = find_corpus(options.corpus)
    subsets = corpus.select([name.strip() for name in options.subsets.split(",") if name.strip()])
    if options.jobs < 1:
        raise DataError(f"--jobs is {options.jobs}; at least 1 is needed")
    if corpus.synthetic and (options.mirror or options.checksums):
        raise DataError("the synthetic corpus is made on this machine: --mirror and --checksums do not apply")
    sums = read_checksums(options.checksums) if options.checksums else None
    path = options.dataset_dir or corpus.default_dataset_dir
    path.mkdir(parents=True, exist_ok=True)
    with _sole_writer(path):
        dataset = _present_state(path, corpus)
        missing = [subset for subset in subsets if not _is_prepared(dataset, subset, sums, options.checksums)]
        if not missing and dataset.digest:
            print(f"{path} is complete already: {_counts(dataset)}")
            return dataset
        mirrors = (options.mirror,) if options.mirror else corpus.mirrors
        archives = {subset.archive.file: subset.archive for subset in missing}
        _check_disk(path, list(archives.values()), mirrors, corpus)
        for archive in archives.values():
            members = [subset for subset in missing if subset.archive == archive]
            with _archive_on_disk(path, corpus, members, mirrors, sums, options) as checked:
                dataset = prepare_archive(dataset, corpus, checked, members, options.jobs)
        dataset = finish_dataset(dataset)
    print(f"{path} is complete: {_counts(dataset)}")
    if not dataset.official and not dataset.synthetic:
        print("Note: made from archives other than the published ones (--checksums).", file=sys.stderr)
    if len(dataset.subsets) == len(corpus.subsets) and corpus.reference_digest not in ("", dataset.digest):
        print(
            f"warning: the checksum is {dataset.digest}, not the reference {corpus.reference_digest}, "
            "as verify_dataset.sh will say: eSpeak NG of another platform or version speaks slightly differently.",
            file=sys.stderr,
        )
    return dataset


def read_checksums(file: Path) -> dict[str, str]:
    """MD5 by file name, from a file in the format of md5sum."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the checksums {file}: {error}") from error
    sums = {}
    for line in filter(None, map(str.strip, lines)):
        md5, _, name = line.partition(" ")
        if len(md5) != 32 or not set(md5.lower()) <= set("0123456789abcdef") or not name.strip(" *"):
            raise DataError(f"{file}: not a line of md5sum: {line!r}")
        sums[Path(name.strip(" *")).name] = md5.lower()
    return sums


def expected_md5(archive: Archive, sums: dict[str, str] | None, file: Path | None) -> str:
    """The MD5 that an archive must have: the official one, or that of --checksums. Empty: made on this machine."""
    if sums is None:
        return archive.md5
    if archive.file not in sums:
        raise DataError(f"{file} has no line for {archive.file}")
    return sums[archive.file]


class MirrorError(DataError):
    """A mirror that does not deliver; another one may."""


def fetch(address: str, target: Path, size: int) -> None:
    """Downloads one archive to `target`, which appears when every byte is on disk; MirrorError where that fails.

    `size` is for the progress bar, should the mirror announce none.
    """
    partial = target.with_name(target.name + ".part")
    request = urllib.request.Request(address, headers={"User-Agent": "deepspeech2-benchmark"})
    with _mirror_failures(address):
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    announced = int(response.headers.get("Content-Length") or 0)
    with response, partial.open("wb") as stream, progress_bar(target.name, announced or size, "B") as bar:
        while True:
            with _mirror_failures(address):
                chunk = response.read(CHUNK_BYTES)
            if not chunk:
                break
            stream.write(chunk)
            bar.update(len(chunk))
        stream.flush()
        os.fsync(stream.fileno())
        if announced and stream.tell() != announced:
            raise MirrorError(f"{address}: the connection ended after {stream.tell()} of {announced} bytes")
    replace_durably(partial, target)


@contextmanager
def _mirror_failures(address: str) -> Iterator[None]:
    """Tells failures of the network from those of this machine's disk."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise MirrorError(f"{address}: {error or type(error).__name__}") from error


def check_archive(file: Path, archive: Archive, expected: str) -> CheckedArchive:
    """Computes the sums of an archive; DataError where its MD5 is not the expected one."""
    md5, sha256 = hashlib.md5(), hashlib.sha256()
    with progress_bar(f"checking {file.name}", file.stat().st_size, "B") as bar, file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            bar.update(len(chunk))
    official = archive.md5 != "" and md5.hexdigest() == archive.md5
    if expected and md5.hexdigest() != expected:
        raise DataError(
            f"{file} ({file.stat().st_size} bytes) has MD5 {md5.hexdigest()}, expected {expected}"
            f"{f' ({archive.bytes} bytes)' if expected == archive.md5 else ''}: damaged, or not the published archive "
            "(LibriSpeech was re-issued once, so old copies differ; for a partial mirror give its sums by --checksums)"
        )
    if official and archive.sha256 not in ("", sha256.hexdigest()):
        raise DataError(f"{file} has SHA-256 {sha256.hexdigest()}, expected {archive.sha256}")
    return CheckedArchive(file, md5.hexdigest(), sha256.hexdigest(), official)


@contextmanager
def _archive_on_disk(
    path: Path,
    corpus: Corpus,
    subsets: Sequence[CorpusSubset],
    mirrors: Sequence[str],
    sums: dict[str, str] | None,
    options: Options,
) -> Iterator[CheckedArchive]:
    """An archive with the right sum: read in place from a folder, else fetched or made, and removed at the end."""
    archive = subsets[0].archive
    expected = expected_md5(archive, sums, options.checksums)
    if (folder := _local_folder(mirrors)) is not None:
        yield check_archive(folder / archive.file, archive, expected)
        return
    target = path / "archives" / archive.file
    target.parent.mkdir(exist_ok=True)
    if corpus.synthetic:
        from data.synthetic import write_archive  # here, so that eSpeak NG is needed for this corpus alone

        write_archive(subsets[0].name, target, options.jobs)
    elif not target.exists():
        _fetch_from_any(mirrors, archive, target)
    try:
        checked = check_archive(target, archive, expected)
    except DataError:
        target.unlink()  # or the next run would find it again
        raise
    yield checked
    target.unlink()
    if not any(target.parent.iterdir()):
        target.parent.rmdir()


def _fetch_from_any(mirrors: Sequence[str], archive: Archive, target: Path) -> None:
    for mirror in mirrors:
        try:
            return fetch(f"{mirror.rstrip('/')}/{archive.file}", target, archive.bytes)
        except MirrorError as error:
            print(f"warning: {error}", file=sys.stderr)
    raise DataError(f"no mirror delivered {archive.file}")


def _local_folder(mirrors: Sequence[str]) -> Path | None:
    """The folder that the user named as the mirror; None where mirrors are addresses."""
    if len(mirrors) != 1 or urllib.parse.urlparse(mirrors[0]).scheme in ("http", "https", "ftp", "file"):
        return None
    return Path(mirrors[0]).expanduser()


def _present_state(path: Path, corpus: Corpus) -> PackedDataset:
    if not (path / DATASET_FILE).exists():
        return PackedDataset(path, corpus.name, corpus.synthetic, corpus.splits([]))
    dataset = read_dataset(path)
    if dataset.corpus != corpus.name:
        raise DataError(f"{path} holds the corpus {dataset.corpus}, not {corpus.name}: give another --dataset-dir")
    return dataset


def _is_prepared(
    dataset: PackedDataset, subset: CorpusSubset, sums: dict[str, str] | None, checksums: Path | None
) -> bool:
    """Whether a subset is there already; DataError if it was made from another archive than is asked for now."""
    expected = expected_md5(subset.archive, sums, checksums)
    if subset.name not in dataset.summary:
        return False
    found = dataset.summary[subset.name].archive_md5
    if expected not in ("", found):
        raise DataError(
            f"{dataset.path} holds {subset.name} from an archive with MD5 {found}, not {expected}: "
            "give the --checksums that it was made with, or another --dataset-dir"
        )
    folder = dataset.path / subset.name
    return (folder / AUDIO_FILE).is_file() and (folder / INDEX_FILE).is_file()


def _check_disk(path: Path, archives: Sequence[Archive], mirrors: Sequence[str], corpus: Corpus) -> None:
    """Refuses to start what the disk cannot hold: the packed data set and the largest archive, unpacked."""
    if corpus.synthetic:
        return
    folder = _local_folder(mirrors)
    if folder is not None:
        for archive in archives:
            if not (folder / archive.file).is_file():
                raise DataError(f"the mirror {folder} has no file {archive.file}")
        sizes = [(folder / archive.file).stat().st_size for archive in archives]
    else:
        sizes = [archive.bytes for archive in archives]
    needed = PACKED_RATIO * sum(sizes) + (UNPACKED_RATIO + (folder is None)) * max(sizes, default=0)
    free = shutil.disk_usage(path).free
    if free < needed:
        raise DataError(f"{path} needs {needed / 1e9:.1f} GB of free disk space, {free / 1e9:.1f} GB are free")


@contextmanager
def _sole_writer(path: Path) -> Iterator[None]:
    """Keeps a second download out of the same folder; the lock is gone when its process is."""
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise DataError(f"another download is working in {path}") from None
    finally:
        os.close(folder)


def _counts(dataset: PackedDataset) -> str:
    return ", ".join(
        f"{subset.name} {subset.utterances} utterances ({subset.hours:.2f} h)" for subset in dataset.summary.values()
    )


if __name__ == "__main__":
    main()
