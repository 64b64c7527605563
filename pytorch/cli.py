"""Exit statuses, errors and progress bars that all commands share."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from data.files import DataError

RANK_FAILED = os.EX_IOERR  # 74
PREEMPTED = os.EX_TEMPFAIL  # 75
READER_GONE = 141  # what a shell says of a program that SIGPIPE has ended


class RunError(Exception):
    """A user-facing error; its one-line message is all that is printed."""


class Preempted(Exception):
    """The system has asked the process to end. State is saved and the user informed."""


class RankFailure(Exception):
    """Another rank of the run is gone or hangs. The message names it."""


def exit_status(work: Callable[[], object], *, interrupted: str = "Interrupted.") -> int:
    """Do a command's work and return its exit status. What was raised is printed as one line.

    The status is 0, 1 if the work returned False or failed, 130 if interrupted, RANK_FAILED, PREEMPTED, or READER_GONE
    if whoever read standard output has left, as `| head` does.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as by 2>&-
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    try:
        status = 1 if work() is False else 0
        sys.stdout.flush()
        return status
    except (RunError, DataError) as error:
        return _failed(error, 1)
    except RankFailure as error:
        return _failed(error, RANK_FAILED)
    except Preempted:
        return PREEMPTED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
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
