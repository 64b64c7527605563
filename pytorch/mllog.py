"""The run's log: `:::MLLOG` lines on standard output through the `mlperf-logging` package (MLPerf training rules)."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperf_logging import mllog
from mlperf_logging.mllog import constants

from data.packed import PackedDataset
from pytorch.cli import RunError
from pytorch.config import EVENTS, ROOT, Config
from pytorch.machine import environment, git_revision

if TYPE_CHECKING:
    import torch  # slow to import: not for those who only read logs

BENCHMARK = "deepspeech2"
DIVISIONS = (constants.CLOSED, constants.OPEN)
LOG_COPY = "DEEPSPEECH2_LOG_COPY"  # names a file for what is printed, too: run_and_time.py's
LOG, REPORT = "last_run.log", "report.html"  # which run_and_time.sh leaves in the output folder
STATUSES = (constants.ONPREM, constants.CLOUD, "preview", constants.RESEARCH)


def get_logger() -> mllog.mllog.MLLogger:
    """Logger to standard output, with file names relative to the repository; silent in all processes but the first."""
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun's
        return mllog.mllog.MLLogger(logging.Logger("silent", logging.CRITICAL))
    mllog.config(root_dir=str(ROOT))
    if LOG_COPY in os.environ:
        mllog.get_mllogger().logger.addHandler(_Copy(Path(os.environ.pop(LOG_COPY))))
    return mllog.get_mllogger()


class _Copy(logging.FileHandler):
    """What is printed, in a file that has another name until the clock starts: a run that cannot start has no log."""

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, partial_copy(path)
        self._started = not self._partial.exists()  # by processes that were lost: these were started in their place
        super().__init__(path if self._started else self._partial, encoding="utf-8")

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if not self._started and f'"{constants.RUN_START}"' in record.getMessage():
            self._started = True
            with suppress(OSError):  # a copy is no reason to end the run
                self._partial.replace(self._path)


def partial_copy(path: Path) -> Path:
    """Name of the copy of a log before the clock has started; whoever asks for the copy makes this file."""
    return path.with_name(f"{path.name}.partial")


def print_result(log: mllog.mllog.MLLogger, line: str) -> None:
    """Print the line that a success ends with, where the events are."""
    print(line, flush=True)
    for handler in log.logger.handlers:
        if isinstance(handler, _Copy):
            handler.emit(logging.makeLogRecord({"msg": line}))


def log_submission(
    log: mllog.mllog.MLLogger, config: Config, dataset: PackedDataset, device: torch.device, ranks: int
) -> None:
    """Log who runs what on what, and every hyperparameter, before the clock starts.

    Raises:
        RunError: SUBMISSION_DIVISION or SUBMISSION_STATUS is set to what the rules do not know.
    """
    log.event(constants.SUBMISSION_BENCHMARK, BENCHMARK)
    log.event(constants.SUBMISSION_ORG, os.environ.get("SUBMISSION_ORG") or "reference")
    log.event(constants.SUBMISSION_DIVISION, submission_division())
    log.event(constants.SUBMISSION_STATUS, submission_status())
    machine = environment(device)
    log.event(constants.SUBMISSION_PLATFORM, submission_platform(machine, ranks))
    for name, event in EVENTS.items():
        log.event(event, getattr(config, name))
    log.event("configuration", config.config, metadata=config.to_dict())
    log.event(
        "dataset",
        dataset.digest,
        metadata={"corpus": dataset.corpus, "official_archives": dataset.official, "synthetic": dataset.synthetic},
    )
    log.event("number_of_ranks", ranks)
    log.event("environment", machine["processor"], metadata=machine)
    commit, changed = git_revision()
    log.event("git_commit", commit, metadata={"uncommitted_changes": changed})
    if image := os.environ.get("DEEPSPEECH2_IMAGE_ID"):  # set by docker/run-dev.sh
        log.event("container_image", image)


def submission_division() -> str:
    """Division of the runs that are started now; RunError where the rules do not know it."""
    return _chosen("SUBMISSION_DIVISION", constants.OPEN, DIVISIONS)


def submission_status() -> str:
    """Status of the system that runs; RunError where the rules do not know it."""
    return _chosen("SUBMISSION_STATUS", constants.RESEARCH, STATUSES)


def submission_platform(machine: dict[str, Any], ranks: int) -> str:
    """What a run uses of a machine (`environment`): each of its processes one accelerator, if there are any."""
    if named := os.environ.get("SUBMISSION_PLATFORM"):
        return named
    if machine["accelerators"]:
        return f"{ranks} x {machine['accelerator']}"
    return f"{machine['cores']} cores of {machine['processor']}"


def _chosen(variable: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable) or default
    if value not in allowed:
        raise RunError(f"{variable} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def log_cache_clear(log: mllog.mllog.MLLogger, machines: Sequence[str]) -> None:
    """Log whether the data set is out of memory on all machines, and where not, why.

    Args:
        log: where to.
        machines: what `clear_cache` has returned on each.
    """
    reasons = [
        reason if len(machines) == 1 else f"machine {number}: {reason}"
        for number, reason in enumerate(machines)
        if reason
    ]
    log.event(constants.CACHE_CLEAR, not reasons, metadata={"reason": "; ".join(reasons)} if reasons else {})
