"""Checkpoints: what a run needs to resume, and a trained model to be used.

A checkpoint is a dictionary of plain values and tensors, read with `weights_only=True`. It is written beside its final
path, flushed to disk and renamed, so a file at the final path is whole; one that was damaged there is found out by the
checksums of its format (zip), and the one before it is used. A run keeps three:

    checkpoint_last.pt      the newest
    checkpoint_previous.pt  the one before it
    checkpoint_best.pt      of the evaluation with the lowest WER

Nothing of an earlier run in the folder is deleted: a new run moves its files into `previous_run`, `previous_run-2`, ...
"""

import dataclasses
import math
import os
import shutil
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from data.files import atomic_replace
from pytorch.config import Config, fields_of
from pytorch.ctc import LABELS
from pytorch.distributed import World, run_id, torchrun_env
from pytorch.errors import RunError

FORMAT_VERSION = 4
READABLE_VERSIONS = (3, 4)  # version 3 has one optimizer; its model can be used, but its run cannot be resumed
BEST = "checkpoint_best.pt"
LAST = "checkpoint_last.pt"
PREVIOUS = "checkpoint_previous.pt"


@dataclasses.dataclass
class TrainState:
    """How far a run has come."""

    epoch: int = 1  # the epoch under way, from 1
    step_in_epoch: int = 0  # steps of it that are done
    losses_in_epoch: int = 0  # of them, steps with a finite loss
    sum_of_losses_in_epoch: float = 0.0
    step: int = 0  # steps of the run that are done, skipped ones included
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    wer: float | None = None  # percent, of the last evaluation
    best_wer: float | None = None  # percent
    elapsed_seconds: float = 0.0  # on the clock, when this was saved
    evaluation_seconds: float = 0.0  # of those, spent in evaluations
    resumed: bool = False

    @property
    def mean_loss(self) -> float:
        """Mean loss of the epoch so far; not a number before the first one."""
        return self.sum_of_losses_in_epoch / self.losses_in_epoch if self.losses_in_epoch else math.nan

    def begin_epoch(self, epoch: int) -> None:
        """Count the steps of an epoch from its beginning."""
        self.epoch, self.step_in_epoch, self.losses_in_epoch, self.sum_of_losses_in_epoch = epoch, 0, 0, 0.0


def save(config: Config, dataset_digest: str, state: TrainState, tensors: dict[str, Any]) -> None:
    """Write the newest checkpoint; the one that was the newest becomes the one before.

    Args:
        config, dataset_digest, state: of the run.
        tensors: `Trainer.state_dict()`.

    Raises:
        RunError: it cannot be written, such as on a full disk. What was there before is untouched.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "labels": LABELS,
        "config": config.to_dict(),
        "dataset_digest": dataset_digest,
        "launch": run_id(),
        "progress": dataclasses.asdict(state),
        **tensors,
    }
    folder = config.output_dir
    path = folder / LAST
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            keep_newest_as(PREVIOUS, folder)
        atomic_replace(partial, path)  # which makes the folder's other names durable too
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        with suppress(OSError):
            partial.unlink()
        raise RunError(f"{path}: the checkpoint could not be written: {error}") from error


def keep_newest_as(name: str, folder: Path) -> None:
    """Hard-link the newest checkpoint to this name, too, or copy it; OSError if that fails."""
    partial = folder / f"{name}.partial"
    partial.unlink(missing_ok=True)
    try:
        partial.hardlink_to(folder / LAST)
    except OSError:
        shutil.copyfile(folder / LAST, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(folder / name)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        RunError: it is absent, damaged, or of another format version.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not compare the checksums that it writes
            damaged = archive.testzip()
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format_version"]
    except FileNotFoundError:
        raise RunError(f"{path}: checkpoint not found") from None
    except Exception as error:  # damaged bytes may do anything
        why = getattr(error, "strerror", None) or type(error).__name__
        raise RunError(f"{path}: not a checkpoint of this project, or damaged ({why})") from error
    if version not in READABLE_VERSIONS:
        raise RunError(f"{path}: checkpoint format {version}; this version reads formats {READABLE_VERSIONS}")
    if damaged is not None:
        raise RunError(f"{path}: damaged: the checksum of {damaged} does not match")
    return content


def find_resumable(config: Config, dataset_digest: str, world: World) -> dict[str, Any] | None:
    """Return the checkpoint to resume from, if that was asked for or torchrun has restarted this run's ranks.

    Nodes may have different checkpoints, or none: the newest that any of them has is used.

    Raises:
        RunError: there is none though --resume asks for one, or it is of another configuration or data set.
    """
    content, failure = None, RunError(f"{config.output_dir / LAST}: checkpoint not found")
    restarted = torchrun_env("TORCHELASTIC_RESTART_COUNT", 0) > 0 or torchrun_env("GROUP_WORLD_SIZE", 1) > 1  # perhaps
    if world.local_rank == 0 and (config.resume or restarted):
        try:
            content = load(config.output_dir / LAST)
        except RunError as error:
            failure = error
            with suppress(RunError):
                content = load(config.output_dir / PREVIOUS)
                print(f"{error}; falling back to {PREVIOUS}", file=sys.stderr)
    if content is not None and not (config.resume or is_of_this_run(content)):
        content = None
    steps = world.all_gather_object(content["progress"]["step"] if content is not None else -1)
    content = world.broadcast_object(content, src=steps.index(max(steps)))
    if content is None:  # without --resume: ranks start for the first time, or were lost before the first checkpoint
        if config.resume:
            raise failure
        return None
    check_resumable(content, config, dataset_digest)
    world.print_once(f"Resuming from {config.output_dir}: step {content['progress']['step']}.")
    return content


def is_of_this_run(content: dict[str, Any]) -> bool:
    """Return whether a checkpoint was written by this run, before torchrun restarted its ranks."""
    return run_id() is not None and content.get("launch") == run_id()


def check_resumable(content: dict[str, Any], config: Config, dataset_digest: str) -> None:
    """Refuse to resume from a checkpoint of another configuration or data set.

    Raises:
        RunError: names each difference.
    """
    if content["format_version"] != FORMAT_VERSION:
        raise RunError(f"a checkpoint of format {content['format_version']} can be evaluated, but not resumed")
    saved = {**content["config"], "data_set": content["dataset_digest"][:12]}
    current = {**config.to_dict(), "data_set": dataset_digest[:12]}
    different = [name for name in (*fields_of("training", "model"), "data_set") if saved.get(name) != current[name]]
    if not different:
        return
    differences = "; ".join(
        f"{name.replace('_', '-')}: checkpoint {saved.get(name)}, command line {current[name]}" for name in different
    )
    fits = set(fields_of("model")).isdisjoint(different)
    if fits and config.resume_with_changes:
        print(f"Resumed with changes: {differences}", file=sys.stderr)
        return
    hint = "--resume-with-changes resumes anyway" if fits else "the weights or the optimizer's state would not fit"
    raise RunError(f"{config.output_dir}: cannot be resumed with this configuration: {differences}. {hint}")
