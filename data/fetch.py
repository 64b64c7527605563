"""One archive, verified: read from a folder, or downloaded over HTTP with retries and resume.

Any later run, after a kill or days, resumes a download after its last byte, from any mirror. If the file has changed
in the meantime, its checksum is wrong, and it is downloaded again from the start.
"""

import hashlib
import random
import re
import ssl
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote
from urllib.request import HTTPBasicAuthHandler, HTTPPasswordMgrWithPriorAuth, OpenerDirector, Request, build_opener

from data.cli import UserError, progress_bar
from data.corpora import Archive, Corpus
from data.files import CHUNK_BYTES, DOWNLOADS, check_space, read_lines

PARALLEL_DOWNLOADS = 3
TIMEOUT_S = 30
RETRIES = 5  # in a row, without progress
BACKOFF_S = 1.0  # before the first of them; doubled for each, up to twice as long by chance
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses of failures after which another request may help
NETWORK_FAILURES = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)
GZIP = b"\x1f\x8b"  # how every archive begins, and no page of a login or of an error
MISMATCH_HINT = "(LibriSpeech was re-issued once; for a partial mirror, pass its --checksums)"
UNPACKED_RATIO, PACKED_RATIO = 1.1, 1.9  # of an archive's size: its files, and their 16-bit samples with the index


class MirrorError(UserError):
    """A mirror that does not deliver; another one may."""


def read_checksums(file: Path) -> dict[str, str]:
    """Return MD5 sums by file name, from a file in the format of md5sum."""
    sums = {}
    for line in read_lines(file):
        match = re.fullmatch(r"\s*([0-9a-f]{32})\s+\*?(\S.*?)\s*", line, re.IGNORECASE)
        if match is None:
            raise UserError(f"{file}: not an md5sum line: {line!r}")
        sums[Path(match[2]).name] = match[1].lower()
    return sums


def verify_archive(file: Path, archive: Archive, progress: Callable[[int], object] = lambda count: None) -> Path:
    """Return a file that has the MD5 of an archive; UserError where it has another."""
    md5, size = hashlib.md5(), file.stat().st_size
    with progress_bar(f"checking {file.name}", size, "B") as bar, file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            md5.update(chunk)
            bar.update(len(chunk))
            progress(len(chunk))
    if archive.md5 != md5.hexdigest():
        published = f" ({archive.bytes} bytes)" if archive.bytes else ""
        found = f"({size} bytes) has md5 {md5.hexdigest()}, expected {archive.md5}{published}"
        raise UserError(f"{file} {found}: damaged, or not the published archive {MISMATCH_HINT}")
    return file


def obtain_archives(
    wanted: Sequence[Archive], corpus: Corpus, work: Path, mirror: str
) -> Generator[tuple[Archive, Path], None, None]:
    """Yield archives and their files as they become available, several at a time. If one fails, the others come first.

    Each is read in place in a local `mirror`, or else downloaded into `work`, and removed when the next is asked for.
    `mirror` is the option's value: a folder, comma-separated addresses, or nothing.
    """
    named = [part.strip() for part in mirror.split(",") if part.strip()]
    addresses = [part for part in named if part.startswith(("http://", "https://"))]
    if addresses != named and (addresses or "://" in mirror):
        raise UserError("--mirror is one folder, or addresses that begin with http:// or https://")
    folder = Path(mirror) if named and not addresses else None

    sizes = [archive.bytes for archive in wanted]  # 0 where --checksums replaces the published sums
    downloaded = sum(file.stat().st_size for file in (work / DOWNLOADS).glob("*"))
    # Archives that wait for their turn take no more than the room that their packed data will need, as an archive
    # is smaller than that and then gone. So only one has to be counted.
    waiting = 0 if folder else max(0, max(sizes) - downloaded)
    check_space(work.parent, PACKED_RATIO * sum(sizes) + waiting + UNPACKED_RATIO * max(sizes))

    stop, failures = threading.Event(), []
    pool = ThreadPoolExecutor(PARALLEL_DOWNLOADS)
    try:
        with progress_bar("archives", sum(sizes), "B") as bar:

            def progress(count: int) -> None:
                if stop.is_set():
                    raise UserError("stopped")
                bar.update(count)

            def obtain(archive: Archive) -> Path:
                if folder is not None:
                    return verify_archive(folder / archive.file, archive, progress)
                download = Download(archive, work / DOWNLOADS / archive.file, progress, stop)
                return download.complete(addresses or corpus.mirrors)

            futures = {pool.submit(obtain, archive): archive for archive in wanted}
            for future in as_completed(futures):
                try:
                    file = future.result()
                except UserError as error:
                    failures.append(str(error))
                    continue
                yield futures[future], file
                if folder is None:
                    file.unlink()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    if failures:
        raise UserError(f"{'; '.join(failures)}; --mirror takes another address, or a folder with the archives")


