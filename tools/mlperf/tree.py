"""Where the results of a series of runs lie, as MLCommons' package_checker expects it of a submission:

<tree>/systems/<system>.json                            the machine
<tree>/results/<system>/deepspeech2/result_<i>.txt      logs of runs, from 0
<tree>/results/<system>/deepspeech2/failed_<i>_<n>.txt  logs of runs that broke off: no results, kept to be read
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlperf_logging.system_desc_checker import system_desc_checker

from data.files import atomic_write, locked
from pytorch.cli import RunError
from pytorch.mllog import BENCHMARK
from tools.mlperf.check import RULESET
from tools.mlperf.system import SUBMISSION, same_machine


@dataclass(frozen=True)
class Tree:
    """The part of a submission that one system's series of runs fills."""

    root: Path
    system: str

    @property
    def folder(self) -> Path:
        """Of the logs."""
        return self.root / "results" / self.system / BENCHMARK

    @property
    def description(self) -> Path:
        """Of the machine."""
        return self.root / "systems" / f"{self.system}.json"

    def result(self, number: int) -> Path:
        """Log of a run that ended by itself."""
        return self.folder / f"result_{number}.txt"

    def partial(self, number: int) -> Path:
        """Log of a run that has not ended."""
        return self.folder / f"result_{number}.txt.partial"

    def set_aside(self, number: int) -> Path:
        """Give the partial log of a run that broke off a name of its own, which is returned."""
        tried = 1
        while (failed := self.folder / f"failed_{number}_{tried}.txt").exists():
            tried += 1
        return self.partial(number).rename(failed)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Make the folder, and keep other series out of it; gives the lock, for those who outlive this process.

        Raises:
            RunError: the folder cannot be made.
            DataError: another series is under way in it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be made: {error.strerror}") from error
        with locked(self.folder, "series of runs") as lock:
            yield lock

    def describe(self, description: dict[str, str]) -> None:
        """Write the machine's description, unless there is one already, which its owner may have edited.

        Where that one says of the submitter, the division or the status what the environment does not, this is printed.

        Raises:
            RunError: the one there is of another machine, or MLCommons' system_desc_checker refuses it.
        """
        path = self.description
        try:
            if path.exists():
                there = json.loads(path.read_text(encoding="utf-8"))
                if field := same_machine(there, description):
                    what = f"{field} is {there.get(field)!r} there, {description[field]!r} here"
                    raise RunError(f"{path} describes another machine ({what}); choose another --system")
                for field, variable in SUBMISSION.items():
                    if os.environ.get(variable) and there.get(field) != description[field]:
                        said = f"{field} is {there.get(field)!r} there, {variable} makes it {description[field]!r}"
                        print(f"warning: {path} is kept as it is: {said}", file=sys.stderr)
            else:
                write_whole(path, json.dumps(description, indent=2) + "\n")
            valid = system_desc_checker.check_system_desc(str(path), "training", RULESET)[0]
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: no description of a machine: {error}") from error
        if not valid:
            raise RunError(f"{path}: refused by MLCommons' system_desc_checker; remove it to have it made again")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or not there, and its folder; RunError where that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
