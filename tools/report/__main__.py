"""A page about runs: what happened in one, or in several side by side.

    python -m tools.report results/synthetic/last_run.log
    python -m tools.report results/2-cores-zen5/an4 -o an4.html
    python -m tools.report fp32=results/2-cores-zen5/an4-fp32 bf16=results/2-cores-zen5/an4 -o comparison.html

Runs that differ only in their seeds are shown as one series. The page is one HTML file that needs no network. Exit
status: 0, or 1 if a log is damaged or the page cannot be written; the reason is one line.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from pytorch.errors import RunError
from tools.cli import command
from tools.output_files import write_output
from tools.report.render import render
from tools.report.runs import find_logs, read_series


def report(
    logs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME=]LOG|FOLDER...")],
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html"),
) -> None:
    """Write the page.

    Args:
        logs: logs of runs; a folder stands for the logs in it, and NAME is what the page calls its runs
        output: the page; never a log, which is not replaced
    """
    if not logs:
        raise RunError("no log: python -m tools.report LOG... -o report.html")
    names: dict[Path, str] = {}
    for argument in logs:
        words = argument.split("=")  # which names and paths may have, too
        splits = [("=".join(words[:count]), Path("=".join(words[count:]))) for count in range(len(words))]
        name, path = next((each for each in splits if each[1].exists()), splits[:2][-1])
        names |= dict.fromkeys(find_logs(path), name)
    write_output(output, render(read_series(names)))
    print(f"Report: {output}")


main = command("tools.report", __doc__, report)

if __name__ == "__main__":
    sys.exit(main())
