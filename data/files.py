"""Files and folders that are whole or absent: atomic writes, work folders, locks, digests.

Nothing here knows what an archive or a data set is. What a command has not finished lies in a work_folder, and
everything in that is this program's; outside of it, nothing is removed or replaced that the program did not make.
"""

import fcntl
import gzip
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from data.cli import UserError

CHUNK_BYTES = 1 << 20  # read or written at once
UNFINISHED, DOWNLOADS, MARK = "unfinished", "downloads", "made-by-this-program.txt"


@contextmanager
def atomic_open(file: Path, scratch: Path | None = None) -> Iterator[TextIO]:
    """Open a text file to write it such that even a power cut, or any error, leaves the old one or the new one.

    It is written under a name that nothing has yet, in the folder `scratch` (by default its own), and compressed if its
    name ends in .gz. What is no Unicode, such as a name from the environment, is written with escapes.
    """
    partial = (scratch or file.parent) / f"{file.name}.{secrets.token_hex(4)}.partial"
    opened: Any = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(partial, "xt", encoding="utf-8", errors="backslashreplace") as stream:
            yield stream
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        atomic_replace(partial, file)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def atomic_replace(partial: Path, final: Path) -> None:
    """Give a finished file or folder its final name, such that a power cut leaves the old one or the new one."""
    partial.replace(final)
    folder = os.open(final.parent, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot flush a folder, and say so in different ways
        os.fsync(folder)
    os.close(folder)


def not_ours(path: Path) -> UserError:
    """Return the error that something which is not this program's is in its way."""
    return UserError(f"{path} exists and was not made by this program; move it away, or give another folder")


def check_space(path: Path, needed: float) -> None:
    """Raise UserError if the disk of `path` has fewer bytes left."""
    free = shutil.disk_usage(path).free
    if free < needed:
        sizes = f"{needed / 1e6:,.1f} MB of free disk space, {free / 1e6:,.1f} MB are free"
        raise UserError(f"{path} needs {sizes}: make room there, or give a --dataset-dir on another disk")


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, by name, those in linked folders once. OSError for what cannot be listed."""

    def unreadable(error: OSError) -> None:
        raise error

    files, seen = list[Path](), set[str]()
    for path, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        real = os.path.realpath(path)  # a link may lead to what is above it
        folders[:] = [] if real in seen else sorted(folders)
        files += [] if real in seen else [Path(path, name) for name in names]
        seen.add(real)
    return sorted(files)


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """Make a marked folder in `parent` for what is unfinished; what an earlier, killed run left in it goes first.

    Only its folder `downloads`, for what can be resumed, outlives this. UserError where something else has the name.
    """
    folder = parent / UNFINISHED
    if os.path.lexists(folder):
        if folder.is_symlink() or not ((folder / MARK).is_file() or (folder.is_dir() and not any(folder.iterdir()))):
            raise not_ours(folder)
        _clear_work_folder(folder)
    folder.mkdir(exist_ok=True)
    try:
        (folder / MARK).write_text("Everything here is removed by the command that made it.\n", encoding="utf-8")
        (folder / DOWNLOADS).mkdir(exist_ok=True)
        yield folder
    finally:
        with suppress(OSError):
            _clear_work_folder(folder)


def _clear_work_folder(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if entry.name not in (MARK, DOWNLOADS):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    with suppress(OSError):
        (folder / DOWNLOADS).rmdir()  # unless there is something to resume
        (folder / MARK).unlink()  # last, so that a folder that is half removed is still known
        folder.rmdir()


def read_text(file: Path) -> str:
    """Return the text of a file, without a byte order mark. UserError where it cannot be read or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {getattr(error, 'strerror', error)}") from error


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text that are not blank. UserError as of read_text."""
    return [line for line in read_text(file).split("\n") if line.strip()]


def file_digest(file: Path, algorithm: str) -> str:
    """Return the digest of a file's content in hexadecimal; `algorithm` is one of hashlib's."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


@contextmanager
def locked(folder: Path, holder: str, *, shared: bool = False) -> Iterator[int]:
    """Lock a folder against other processes, or, if `shared`, only against those that do not share it.

    The lock ends with its process. It is on the folder itself, so that a read-only one can be locked. Yield its
    descriptor, for processes that outlive this one. UserError says that another `holder` has the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another {holder} is working in {folder}; wait until it has ended") from None
        except OSError as error:  # such as NFS, which locks no folders
            print(f"warning: {folder} cannot be locked ({error}): let nothing else work in it now", file=sys.stderr)
        yield descriptor
    finally:
        os.close(descriptor)
