import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pytorch.layers.rows import pad_rows, padded_rows
from pytorch.trainer import Trainer
from pytorch.warmup import random_batch
from tests.pytorch.test_trainer import small_config

CPU, PRODUCTS = torch.device("cpu"), ("mm", "bmm", "addmm", "baddbmm_")


class Shapes(TorchDispatchMode):
    """Collects the shapes of products in bfloat16: for each, oneDNN makes a primitive, which it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.split(".")[0] in PRODUCTS and args[-1].dtype == torch.bfloat16:
            self.found.add((function, *(tuple(argument.shape) for argument in args)))
        return function(*args, **(kwargs or {}))


def test_steps_whose_batches_all_differ_soon_bring_no_new_shape_of_a_product() -> None:
    config = dataclasses.replace(small_config(optimizer="adamw", tempo_min=1.0), precision="bf16")
    trainer = Trainer(config, CPU)
    after = []
    with Shapes() as shapes:
        for step in range(24):
            lengths_B = torch.tensor([8000 + 320 * step, 8100 + 160 * ((7 * step) % 24)])
            trainer.train_step([random_batch(config, lengths_B, CPU)], 2, 0.0)()
            after.append(len(shapes.found))
    assert after[0] > 20  # of a step
    assert after[-1] < 5 * after[0]  # 24 times as many if each step had its own


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 100, 1023, 1024, 12345])
def test_rows_are_padded_by_an_eighth_at_most_and_with_zeros(rows: int) -> None:
    x = torch.randn(2, rows, 3)
    padded = pad_rows(x, torch.bfloat16, 1)
    assert rows <= padded.shape[1] <= rows * 9 / 8
    assert padded.shape[1] == padded_rows(rows, CPU, torch.bfloat16)
    assert torch.equal(padded[:, :rows], x.bfloat16())
    assert not padded[:, rows:].any()
    assert padded_rows(rows, CPU, torch.float32) == padded_rows(rows, torch.device("cuda"), torch.bfloat16) == rows
