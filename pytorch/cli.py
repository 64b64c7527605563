"""What the commands have in common: how they end, and how they show that they go on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from data.packed import DataError, write_durably


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
        return 1 if work() is False else 0
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


def write_output(path: Path, text: str) -> None:
    """Write the file that a command line names: whole or not at all, and where a symbolic link points to.

    What is no regular file, such as a pipe or /dev/null, is written to and stays what it is.

    Raises:
        RunError: the file there is the log of a run, or it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        path = Path(os.path.realpath(path))
        if path.exists():
            with path.open("rb") as file:
                if any(b":::MLLOG " in line for line in file):
                    raise RunError(f"{path}: this is the log of a run, which is not replaced; choose another name")
        write_durably(path, text)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error


def progress_bar(title: str, total: int, initial: int = 0, *, shown: bool = True) -> tqdm:
    """Progress with time left on standard error, gone when done; silent where that is no terminal."""
    return tqdm(total=total, initial=initial, desc=title, leave=False, disable=None if shown else True, unit="batch")
