"""What is done with the logs of finished runs.

    python -m tools.mlperf check LOG...                       is each one sound, and a result?
    python -m tools.mlperf score LOG...                       the score of several runs
    python -m tools.mlperf rcp LOG... -o FILE                 reference convergence points
    python -m tools.mlperf rcp LOG... --against FILE          do these runs converge as the reference does?
    python -m tools.mlperf compare A.log B.log                where losses first differ; times to target
    sh pytorch/run_and_time.sh --runs 10                        several runs, into a submission's tree

The rules are this project's own, applied by MLCommons' checkers: the official list has no DeepSpeech2.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pytorch.cli import RunError, exit_status
from tools.mlperf import compare, rcp, score
from tools.mlperf.check import check, describe, notes
from tools.mlperf.logs import RunLog
from tools.mlperf.tree import write_whole

Logs = tyro.conf.Positional[Annotated[list[Path], tyro.conf.arg(metavar="LOG...")]]


@dataclass(frozen=True)
class Check:
    """Whether logs keep the rules of a division. Exit status 1 if one of them does not; each reason is a line.

    Open: anything measured, if the log is complete and consistent. Closed: also the reference recipe on LibriSpeech.
    """

    logs: Logs
    """logs of runs"""
    division: Literal["closed", "open"] | None = None
    """whose rules to apply; None: the division that the log names"""

    def __call__(self) -> bool:
        passed = [self._passes(path) for path in _some(self.logs)]  # each of them is looked at
        return all(passed)

    def _passes(self, path: Path) -> bool:
        try:
            log, found = check(path, self.division)
        except RunError as error:
            print(error)
            return False
        for each in found:
            print(describe(path, each))
        if found:
            return False
        division = self.division or log.value("submission_division")
        last = log.epochs[-1]
        print(f"{path}: keeps our {division} rules: WER {last.wer:.2f} in {log.seconds:.1f} s, epoch {last.number}")
        for note in notes(log):
            print(f"{path}: note: {note}")
        return True


def _some(logs: list[Path]) -> list[Path]:
    """The command line's logs; RunError if it has none."""
    if not logs:
        raise RunError("no log is named; --help shows how to")
    return logs


@dataclass(frozen=True)
class Score:
    """The score of several runs: the mean time to target without the fastest and the slowest; and their spread.

    Runs must differ in their seeds, and in nothing else. Exit status 1 if there is no score.
    """

    logs: Logs
    """logs of runs, 3 or more"""

    def __call__(self) -> bool:
        found = score.score(_some(self.logs))
        print(score.report(found))
        return found.seconds is not None


@dataclass(frozen=True)
class Rcp:
    """Reference convergence points of runs, one for each batch size among them; or check runs against such a file."""

    logs: Logs
    """logs of runs, 3 or more of each batch size"""
    against: Path | None = None
    """check the runs, of one batch size, against this file; exit status 1 if they converge too fast"""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """file to write, in the form that MLCommons' rcp_checker reads; None: only show them"""

    def __call__(self) -> bool:
        if self.against is not None:
            passed, verdict = rcp.against(_some(self.logs), self.against)
            print(verdict)
            return passed
        content = rcp.points(_some(self.logs))
        if self.output is not None:
            write_whole(self.output, json.dumps(content, indent=2) + "\n")
        print(rcp.describe(content))
        return True


@dataclass(frozen=True)
class Compare:
    """Where the losses of two runs first differ and by how much, what else differs, WER and times to target.

    Exit status 0 if every step that both have done has the same loss, else 1.
    """

    a: tyro.conf.Positional[Path]
    """log of a run, such as one before a change"""
    b: tyro.conf.Positional[Path]
    """log of another, such as one after it"""

    def __call__(self) -> bool:
        same, text = compare.compare(RunLog.read(self.a), RunLog.read(self.b))
        print(text)
        return same


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"check": Check, "score": Score, "rcp": Rcp, "compare": Compare},
        prog="python -m tools.mlperf",
        description=__doc__,
        args=arguments,
    )
    return exit_status(command)


if __name__ == "__main__":
    sys.exit(main())
