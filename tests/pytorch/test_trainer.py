"""One optimizer step, alone."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pytorch import trainer
from pytorch.config import CONFIGS, Config
from pytorch.loader import CPU
from pytorch.trainer import Trainer
from pytorch.warmup import random_batch


def small_config(**changes: Any) -> Config:
    return dataclasses.replace(CONFIGS["synthetic"], hidden_size=8, conv_channels=2, precision="fp32", **changes)


@pytest.fixture
def infinite(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Says of each loss to come, the last first, whether it is to be infinite."""
    left: list[bool] = []
    proper: Callable[..., Tensor] = trainer.ctc_loss
    monkeypatch.setattr(trainer, "ctc_loss", lambda *given: proper(*given) * (math.inf if left.pop() else 1))
    return left


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_moves_neither_weights_nor_their_average(infinite: list[bool], optimizer: Any) -> None:
    config = small_config(ema_decay=0.9, optimizer=optimizer)
    taught, batch = Trainer(config, CPU), random_batch(config, torch.tensor([4800, 8000]), CPU)
    assert taught.ema_model is not None
    infinite[:] = [True, False, False]
    for _ in range(2):
        taught.train_step([batch], 2, 1e-3)
    before = [weight.clone() for weight in (*taught.model.parameters(), *taught.ema_model.parameters())]
    assert not torch.equal(before[0], next(taught.ema_model.parameters()))
    result = taught.train_step([batch], 2, 1e-3)()
    assert not result[0].isfinite()
    after = [*taught.model.parameters(), *taught.ema_model.parameters()]
    assert all(map(torch.equal, before, after))


def test_sgd_starts_with_no_momentum_after_a_first_step_that_is_skipped(infinite: list[bool]) -> None:
    config = small_config(optimizer="sgd")
    batch, weights = random_batch(config, torch.tensor([4800, 8000]), CPU), []
    for losses in ([False], [False, True]):
        torch.manual_seed(0)
        taught = Trainer(config, CPU)
        infinite[:] = losses
        used = [torch.full_like(weight, 7.0) for weight in taught.model.parameters()]
        del used  # what is not initialized is likely to be this
        while infinite:
            taught.train_step([batch], 2, 1e-3)
        weights.append(list(taught.model.parameters()))
    assert all(map(torch.equal, *weights))


def test_a_run_resumed_without_its_ema_keeps_the_weights_in_training() -> None:
    config = small_config(ema_decay=0.9)
    before, batch = Trainer(config, CPU), random_batch(config, torch.tensor([4800, 8000]), CPU)
    for _ in range(2):
        before.train_step([batch], 2, 1e-3)
    state = before.state_dict()
    after = Trainer(small_config(ema_decay=0.0), CPU)
    after.load_state_dict(state, 2)
    name = next(iter(state["model"]))
    assert not torch.equal(state["model"][name], state["trained_model"][name])
    assert all(torch.equal(value, state["trained_model"][name]) for name, value in after.model.state_dict().items())
