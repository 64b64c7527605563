"""Errors of a run, kinds of UserError, and the exit statuses that they end a command with."""

import os
import signal

from data.cli import UserError

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1  # that end a run
RANK_FAILED = os.EX_IOERR  # 74
PREEMPTED = os.EX_TEMPFAIL  # 75


class RunError(UserError):
    """The run cannot start or go on."""


class RankFailure(UserError):
    """Another rank of the run is gone or hangs. The message names it."""

    exit_status = RANK_FAILED


class Preempted(UserError):
    """The system has asked the process to end. State is saved and the user informed."""

    exit_status = PREEMPTED

    def __init__(self) -> None:
        super().__init__("")
        for number in (signal.SIGTERM, signal.SIGUSR1):  # else a second one, while Python ends, would be the status
            signal.signal(number, signal.SIG_IGN)
