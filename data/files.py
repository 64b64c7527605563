"""What every command needs of the system: errors, files that are whole or absent, locks, digests, processes, progress.

Nothing here knows what an archive or a data set is.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

CHUNK_BYTES = 1 << 20  # read or written at once


class DataError(Exception):
    """An error that a user can do something about: its one line is printed, without a traceback."""


def atomic_write(file: Path, text: str, scratch: Path | None = None) -> None:
    """Write a file such that even a power cut leaves the old one or the new one.

    It is first written under a name that nothing has yet, in the folder `scratch` (by default the file's own).
    """
    partial = (scratch or file.parent) / f"{file.name}.{secrets.token_hex(4)}.partial"
    with partial.open("x", encoding="utf-8") as stream:
        try:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
            atomic_replace(partial, file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def atomic_replace(partial: Path, final: Path) -> None:
    """Give a finished file or folder its final name, such that a power cut leaves the old one or the new one."""
    partial.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_digest(file: Path, algorithm: str) -> str:
    """Return the digest of a file's content in hexadecimal; `algorithm` is one of hashlib's."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


@contextmanager
def locked(folder: Path, holder: str, *, shared: bool = False) -> Iterator[int]:
    """Lock a folder against other processes, or, if `shared`, only against those that do not share it.

    The lock ends with its process. It is on the folder itself, so that a read-only one can be locked. Yield its
    descriptor, for processes that outlive this one. DataError says that another `holder` has the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another {holder} is working in {folder}; wait until it has ended") from None
        except OSError as error:  # such as NFS, which locks no folders
            print(f"warning: {folder} cannot be locked ({error}): let nothing else work in it now", file=sys.stderr)
        yield descriptor
    finally:
        os.close(descriptor)


def die_with_parent(parent: int | None = None) -> None:
    """On Linux, have this process killed when the one that started it ends: an orphan would work on unseen.

    `parent` is the process id of that one, where it is known: it may have ended before this call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(description: str, total: float, unit: str) -> tqdm:
    """Return a bar with rate and time left, on standard error, shown only where that is a terminal."""
    return tqdm(desc=description, total=total, unit=unit, unit_scale=True, file=sys.stderr, disable=None, leave=False)
