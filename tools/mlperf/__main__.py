"""Series of runs, and what is done with the logs of finished runs.

    python -m tools.mlperf series --runs 10                   several runs, into a submission's folders
    python -m tools.mlperf check LOG...                       is each one valid, and a result?
    python -m tools.mlperf check FOLDER --package             does MLCommons' package checker accept a submission?
    python -m tools.mlperf score LOG...                       the score of several runs
    python -m tools.mlperf rcp LOG... -o FILE                 reference convergence points
    python -m tools.mlperf rcp LOG... --against FILE          do these runs converge as the reference does?
    python -m tools.mlperf compare A.log B.log                where losses first differ; times to target

The rules are this project's own, applied by MLCommons' checkers: the official list has no DeepSpeech2.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pytorch.errors import RunError
from tools.cli import command
from tools.mlperf import check, compare, rcp, score
from tools.mlperf.package import check_package
from tools.mlperf.runlog import RunLog
from tools.mlperf.series import run_series
from tools.output_files import write_output

Log = tyro.conf.Positional[Path]
Logs = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="LOG...")]
Output = Annotated[Path | None, tyro.conf.arg(aliases=["-o"])]


def check_logs(logs: Logs, division: Literal["closed", "open"] | None = None, package: bool = False) -> bool:
    """Check whether logs follow the rules of a division. Exit status 1 if one does not, with one line per reason.

    Open: anything measured, if the log is complete and consistent. Closed: also the reference recipe on LibriSpeech.

    Args:
        logs: logs of runs
        division: whose rules to apply; None: the division that the log names
        package: instead, check folders of submissions by the rules of MLCommons' newest round that is installed
    """
    passed = True
    for path in _some(logs):  # each of them is looked at
        try:
            lines, accepted = check_package(path) if package else check.describe(path, division)
        except RunError as error:
            lines, accepted = [str(error)], False
        print(*lines, sep="\n")
        passed &= accepted
    return passed


def score_logs(logs: Logs) -> bool:
    """Score several runs: the mean time to target without the fastest and the slowest; and their spread.

    Runs must differ in their seeds, and in nothing else. Exit status 1 if there is no score.

    Args:
        logs: logs of runs, 3 or more
    """
    found = score.score(check.load_valid(_some(logs)))
    print(score.report(found))
    return found.seconds is not None


def make_or_apply_rcps(logs: Logs, against: Path | None = None, output: Output = None) -> bool:
    """Make reference convergence points of runs, one for each batch size among them; or check runs against such a file.

    Exit status 1 if they converge too fast.

    Args:
        logs: logs of runs, 3 or more of each batch size
        against: check the runs, of one batch size, against this file
        output: file to write, in the form that MLCommons' rcp_checker reads; None: only show them
    """
    if against is not None:
        passed, verdict = rcp.check_convergence(_some(logs), against)
        print(verdict)
        return passed
    points = rcp.make_points(_some(logs))
    if output is not None:
        write_output(output, json.dumps(points, indent=2) + "\n")
    print(rcp.describe(points))
    return True


def compare_logs(a: Log, b: Log) -> bool:
    """Show where the losses of two runs first differ and by how much, what else differs, WER and times to target.

    Exit status 0 if every step that both have done has the same loss, else 1.

    Args:
        a: log of a run, such as one before a change
        b: log of another, such as one after it
    """
    same, text = compare.compare(RunLog.read(a), RunLog.read(b))
    print(text)
    return same


def _some(logs: tuple[Path, ...]) -> list[Path]:
    """Return the command line's logs; RunError if it has none."""
    if not logs:
        raise RunError("no log is named; see --help")
    return list(logs)


COMMANDS: dict[str, Callable[..., Any]] = {
    "series": run_series,
    "check": check_logs,
    "score": score_logs,
    "rcp": make_or_apply_rcps,
    "compare": compare_logs,
}


main = command("tools.mlperf", __doc__, COMMANDS)

if __name__ == "__main__":
    sys.exit(main())
