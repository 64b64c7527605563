"""Errors of a run, beside DataError, and the exit statuses that they end a command with."""

from __future__ import annotations

import os
import signal

from data.cli import DataError

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1  # that end a run
RANK_FAILED = os.EX_IOERR  # 74
PREEMPTED = os.EX_TEMPFAIL  # 75


class RunError(DataError):
    """A user-facing error; its one-line message is all that is printed."""


class RankFailure(DataError):
    """Another rank of the run is gone or hangs. The message names it."""

    exit_status = RANK_FAILED


class Preempted(DataError):
    """The system has asked the process to end. State is saved and the user informed."""

    exit_status = PREEMPTED

    def __init__(self) -> None:
        super().__init__("")
        for number in (signal.SIGTERM, signal.SIGUSR1):  # else a second one, while Python ends, would be the status
            signal.signal(number, signal.SIG_IGN)
