"""A page about runs: what happened in one, or in several side by side.

    python -m tools.report results/synthetic/mlperf_ds2.log
    python -m tools.report results/2-cores-zen5/an4/*.txt -o comparison.html

Runs that differ only in their seeds are shown as one series. The page is one HTML file that needs no network. Exit
status: 0, or 1 if a log is damaged or the page cannot be written; the reason is one line.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.cli import exit_status
from pytorch.errors import RunError
from tools.output_files import write_output
from tools.report.render import render
from tools.report.runs import read_series


@dataclass(frozen=True)
class Options:
    """What to show."""

    logs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """logs of runs, as run_and_time.sh prints them"""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """the page; never a log, which is not replaced"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    options = tyro.cli(Options, args=arguments, prog="python -m tools.report", description=__doc__)

    def report() -> None:
        if not options.logs:
            raise RunError("no log is given: python -m tools.report LOG... -o report.html")
        write_output(options.output, render(read_series(options.logs)))
        print(f"Report: {options.output}")

    return exit_status(report, arguments)


if __name__ == "__main__":
    sys.exit(main())
