"""One archive, verified: read from a folder, or downloaded over HTTP with retries and resume.

An unfinished download is `<archive>.part`. Any later run, after a kill or days, resumes after its last byte, from any
mirror; if the file has changed in the meantime, its checksum is wrong, and it is downloaded again from the start.
urllib3 handles timeouts, redirects, retries and proxies, and has no dependencies of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, ProtocolError, ReadTimeoutError
from urllib3.util import Retry, make_headers, parse_url

from data.cli import DataError, Progress, progress_bar
from data.corpora import Archive, Corpus
from data.files import CHUNK_BYTES, DOWNLOADS, atomic_replace, check_space

PARALLEL_DOWNLOADS = 3
TIMEOUT_S = urllib3.Timeout(connect=20, read=30)
RETRIES = 5  # in a row, without progress
LONGEST_WAIT_S = 600.0  # give up on a mirror that asks for a longer delay
POLICY: dict[str, Any] = {
    **{"total": None, "connect": RETRIES, "read": RETRIES, "status": RETRIES, "redirect": RETRIES, "other": 0},
    **{"allowed_methods": None, "status_forcelist": (408, 425, 429, 500, 502, 503, 504)},
    **{"backoff_factor": 1.0, "backoff_jitter": 1.0, "backoff_max": 60.0},
}
GZIP = b"\x1f\x8b"  # how every archive begins, and no page of a login or of an error
MISMATCH_HINT = "(LibriSpeech was re-issued once; for a partial mirror, pass its --checksums)"
HEADERS = {"User-Agent": "deepspeech2-benchmark", "Accept-Encoding": "identity"}
# Of an archive's size: what its files take unpacked, and as packed 16-bit samples with their index.
UNPACKED_RATIO = {"librispeech": 1.1, "an4": 1.5}
PACKED_RATIO = 1.9


class MirrorError(DataError):
    """A mirror that does not deliver; another one may."""


@dataclass(frozen=True)
class VerifiedArchive:
    """An archive on this disk whose sums are right."""

    file: Path
    md5: str
    sha256: str


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


def verify_archive(file: Path, archive: Archive, progress: Progress = lambda count: None) -> VerifiedArchive:
    """Compare the sums of a file with those of an archive; DataError where they differ."""
    md5, sha256, size = hashlib.md5(), hashlib.sha256(), file.stat().st_size
    with progress_bar(f"checking {file.name}", size, "B") as bar, file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            md5.update(chunk)
            sha256.update(chunk)
            bar.update(len(chunk))
            progress(len(chunk))
    for digest, expected in ((md5, archive.md5), (sha256, archive.sha256)):
        if expected not in ("", digest.hexdigest()):
            published = f" ({archive.bytes} bytes)" if archive.bytes else ""
            raise DataError(
                f"{file} ({size} bytes) has {digest.name} {digest.hexdigest()}, expected {expected}{published}: "
                f"damaged, or not the published archive {MISMATCH_HINT}"
            )
    return VerifiedArchive(file, md5.hexdigest(), sha256.hexdigest())


class ArchiveSource:
    """The archives of a corpus: read in place, from `mirror` or `kept`, or else downloaded in `work`.

    `mirror` is the option's value: a folder, comma-separated addresses, or nothing.
    """

    def __init__(self, kept: Path, work: Path, corpus: Corpus, mirror: str, keep: bool) -> None:
        self._kept, self._work, self._corpus, self._keep = kept, work, corpus, keep
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
        files = [self._local / archive.file for archive in wanted]
        if absent := [file.name for file in files if not file.is_file()]:
            raise DataError(f"the mirror {self._local} has no file {absent[0]}")
        self._check_space([file.stat().st_size for file in files], 0)
        yield from map(verify_archive, files, wanted)

    def drop(self, archive: VerifiedArchive) -> None:
        """Remove an archive that is done with, or keep it if asked to; one that was read in place stays as it is."""
        if self._work not in archive.file.parents:
            return
        if self._keep:
            atomic_replace(archive.file, self._kept / archive.file.name)
        else:
            archive.file.unlink()

    def _download_all(self, wanted: Sequence[Archive]) -> Iterator[VerifiedArchive]:
        """Download several at a time. If one fails, the others are finished first."""
        sizes = [archive.bytes for archive in wanted]  # 0 where --checksums replaces the published sums
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
        if not os.path.lexists(kept):
            return fetch(archive, self._mirrors, target, progress, stop)
        try:
            return verify_archive(kept, archive, progress)
        except DataError as error:
            raise DataError(f"{error}; move it away to have it downloaded") from error

    def _check_space(self, sizes: Sequence[int], archives: float) -> None:
        unpacked = UNPACKED_RATIO.get(self._corpus.layout, max(UNPACKED_RATIO.values())) * max(sizes)
        check_space(self._kept.parent, PACKED_RATIO * sum(sizes) + archives + unpacked)


class _Patience(Retry):
    """urllib3's retries with waits that `stop` interrupts. A mirror that asks for too long a wait is left."""

    def __init__(self, mirror: str, stop: threading.Event, **options: Any) -> None:
        super().__init__(**options)
        self.mirror, self.stop = mirror, stop

    def new(self, **changes: Any) -> Self:
        return super().new(mirror=self.mirror, stop=self.stop, **changes)

    def sleep(self, response: urllib3.BaseHTTPResponse | None = None) -> None:
        wait, last = self.get_backoff_time(), self.history[-1]
        reason = _reason(last.error) if last.error else f"HTTP status {last.status}"
        if response is not None:
            with suppress(InvalidHeader):
                wait = max(wait, self.get_retry_after(response) or 0)
        if wait > LONGEST_WAIT_S:
            raise MirrorError(f"{reason}; the server asks for a wait of {wait:.0f} s")
        print(f"{_without_login(self.mirror)}: {reason}; trying again in {wait:.1f} s", file=sys.stderr)
        if self.stop.wait(wait):
            raise DataError("stopped")


