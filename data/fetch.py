"""One archive, verified: read from a folder, or downloaded over HTTP whatever happens.

An unfinished download is `<archive>.part`. Any later run, after a kill or days, resumes after its last byte, from any
mirror; if the file has changed in the meantime, its checksum is wrong, and it is downloaded again from the start.
urllib3 handles timeouts, redirects and proxies, and has no dependencies of its own.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import shutil
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import urllib3
from urllib3.exceptions import HTTPError, LocationValueError, ResponseError, SSLError
from urllib3.util import Retry, make_headers, parse_url

from data.cli import DataError, Progress, progress_bar
from data.corpora import Archive, Corpus
from data.files import CHUNK_BYTES, DOWNLOADS, atomic_replace

PARALLEL_DOWNLOADS = 3
TIMEOUT_S = urllib3.Timeout(connect=20, read=30)
REDIRECTS = Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False)
ATTEMPTS = 6  # at a mirror, in a row, without progress
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
LONGEST_WAIT_S = 600.0  # give up on a mirror that asks for a longer delay
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
MISMATCH_HINT = "(LibriSpeech was re-issued once; for a partial mirror, pass its --checksums)"
HEADERS = {"User-Agent": "deepspeech2-benchmark", "Accept-Encoding": "identity"}
# Of an archive's size: what its files take unpacked, and as packed 16-bit samples with their index.
UNPACKED_RATIO = {"librispeech": 1.1, "an4": 1.5}
PACKED_RATIO = 1.9


class MirrorError(DataError):
    """A mirror that does not deliver; another one may."""


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
    for line in filter(str.strip, lines):
        match = re.fullmatch(r"\s*([0-9a-f]{32})\s+\*?(\S.*?)\s*", line, re.IGNORECASE)
        if match is None:
            raise DataError(f"{file}: not an md5sum line: {line!r}")
        sums[Path(match[2]).name] = match[1].lower()
    return sums


def check_space(path: Path, needed: float) -> None:
    """Raise DataError if the disk of `path` has fewer bytes left."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise DataError(
            f"{path} needs {needed / 1e6:,.1f} MB of free disk space, {free / 1e6:,.1f} MB are free: "
            "make room there, or give a --dataset-dir on another disk"
        )


class ArchiveSource:
    """The archives of a corpus: read in place, from `mirror` or `kept`, or else downloaded in `work`.

    `mirror` is what the user gave: a folder, comma-separated addresses, or nothing.
    """

    def __init__(self, kept: Path, work: Path, corpus: Corpus, mirror: str, keep: bool) -> None:
        self._kept, self._work, self._corpus, self._keep = kept, work, corpus, keep
        self._official = {subset.archive.file: subset.archive.md5 for subset in corpus.subsets}
        named = [part.strip() for part in mirror.split(",") if part.strip()]
        addresses = [part for part in named if part.startswith(("http://", "https://"))]
        if addresses != named and (addresses or "://" in mirror):
            raise DataError("--mirror is one folder, or addresses that begin with http:// or https://")
        self._mirrors = addresses or list(corpus.mirrors)
        self._local = Path(mirror) if mirror and not addresses else None
        if keep:
            kept.mkdir(exist_ok=True)
            if kept.stat().st_dev != work.stat().st_dev:
                raise DataError(f"{kept} is on another disk than its data set, so archives cannot be kept there")

    def archives(self, wanted: Sequence[Archive]) -> Generator[VerifiedArchive, None, None]:
        """Yield the archives as they become available. DataError if one cannot be obtained."""
        if self._local is None:
            yield from self._download_all(wanted)
            return
        for file, archive in zip(self._find_all(wanted, self._local), wanted, strict=True):
            yield self._verify(file, archive, *_sums(file))

    def drop(self, archive: VerifiedArchive) -> None:
        """Remove an archive that is done with, or keep it if asked to; one that was read in place stays as it is."""
        if self._work not in archive.file.parents:
            return
        if self._keep:
            atomic_replace(archive.file, self._kept / archive.file.name)
        else:
            archive.file.unlink()

    def _find_all(self, wanted: Sequence[Archive], folder: Path) -> list[Path]:
        files = [folder / archive.file for archive in wanted]
        if absent := [file.name for file in files if not file.is_file()]:
            raise DataError(f"the mirror {folder} has no file {absent[0]}")
        self._check_space([file.stat().st_size for file in files], 0)
        return files

    def _download_all(self, wanted: Sequence[Archive]) -> Iterator[VerifiedArchive]:
        """Download several at a time. If one fails, the others are finished first."""
        sizes = [archive.bytes or content_length(self._mirrors, archive.file) for archive in wanted]
        names = [f"{archive.file}{suffix}" for archive in wanted for suffix in ("", ".part")]
        files = [folder / name for folder in (self._kept, self._work / DOWNLOADS) for name in names]
        present = sum(file.stat().st_size for file in files if file.exists())
        # Archives that wait for their turn take no more than the room that their packed data will need, as an archive
        # is smaller than that and then gone. So only one has to be counted.
        self._check_space(sizes, max(0, (sum(sizes) if self._keep else max(sizes)) - present))
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
            raise DataError(f"{'; '.join(failures)}; --mirror takes another address, or a folder with the archives")

    def _download(self, archive: Archive, progress: Progress, stop: threading.Event) -> VerifiedArchive:
        kept, target = self._kept / archive.file, self._work / DOWNLOADS / archive.file
        if os.path.lexists(kept):
            try:
                return self._verify(kept, archive, *_sums(kept, progress))
            except DataError as error:
                raise DataError(f"{error}; move it away to have it downloaded") from error
        if target.exists():  # an earlier run was ended before it was prepared
            try:
                return self._verify(target, archive, *_sums(target, progress))
            except DataError as error:
                print(f"warning: {error}; downloading again", file=sys.stderr)
        sums = fetch(archive, self._mirrors, target, progress, stop)
        print(f"{archive.file}: downloaded {target.stat().st_size / 1e6:,.1f} MB", file=sys.stderr)
        return self._verify(target, archive, *sums)

    def _verify(self, file: Path, archive: Archive, md5: str, sha256: str) -> VerifiedArchive:
        """Compare the sums of an archive with the expected ones; DataError where they differ."""
        if mismatch := _mismatch(archive, file.stat().st_size, md5, sha256):
            raise DataError(f"{file} {mismatch}")
        return VerifiedArchive(file, md5, sha256, official=md5 == self._official[archive.file] != "")

    def _check_space(self, sizes: Sequence[int], archives: float) -> None:
        unpacked = UNPACKED_RATIO.get(self._corpus.layout, max(UNPACKED_RATIO.values())) * max(sizes)
        check_space(self._kept.parent, PACKED_RATIO * sum(sizes) + archives + unpacked)


