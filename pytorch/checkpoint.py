"""Checkpoints: what a run needs to go on, and a trained model to be used.

A checkpoint is a dictionary of plain values and tensors, read with `weights_only=True`. It is written beside its final
path, flushed to disk and renamed, so a file at the final path is always whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from pytorch.config import Config, RunError
from pytorch.decoder import LABELS

FORMAT_VERSION = 2
BEST = "checkpoint_best.pt"
LAST = "checkpoint_last.pt"

# What a resumed run may change: where it runs and when it ends, not what it computes.
_FREE_ON_RESUME = {"dataset_dir", "output_dir", "resume", "device", "target_wer", "max_epochs", "max_steps"}


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 1  # the epoch under way, from 1
    step_in_epoch: int = 0  # steps of it that are done
    step: int = 0  # steps of the run that are done, skipped ones included
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    wer: float | None = None  # percent, of the last evaluation
    best_wer: float | None = None  # percent
    elapsed_seconds: float = 0.0  # on the clock, before this process
    evaluation_seconds: float = 0.0  # of those, spent in evaluations
    resumed: bool = False


def save(
    path: Path,
    config: Config,
    dataset_digest: str,
    progress: Progress,
    evaluated: torch.nn.Module,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint atomically: the model that was evaluated as "model", the one in training as "trained_model".

    Raises:
        RunError: it cannot be written, such as on a full disk. What was at `path` before is untouched.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "labels": LABELS,
        "config": config.plain(),
        "dataset_digest": dataset_digest,
        "progress": dataclasses.asdict(progress),
        "model": evaluated.state_dict(),
        "trained_model": model.state_dict(),  # takes no space where it is the same
        "optimizer": optimizer.state_dict(),
    }
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RunError(f"{path}: the checkpoint could not be written: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        RunError: it is absent, damaged, or of another format version or label set.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format_version"]
    except FileNotFoundError:
        raise RunError(f"{path}: there is no such checkpoint") from None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not a checkpoint of this project, or damaged ({type(error).__name__})") from error
    if version != FORMAT_VERSION:
        raise RunError(f"{path}: checkpoint format {version}; this version reads format {FORMAT_VERSION}")
    if content["labels"] != LABELS:
        raise RunError(f"{path}: its labels are {content['labels']!r}, expected {LABELS!r}")
    return content


def check_resumable(path: Path, content: dict[str, Any], config: Config, dataset_digest: str) -> None:
    """Refuse to go on from a checkpoint of another configuration or data set.

    Raises:
        RunError: names each difference.
    """
    differences = [
        f"{key.replace('_', '-')} {content['config'].get(key)} there, {value} now"
        for key, value in config.plain().items()
        if key not in _FREE_ON_RESUME and content["config"].get(key) != value
    ]
    if content["dataset_digest"] != dataset_digest:
        differences.append(f"data set {content['dataset_digest'][:12]} there, {dataset_digest[:12]} now")
    if differences:
        raise RunError(f"{path}: cannot be resumed with this configuration: {'; '.join(differences)}")
