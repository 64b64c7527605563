"""Evaluation, shared out over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.packed import open_dataset
from pytorch.distributed import World
from pytorch.errors import RunError
from pytorch.evaluation import evaluate, greedy_decoder
from pytorch.loader import Batch, Utterances
from pytorch.trainer import Trainer
from tests.conftest import write_packed_dataset
from tests.pytorch.test_trainer import small_config


def test_evaluation_is_balanced_over_processes_and_no_batch_is_larger_than_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(write_packed_dataset(tmp_path / "set", {"train": 1, "validation": 31}))
    utterances = Utterances(dataset.split("validation"))
    shares: list[list[int]] = []

    def all_gather_object(_: World, mine: tuple[bool, list[tuple[int, Any]]]) -> list[Any]:
        shares.append([index for index, _ in mine[1]])
        return [mine]

    monkeypatch.setattr(World, "all_gather_object", all_gather_object)
    trainer = Trainer(small_config(), torch.device("cpu"))
    trainer.model.eval()
    capacity = 2 * int(utterances.num_samples.max())

    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.waveforms_BS.numel() <= capacity
        return trainer.evaluate_logits(batch)

    for rank in range(3):
        with pytest.raises(RunError, match="instead of each of the 31 once"):  # what the others found is missing
            evaluate(forward, utterances, World(rank, 3), max_batch_samples=capacity)
    assert sorted(index for share in shares for index in share) == list(range(31))
    samples = [int(utterances.num_samples[share].sum()) for share in shares]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert max(samples) - min(samples) <= utterances.num_samples.max()


def test_an_utterance_whose_logits_a_kernel_gave_up_on_ends_the_evaluation_by_name(tones: Path) -> None:
    utterances = Utterances(open_dataset(tones).split("validation"))

    def forward(batch: Batch) -> tuple[Tensor, Tensor]:
        logits_TBV = torch.zeros(5, len(batch), 29)
        logits_TBV[3:, 0] = float("nan")  # argmax would be blank: an empty transcript
        return logits_TBV, torch.full((len(batch),), 5)

    with pytest.raises(RunError, match="not finite for 1 of 7 utterances"):
        evaluate(forward, utterances, World(), max_batch_samples=10**9)
    assert greedy_decoder(torch.zeros(5, 2, 29), torch.tensor([5, 3]))() == ["", ""]