def _sums(file: Path, progress: Progress = lambda count: None) -> tuple[str, str]:
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


class PartialDownload:
    """The beginning of an archive on disk: what requests, runs and mirrors have brought so far."""

    def __init__(self, wanted: Archive, target: Path, progress: Progress, stop: threading.Event | None) -> None:
        self._wanted, self._progress, self._stop = wanted, progress, stop or threading.Event()
        self.file = target.with_name(target.name + ".part")
        self.resumed = self.size > 0  # whether it comes from several responses, perhaps of several mirrors
        progress(self.size)

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def complete(self, address: str) -> tuple[str, str]:
        """Download what is missing and return MD5 and SHA-256. MirrorError if this mirror fails or has another file.

        Failures that may pass are retried after growing waits, as long as they are few or something more has come.
        """
        failures, furthest, begun_anew = 0, self.size, False
        while True:
            try:
                return self._attempt(address)
            except Transient as error:
                if self.size < furthest and not begun_anew:  # once, or rubbish could go on forever
                    furthest, begun_anew = -1, True
                failures = 0 if self.size > furthest else failures + 1
                furthest = max(furthest, self.size)
                if failures == ATTEMPTS:
                    raise MirrorError(f"{error}; given up after {ATTEMPTS} attempts") from error
                # Jitter keeps many machines from coming back at the same moment.
                delay = max(error.wait, min(LONGEST_BACKOFF_S, BACKOFF_S * 2**failures) * random.uniform(0.5, 1.5))
                if delay > LONGEST_WAIT_S:
                    raise MirrorError(f"{error}; the server asks for a wait of {delay:.0f} s") from error
                waiting = f"resuming in {delay:.1f} s at byte {self.size}"
                print(f"{_without_login(address)}: {error}; {waiting}", file=sys.stderr)
                if self._stop.wait(delay):
                    raise DataError("stopped") from error

    def _attempt(self, address: str) -> tuple[str, str]:
        if self.size == 0 or self.size != self._wanted.bytes:
            self._request(address)
        md5, sha256 = _sums(self.file)
        if not (mismatch := _mismatch(self._wanted, self.size, md5, sha256)):
            return md5, sha256
        resumed = self.resumed
        self._discard()
        if resumed:  # only what comes from this mirror in one response proves it wrong
            raise Transient("checksum mismatch after resuming")
        raise MirrorError(f"its file {mismatch}")

    def _discard(self) -> None:
        self._progress(-self.size)
        self.file.unlink(missing_ok=True)
        self.resumed = False

    def _request(self, address: str) -> None:
        """Send one request for the bytes that are missing, and write its answer."""
        try:
            response = _send("GET", address, {"Range": f"bytes={self.size}-"} if self.size else {})
        except HTTPError as error:
            raise _failure(error) from error
        try:
            length = self._begin(response)
            with self.file.open("ab") as stream:
                # read1 hands out what has arrived, so that a cut costs nothing that has.
                while self.size < length and (chunk := response.read1(CHUNK_BYTES, decode_content=False)):
                    if self._stop.is_set():
                        raise DataError("stopped")
                    stream.write(chunk)
                    stream.flush()
                    self._progress(len(chunk))
        except HTTPError as error:
            raise _failure(error) from error
        finally:
            # Not back into the pool: what is left of the body may be gigabytes, or never come.
            response.close()
        if self.size < length < math.inf:
            raise Transient("the connection ended early")

    def _begin(self, response: urllib3.BaseHTTPResponse) -> float:
        """Judge an answer by its status and headers; return the whole file's length, infinite where it is not known."""
        status, headers = response.status, response.headers
        if status in TRANSIENT:
            raise Transient(f"HTTP status {status}", _number(headers.get("Retry-After")) or 0)
        if status not in (200, 206, 416):
            raise MirrorError(f"HTTP status {status}")
        _, _, length_of_all = headers.get("Content-Range", "").partition("/")
        length = _number(headers.get("Content-Length") if status == 200 else length_of_all)
        published = self._wanted.bytes
        if length and published and length != published:
            raise MirrorError(
                f"its file has {length} bytes, {published} were published: not the published archive {MISMATCH_HINT}"
            )
        if status == 200:
            self._discard()
        elif (status == 206 and f" {self.size}-" in headers.get("Content-Range", "")) or length == self.size:
            self.resumed = True
        else:
            self._discard()
            raise Transient("it has a shorter file, or sends another range than asked for")
        return length or published or math.inf


