"""Shared by all commands: errors, files that are whole or absent, locks, digests, processes, progress bars.

Nothing here knows what an archive or a data set is. What a command has not finished lies in a work_folder, and
everything in that is this program's; outside of it, nothing is removed or replaced that the program did not make.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, cast

from tqdm import tqdm

CHUNK_BYTES = 1 << 20  # read or written at once
Progress = Callable[[int], object]  # is told how many bytes more have been read or written
UNFINISHED, DOWNLOADS, MARK = "unfinished", "downloads", "made-by-this-program.txt"
SHOWN_PROBLEMS = 20
MAY_BE_EMPTY = ("--subsets", "--mirror", "--md5")
INTERRUPTED = 130  # what a shell says of a program that SIGINT has ended
READER_GONE = 141  # what a shell says of a program that SIGPIPE has ended


class DataError(Exception):
    """An error that a user can do something about: its message is printed, without a traceback."""


class _StandardError:
    """Standard error, which may be lost without an end to the work: its terminal is closed, its disk is full."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        """Write and flush."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # takes what is still to be written


def require_values(arguments: Sequence[str]) -> None:
    """Raise DataError where an option's value would be a folder that nobody means: '' for ., or a literal ~."""
    for option, value in pairwise(word for argument in arguments for word in argument.split("=", 1)):
        if option.startswith("-") and value == "" and option not in MAY_BE_EMPTY:
            raise DataError(f"{option} has an empty value")
        if option.startswith("-") and value.startswith("~"):
            raise DataError(f"{option} is {value}: your shell did not expand the ~; write $HOME")


def exit_status(
    work: Callable[[], object], arguments: Sequence[str] | None = (), *, interrupted: str = "Interrupted."
) -> int:
    """Do a command's work and return its exit status. What was raised is printed as one line.

    `arguments` are those to check before (require_values); None for the process's.

    The status is what the work returned if that is an integer; else 0, 1 if it returned False or raised DataError or
    an OSError of a file, INTERRUPTED, or READER_GONE if whoever read standard output has left, as `| head` does.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as by 2>&-
            setattr(sys, name, Path(os.devnull).open("r+"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names need not be Unicode
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as a package may set it while its modules are imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with redirect_stderr(cast(TextIO, _StandardError(sys.stderr))):
        try:
            require_values(sys.argv[1:] if arguments is None else arguments)
            result = work()
            sys.stdout.flush()
            return result if type(result) is int else int(result is False)
        except DataError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr)
            return INTERRUPTED
        except OSError as error:
            if error.filename is not None:  # a path of the user's: no right to look, a name too long, not a folder
                print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
                return 1
            if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
                raise  # not of standard output
            reader_gone = isinstance(error, BrokenPipeError)
            if not reader_gone:
                print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
            for descriptor in (1, 2):  # else Python would fail again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            return READER_GONE if reader_gone else 1


def first_of(problems: Sequence[str]) -> str:
    """Return the first problems, a line each, and how many more there are."""
    more = f"\n... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return "\n".join(problems[:SHOWN_PROBLEMS]) + more


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


def not_ours(path: Path) -> DataError:
    """Return the error that something which is not this program's is in its way."""
    return DataError(f"{path} exists and was not made by this program; move it away, or give another folder")


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """Make a marked folder in `parent` for what is unfinished; what an earlier, killed run left in it goes first.

    Only its folder `downloads`, for what can be resumed, outlives this. DataError where something else has the name.
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
        if entry.name == DOWNLOADS:
            with suppress(OSError):  # there is something in it
                entry.rmdir()
        elif entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != MARK:
            entry.unlink()
    if [entry.name for entry in folder.iterdir()] in ([], [MARK]):
        (folder / MARK).unlink(missing_ok=True)  # last, so that a folder that is half removed is still known
        folder.rmdir()


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


def progress_bar(title: str, total: float | None, unit: str = "batch", *, initial: int = 0, shown: bool = True) -> tqdm:
    """Return a progress bar on standard error, silent where that is no terminal; a total tells the time left."""
    scaled, disabled = unit != "batch", None if shown else True
    return tqdm(total=total, initial=initial, desc=title, unit=unit, unit_scale=scaled, leave=False, disable=disabled)
