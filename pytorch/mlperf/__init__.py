"""The run's log: `:::MLLOG` lines on standard output through the `mlperf-logging` package (MLPerf training rules)."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mlperf_logging import mllog
from mlperf_logging.mllog import constants

from data.packed import PackedDataset
from pytorch.config import ROOT, Config, RunError

BENCHMARK = "deepspeech2"
DIVISIONS = (constants.CLOSED, constants.OPEN)
LOG_COPY = "DEEPSPEECH2_LOG_COPY"  # names a file for the events, beside standard output: run_and_time.py's
STATUSES = (constants.ONPREM, constants.CLOUD, "preview", constants.RESEARCH)


def get_logger() -> mllog.mllog.MLLogger:
    """Logger to standard output, with file names relative to the repository; silent in all processes but the first."""
    if int(os.environ.get("RANK", "0")) > 0:  # torchrun's
        return mllog.mllog.MLLogger(logging.Logger("silent", logging.CRITICAL))
    mllog.config(root_dir=str(ROOT))
    if LOG_COPY in os.environ:
        mllog.config(filename=os.environ.pop(LOG_COPY))
    return mllog.get_mllogger()


def log_submission(
    log: mllog.mllog.MLLogger, config: Config, dataset: PackedDataset, device: torch.device, ranks: int
) -> None:
    """Log who runs what on what, and every hyperparameter, before the clock starts.

    Raises:
        RunError: SUBMISSION_DIVISION or SUBMISSION_STATUS is set to what the rules do not know.
    """
    log.event(constants.SUBMISSION_BENCHMARK, BENCHMARK)
    log.event(constants.SUBMISSION_ORG, os.environ.get("SUBMISSION_ORG", "reference"))
    log.event(constants.SUBMISSION_DIVISION, _chosen("SUBMISSION_DIVISION", constants.OPEN, DIVISIONS))
    log.event(constants.SUBMISSION_STATUS, _chosen("SUBMISSION_STATUS", constants.RESEARCH, STATUSES))
    machine = environment(device)
    log.event(constants.SUBMISSION_PLATFORM, os.environ.get("SUBMISSION_PLATFORM") or _platform(machine))
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


def _chosen(variable: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(variable, default)
    if value not in allowed:
        raise RunError(f"{variable} is {value!r}; it must be one of {', '.join(allowed)}")
    return value


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and software of this machine that bear on a result."""
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


def _platform(machine: dict[str, Any]) -> str:
    if machine["accelerators"]:
        return f"{machine['accelerators']} x {machine['accelerator']}"
    return f"{machine['cores']} cores of {machine['processor']}"


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


def clear_cache(folder: Path) -> dict[str, Any]:
    """Drop a data set from the operating system's page cache, and look whether it is gone.

    Returns:
        "cleared": whether it is, and where not, "reason".
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        return {"cleared": False, "reason": "this operating system offers no way to do so"}
    for path in sorted(folder.rglob("*.npy")):
        try:
            if not _drop(path):
                return {"cleared": False, "reason": f"{path.name} is still cached: another process may be using it"}
        except OSError as error:
            return {"cleared": False, "reason": f"{path.name}: {error.strerror}"}
    return {"cleared": True}


def _drop(path: Path) -> bool:
    """Drop a file from the page cache; whether it is gone. A page that is just being written goes a moment later."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for _ in range(10):
            os.fsync(descriptor)  # what is not yet on the disk is not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                os.preadv(descriptor, [bytearray(1)], 0, os.RWF_NOWAIT)
            except BlockingIOError:
                return True  # it would have to come from the disk
            time.sleep(0.1)
        return False
    finally:
        os.close(descriptor)
