"""What is settled before the clock starts: precision, and that all ranks agree."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pytorch import checkpoint
from pytorch.distributed import World
from tests.pytorch.test_train import run_here


def test_a_run_resumed_from_the_last_checkpoint_alone_has_a_best_one_again(tones: Path, tmp_path: Path) -> None:
    """Though its WER stays above the lowest before."""
    run_here(tones, tmp_path / "first", "--max-steps", "6", "--target-wer", "0")
    content = checkpoint.load(tmp_path / "first" / checkpoint.LAST)
    content["progress"]["best_wer"] = 0.5
    (tmp_path / "second").mkdir()
    torch.save(content, tmp_path / "second" / checkpoint.LAST)
    run_here(tones, tmp_path / "second", "--max-steps", "12", "--target-wer", "0", "--resume")
    assert checkpoint.load(tmp_path / "second" / checkpoint.BEST)["progress"]["step"] == 12


def test_ranks_of_different_configurations_refuse_to_train_together(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def all_gather_object(_: World, mine: Any) -> list[Any]:
        return [mine, {**mine, "seed": 9, "resume": True}, {**mine, "data_set": "another"}]

    monkeypatch.setattr(World, "all_gather_object", all_gather_object)
    said = run_here(tones, tmp_path).stderr
    assert "resume True on rank 1, False on rank 0; seed 9 on rank 1, 1 on rank 0; data-set another on rank 2" in said
