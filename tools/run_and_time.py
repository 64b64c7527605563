"""What run_and_time.sh starts: the timed run, and when it is over, its report.

    python -m tools.run_and_time --config synthetic

Options and exit status are those of pytorch.launch, which runs here as it does alone. The page, report.html beside the
log, is written by another process.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from data.cli import exit_status
from pytorch import launch, train
from pytorch.config import parse_config
from pytorch.mllog import LOG, REPORT


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return the exit status, which is that of the timed run."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: _run(given))


def _run(arguments: list[str]) -> int:
    config = parse_config(arguments, program="sh run_and_time.sh", description=train.__doc__ or "")
    log = config.output_dir / LOG
    before = _written_at(log)
    status = launch.main(arguments)
    # Else the run could not start, and may have put the log before it away, or logs on another machine.
    if status in (0, 1) and _written_at(log) not in (0, before):
        command = [sys.executable, "-m", "tools.report", str(log), "--output", str(log.with_name(REPORT))]
        with suppress(KeyboardInterrupt):
            subprocess.run(command, stdout=sys.stderr)  # if it fails, the run has not
    return status


def _written_at(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
