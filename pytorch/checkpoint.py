"""Checkpoints: what a run needs to resume, and a trained model to be used.

A checkpoint is a dictionary of plain values and tensors, read with `weights_only=True`, that holds the SHA-256 digest
of its own content. It is written beside its final path, flushed to disk and renamed, so a file at the final path is
whole; one that was damaged there is found out, and the one before it is used. A run keeps three:

    checkpoint_last.pt      the newest
    checkpoint_previous.pt  the one before it
    checkpoint_best.pt      of the evaluation with the lowest WER

Nothing of an earlier run in the folder is deleted: a new run moves its files into `previous_run`, `previous_run-2`, ...
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Sequence
from itertools import count
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
PREVIOUS_RUN = "previous_run"


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
    content["digest"] = _digest(content)
    folder = config.output_dir
    path = folder / LAST
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            _link_or_copy(path, folder / PREVIOUS)
        atomic_replace(partial, path)  # which makes the folder's other names durable too
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RunError(f"{path}: the checkpoint could not be written: {error}") from error


def mark_best(folder: Path) -> None:
    """Keep the newest checkpoint as the best one, too.

    Raises:
        RunError: it cannot be written.
    """
    try:
        _link_or_copy(folder / LAST, folder / BEST)
    except OSError as error:
        raise RunError(f"{folder / BEST}: the checkpoint could not be written: {error}") from error


def _link_or_copy(path: Path, second: Path) -> None:
    """Hard-link `path` to `second`, or copy it, replacing what is there."""
    partial = second.with_name(second.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        partial.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(second)


def put_away(folder: Path, others: Sequence[str], *, keep_checkpoints: bool = False) -> Path | None:
    """Move an earlier run's files into a folder of their own; nothing that was put away before is touched.

    Nothing is moved if that run had not begun: it left no more than its first checkpoint, which holds no training.

    Args:
        folder: the output folder.
        others: names of files that belong to that run, beside its checkpoints.
        keep_checkpoints: whether the checkpoints stay, since the run is continued.

    Returns:
        Where the files are now; None if none was moved.

    Raises:
        RunError: they cannot be moved; then none is.
    """
    # LAST goes first: a start that is killed in between leaves files that still tell the next one of a run.
    names = [*others] if keep_checkpoints else [LAST, PREVIOUS, BEST, *others]
    files = [name for name in names if (folder / name).exists()]
    if not set(files) - {LAST}:
        return None
    folders = (PREVIOUS_RUN if number == 1 else f"{PREVIOUS_RUN}-{number}" for number in count(1))
    away = next(folder / name for name in folders if not os.path.lexists(folder / name))
    moved: list[str] = []
    try:
        away.mkdir()
        for name in files:
            (folder / name).rename(away / name)
            moved.append(name)
        return away
    except OSError as error:
        for name in moved:
            (away / name).rename(folder / name)
        raise RunError(f"{away}: cannot move the earlier run's files there: {error.strerror}") from error


def _digest(content: Any) -> str:
    """Return the SHA-256 of plain values and tensors: of all keys, types, shapes and bytes, in order."""
    digest = hashlib.sha256()

    def add(thing: Any) -> None:
        if isinstance(thing, dict):
            for key, value in thing.items():
                digest.update(f"{key!r}:".encode())
                add(value)
        elif isinstance(thing, (list, tuple)):
            for value in thing:
                add(value)
        elif isinstance(thing, torch.Tensor):
            digest.update(f"{thing.dtype}{tuple(thing.shape)}".encode())
            digest.update(thing.detach().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(repr(thing).encode())

    add(content)
    return digest.hexdigest()


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        RunError: it is absent, damaged, or of another format version or label set.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, labels = content["format_version"], content.get("labels")
        whole = content.pop("digest", None) == _digest(content)
    except FileNotFoundError:
        raise RunError(f"{path}: checkpoint not found") from None
    except Exception as error:  # the digest is in the file, so it is read first; damaged bytes may do anything then
        why = getattr(error, "strerror", None) or type(error).__name__
        raise RunError(f"{path}: not a checkpoint of this project, or damaged ({why})") from error
    if version not in READABLE_VERSIONS:
        raise RunError(f"{path}: checkpoint format {version}; this version reads formats {READABLE_VERSIONS}")
    if labels != LABELS:
        raise RunError(f"{path}: its labels are {labels!r}, expected {LABELS!r}")
    if not whole:
        raise RunError(f"{path}: damaged: its content does not match its digest")
    return content


def find_resumable(config: Config, dataset_digest: str, world: World) -> dict[str, Any] | None:
    """Return the checkpoint to resume from, if that was asked for or torchrun has restarted this run's ranks.

    Nodes may have different checkpoints, or none: the newest that any of them has is used, one of this run before any
    other.

    Raises:
        RunError: there is none though --resume asks for one, or it is of another configuration or data set.
    """
    path, content, failure = config.output_dir / LAST, None, None
    restarted = torchrun_env("TORCHELASTIC_RESTART_COUNT", 0) > 0 or torchrun_env("GROUP_WORLD_SIZE", 1) > 1  # perhaps
    if world.local_rank == 0 and (config.resume or restarted):
        try:
            path, content = load_newest(config.output_dir)
        except RunError as error:
            failure = error
    of_this_run = content is not None and run_id() is not None and content["launch"] == run_id()
    if not (of_this_run or config.resume):
        content = None
    candidates = world.all_gather_object((of_this_run, content["progress"]["step"] if content is not None else -1))
    newest = candidates.index(max(candidates))
    if candidates[newest][1] < 0:
        if config.resume:
            raise failure or RunError(f"{path}: checkpoint not found")
        return None  # the ranks start for the first time, or one was lost before the first checkpoint
    content = world.broadcast_object(content, src=newest)
    assert content is not None
    check_resumable(path, content, config, dataset_digest)
    world.print_once(f"Resuming from {path}: step {content['progress']['step']}.")
    return content


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return a run's newest checkpoint that is whole, and its path; say so if it is not the last one written.

    Raises:
        RunError: there is none, or none that is whole.
    """
    path, previous = folder / LAST, folder / PREVIOUS
    try:
        return path, load(path)
    except RunError as error:
        if not previous.exists():
            raise
        print(f"{error}; falling back to {previous.name}", file=sys.stderr)
        return previous, load(previous)


