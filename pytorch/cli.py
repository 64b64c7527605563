"""Errors and exit statuses of the commands that run or read a training."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from data import files
from data.files import DataError

RANK_FAILED = os.EX_IOERR  # 74
PREEMPTED = os.EX_TEMPFAIL  # 75


class RunError(DataError):
    """A user-facing error; its one-line message is all that is printed."""


class Preempted(Exception):
    """The system has asked the process to end. State is saved and the user informed."""


class RankFailure(Exception):
    """Another rank of the run is gone or hangs. The message names it."""


def exit_status(
    work: Callable[[], object], arguments: Sequence[str] | None = (), *, interrupted: str = "Interrupted."
) -> int:
    """Do a command's work and return its exit status: that of data.files.exit_status, RANK_FAILED, or PREEMPTED."""
    try:
        return files.exit_status(work, arguments, interrupted=interrupted)
    except RankFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return RANK_FAILED
    except Preempted:
        for number in (signal.SIGTERM, signal.SIGUSR1):  # else a second one, while Python ends, would be the status
            signal.signal(number, signal.SIG_IGN)
        return PREEMPTED
