"""Checkpoints: what a run needs to go on, and a trained model to be used.

A checkpoint is a dictionary of plain values and tensors, read with `weights_only=True`, that holds the SHA-256 digest
of its own content. It is written beside its final path, flushed to disk and renamed, so a file at the final path is
whole; one that was damaged there is found out, and the one before it is used. A run keeps three:

    checkpoint_last.pt      the newest
    checkpoint_previous.pt  the one before it
    checkpoint_best.pt      of the evaluation with the lowest WER

Those of a run before it in the same folder are kept in its folder `earlier`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from data.packed import replace_durably
from pytorch.cli import RunError
from pytorch.config import Config, fields_of, with_current_names
from pytorch.ctc import LABELS

FORMAT_VERSION = 3
BEST = "checkpoint_best.pt"
LAST = "checkpoint_last.pt"
PREVIOUS = "checkpoint_previous.pt"
EARLIER = "earlier"


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
    elapsed_seconds: float = 0.0  # on the clock, before this process
    evaluation_seconds: float = 0.0  # of those, spent in evaluations
    resumed: bool = False


def save(
    folder: Path,
    config: Config,
    dataset_digest: str,
    progress: TrainState,
    eval_model: torch.nn.Module,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    launch: str | None,
    best: bool,
) -> None:
    """Write the newest checkpoint: the model that is evaluated as "model", the one in training as "trained_model".

    Args:
        folder: of the run's checkpoints; the newest one there becomes the one before.
        config, dataset_digest, progress, eval_model, model, optimizer: its content.
        launch: which start of the run it is from, see `pytorch.launch`; None if that started no processes.
        best: whether it is the best one as well.

    Raises:
        RunError: it cannot be written, such as on a full disk. What was there before is untouched.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "labels": LABELS,
        "config": config.to_dict(),
        "dataset_digest": dataset_digest,
        "launch": launch,
        "progress": dataclasses.asdict(progress),
        "random_state": torch.get_rng_state(),
        "model": eval_model.state_dict(),
        "trained_model": model.state_dict(),  # takes no space where it is the same
        "optimizer": optimizer.state_dict(),
    }
    content["digest"] = _digest(content)
    path = folder / LAST
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            _link_or_copy(path, folder / PREVIOUS)
        if best:
            _link_or_copy(partial, folder / BEST)
        replace_durably(partial, path)  # which makes the folder's other names durable too
    except (OSError, RuntimeError) as error:  # torch turns a failed write into a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RunError(f"{path}: the checkpoint could not be written: {error}") from error


def _link_or_copy(path: Path, second: Path) -> None:
    """Make a file known by a second path too, replacing what is there; a copy where there are no hard links."""
    partial = second.with_name(second.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        partial.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
    partial.rename(second)


def archive_previous_run(folder: Path) -> Path | None:
    """Move the checkpoints of an earlier run into a folder of their own, in place of those there.

    Nothing is moved if that run has not come further than its first checkpoint, which holds no training.

    Returns:
        Where they are now; None if none was moved.

    Raises:
        RunError: they cannot be moved.
    """
    there = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
    if set(there) <= {LAST}:
        return None
    earlier = folder / EARLIER
    try:
        earlier.mkdir(exist_ok=True)
        for name in (LAST, PREVIOUS, BEST):
            (earlier / name).unlink(missing_ok=True)
        for name in there:
            replace_durably(folder / name, earlier / name)
    except OSError as error:
        raise RunError(f"{earlier}: the earlier run's checkpoints cannot be moved there: {error.strerror}") from error
    return earlier


def _digest(content: Any) -> str:
    """SHA-256 of plain values and tensors: of all keys, types, shapes and bytes, in order."""
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
        raise RunError(f"{path}: there is no such checkpoint") from None
    except Exception as error:  # the digest is in the file, so it is read first; damaged bytes may do anything then
        raise RunError(f"{path}: not a checkpoint of this project, or damaged ({type(error).__name__})") from error
    if version != FORMAT_VERSION:
        raise RunError(f"{path}: checkpoint format {version}; this version reads format {FORMAT_VERSION}")
    if labels != LABELS:
        raise RunError(f"{path}: its labels are {labels!r}, expected {LABELS!r}")
    if not whole:
        raise RunError(f"{path}: damaged: its content does not have the digest that it was written with")
    return content


def load_newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a run that is whole, and where it is; says so if it is not the last one written.

    Raises:
        RunError: there is none, or none that is whole.
    """
    path = folder / LAST
    try:
        return path, load(path)
    except RunError as error:
        previous = folder / PREVIOUS
        if not previous.exists():
            raise
        print(f"{error}; going on from the one before, {previous.name}", file=sys.stderr)
        return previous, load(previous)


def check_resumable(path: Path, content: dict[str, Any], config: Config, dataset_digest: str) -> None:
    """Refuse to go on from a checkpoint of another configuration or data set.

    Raises:
        RunError: names each difference.
    """
    saved, current = with_current_names(content["config"]), config.to_dict()
    different = [name for name in fields_of("training", "model") if saved.get(name) != current[name]]
    differences = [f"{name.replace('_', '-')} {saved.get(name)} there, {current[name]} now" for name in different]
    if config.resume_with_changes and set(fields_of("model")).intersection(different):
        raise RunError(
            f"{path}: cannot be resumed with this configuration, since its weights or the state of its optimizer "
            f"would not fit: {'; '.join(differences)}"
        )
    if content["dataset_digest"] != dataset_digest:
        differences.append(f"data set {content['dataset_digest'][:12]} there, {dataset_digest[:12]} now")
    if not differences:
        return
    if config.resume_with_changes:
        print(f"{path}: resumed with changes: {'; '.join(differences)}", file=sys.stderr)
        return
    raise RunError(
        f"{path}: cannot be resumed with this configuration: {'; '.join(differences)}. If that is what you want: "
        "--resume-with-changes"
    )
