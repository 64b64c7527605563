"""What the commands have in common: how they end, and how they show that they go on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

from tqdm import tqdm

from data.packed import DataError


class RunError(Exception):
    """A fact that ends a run. The message is one line, complete for the user: the command line prints only that."""


class Preempted(Exception):
    """The system has asked the process to end, and what it did is saved and said."""


class RankFailure(Exception):
    """Another process of the run is gone or hangs. The message names it."""


RANK_FAILED = os.EX_IOERR  # 74
PREEMPTED = os.EX_TEMPFAIL  # 75


def exit_status(work: Callable[[], object], *, interrupted: str = "interrupted") -> int:
    """Do a command's work and return its exit status. What was raised is printed as one line.

    The status is 0, 1 if the work returned False or failed, 130 if interrupted, RANK_FAILED or PREEMPTED.
    """
    try:
        succeeded = work() is not False
        sys.stdout.flush()  # else what cannot be written would be known when the interpreter ends
        return 0 if succeeded else 1
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        if error.errno != errno.EPIPE:  # such as of `| head`, which has what it wanted
            print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter tries once more
        return 1
    except (RunError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RankFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return RANK_FAILED
    except Preempted:
        return PREEMPTED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def progress_bar(title: str, total: int, initial: int = 0, *, shown: bool = True) -> tqdm:
    """Progress with time left on standard error, gone when done; silent where that is no terminal."""
    return tqdm(total=total, initial=initial, desc=title, leave=False, disable=None if shown else True, unit="batch")
