"""What the commands have in common: how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable

from data.packed import DataError
from pytorch.config import RunError


def exit_status(work: Callable[[], object], *, interrupted: str = "interrupted") -> int:
    """Do a command's work; its exit status: 0, 1 if it returned False or failed, 130 if it was interrupted.

    A RunError or DataError is printed as one line.
    """
    try:
        return 1 if work() is False else 0
    except (RunError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
