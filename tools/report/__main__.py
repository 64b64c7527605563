"""A page about runs: what happened in one, or in several side by side.

    python -m tools.report results/synthetic/mlperf_ds2.log
    python -m tools.report results/2-cores-zen5/an4/*.txt -o comparison.html

Writes one HTML file that needs no network. Exit status: 0, or 1 if a log is damaged or the page cannot be written; the
reason is one line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.files import atomic_write
from pytorch.cli import RunError, exit_status
from tools.mlperf.score import MIN_RUNS, score, verdict
from tools.report.page import render
from tools.report.runs import Run, read_runs


@dataclass(frozen=True)
class Options:
    """What to show."""

    logs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """logs of runs, as run_and_time.sh prints them"""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """the page"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, prog="python -m tools.report", description=__doc__)
    return exit_status(lambda: report(options))


def report(options: Options) -> None:
    """Write the page.

    Raises:
        RunError: there is no log, one cannot be read, or the page cannot be written.
    """
    if not options.logs:
        raise RunError("no log is named: python -m tools.report LOG... -o report.html")
    runs = read_runs(options.logs)
    page = render(runs, _score(runs))
    try:
        atomic_write(options.output, page)
    except OSError as error:
        raise RunError(f"--output {options.output}: cannot be written: {error.strerror}") from error
    print(f"Report: {options.output}")


def _score(runs: Sequence[Run]) -> list[str]:
    """What to say about the score of runs that are enough for one, as `python -m tools.mlperf score` says it."""
    if len(runs) < MIN_RUNS:
        return []
    try:
        return verdict(score([run.log.path for run in runs]))
    except RunError as error:
        return [f"No score: {error}."]


if __name__ == "__main__":
    sys.exit(main())
