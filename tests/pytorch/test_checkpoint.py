"""Checkpoints: what is refused, and that damage is always found out."""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from pytorch import checkpoint
from pytorch.checkpoint import TrainState
from pytorch.config import CONFIGS
from pytorch.errors import RunError
from tests.conftest import write_packed_dataset
from tests.pytorch.test_train import run_here, values


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # a damaged one
def test_whatever_bytes_are_damaged_the_file_is_whole_or_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIGS["synthetic"], output_dir=tmp_path)
    checkpoint.save(config, "digest", TrainState(), {"model": nn.Linear(2, 2).state_dict()})
    path, chance = tmp_path / checkpoint.LAST, random.Random(0)
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


def test_another_configuration_or_data_set_is_refused_unless_that_is_wanted(tones: Path, tmp_path: Path) -> None:
    run_here(tones, tmp_path, "--max-steps", "1", "--target-wer", "0")
    other = write_packed_dataset(tmp_path / "other", {"train": 5, "validation": 2}, seed=9)
    options = ["--max-steps", "2", "--target-wer", "0", "--learning-rate", "0.5", "--resume"]
    for accepted in ([], ["--resume-with-changes"]):
        run = run_here(other, tmp_path, *options, *accepted)
        assert "learning-rate: checkpoint 0.0015, command line 0.5; data-set: checkpoint " in run.stderr
        assert len(values(run.stdout, "train_loss")) == len(accepted)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_hyperparameters_of_the_optimizer_may_change_on_resuming_but_not_its_kind_nor_the_models_size(
    optimizer: str, tones: Path, tmp_path: Path
) -> None:
    first = ["--target-wer", "0", "--optimizer", optimizer]
    options = [*first, "--resume", "--resume-with-changes", "--max-steps", "2"]
    run_here(tones, tmp_path, *first, "--max-steps", "1")
    for option, value in (("--hidden-size", "12"), ("--conv-channels", "3"), ("--optimizer", "sgd")):
        said = run_here(tones, tmp_path, *options, option, value).stderr
        assert f"{option.removeprefix('--')}: checkpoint " in said and "would not fit" in said
    run_here(tones, tmp_path, *options, "--weight-decay", "0.5", "--beta1", "0.7")
    saved = checkpoint.load(tmp_path / checkpoint.LAST)["optimizers"]
    groups = [group for each in saved for group in each["param_groups"]]
    assert {group["weight_decay"] for group in groups} == {0.5}
    assert tuple(groups[0]["betas"]) == (0.7, 0.98)


def test_a_checkpoint_that_is_missing_or_damaged_or_of_the_version_before_cannot_be_resumed(
    tones: Path, tmp_path: Path
) -> None:
    assert "checkpoint_last.pt: checkpoint not found" in run_here(tones, tmp_path, "--resume").stderr
    (tmp_path / checkpoint.LAST).write_bytes(b"no checkpoint")
    assert "checkpoint_last.pt: not a checkpoint" in run_here(tones, tmp_path, "--resume").stderr
    torch.save({"format_version": 3, "progress": {"step": 1}}, tmp_path / checkpoint.LAST)
    said = run_here(tones, tmp_path, "--resume").stderr
    assert "error: a checkpoint of format 3 can be evaluated, but not resumed" in said