def fetch(
    wanted: Archive, mirrors: Sequence[str], target: Path, progress: Progress, stop: threading.Event | None = None
) -> tuple[str, str]:
    """Download an archive from the first mirror that has it; return its MD5 and SHA-256.

    `target` appears when its sums have been found right; a size of 0 is one that is not known. `progress` is told the
    bytes that are added, or, where it must start again, lost. DataError says what each mirror did wrong.
    """
    partial = PartialDownload(wanted, target, progress, stop)
    reasons = []
    for address in (f"{mirror.rstrip('/')}/{wanted.file}" for mirror in mirrors):
        try:
            md5, sha256 = partial.complete(address)
        except MirrorError as error:
            reasons.append(f"{_without_login(address)}: {error}")
            print(f"warning: {reasons[-1]}", file=sys.stderr)
            continue
        atomic_replace(partial.file, target)
        return md5, sha256
    raise DataError(f"no mirror delivered {wanted.file}: {'; '.join(reasons)}")


def content_length(mirrors: Sequence[str], file: str) -> int:
    """Return the size of a file by the first mirror that tells it; 0 if none does."""
    for mirror in mirrors:
        with suppress(HTTPError):
            response = _send("HEAD", f"{mirror.rstrip('/')}/{file}", {})
            response.close()
            if response.status == 200 and (length := _number(response.headers.get("Content-Length"))):
                return length
    return 0


def _send(method: str, address: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
    """Send a request, through the proxy that http_proxy, https_proxy and no_proxy name; its body is not read yet."""
    url = parse_url(address)
    proxy = urllib.request.getproxies().get(url.scheme or "")
    if not proxy or urllib.request.proxy_bypass(url.netloc or ""):
        pool = urllib3.PoolManager()
    else:
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        login = urllib.parse.unquote(parse_url(proxy).auth or "")
        pool = urllib3.ProxyManager(proxy, proxy_headers=make_headers(proxy_basic_auth=login or None))
    login = urllib.parse.unquote(url.auth or "")  # which urllib3 does not send by itself
    headers = {**HEADERS, **headers, **make_headers(basic_auth=login or None)}
    address = _without_login(address)
    return pool.request(method, address, headers=headers, preload_content=False, retries=REDIRECTS, timeout=TIMEOUT_S)


def _without_login(address: str) -> str:
    """Return an address as it may be printed, without a name and a password."""
    return re.sub(r"^(\w+://)[^/]*@", r"\1", address)


def _failure(error: HTTPError) -> Transient | MirrorError:
    """Return what a failure means, without the names of objects that urllib3 puts before its cause."""
    cause = getattr(error, "reason", None) or error
    reason = re.sub(r"<[^>]*>(?:\([^)]*\))?:? ?", "", str(cause)) or type(error).__name__
    # Endless redirects, a certificate that is not trusted, no address.
    lasting = isinstance(cause, (ResponseError, SSLError, LocationValueError))
    return MirrorError(reason) if lasting else Transient(reason)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
