"""What run_and_time.sh runs: the timed run, and when it is over, its report.

    python -m pytorch.run_and_time --config synthetic

As pytorch.launch, whose options and exit status it has. The log is kept in the output folder too, in last_run.log,
which is that of the run before until this one's clock starts. The report, report.html beside it, is written by another
process, so that the timed run imports nothing for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pytorch import launch, mllog
from pytorch.cli import RunError
from pytorch.config import parse_config


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status, which is that of the timed run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    log = _keep_log(arguments)
    status = launch.main(arguments)
    if log is not None and mllog.partial_copy(log).exists():  # it could not start, or logs on another machine
        mllog.partial_copy(log).unlink()
    elif log is not None and status in (0, 1):
        command = [sys.executable, "-m", "tools.report", str(log), "--output", str(log.with_name(mllog.REPORT))]
        subprocess.run(command, stdout=sys.stderr)  # if it fails, the run has not
    return status


def _keep_log(arguments: list[str]) -> Path | None:
    """Have the log written into a file too; None where that cannot be, of which the run itself complains."""
    node = os.environ.get("NODE_RANK") or "0"  # torchrun chooses which of them logs
    name = mllog.LOG if node == "0" else f"{Path(mllog.LOG).stem}_node{node}.log"
    try:
        folder = parse_config(
            arguments, program="sh run_and_time.sh", description=launch.train.__doc__ or ""
        ).output_dir
        folder.mkdir(parents=True, exist_ok=True)
        mllog.partial_copy(folder / name).write_text("")
    except (RunError, OSError):
        return None
    os.environ[mllog.LOG_COPY] = str(folder / name)
    return folder / name


if __name__ == "__main__":
    sys.exit(main())
