"""The run's log: `:::MLLOG` lines on standard output through the `mlperf-logging` package (MLPerf training rules)."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
from mlperf_logging import mllog
from mlperf_logging.mllog import constants

from data.packed import PackedDataset
from pytorch.config import ROOT, Config

BENCHMARK = "deepspeech2"


def get_logger() -> mllog.mllog.MLLogger:
    """Logger to standard output, with file names relative to the repository."""
    mllog.config(root_dir=str(ROOT))
    return mllog.get_mllogger()


def log_submission(log: mllog.mllog.MLLogger, config: Config, dataset: PackedDataset, device: torch.device) -> None:
    """Log who and what runs, and every hyperparameter, before the clock starts."""
    log.event(constants.SUBMISSION_BENCHMARK, BENCHMARK)
    log.event(constants.SUBMISSION_ORG, os.environ.get("SUBMISSION_ORG", "reference"))
    log.event(constants.SUBMISSION_DIVISION, constants.OPEN)
    log.event(constants.SUBMISSION_STATUS, constants.RESEARCH)
    log.event(constants.SUBMISSION_PLATFORM, _platform(device))
    log.event(constants.SEED, config.seed)
    log.event(constants.GLOBAL_BATCH_SIZE, config.batch_size)
    log.event(constants.GRADIENT_ACCUMULATION_STEPS, 1)
    log.event(constants.OPT_NAME, config.optimizer)
    log.event(constants.OPT_BASE_LR, config.learning_rate)
    log.event(constants.OPT_LR_WARMUP_STEPS, config.warmup_steps)
    log.event(constants.OPT_WEIGHT_DECAY, config.weight_decay)
    log.event(constants.OPT_GRADIENT_CLIP_NORM, config.gradient_clip_norm)
    log.event("configuration", config.config, metadata=config.plain())
    log.event(
        "dataset",
        dataset.digest,
        metadata={"corpus": dataset.corpus, "official_archives": dataset.official, "synthetic": dataset.synthetic},
    )
    if image := os.environ.get("DEEPSPEECH2_IMAGE_ID"):  # set by docker/run-dev.sh
        log.event("container_image", image)


def clear_cache(folder: Path) -> bool:
    """Drop a data set from the operating system's page cache. Returns whether the system could be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in sorted(folder.rglob("*.npy")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True


def _platform(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} x {platform.machine()} cores, torch {torch.__version__}"
