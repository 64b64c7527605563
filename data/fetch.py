"""One archive, verified: read from a folder, downloaded over HTTP whatever happens, or synthesized on this machine.

An unfinished download is `<archive>.part`. Any later run, after a kill or days, goes on from its last byte, at any
mirror; should the file have changed meanwhile, its sum is wrong in the end, and it is downloaded again from the start.

`<archive>.part.json` beside it says that the download is this program's; once the archive is whole, it holds its MD5.
Only archives with such notes are ever removed or replaced. The library is urllib3: it has the timeouts, redirects and
proxies, and no dependencies of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import urllib3
from urllib3.exceptions import HTTPError, ResponseError, SSLError
from urllib3.util import Retry, make_headers, parse_url

from data.corpora import Archive, Corpus
from data.files import CHUNK_BYTES, DataError, atomic_replace, atomic_write, progress_bar

PARALLEL_DOWNLOADS = 3
TIMEOUT_S = urllib3.Timeout(connect=20, read=30)
REDIRECTS = Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False)
ATTEMPTS = 6  # at a mirror, one after the other, none of which came further
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
LONGEST_WAIT_S = 600.0  # give up on a mirror that asks for a longer delay
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
MISMATCH_HINT = (
    "(LibriSpeech was re-issued once, so old copies differ; for a partial mirror give its sums by --checksums)"
)
HEADERS = {"User-Agent": "deepspeech2-benchmark", "Accept-Encoding": "identity"}
# Of an archive's size: what its files take unpacked, and as packed 16-bit samples with their index.
UNPACKED_RATIO = {"librispeech": 1.1, "an4": 1.5}
PACKED_RATIO = 1.9


class MirrorError(DataError):
    """A mirror that does not deliver; another one may."""


class Stopped(Exception):
    """The download was told to stop."""


class Transient(Exception):
    """A failure that is likely to pass. `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: int = 0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class VerifiedArchive:
    """An archive on this disk whose sum is right. `official`: it is the published one."""

    file: Path
    md5: str
    sha256: str
    official: bool


def read_checksums(file: Path) -> dict[str, str]:
    """Return MD5 sums by file name, from a file in the format of md5sum."""
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


def check_space(path: Path, *, packed: float, archives: float, unpacked: float) -> None:
    """Raise DataError if the disk cannot hold what is still to be written, in bytes."""
    needed, free = packed + archives + unpacked, shutil.disk_usage(path).free
    if free < needed:
        raise DataError(
            f"{path} needs {_size(needed)} of free disk space ({_size(packed)} for the packed data set, "
            f"{_size(archives)} for archives, {_size(unpacked)} for the largest one's files), {_size(free)} are free: "
            "make room there, or give a --dataset-dir on another disk"
        )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


class ArchiveSource:
    """The archives of a corpus: read in place, downloaded into `folder`, or synthesized in `work`.

    `mirror` is what the user gave: a folder, comma-separated addresses, or nothing.
    """

    def __init__(self, folder: Path, work: Path, corpus: Corpus, mirror: str, keep: bool, jobs: int) -> None:
        self._folder, self._work, self._corpus, self._keep, self._jobs = folder, work, corpus, keep, jobs
        self._official = {subset.archive.file: subset.archive.md5 for subset in corpus.subsets}
        named = [part.strip() for part in mirror.split(",") if part.strip()]
        addresses = [part for part in named if part.startswith(("http://", "https://"))]
        if addresses != named and (addresses or "://" in mirror):
            raise DataError("--mirror is one folder, or addresses that begin with http:// or https://")
        self._mirrors = addresses or list(corpus.mirrors)
        self._local = Path(mirror).expanduser() if mirror and not addresses else None

    def archives(self, wanted: Sequence[Archive]) -> Generator[VerifiedArchive, None, None]:
        """Yield the archives in the order in which they are there. DataError if one cannot be had."""
        if not wanted:
            return
        if self._corpus.synthetic:
            yield from self._synthesize(wanted)
        elif self._local is not None:
            yield from self._read_in_place(wanted, self._local)
        else:
            yield from self._download_all(wanted)

    def drop(self, archive: VerifiedArchive) -> None:
        """Remove an archive that is done with, if it was made or downloaded here; one that is kept is the user's."""
        if archive.file.parent == self._work:
            archive.file.unlink()
        elif self._local is None and was_fetched(archive.file, archive.md5):
            forget(archive.file)
            if not self._keep:
                archive.file.unlink()
            with suppress(OSError):  # it is not empty, or only a link
                self._folder.rmdir()

    def _synthesize(self, wanted: Sequence[Archive]) -> Iterator[VerifiedArchive]:
        from data.synthetic.archive import write_archive  # here, so that eSpeak NG is needed for this corpus alone

        for archive in wanted:
            target = self._work / archive.file
            write_archive(archive.file.removesuffix(".tar.gz"), target, self._jobs)
            yield self._verify(target, archive, *_sums(target))

    def _read_in_place(self, wanted: Sequence[Archive], folder: Path) -> Iterator[VerifiedArchive]:
        if absent := [archive.file for archive in wanted if not (folder / archive.file).is_file()]:
            raise DataError(f"the mirror {folder} has no file {absent[0]}")
        self._check_space([(folder / archive.file).stat().st_size for archive in wanted], 0)
        for archive in wanted:
            yield self._verify(folder / archive.file, archive, *_sums(folder / archive.file))

    def _download_all(self, wanted: Sequence[Archive]) -> Iterator[VerifiedArchive]:
        """Download several at a time. If one fails, the others are finished first."""
        for archive in wanted:
            _refuse_foreign(self._folder / archive.file)
        sizes = [archive.bytes or content_length(self._mirrors, archive.file) for archive in wanted]
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
            with progress_bar("archives", sum(sizes), "B") as bar:
                futures = [pool.submit(self._download, archive, bar.update, stop) for archive in wanted]
                for future in as_completed(futures):
                    try:
                        verified = future.result()
                    except DataError as error:
                        failures.append(str(error))
                    else:
                        yield verified
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
        if failures:
            raise DataError("; ".join(failures))

    def _download(self, archive: Archive, progress: Callable[[int], object], stop: threading.Event) -> VerifiedArchive:
        target = self._folder / archive.file
        if os.path.lexists(target):
            md5, sha256 = _sums(target, progress)
            try:
                return self._verify(target, archive, md5, sha256)
            except DataError as error:
                if not was_fetched(target, md5):
                    raise DataError(f"{error}; it was not downloaded by this program: move it away") from error
                # It stays until the new one is whole.
                print(f"warning: {error}; downloading again", file=sys.stderr)
        started = time.monotonic()
        md5, sha256 = fetch(archive, self._mirrors, target, progress, stop)
        print(f"{archive.file}: {_size(target.stat().st_size)} in {time.monotonic() - started:.1f} s", file=sys.stderr)
        return self._verify(target, archive, md5, sha256)

    def _verify(self, file: Path, archive: Archive, md5: str, sha256: str) -> VerifiedArchive:
        """Compare the sums of an archive with the expected ones; DataError where they differ."""
        if mismatch := _mismatch(archive, file.stat().st_size, md5, sha256):
            raise DataError(f"{file} {mismatch}")
        return VerifiedArchive(file, md5, sha256, official=md5 == self._official[archive.file] != "")

    def _check_space(self, sizes: Sequence[int], archives: float) -> None:
        check_space(
            self._folder.parent,
            packed=PACKED_RATIO * sum(sizes),
            archives=archives,
            unpacked=UNPACKED_RATIO[self._corpus.layout] * max(sizes),
        )


def _sums(file: Path, progress: Callable[[int], object] = lambda count: None) -> tuple[str, str]:
    """Return the MD5 and the SHA-256 of a file."""
    md5, sha256 = hashlib.md5(), hashlib.sha256()
    with progress_bar(f"checking {file.name}", file.stat().st_size, "B") as bar, file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            bar.update(len(chunk))
            progress(len(chunk))
    return md5.hexdigest(), sha256.hexdigest()


def _mismatch(archive: Archive, size: int, md5: str, sha256: str) -> str:
    """Return in what a file of these sums differs from an archive; nothing if it does not."""
    for name, found, expected in (("MD5", md5, archive.md5), ("SHA-256", sha256, archive.sha256)):
        if expected not in ("", found):
            published = f" ({archive.bytes} bytes)" if archive.bytes else ""
            return (
                f"({size} bytes) has {name} {found}, expected {expected}{published}: "
                f"damaged, or not the published archive {MISMATCH_HINT}"
            )
    return ""


def was_fetched(target: Path, md5: str) -> bool:
    """Return whether an archive, with this MD5, was downloaded by this program, by its notes."""
    return (_read_notes(target) or {}).get("md5") == md5


def forget(target: Path) -> None:
    """Remove the notes of an archive, which from then on is not this program's."""
    _notes(target).unlink(missing_ok=True)


def _notes(target: Path) -> Path:
    return target.with_name(target.name + ".part.json")


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _read_notes(target: Path) -> dict[str, object] | None:
    try:
        notes = json.loads(_notes(target).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return notes if isinstance(notes, dict) and isinstance(notes.get("address"), str) else None


def _refuse_foreign(target: Path) -> None:
    """Raise DataError where something that is not this program's has the name of its notes or its download."""
    if _read_notes(target) is None:
        for file in (_notes(target), _part(target)):
            if os.path.lexists(file):
                raise DataError(f"{file} exists and was not made by this program; move it away")


class PartialDownload:
    """The beginning of an archive on disk: what requests, runs and mirrors have brought so far."""

    def __init__(
        self, wanted: Archive, target: Path, progress: Callable[[int], object], stop: threading.Event | None
    ) -> None:
        _refuse_foreign(target)
        self._wanted, self._progress, self._stop = wanted, progress, stop or threading.Event()
        self.file = _part(target)
        self.resumed = self.size > 0  # whether it comes from several responses, perhaps of several mirrors
        progress(self.size)

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def complete(self, address: str) -> tuple[str, str]:
        """Download what is missing and return MD5 and SHA-256. MirrorError if this mirror fails or has another file."""
        while True:
            self._request_until_whole(address)
            md5, sha256 = _sums(self.file)
            mismatch, resumed = _mismatch(self._wanted, self.size, md5, sha256), self.resumed
            if not mismatch:
                return md5, sha256
            self._discard()
            if not resumed:
                raise MirrorError(f"{address} {mismatch}")
            # Only what came from this mirror in one response proves it wrong.
            print(f"{address}: checksum mismatch after resuming; restarting the download", file=sys.stderr)

    def _discard(self) -> None:
        self._progress(-self.size)
        self.file.unlink(missing_ok=True)
        self.resumed = False

    def _request_until_whole(self, address: str) -> None:
        """Request what is missing until nothing is, waiting longer and longer between failures."""
        failures, furthest = 0, self.size
        while self.size == 0 or self.size != self._wanted.bytes:
            try:
                self._request(address)
                return
            except Transient as error:
                failures = 0 if self.size > furthest else failures + 1
                furthest = max(furthest, self.size)
                if failures == ATTEMPTS:
                    raise MirrorError(f"{address}: {error}; given up after {ATTEMPTS} attempts") from error
                # Jitter keeps many machines from coming back at the same moment.
                delay = max(error.wait, min(LONGEST_BACKOFF_S, BACKOFF_S * 2**failures) * random.uniform(0.5, 1.5))
                if delay > LONGEST_WAIT_S:
                    raise MirrorError(f"{address}: {error}; it asks to wait {delay:.0f} s") from error
                print(f"{address}: {error}; resuming in {delay:.1f} s at byte {self.size}", file=sys.stderr)
                if self._stop.wait(delay):
                    raise Stopped from error

    def _request(self, address: str) -> None:
        """Send one request for the bytes that are missing, and write its answer."""
        try:
            response = _send("GET", address, {"Range": f"bytes={self.size}-"} if self.size else {})
        except HTTPError as error:
            raise _failure(address, error) from error
        try:
            length = self._begin(response, address)
            with self.file.open("ab") as stream:
                # read1 hands out what has arrived, so that a cut costs nothing that has.
                while (length is None or self.size < length) and (
                    chunk := response.read1(CHUNK_BYTES, decode_content=False)
                ):
                    if self._stop.is_set():
                        raise Stopped
                    stream.write(chunk)
                    stream.flush()
                    self._progress(len(chunk))
        except HTTPError as error:
            raise _failure(address, error) from error
        finally:
            # Not back into the pool: what is left of the body may be gigabytes, or never come.
            response.close()
        if length and self.size < length:
            raise Transient("the connection ended early")

    def _begin(self, response: urllib3.BaseHTTPResponse, address: str) -> int | None:
        """Judge an answer by its status and headers; return the length of the whole file, None if nobody tells it."""
        status, headers = response.status, response.headers
        if status in TRANSIENT:
            raise Transient(f"{address}: HTTP status {status}", _number(headers.get("Retry-After")) or 0)
        if status not in (200, 206, 416):
            raise MirrorError(f"{address}: HTTP status {status}")
        _, _, length_of_all = headers.get("Content-Range", "").partition("/")
        length = _number(headers.get("Content-Length") if status == 200 else length_of_all)
        published = self._wanted.bytes
        if length and published and length != published:
            raise MirrorError(
                f"{address} has {length} bytes, {published} were published: not the published archive {MISMATCH_HINT}"
            )
        if status == 200:
            self._discard()
        elif (status == 206 and f" {self.size}-" in headers.get("Content-Range", "")) or length == self.size:
            self.resumed = True
        else:
            self._discard()
            raise Transient("it has a shorter file, or sends another range than asked for")
        return length or published or None


def fetch(
    wanted: Archive,
    mirrors: Sequence[str],
    target: Path,
    progress: Callable[[int], object] = lambda count: None,
    stop: threading.Event | None = None,
) -> tuple[str, str]:
    """Download an archive from the first mirror that has it; return its MD5 and SHA-256.

    `target` appears when its sums have been found right; a size of 0 is one that is not known. `progress` is told the
    bytes that are added, or, where it must start again, lost. DataError says what each mirror did wrong.
    """
    partial = PartialDownload(wanted, target, progress, stop)
    if _read_notes(target) is None:
        atomic_write(_notes(target), json.dumps({"address": ""}))
    reasons = []
    for address in (f"{mirror.rstrip('/')}/{wanted.file}" for mirror in mirrors):
        try:
            md5, sha256 = partial.complete(address)
        except MirrorError as error:
            reasons.append(str(error))
            print(f"warning: {error}", file=sys.stderr)
            continue
        with partial.file.open("rb") as stream:
            os.fsync(stream.fileno())
        atomic_write(_notes(target), json.dumps({"address": address, "md5": md5}))
        atomic_replace(partial.file, target)
        return md5, sha256
    raise DataError(f"no mirror delivered {wanted.file}: {'; '.join(reasons)}")


def content_length(mirrors: Sequence[str], file: str) -> int:
    """Return the size of a file by the first mirror that tells it; 0 if none does."""
    for mirror in mirrors:
        with suppress(HTTPError):
            response = _send("HEAD", f"{mirror.rstrip('/')}/{file}", {})
            if response.status == 200 and (length := _number(response.headers.get("Content-Length"))):
                return length
    return 0


def _send(method: str, address: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
    """Send a request, through the proxy that http_proxy, https_proxy and no_proxy name; its body is not read yet."""
    parts = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        pool = urllib3.PoolManager()
    else:
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        login = parse_url(proxy).auth
        pool = urllib3.ProxyManager(
            proxy, proxy_headers=make_headers(proxy_basic_auth=urllib.parse.unquote(login)) if login else None
        )
    headers = {**HEADERS, **headers}
    return pool.request(method, address, headers=headers, preload_content=False, retries=REDIRECTS, timeout=TIMEOUT_S)


def _failure(address: str, error: HTTPError) -> Transient | MirrorError:
    """Return what a failure means, without the names of objects that urllib3 puts before its cause."""
    cause = getattr(error, "reason", None) or error
    reason = re.sub(r"<[^>]*>(?:\([^)]*\))?:? ?", "", str(cause)) or type(error).__name__
    lasting = isinstance(cause, (ResponseError, SSLError))  # endless redirects, or a certificate that is not trusted
    return MirrorError(f"{address}: {reason}") if lasting else Transient(reason)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
