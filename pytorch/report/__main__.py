"""A page about runs: what happened in one, or in several side by side.

    python -m pytorch.report results/synthetic/mlperf_ds2.log
    python -m pytorch.report results/measured/*.log -o comparison.html

Writes one HTML file that needs no network. Exit status: 0, or 1 if a log is damaged or the page cannot be written; the
reason is one line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.packed import replace_durably
from pytorch.command import exit_status
from pytorch.config import RunError
from pytorch.report.page import render
from pytorch.report.runs import read_runs


@dataclass(frozen=True)
class Options:
    """What to show."""

    logs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """logs of runs, as run_and_time.sh prints them"""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html")
    """the page"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, prog="python -m pytorch.report", description=__doc__)
    return exit_status(lambda: report(options))


def report(options: Options) -> None:
    """Write the page.

    Raises:
        RunError: there is no log, one cannot be read, or the page cannot be written.
    """
    if not options.logs:
        raise RunError("no log is named: python -m pytorch.report LOG... -o report.html")
    page = render(read_runs(options.logs))
    partial = options.output.with_name(options.output.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        replace_durably(partial, options.output)
    except OSError as error:
        raise RunError(f"--output {options.output}: cannot be written: {error.strerror}") from error
    print(f"Report: {options.output}")


if __name__ == "__main__":
    sys.exit(main())