def check_resumable(path: Path, content: dict[str, Any], config: Config, dataset_digest: str) -> None:
    """Refuse to resume from a checkpoint of another configuration or data set.

    Raises:
        RunError: names each difference.
    """
    if content["format_version"] != FORMAT_VERSION:
        raise RunError(
            f"{path}: checkpoint format {content['format_version']} (this version writes {FORMAT_VERSION}) can be "
            "evaluated or transcribed with, not resumed"
        )
    saved, current = content["config"], config.to_dict()
    if current["precision"] == "auto":  # stays what it was chosen to be
        current["precision"] = saved["precision"]
    different = [name for name in fields_of("training", "model") if saved.get(name) != current[name]]
    differences = [
        f"{name.replace('_', '-')}: checkpoint {saved.get(name)}, command line {current[name]}" for name in different
    ]
    again = "".join(f" --{name.replace('_', '-')} {saved.get(name)}" for name in different)
    if set(fields_of("model")).intersection(different):
        raise RunError(
            f"{path}: cannot be resumed with this configuration, since its weights or the state of its optimizer "
            f"would not fit: {'; '.join(differences)}. To continue with its options:{again}"
        )
    if content["dataset_digest"] != dataset_digest:
        differences.append(f"data set: checkpoint {content['dataset_digest'][:12]}, command line {dataset_digest[:12]}")
    if not differences:
        return
    if config.resume_with_changes:
        print(f"{path}: resumed with changes: {'; '.join(differences)}", file=sys.stderr)
        return
    raise RunError(
        f"{path}: cannot be resumed with this configuration: {'; '.join(differences)}. To resume anyway: "
        "--resume-with-changes"
    )
