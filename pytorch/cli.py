"""Exit statuses, errors and progress bars that all commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from tqdm import tqdm

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


def exit_status(work: Callable[[], object], *, interrupted: str = "Interrupted.") -> int:
    """Do a command's work and return its exit status: that of data.files.exit_status, RANK_FAILED, or PREEMPTED."""
    try:
        return files.exit_status(work, interrupted=interrupted)
    except RankFailure as error:
        print(f"error: {error}", file=sys.stderr)
        return RANK_FAILED
    except Preempted:
        return PREEMPTED


def progress_bar(title: str, total: float | None, initial: int = 0, *, unit: str = "batch", shown: bool = True) -> tqdm:
    """Return a progress bar on standard error, silent where that is no terminal; a total tells the time left."""
    scaled, disabled = unit != "batch", None if shown else True
    return tqdm(total=total, initial=initial, desc=title, unit=unit, unit_scale=scaled, leave=False, disable=disabled)
