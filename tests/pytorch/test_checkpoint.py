"""Checkpoints: what is refused, that damage is always found out, and that an earlier run's are kept."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytorch import checkpoint
from pytorch.checkpoint import TrainState
from pytorch.config import CONFIGS
from pytorch.ctc import LABELS
from pytorch.errors import RunError

CONFIG = CONFIGS["synthetic"]


def save(folder: Path) -> Path:
    """A small checkpoint."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    tensors = {"model": model.state_dict(), "optimizers": [optimizer.state_dict()]}
    checkpoint.save(folder, CONFIG, "digest", TrainState(), tensors, launch_id=None)
    return folder / checkpoint.LAST


def test_whatever_bytes_are_damaged_the_file_is_whole_or_refused(tmp_path: Path) -> None:
    path, chance = save(tmp_path), random.Random(0)
    good = path.read_bytes()
    before = checkpoint.load(path)
    for _ in range(300):
        content = bytearray(good)
        start = chance.randrange(len(content))
        if chance.random() < 0.2:
            content = content[:start]
        else:
            content[start : start + chance.choice((1, 8, 64))] = chance.randbytes(1)
        path.write_bytes(content)
        try:
            after = checkpoint.load(path)
        except RunError:
            continue
        assert all(torch.equal(after["model"][name], before["model"][name]) for name in before["model"])


def test_a_file_of_other_labels_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path)
    content: dict[str, Any] = torch.load(path, weights_only=True)
    torch.save({**content, "labels": "_AB"}, path)
    with pytest.raises(RunError, match=f"its labels are '_AB', expected {LABELS!r}"):
        checkpoint.load(path)


def test_another_data_set_is_refused_unless_that_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path)
    content = checkpoint.load(path)
    with pytest.raises(RunError, match="data set digest there, another now"):
        checkpoint.check_resumable(path, content, CONFIG, "another")
    checkpoint.check_resumable(
        path, content, dataclasses.replace(CONFIG, resume=True, resume_with_changes=True), "another"
    )
    assert "resumed with changes: data set digest there, another now" in capsys.readouterr().err


def test_a_checkpoint_of_the_version_before_can_be_used_but_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 3)
    path = save(tmp_path)
    monkeypatch.undo()
    content = checkpoint.load(path)
    with pytest.raises(RunError, match="format 3 can be used, but not resumed"):
        checkpoint.check_resumable(path, content, CONFIG, "digest")


def test_a_start_that_is_interrupted_while_it_moves_files_aside_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST)
    archive, move = tmp_path / checkpoint.PREVIOUS_RUN, checkpoint.atomic_replace
    moved: list[Path] = []

    def interrupted(partial: Path, final: Path) -> None:
        if moved:
            raise KeyboardInterrupt
        moved.append(final)
        move(partial, final)

    archive.mkdir()
    for name in names:
        (archive / name).write_text("the run before")
        (tmp_path / name).write_text("the earlier run")
    monkeypatch.setattr(checkpoint, "atomic_replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.archive_previous_run(tmp_path)
    monkeypatch.setattr(checkpoint, "atomic_replace", move)
    assert checkpoint.archive_previous_run(tmp_path) == archive
    assert {path.name: path.read_text() for path in archive.iterdir()} == dict.fromkeys(names, "the earlier run")
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]
