"""Where the archives of a corpus come from: a folder, in which they are read in place, mirrors, or this machine itself.

Whatever they come from, each is handed out with its sums checked, and as soon as it is there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

from data.corpora import Archive, Corpus
from data.fetch import HINT, announced_bytes, fetch, forget, was_fetched
from data.packed import CHUNK_BYTES, DataError
from data.prepare import CheckedArchive, progress_bar

PARALLEL_DOWNLOADS = 3
# Of an archive's size: what its files take unpacked, and as packed 16-bit samples with their index.
UNPACKED_RATIO = {"librispeech": 1.1, "an4": 1.5}
PACKED_RATIO = 1.9


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


def check_archive(file: Path, archive: Archive, official_md5: str) -> CheckedArchive:
    """Computes the sums of an archive on disk; DataError where they are not the expected ones."""
    return _judge(file, archive, official_md5, *sums_of(file))


def sums_of(file: Path, progress: Callable[[int], object] = lambda count: None) -> tuple[str, str]:
    """MD5 and SHA-256 of a file."""
    md5, sha256 = hashlib.md5(), hashlib.sha256()
    with progress_bar(f"checking {file.name}", file.stat().st_size, "B") as bar, file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            bar.update(len(chunk))
            progress(len(chunk))
    return md5.hexdigest(), sha256.hexdigest()


def _judge(file: Path, archive: Archive, official_md5: str, md5: str, sha256: str) -> CheckedArchive:
    if archive.md5 not in ("", md5):
        raise DataError(
            f"{file} ({file.stat().st_size} bytes) has MD5 {md5}, expected {archive.md5}"
            f"{f' ({archive.bytes} bytes)' if archive.bytes else ''}: damaged, or not the published archive {HINT}"
        )
    if archive.sha256 not in ("", sha256):
        raise DataError(f"{file} has SHA-256 {sha256}, expected {archive.sha256}")
    return CheckedArchive(file, md5, sha256, official=md5 == official_md5)


def check_space(path: Path, *, packed: float, archives: float, unpacked: float) -> None:
    """Refuses to start what the disk cannot hold. Sizes in bytes of what is still to be written."""
    needed, free = packed + archives + unpacked, shutil.disk_usage(path).free
    if free < needed:
        raise DataError(
            f"{path} needs {needed / 1e9:.1f} GB of free disk space ({packed / 1e9:.1f} GB for the packed data set, "
            f"{archives / 1e9:.1f} GB for archives, {unpacked / 1e9:.1f} GB for the largest one's files), "
            f"{free / 1e9:.1f} GB are free: make room there, or give a --dataset-dir on another disk"
        )


class Supply:
    """The archives of a corpus: downloaded into `folder`, or made in `work`. `mirror` is the user's, empty for none."""

    def __init__(self, folder: Path, work: Path, corpus: Corpus, mirror: str, keep: bool, jobs: int) -> None:
        self._folder, self._work, self._corpus, self._keep, self._jobs = folder, work, corpus, keep, jobs
        self._official = {subset.archive.file: subset.archive.md5 for subset in corpus.subsets}
        named = [part.strip() for part in mirror.split(",") if part.strip()]
        addresses = [part for part in named if part.startswith(("http://", "https://"))]
        self._mirrors = addresses or list(corpus.mirrors)
        self._local = Path(mirror).expanduser() if mirror and not addresses else None
        if addresses and len(addresses) != len(named):
            raise DataError("--mirror is one folder, or addresses that begin with http:// or https://")

    def archives(self, wanted: Sequence[Archive]) -> Generator[CheckedArchive, None, None]:
        """The archives, checked, in the order in which they are there. DataError if one cannot be had."""
        if not wanted:
            return
        if self._corpus.synthetic:
            yield from self._made(wanted)
        elif self._local is not None:
            yield from self._read_in_place(wanted, self._local)
        else:
            yield from self._fetched(wanted)

    def drop(self, archive: CheckedArchive) -> None:
        """Removes an archive that is done with, if it was made or downloaded here; one that is kept is the user's."""
        if archive.file.parent == self._work:
            archive.file.unlink()
        elif self._local is None and was_fetched(archive.file, archive.md5):
            forget(archive.file)
            if not self._keep:
                archive.file.unlink()
            with suppress(OSError):  # it is not empty, or only a link
                self._folder.rmdir()

    def _made(self, wanted: Sequence[Archive]) -> Iterator[CheckedArchive]:
        from data.synthetic import write_archive  # here, so that eSpeak NG is needed for this corpus alone

        for archive in wanted:
            target = self._work / archive.file
            write_archive(archive.file.removesuffix(".tar.gz"), target, self._jobs)
            yield check_archive(target, archive, "none")

    def _read_in_place(self, wanted: Sequence[Archive], folder: Path) -> Iterator[CheckedArchive]:
        if absent := [archive.file for archive in wanted if not (folder / archive.file).is_file()]:
            raise DataError(f"the mirror {folder} has no file {absent[0]}")
        self._check_space([(folder / archive.file).stat().st_size for archive in wanted], 0)
        for archive in wanted:
            yield check_archive(folder / archive.file, archive, self._official[archive.file])

    def _fetched(self, wanted: Sequence[Archive]) -> Iterator[CheckedArchive]:
        """Fetches several at a time. If one fails, the others are finished first."""
        sizes = [archive.bytes or announced_bytes(self._mirrors, archive.file) for archive in wanted]
        present = [self._folder / f"{archive.file}{suffix}" for archive in wanted for suffix in ("", ".part")]
        # Archives that wait for their turn take no more than the room that their packed data will need, as an archive
        # is smaller than that and then gone. So only one has to be counted.
        self._check_space(
            sizes,
            (sum(sizes) if self._keep else max(sizes)) - sum(file.stat().st_size for file in present if file.exists()),
        )
        self._folder.mkdir(exist_ok=True)
        stop = threading.Event()
        pool = ThreadPoolExecutor(PARALLEL_DOWNLOADS)
        failures = []
        try:
            with progress_bar("all archives", sum(sizes), "B") as everything:
                futures = [pool.submit(self._fetch, archive, everything.update, stop) for archive in wanted]
                for future in as_completed(futures):
                    try:
                        checked = future.result()
                    except DataError as error:
                        failures.append(str(error))
                    else:
                        yield checked
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        if failures:
            raise DataError("; ".join(failures))

    def _fetch(self, archive: Archive, progress: Callable[[int], object], stop: threading.Event) -> CheckedArchive:
        target = self._folder / archive.file
        if os.path.lexists(target):
            found = sums_of(target, progress)
            try:
                return _judge(target, archive, self._official[archive.file], *found)
            except DataError as error:
                if not was_fetched(target, found[0]):
                    raise DataError(f"{error}; it was not downloaded by this program: move it away") from error
                # It stays until the new one is whole.
                print(f"warning: {error}; fetching it anew", file=sys.stderr)
        started = time.monotonic()
        with progress_bar(archive.file, archive.bytes, "B") as bar:

            def advance(count: int) -> None:
                bar.update(count)
                progress(count)

            md5, sha256 = fetch(archive, self._mirrors, target, advance, stop)
        size, seconds = target.stat().st_size, time.monotonic() - started
        print(f"{archive.file}: {size / 1e6:.1f} MB in {seconds:.1f} s", file=sys.stderr)
        return _judge(target, archive, self._official[archive.file], md5, sha256)

    def _check_space(self, sizes: Sequence[int], archives: float) -> None:
        check_space(
            self._folder.parent,
            packed=PACKED_RATIO * sum(sizes),
            archives=archives,
            unpacked=UNPACKED_RATIO[self._corpus.layout] * max(sizes),
        )
