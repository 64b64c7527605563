"""Exit statuses, errors and progress bars that all commands share."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO, cast

from tqdm import tqdm

from data.files import DataError

RANK_FAILED = os.EX_IOERR  # 74
PREEMPTED = os.EX_TEMPFAIL  # 75
INTERRUPTED = 130  # what a shell says of a program that SIGINT has ended
READER_GONE = 141  # what a shell says of a program that SIGPIPE has ended


class RunError(Exception):
    """A user-facing error; its one-line message is all that is printed."""


class Preempted(Exception):
    """The system has asked the process to end. State is saved and the user informed."""


class RankFailure(Exception):
    """Another rank of the run is gone or hangs. The message names it."""


def require_values(arguments: Sequence[str]) -> None:
    """Raise RunError where an option's value would be a folder that nobody means: '' for ., or a literal ~."""
    for option, value in pairwise(word for argument in arguments for word in argument.split("=", 1)):
        if option.startswith("-") and value == "":
            raise RunError(f"{option} has an empty value")
        if option.startswith("-") and value.startswith("~"):
            raise RunError(f"{option} is {value}: your shell leaves this ~ as it is; write $HOME")


class StandardError:
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


def exit_status(work: Callable[[], object], *, interrupted: str = "Interrupted.") -> int:
    """Do a command's work and return its exit status. What was raised is printed as one line.

    The status is what the work returned if that is an integer; else 0, 1 if it returned False or failed, 130 if
    interrupted, RANK_FAILED, PREEMPTED, or READER_GONE if whoever read standard output has left, as `| head` does.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as by 2>&-
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see __init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with redirect_stderr(cast(TextIO, StandardError(sys.stderr))):
        return _exit_status(work, interrupted)


def _exit_status(work: Callable[[], object], interrupted: str) -> int:
    try:
        result = work()
        sys.stdout.flush()
        return result if type(result) is int else int(result is False)
    except (RunError, DataError) as error:
        return _failed(error, 1)
    except RankFailure as error:
        return _failed(error, RANK_FAILED)
    except Preempted:
        for number in (signal.SIGTERM, signal.SIGUSR1):  # else a second one, while Python ends, would be the status
            signal.signal(number, signal.SIG_IGN)
        return PREEMPTED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise  # not of standard output
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python would fail again when it ends
        return (
            READER_GONE
            if isinstance(error, BrokenPipeError)
            else _failed(f"standard output cannot be written: {error.strerror}", 1)
        )


def _failed(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


def progress_bar(title: str, total: float | None, initial: int = 0, *, unit: str = "batch", shown: bool = True) -> tqdm:
    """Return a progress bar on standard error, silent where that is no terminal; a total tells the time left."""
    scaled, disabled = unit != "batch", None if shown else True
    return tqdm(total=total, initial=initial, desc=title, unit=unit, unit_scale=scaled, leave=False, disable=disabled)
