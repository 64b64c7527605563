"""The run's log: `:::MLLOG` lines on standard output through the `mlperf-logging` package (MLPerf training rules)."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mlperf_logging import mllog
from mlperf_logging.mllog import constants

from data.packed import PackedDataset, content_files
from pytorch.config import ROOT, Config, RunError

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
    log.event(constants.SUBMISSION_ORG, os.environ.get("SUBMISSION_ORG", "reference"))
    log.event(constants.SUBMISSION_DIVISION, chosen_division())
    log.event(constants.SUBMISSION_STATUS, chosen_status())
    machine = environment(device)
    log.event(constants.SUBMISSION_PLATFORM, chosen_platform(machine, ranks))
    log.event(constants.SEED, config.seed)
    log.event(constants.GLOBAL_BATCH_SIZE, config.batch_size)
    log.event(constants.GRADIENT_ACCUMULATION_STEPS, config.gradient_accumulation_steps)
    log.event(constants.OPT_NAME, config.optimizer)
    log.event(constants.OPT_BASE_LR, config.learning_rate)
    log.event(constants.OPT_LR_WARMUP_STEPS, config.warmup_steps)
    log.event(constants.OPT_LR_DECAY_SCHEDULE, config.schedule)
    log.event(constants.OPT_WEIGHT_DECAY, config.weight_decay)
    log.event(constants.OPT_GRADIENT_CLIP_NORM, config.gradient_clip_norm)
    log.event(constants.MODEL_EVAL_EMA_FACTOR, config.averaging_decay)
    log.event("configuration", config.config, metadata=config.plain())
    log.event(
        "dataset",
        dataset.digest,
        metadata={"corpus": dataset.corpus, "official_archives": dataset.official, "synthetic": dataset.synthetic},
    )
    log.event("number_of_ranks", ranks)
    log.event("environment", machine["processor"], metadata=machine)
    commit, changed = git_state()
    log.event("git_commit", commit, metadata={"uncommitted_changes": changed})
    if image := os.environ.get("DEEPSPEECH2_IMAGE_ID"):  # set by docker/run-dev.sh
        log.event("container_image", image)


def chosen_division() -> str:
    """Division of the runs that are started now; RunError where the rules do not know it."""
    return _chosen("SUBMISSION_DIVISION", constants.OPEN, DIVISIONS)


def chosen_status() -> str:
    """Status of the system that runs; RunError where the rules do not know it."""
    return _chosen("SUBMISSION_STATUS", constants.RESEARCH, STATUSES)


def chosen_platform(machine: dict[str, Any], ranks: int) -> str:
    """What a run uses of a machine (`environment`): each of its processes one accelerator, if there are any."""
    if named := os.environ.get("SUBMISSION_PLATFORM"):
        return named
    if machine["accelerators"]:
        return f"{ranks} x {machine['accelerator']}"
    return f"{machine['cores']} cores of {machine['processor']}"


def _chosen(variable: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable, default)
    if value not in allowed:
        raise RunError(f"{variable} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and software of this machine that bear on a result."""
    import torch

    packages = "torch", "numpy", "mlperf-logging"
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "operating_system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "accelerators": 0,
    }
    if device.type == "cuda":
        found["accelerators"] = torch.cuda.device_count()
        found["accelerator"] = torch.cuda.get_device_name()
        found["accelerator_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_state() -> tuple[str, bool | None]:
    """Commit of this repository, and whether files differ from it; "unknown" and None without git or its folder."""
    if told := os.environ.get("DEEPSPEECH2_COMMIT"):  # by docker/run-dev.sh: an image needs no git
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    if shutil.which("git") is None:
        return "unknown", None
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    answers = [
        subprocess.run([*git, *command], capture_output=True, text=True)
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
    ]
    if any(answer.returncode for answer in answers):
        return "unknown", None
    return answers[0].stdout.strip(), bool(answers[1].stdout.strip())


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


def clear_cache(dataset: PackedDataset) -> str:
    """Drop a data set from the operating system's page cache.

    Returns:
        Why that was not possible, for the first file of which some of it is still there; empty if nothing is.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(ctypes.CDLL(None), "mincore"):
        return "this operating system offers no way to do so"
    for name in content_files(dataset.subsets):
        try:
            if left := _drop(dataset.path / name):
                return f"{left} pages of {name} are still cached: another process may be using it"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return ""


def _drop(path: Path) -> int:
    """Drop a file from the page cache; how many of its pages are still there.

    A page that is just being read or written goes a moment later.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for _ in range(10):
            os.fsync(descriptor)  # what is not yet on the disk is not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not (left := _cached_pages(descriptor)):
                break
            time.sleep(0.1)
        return left
    finally:
        os.close(descriptor)


def _cached_pages(descriptor: int) -> int:
    """How many pages of a file are in memory. To read some of it, even without waiting, would bring them there."""
    size = os.fstat(descriptor).st_size
    if not size:
        return 0
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
        start = np.frombuffer(mapped, np.uint8)
        cached = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        library = ctypes.CDLL(None, use_errno=True)
        failed = library.mincore(
            ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(cached.ctypes.data)
        )
        del start  # else the mapping could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(np.count_nonzero(cached & 1))
