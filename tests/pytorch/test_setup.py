"""What is settled before the clock starts: precision, and that all ranks agree."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pytorch import checkpoint, setup
from pytorch.distributed import World
from pytorch.layers import kernels
from tests.pytorch.test_train import metadata, run_here, values


def test_auto_is_the_precision_that_was_measured_to_be_faster_and_stays_so_when_resumed(
    tones: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def precision(*options: str) -> tuple[list[str], list[str]]:
        log = run_here(tones, tmp_path, "--precision", "auto", "--target-wer", "0", *options).stdout
        return metadata(log, "configuration", "precision"), values(log, "auto_precision")

    monkeypatch.setattr(kernels, "has_native_bf16", lambda: True)
    monkeypatch.setattr(setup, "faster_precision", lambda _: ("bf16", {"fp32": 2.0, "bf16": 1.0}))
    assert precision("--max-steps", "1") == (["bf16"], ["bf16"])
    monkeypatch.setattr(setup, "faster_precision", lambda _: ("fp32", {"fp32": 1.0, "bf16": 2.0}))
    assert precision("--max-steps", "2", "--resume") == (["bf16"], [])
    assert precision("--max-steps", "1", "--precision", "fp32") == (["fp32"], [])


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
