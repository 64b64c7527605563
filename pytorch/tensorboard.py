"""A run's scalars for TensorBoard, while it goes on: what the log holds, drawn live.

    python -m pytorch.train --config an4 --tensorboard runs/an4
    tensorboard --logdir runs

Needs the extra `tensorboard`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch.cli import RunError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Scalars:
    """Writes what it is told into a folder, or nothing where none was asked for. All curves are over steps.

    A folder that can no longer be written, such as on a full disk, is said once: it is no reason to end the run.
    """

    def __init__(self, folder: Path | None = None, done: int = 0) -> None:
        """Open a folder, in which earlier runs may have written.

        Args:
            folder: where to write; None: nowhere.
            done: steps of the run that a resumed run goes on from; what was written after them is dropped.

        Raises:
            RunError: the package tensorboard is missing, or the folder cannot be written.
        """
        self._writer: SummaryWriter | None = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra
        except ImportError as error:
            raise RunError("--tensorboard needs a package: python -m pip install -e '.[tensorboard]'") from error
        try:
            self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        except OSError as error:
            raise RunError(f"--tensorboard {folder}: cannot be written: {error.strerror}") from error

    def step(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """An optimizer step that was done."""
        self._write(
            step, {"train/loss": loss, "train/learning_rate": learning_rate, "train/gradient_norm": gradient_norm}
        )

    def epoch(
        self, step: int, wers: Mapping[str, float], utterances_per_second: float, data_wait_fraction: float
    ) -> None:
        """An epoch that was trained, up to this step of the run, and evaluated: WER in percent by subset."""
        speed = {"train/utterances_per_second": utterances_per_second, "train/data_wait_fraction": data_wait_fraction}
        self._write(step, {**speed, **{f"validation/wer/{subset}": wer for subset, wer in wers.items()}})
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        """Write what is still in memory."""
        self._try(lambda writer: writer.close())

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        def write(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self._try(write)

    def _try(self, write: Callable[[SummaryWriter], object]) -> None:
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:  # also of what was written before: another thread does it
            self._writer = None
            print(f"--tensorboard: cannot be written, so no more curves: {error.strerror or error}", file=sys.stderr)
