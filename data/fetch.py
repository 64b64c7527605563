"""One archive over HTTP, whatever happens: resumed, retried, from the next mirror, and complete or not at all.

An unfinished archive is `<name>.part`; `<name>.part.json` beside it says where it came from and which version of the
file it is. Any later run, after a kill or days, goes on from its last byte, if the server still has that version.
When the archive is whole these notes hold its MD5, by which it is known to have been downloaded here; what has no such
notes is somebody else's, and never changed.
The library is urllib3: it has the timeouts, redirects and proxies, and no dependencies of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Retry, make_headers, parse_url

from data.corpora import Archive
from data.packed import CHUNK_BYTES, DataError, replace_durably, write_durably

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 20.0, 30.0
ATTEMPTS = 6  # at a mirror, one after the other, none of which came further
BACKOFF_S, LONGEST_BACKOFF_S = 1.0, 60.0
LONGEST_WAIT_S = 600.0  # a mirror that asks for more patience is left
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
HINT = "(LibriSpeech was re-issued once, so old copies differ; for a partial mirror give its sums by --checksums)"
HEADERS = {"User-Agent": "deepspeech2-benchmark", "Accept-Encoding": "identity"}


class MirrorError(DataError):
    """A mirror that does not deliver; another one may."""


class Stopped(Exception):
    """The download was told to stop."""


class Transient(Exception):
    """A failure that is likely to pass. `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Source:
    """Which version of a file a server has: its ETag or else its date, and its length; empty or 0 where unknown."""

    address: str = ""
    version: str = ""
    length: int = 0


class Partial:
    """The beginning of an archive on disk, with the sums of what is there."""

    def __init__(self, target: Path, progress: Callable[[int], object]) -> None:
        self.file = target.with_name(target.name + ".part")
        self._notes = _notes_of(target)
        self._progress = progress
        self.source = self._claim()
        self.file.touch()
        self._stream = self.file.open("r+b", buffering=0)
        self.resumed = False  # whether its bytes came in several responses, perhaps of several mirrors
        self.size = 0
        self.md5, self.sha256 = hashlib.md5(), hashlib.sha256()
        while chunk := self._stream.read(CHUNK_BYTES):
            self._count(chunk)
            self.resumed = True

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()

    def write(self, chunk: bytes) -> None:
        remaining = memoryview(chunk)
        try:
            while remaining:
                remaining = remaining[self._stream.write(remaining) :]
        except OSError as error:
            raise DataError(f"cannot write {self.file}: {error.strerror}") from error
        self._count(chunk)

    def restart(self, source: Source) -> None:
        """Drops what is there; what follows comes from `source`."""
        self._stream.seek(0)
        self._stream.truncate()
        self._progress(-self.size)
        self.size, self.resumed, self.source = 0, False, source
        self.md5, self.sha256 = hashlib.md5(), hashlib.sha256()
        write_durably(self._notes, json.dumps(asdict(source)))

    def finish(self, target: Path) -> None:
        """Gives the archive its final name, when its bytes are on the disk."""
        os.fsync(self._stream.fileno())
        write_durably(self._notes, json.dumps({**asdict(self.source), "md5": self.md5.hexdigest()}))
        replace_durably(self.file, target)

    def _count(self, chunk: bytes) -> None:
        self.md5.update(chunk)
        self.sha256.update(chunk)
        self.size += len(chunk)
        self._progress(len(chunk))

    def _claim(self) -> Source:
        """Reads the notes, or makes them. DataError where something else has these names."""
        notes = _read_notes(self._notes)
        if notes is None:
            for file in (self._notes, self.file):
                if os.path.lexists(file):
                    raise DataError(f"{file} exists and was not made by this program; move it away")
            notes = asdict(Source())
            write_durably(self._notes, json.dumps(notes))
        return Source(notes["address"], notes.get("version", ""), notes.get("length", 0))


def was_fetched(target: Path, md5: str) -> bool:
    """Whether the notes beside an archive say that it, with this MD5, was downloaded by this program."""
    notes = _read_notes(_notes_of(target))
    return notes is not None and notes.get("md5") == md5


def forget(target: Path) -> None:
    """Removes the notes of an archive, which from then on is not this program's."""
    _notes_of(target).unlink(missing_ok=True)


def _notes_of(target: Path) -> Path:
    return target.with_name(target.name + ".part.json")


def _read_notes(file: Path) -> dict[str, Any] | None:
    try:
        notes = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return notes if isinstance(notes, dict) and isinstance(notes.get("address"), str) else None


def fetch(
    wanted: Archive,
    mirrors: Sequence[str],
    target: Path,
    progress: Callable[[int], object] = lambda count: None,
    stop: threading.Event | None = None,
) -> tuple[str, str]:
    """Downloads an archive from the first mirror that has it; returns its MD5 and SHA-256.

    `target` appears when its MD5 has been found right; a size of 0 is one that is not known. `progress` is told the
    bytes that are added, or, where it must start again, lost. DataError says what each mirror did wrong.
    """
    stop = stop or threading.Event()
    reasons = []
    with Partial(target, progress) as partial:
        if partial.size > max(wanted.bytes, partial.source.length):
            partial.restart(Source())
        for address in (f"{mirror.rstrip('/')}/{wanted.file}" for mirror in mirrors):
            try:
                if _matches(partial, wanted, address, stop):
                    partial.finish(target)
                    return partial.md5.hexdigest(), partial.sha256.hexdigest()
            except MirrorError as error:
                reasons.append(str(error))
                print(f"warning: {error}", file=sys.stderr)
    raise DataError(f"no mirror delivered {wanted.file}: {'; '.join(reasons)}")


def announced_bytes(mirrors: Sequence[str], file: str) -> int:
    """The size of a file by the first mirror that tells; 0 if none does."""
    for address in (f"{mirror.rstrip('/')}/{file}" for mirror in mirrors):
        try:
            response = _pool(address).request(
                "HEAD", address, headers=HEADERS, retries=_redirects(), timeout=_timeout()
            )
        except HTTPError:
            continue
        if response.status == 200 and (length := response.headers.get("Content-Length", "")).isdigit():
            return int(length)
    return 0


def _matches(partial: Partial, wanted: Archive, address: str, stop: threading.Event) -> bool:
    """Completes the archive from one mirror. MirrorError if it fails or has a file of another sum."""
    for last in (False, True):
        _complete(partial, wanted, address, stop)
        found, size, pieced = partial.md5.hexdigest(), partial.size, partial.resumed
        if found == wanted.md5:
            return True
        partial.restart(Source())
        if last or not pieced:
            break
        # Only what came from this mirror in this run proves it wrong; pieces get a second chance, from the beginning.
        print(f"{wanted.file}: the pieces do not fit together; starting again", file=sys.stderr)
    raise MirrorError(
        f"{address} ({size} bytes) has MD5 {found}, expected {wanted.md5}: damaged, or not the published archive {HINT}"
    )


def _complete(partial: Partial, wanted: Archive, address: str, stop: threading.Event) -> None:
    """Requests what is missing until nothing is, waiting longer and longer between failures."""
    failures, furthest = 0, partial.size
    while True:
        if partial.size and partial.size == (wanted.bytes or partial.source.length):
            return
        try:
            _request(partial, wanted, address, stop)
            return
        except Transient as error:
            failures = 0 if partial.size > furthest else failures + 1
            furthest = max(furthest, partial.size)
            if failures == ATTEMPTS:
                raise MirrorError(f"{address}: {error}; given up after {ATTEMPTS} attempts") from error
            # Jitter keeps many machines from coming back at the same moment.
            delay = min(LONGEST_BACKOFF_S, BACKOFF_S * 2**failures) * random.uniform(0.5, 1.5)
            if error.wait is not None:
                delay = max(delay, error.wait)
            if delay > LONGEST_WAIT_S:
                raise MirrorError(f"{address}: {error}; it asks to wait {delay:.0f} s") from error
            print(f"{wanted.file}: {error}; going on in {delay:.1f} s at byte {partial.size}", file=sys.stderr)
            if stop.wait(delay):
                raise Stopped from error


def _request(partial: Partial, wanted: Archive, address: str, stop: threading.Event) -> None:
    """One request for the bytes from partial.size on, and its answer."""
    headers = dict(HEADERS)
    if partial.size:
        headers["Range"] = f"bytes={partial.size}-"
        # Weak ETags may not be used here: they promise equal meaning, not equal bytes.
        if partial.source.address == address and partial.source.version and partial.source.version[:2] != "W/":
            headers["If-Range"] = partial.source.version
    try:
        response = _pool(address).request(
            "GET", address, headers=headers, preload_content=False, retries=_redirects(), timeout=_timeout()
        )
    except HTTPError as error:
        raise Transient(_reason(error)) from error
    try:
        _prepare_for(response, partial, wanted, address)
        while True:
            try:
                # read1 hands out what has arrived, so that a cut costs nothing that has.
                chunk = response.read1(CHUNK_BYTES, decode_content=False)
            except HTTPError as error:
                raise Transient(_reason(error)) from error
            if stop.is_set():
                raise Stopped
            if not chunk:
                break
            partial.write(chunk)
            if 0 < wanted.bytes < partial.size:
                size = partial.size
                partial.restart(Source())
                raise MirrorError(f"{address} sends more than {size} bytes, {wanted.bytes} were published")
        if 0 < partial.size < (wanted.bytes or partial.source.length):
            raise Transient("the connection ended early")
    finally:
        # Not back into the pool: what is left of the body may be gigabytes, or never come.
        response.close()


def _prepare_for(response: urllib3.BaseHTTPResponse, partial: Partial, wanted: Archive, address: str) -> None:
    """Judges an answer by its status and headers; what cannot be continued is started again."""
    status, found = response.status, response.headers
    if status in TRANSIENT:
        raise Transient(f"{address}: HTTP status {status}", _wait(response))
    source = Source(address, found.get("ETag") or found.get("Last-Modified") or "")
    if status == 206 and partial.size:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", found.get("Content-Range", "").strip())
        if match is None or int(match[1]) != partial.size:
            partial.restart(Source())
            raise Transient(f"{address} sends another range than asked for")
        length = 0 if match[2] == "*" else int(match[2])
        same_place = partial.source.address == address
        changed = same_place and source.version != partial.source.version
        unknown = not same_place and not (length and length == (wanted.bytes or partial.source.length))
        if changed or unknown or partial.source.length not in (0, length or partial.source.length):
            partial.restart(Source())
            raise Transient(f"{address} has another version of the file")
        partial.resumed = True
    elif status == 200:
        announced = found.get("Content-Length", "")
        length = int(announced) if announced.isdigit() else 0
        _check_length(address, length, wanted)
        partial.restart(Source(address, source.version, length))
    elif status == 416 and partial.size:
        partial.restart(Source())
        raise Transient(f"{address} has a shorter file")
    else:
        raise MirrorError(f"{address}: HTTP status {status}")
    _check_length(address, length, wanted)


def _check_length(address: str, length: int, wanted: Archive) -> None:
    if length and wanted.bytes and length != wanted.bytes:
        raise MirrorError(
            f"{address} has {length} bytes, {wanted.bytes} were published: not the published archive {HINT}"
        )


def _wait(response: urllib3.BaseHTTPResponse) -> float | None:
    """What Retry-After asks for, be it seconds or a date."""
    try:
        return Retry().get_retry_after(response)
    except HTTPError:
        return None


def _reason(error: HTTPError) -> str:
    """The cause, without the names of objects that urllib3 puts before it."""
    return (
        re.sub(r"<[^>]*>(?:\([^)]*\))?:? ?", "", str(getattr(error, "reason", None) or error)) or type(error).__name__
    )


def _redirects() -> Retry:
    return Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5, respect_retry_after_header=False)


def _timeout() -> urllib3.Timeout:
    return urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)


def _pool(address: str) -> urllib3.PoolManager:
    """Connections to an address, through the proxy that http_proxy, https_proxy and no_proxy name."""
    parts = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        return urllib3.PoolManager()
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    login = parse_url(proxy).auth
    headers = make_headers(proxy_basic_auth=urllib.parse.unquote(login)) if login else None
    return urllib3.ProxyManager(proxy, proxy_headers=headers)