@dataclass
class PartialDownload:
    """The beginning of an archive on disk, `file`: what requests, runs and mirrors have brought so far.

    An answer that begins anew does not touch it. That goes to the file `anew` until its sums are right.
    """

    wanted: Archive
    file: Path
    anew: Path
    progress: Progress
    stop: threading.Event

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def complete(self, address: str) -> VerifiedArchive:
        """Download what is missing, and verify it. MirrorError or HTTPError if this mirror does not deliver it."""
        fresh = retries = _Patience(address, self.stop, **POLICY)
        begun_anew = False
        while True:
            before = self.size
            try:
                file = self.file if before and before == self.wanted.bytes else self._request(address, fresh)
            except (ProtocolError, ReadTimeoutError) as error:  # in the body, where urllib3 does not retry
                retries = (fresh if self.size > before else retries).increment("GET", address, error=error)
                retries.sleep()
                continue
            try:
                return verify_archive(file, self.wanted)
            except DataError as error:
                self.progress(-file.stat().st_size)
                file.unlink()
                # Only what comes from this mirror in one response proves it wrong.
                if begun_anew or not before or file == self.anew:
                    raise MirrorError(f"its file {error}") from error
                begun_anew = True

    def _request(self, address: str, retries: Retry) -> Path:
        """Send one request for the bytes that are missing; return the file that its answer was written to."""
        start, published = self.size, self.wanted.bytes
        response = _send(address, retries, start)
        try:
            if response.status == 416 and start > published:
                return self.file  # may be complete: its sums decide
            if response.status not in (200, 206):
                raise MirrorError(f"HTTP status {response.status}{_redirected(address, response)}")
            resumed, rest = response.status == 206, response.length_remaining
            chunk = response.read1(CHUNK_BYTES) if resumed else response.read(len(GZIP))
            if not resumed and not GZIP.startswith(chunk):
                kind = response.headers.get("Content-Type", "something else")
                raise MirrorError(f"it sent {kind}, not a .tar.gz archive{_redirected(address, response)}")
            length = (rest or published) + (start if resumed and rest else 0)
            if published and length != published:
                raise MirrorError(f"its file has {length} bytes, {published} were published {MISMATCH_HINT}")
            file = self.file if resumed or not start else self.anew
            with file.open("ab" if resumed else "wb") as stream:
                # read1 returns what has arrived, so that a cut costs nothing that has.
                while chunk and stream.tell() <= (published or sys.maxsize):
                    stream.write(chunk)
                    stream.flush()
                    self.progress(len(chunk))
                    if self.stop.is_set():
                        raise DataError("stopped")
                    chunk = response.read1(CHUNK_BYTES)
        finally:
            # Not back into the pool: what is left of the body may be gigabytes, or never come.
            response.close()
        if file.stat().st_size < published:
            raise ProtocolError("the connection ended early")
        return file


