"""Checkpoints: what is refused, that damage is always found out, and that an earlier run's are kept."""

import dataclasses
import errno
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
    checkpoint.save(dataclasses.replace(CONFIG, output_dir=folder), "digest", TrainState(), tensors)
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
    with pytest.raises(RunError, match="data set: checkpoint digest, command line another"):
        checkpoint.check_resumable(path, content, CONFIG, "another")
    checkpoint.check_resumable(
        path, content, dataclasses.replace(CONFIG, resume=True, resume_with_changes=True), "another"
    )
    assert "resumed with changes: data set: checkpoint digest, command line another" in capsys.readouterr().err


def test_a_checkpoint_of_the_version_before_can_be_used_but_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 3)
    path = save(tmp_path)
    monkeypatch.undo()
    content = checkpoint.load(path)
    with pytest.raises(RunError, match=r"format 3 .* not resumed"):
        checkpoint.check_resumable(path, content, CONFIG, "digest")


@pytest.mark.parametrize("moves", [1, 2, 3])
def test_a_start_that_is_killed_while_it_puts_files_away_loses_none(
    moves: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST, "last_run.log"]
    for name in names:
        (tmp_path / name).write_text(name)
    moved: list[Path] = []
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if len(moved) == moves:
            raise KeyboardInterrupt
        moved.append(path)
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", killed)
        checkpoint.put_away(tmp_path, ["last_run.log"])
    assert checkpoint.put_away(tmp_path, ["last_run.log"]) == tmp_path / f"{checkpoint.PREVIOUS_RUN}-2"
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != tmp_path]
    assert sorted(path.read_text() for path in kept) == sorted(names)


def test_files_that_cannot_be_put_away_stay_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [checkpoint.LAST, checkpoint.BEST, "last_run.log"]
    for name in names:
        (tmp_path / name).write_text(name)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path == tmp_path / "last_run.log":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(RunError, match="Permission denied"):
        checkpoint.put_away(tmp_path, ["last_run.log"])
    assert all((tmp_path / name).read_text() == name for name in names)


def test_a_run_that_left_only_its_first_checkpoint_holds_no_training(tmp_path: Path) -> None:
    (tmp_path / checkpoint.LAST).write_text("")
    assert checkpoint.put_away(tmp_path, ["last_run.log"]) is None