@dataclass
class Download:
    """An archive, and what requests, runs and mirrors have brought of it so far: `file`.

    `progress` is called with the bytes that are added, or, where it must start again, lost. A size of 0 is unknown.
    """

    wanted: Archive
    file: Path
    progress: Callable[[int], object]
    stop: threading.Event

    @property
    def size(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0

    def complete(self, mirrors: Sequence[str]) -> Path:
        """Download what is missing from the first mirror that has it. UserError says what each mirror did wrong."""
        self.progress(self.size)
        reasons = []
        for mirror in mirrors:
            scheme, _, rest = mirror.partition("://")
            login, _, place = rest.rpartition("@")  # a login is never printed
            address = f"{scheme}://{place.rstrip('/')}/{self.wanted.file}"
            try:
                self._complete_from(address, _opener(address, login))
            except (MirrorError, ValueError, *NETWORK_FAILURES) as error:  # a ValueError of what is no address
                reasons.append(f"{address}: {_reason(error)}")
                print(f"warning: {reasons[-1]}", file=sys.stderr)
            else:
                print(f"{self.wanted.file}: downloaded {self.size / 1e6:,.1f} MB", file=sys.stderr)
                return self.file
        raise UserError(f"no mirror delivered {self.wanted.file}: {'; '.join(reasons)}")

    def _complete_from(self, address: str, opener: OpenerDirector) -> Path:
        """Download what is missing, and verify it. MirrorError or one of NETWORK_FAILURES if that is impossible."""
        failures, anew = 0, False
        while True:
            before = self.size
            try:
                if not before or before != self.wanted.bytes:
                    self._request(address, opener)
            except NETWORK_FAILURES as error:
                failures = 1 if self.size > before else failures + 1
                if failures > RETRIES:
                    raise
                wait = BACKOFF_S * 2 ** (failures - 1) * random.uniform(1, 2)
                print(f"{address}: {_reason(error)}; trying again in {wait:.1f} s", file=sys.stderr)
                if self.stop.wait(wait):
                    raise UserError("stopped") from error
                continue
            try:
                return verify_archive(self.file, self.wanted)
            except UserError as error:
                self.progress(-self.size)
                self.file.unlink()
                if anew or not before:  # else the file has changed, or an earlier run or another mirror is to blame
                    raise MirrorError(f"its file {error}") from error
                anew = True

    def _request(self, address: str, opener: OpenerDirector) -> None:
        """Send one request for the bytes that are missing, and add those of its answer that are."""
        start, published = self.size, self.wanted.bytes
        headers = {"User-Agent": "deepspeech2-benchmark", **({"Range": f"bytes={start}-"} if start else {})}
        try:
            response = opener.open(Request(address, headers=headers), timeout=TIMEOUT_S)
        except HTTPError as error:
            if error.code == 416 and start > published:
                return  # may be complete: its sums decide
            if error.code in PASSING:
                raise ConnectionError(f"HTTP status {error.code}") from error
            raise MirrorError(f"HTTP status {error.code}{_redirected(address, error.url)}") from error
        with response:
            resumed, rest = response.status == 206, response.length
            chunk = response.read1(CHUNK_BYTES) if resumed else response.read(len(GZIP))
            if not resumed and not GZIP.startswith(chunk):
                kind = response.headers.get("Content-Type", "something else")
                raise MirrorError(f"it sent {kind}, not a .tar.gz archive{_redirected(address, response.url)}")
            length = (rest or published) + (start if resumed and rest else 0)
            if published and length != published:
                raise MirrorError(f"its file has {length} bytes, {published} were published {MISMATCH_HINT}")
            if not resumed:  # a server without ranges
                self.progress(-start)
            with self.file.open("ab" if resumed else "wb") as stream:
                while chunk:
                    self.progress(stream.write(chunk))
                    stream.flush()
                    chunk = response.read1(CHUNK_BYTES)  # what has arrived, so that a cut costs nothing that has
            if response.length:
                raise ConnectionError(f"cut off, {response.length} bytes before the end")


def _opener(address: str, login: str) -> OpenerDirector:
    """Return what opens an address with its login, user:password or nothing, and sends it to that folder alone."""
    user, _, password = login.partition(":")
    logins = HTTPPasswordMgrWithPriorAuth()
    if login:
        folder = address.rpartition("/")[0]  # of the address itself, one failure would forget it
        logins.add_password(None, folder, unquote(user), unquote(password), is_authenticated=True)
    return build_opener(HTTPBasicAuthHandler(logins))


def _redirected(address: str, final: str) -> str:
    """Return where redirects led, as a part of a sentence; empty if there were none. A query may hold a secret."""
    return f" after a redirect to {final.partition('?')[0]}" if final != address else ""


def _reason(error: Exception) -> str:
    """Return what a failure means: of one to connect, its cause."""
    return str(getattr(error, "reason", error)) or type(error).__name__