def fetch(
    wanted: Archive, mirrors: Sequence[str], target: Path, progress: Progress, stop: threading.Event | None = None
) -> VerifiedArchive:
    """Download an archive from the first mirror that has it.

    `target` appears when its sums are right; a size of 0 is unknown. `progress` is called with the bytes that are
    added, or, where it must start again, lost. DataError says what each mirror did wrong.
    """
    part, anew = (target.with_name(target.name + suffix) for suffix in (".part", ".new"))
    if target.exists():  # an earlier run was ended before it was prepared; perhaps it asked for another archive
        target.replace(part)
    partial = PartialDownload(wanted, part, anew, progress, stop or threading.Event())
    progress(partial.size)
    reasons = []
    try:
        for address in (f"{mirror.rstrip('/')}/{wanted.file}" for mirror in mirrors):
            try:
                verified = partial.complete(address)
            except (MirrorError, HTTPError) as error:
                reasons.append(f"{_without_login(address)}: {_reason(error)}")
                print(f"warning: {reasons[-1]}", file=sys.stderr)
                continue
            atomic_replace(verified.file, target)
            part.unlink(missing_ok=True)
            print(f"{wanted.file}: downloaded {target.stat().st_size / 1e6:,.1f} MB", file=sys.stderr)
            return replace(verified, file=target)
    finally:
        anew.unlink(missing_ok=True)
    raise DataError(f"no mirror delivered {wanted.file}: {'; '.join(reasons)}")


def _send(address: str, retries: Retry, start: int) -> urllib3.BaseHTTPResponse:
    """Request a file from byte `start` on, through the proxy that http_proxy, https_proxy and no_proxy name."""
    url = parse_url(address)
    proxy = urllib.request.getproxies().get(url.scheme or "")
    if not proxy or urllib.request.proxy_bypass(url.netloc or ""):
        pool = urllib3.PoolManager()
    else:
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        login = urllib.parse.unquote(parse_url(proxy).auth or "")
        pool = urllib3.ProxyManager(proxy, proxy_headers=make_headers(proxy_basic_auth=login or None))
    login = urllib.parse.unquote(url.auth or "")  # which urllib3 does not send by itself
    headers = {**HEADERS, **make_headers(basic_auth=login or None)}
    if start:
        headers["Range"] = f"bytes={start}-"
    address = _without_login(address)
    return pool.request(
        "GET", address, headers=headers, retries=retries, timeout=TIMEOUT_S, preload_content=False, decode_content=False
    )


def _without_login(address: str) -> str:
    """Return an address as it may be printed, without a name and a password."""
    return re.sub(r"^(\w+://)[^/]*@", r"\1", address)


def _redirected(address: str, response: urllib3.BaseHTTPResponse) -> str:
    """Return where redirects led, as a part of a sentence; empty if there were none. A query may hold a secret."""
    steps = [step.redirect_location for step in response.retries.history] if response.retries else []
    for step in filter(None, steps):
        address = urllib.parse.urljoin(address, step)
    return f" after a redirect to {_without_login(address.partition('?')[0])}" if any(steps) else ""


def _reason(error: Exception) -> str:
    """Return what a failure means, without the names of objects that urllib3 puts before its cause."""
    cause = getattr(error, "reason", None) or error
    text = str(cause.args[0]) if cause.args else type(cause).__name__
    return re.sub(r"<[^>]*>(?:\([^)]*\))?:? ?", "", text)
