"""What all command lines share: errors, exit statuses, progress bars, the cores they may use."""

import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, cast

from tqdm import tqdm

SHOWN_PROBLEMS = 20
MAY_BE_EMPTY = ("--subsets", "--mirror")
INTERRUPTED = 130  # what a shell says of a program that SIGINT has ended
NARROWEST = 40  # columns; in a narrower terminal tyro would lay out help without end
READER_GONE = 141  # what a shell says of a program that SIGPIPE has ended
CONTROL_GROUP = Path("/sys/fs/cgroup")  # a container sees its own one here


class UserError(Exception):
    """An error that a user can do something about: its message is printed, without a traceback."""

    exit_status = 1  # of the command that it ends


class _StandardError:
    """Standard error, such that a closed terminal or a full disk does not stop the work."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write and flush."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # takes what is still to be written
        return len(text)


def require_values(arguments: Sequence[str]) -> None:
    """Raise UserError where an option's value is empty, or begins with a ~ that the shell did not expand."""
    for option, value in pairwise(word for argument in arguments for word in argument.split("=", 1)):
        if option.startswith("-") and value == "" and option not in MAY_BE_EMPTY:
            raise UserError(f"{option} has an empty value")
        if option.startswith("-") and value.startswith("~"):
            raise UserError(f"{option} is {value}: your shell did not expand the ~; write $HOME")


def exit_status(
    work: Callable[[], object], arguments: Sequence[str] | None = (), *, interrupted: str = "Interrupted."
) -> int:
    """Do a command's work and return its exit status. What was raised is printed as one line.

    `arguments` are those to check before (require_values); None for the process's.
    The status is what the work returned if that is an integer; else 0, 1 if it returned False or raised UserError or
    an OSError, INTERRUPTED, or READER_GONE if whoever read standard output has left, as `| head` does.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as by 2>&-
            setattr(sys, name, Path(os.devnull).open("r+"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names need not be Unicode
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as a package may set it while its modules are imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    with redirect_stderr(cast(TextIO, _StandardError(sys.stderr))):
        try:
            require_values(sys.argv[1:] if arguments is None else arguments)
            result = work()
            sys.stdout.flush()
            return result if type(result) is int else int(result is False)
        except UserError as error:
            if str(error):
                print(f"error: {error}\n", end="", file=sys.stderr)  # at once: other ranks may print theirs
            return error.exit_status
        except KeyboardInterrupt:
            if interrupted:
                print(interrupted, file=sys.stderr)
            return INTERRUPTED
        except OSError as error:
            reader_gone = isinstance(error, BrokenPipeError) and error.filename is None
            name = f"{error.filename}: " if error.filename is not None else ""
            try:
                sys.stdout.flush()
            except OSError:  # so it was this that failed, and would fail again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                name = "standard output cannot be written: "
            if not reader_gone:  # a path that may not be looked at, a full disk, no place for temporary files
                print(f"error: {name}{error.strerror or error}", file=sys.stderr)
            return READER_GONE if reader_gone else 1


def first_of(problems: Sequence[str]) -> str:
    """Return the first problems, a line each, and how many more there are."""
    more = f"\n... and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
    return "\n".join(problems[:SHOWN_PROBLEMS]) + more


def progress_bar(title: str, total: float | None, unit: str = "batch", *, initial: int = 0, shown: bool = True) -> tqdm:
    """Return a progress bar on standard error, silent where that is no terminal; a total tells the time left."""
    scaled, disabled = unit != "batch", None if shown else True
    return tqdm(total=total, initial=initial, desc=title, unit=unit, unit_scale=scaled, leave=False, disable=disabled)


def available_cores() -> int:
    """Return how many cores this process may use, by its affinity and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):  # control groups of version 2, of 1
        with suppress(OSError, ValueError):  # no such file, or no quota: "max"
            quota, period = map(int, " ".join((CONTROL_GROUP / name).read_text() for name in names).split())
            cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores
