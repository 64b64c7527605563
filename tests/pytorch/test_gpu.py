"""A GPU against the CPU: layers, spectrogram, loss, gradients, runs. `-m gpu` runs these tests alone."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from data.packed import open_dataset
from pytorch.config import CONFIGS
from pytorch.device import has_bf16
from pytorch.distributed import World
from pytorch.features import LogSpectrogram, draw_augmentation
from pytorch.layers import gru
from pytorch.layers.batch_norm import BatchNorm
from pytorch.layers.convolution import Convolution
from pytorch.layers.gru import GRU
from pytorch.loader import TrainingLoader, Utterances
from pytorch.trainer import Trainer
from tests.pytorch.test_distributed import run_in
from tests.pytorch.test_train import values
from tests.pytorch.test_trainer import small_config

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no CUDA device")]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "first convolution": (lambda: Convolution(1, 32, (41, 11), (2, 2)), (3, 75, 161, 1)),
    "second convolution": (lambda: Convolution(32, 32, (21, 11), (2, 1)), (3, 38, 81, 32)),
    "batch norm": (lambda: BatchNorm(32, (0.0, 20.0)), (5000, 32)),
    "GRU": (lambda: GRU(64, 96), (60, 64)),
}
BATCH_SIZES = torch.tensor([5] * 7 + [4] * 2 + [3] * 3 + [1] * 8)  # of 60 packed rows


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # products have none unless a run allows it


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest) -> Any:
    if request.param == "bf16" and not has_bf16(GPU):
        pytest.skip("this GPU has no bf16 arithmetic")
    return request.param


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    return float((actual - expected).norm() / expected.norm())


def run(layer: nn.Module, x: Tensor, batch_sizes: Tensor = BATCH_SIZES) -> list[Tensor]:
    """Outputs, and the gradients of the input and of the parameters."""
    x = x.detach().requires_grad_()
    output = layer(PackedSequence(x, batch_sizes)).data if isinstance(layer, GRU) else layer(x)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    wanted = [x, *layer.parameters()] if x.shape[-1] > 1 else list(layer.parameters())  # features have no gradient
    return [output, *torch.autograd.grad(output, wanted, upstream)]


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_and_its_gradients_are_those_of_a_cpu_in_float64(name: str, precision: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    expected = run(copy.deepcopy(layer).double(), x.double())
    with torch.autocast(GPU.type, torch.bfloat16, enabled=precision == "bf16"):
        actual = run(layer.to(GPU), x.to(GPU))
    errors = list(map(relative_error, actual, expected))
    assert max(errors) < (1e-4 if precision == "fp32" else 3e-2), errors


@pytest.mark.parametrize(("hidden", "batch", "time"), [(256, 16, 150), (800, 150, 40)])
def test_the_triton_kernel_is_as_exact_as_rounding_allows_and_repeats_to_the_bit(
    hidden: int, batch: int, time: int
) -> None:
    if not gru.has_triton_kernel(GPU, hidden, "triton"):
        pytest.skip("this GPU runs cuDNN's layers")
    torch.manual_seed(0)
    layer, lengths_B = GRU(64, hidden), torch.linspace(time, 1, batch).long()
    layer.kernel = "triton"
    batch_sizes, x_NI = (torch.arange(time)[:, None] < lengths_B).sum(1), torch.randn(int(lengths_B.sum()), 64)
    expected = run(copy.deepcopy(layer).double(), x_NI.double(), batch_sizes)
    with torch.autocast(GPU.type, torch.bfloat16):
        first, again = (run(layer.to(GPU), x_NI.to(GPU), batch_sizes) for _ in range(2))
    assert max(map(relative_error, first, expected)) < 1e-2
    assert all(map(torch.equal, first, again))


def test_the_augmented_spectrogram_is_that_of_a_cpu() -> None:
    num_samples_B = torch.tensor([40_000, 31_999, 16_000, 5_000])
    waveforms_BS = torch.randint(-9999, 9999, (4, 40_000), generator=torch.Generator().manual_seed(0)).short()
    waveforms_BS[torch.arange(40_000) >= num_samples_B[:, None]] = 0
    augmentation = draw_augmentation(CONFIGS["librispeech"], [[row] for row in range(4)], np.full(4, np.inf))
    expected_BFT, frames_B = LogSpectrogram()(waveforms_BS, num_samples_B, augmentation)
    actual_BFT, actual_B = LogSpectrogram().to(GPU)(waveforms_BS.to(GPU), num_samples_B, augmentation)
    assert torch.equal(actual_B, frames_B)
    longest = expected_BFT.shape[2]
    torch.testing.assert_close(actual_BFT[..., :longest].cpu(), expected_BFT, rtol=1e-3, atol=1e-3)
    assert not actual_BFT[..., longest:].any()


def made(dataset: Path, device: torch.device, precision: Any) -> tuple[Trainer, list[Any]]:
    """A small model from a fixed seed, and the first batches of the second epoch, augmented."""
    config = small_config(batch_size=7, augment_from_epoch=1)
    torch.manual_seed(0)
    trainer = Trainer(dataclasses.replace(config, precision=precision), device)
    utterances = Utterances(open_dataset(dataset).split("train"))
    loader = TrainingLoader(utterances, config, World(), device)
    return trainer, [microbatches for _, microbatches in loader.epoch(2, 0, 3)]


def test_loss_and_gradients_of_a_batch_are_those_of_a_cpu(tones: Path, precision: Any) -> None:
    found = []
    for device, computed in ((CPU, "fp32"), (GPU, precision)):
        trainer, ((batch,), *_) = made(tones, device, computed)
        loss = trainer.loss(batch)
        loss.backward()
        gradients = [weight.grad.flatten().cpu() for weight in trainer.model.parameters() if weight.grad is not None]
        found.append((loss.detach(), torch.cat(gradients)))
    errors = [relative_error(actual, expected) for expected, actual in zip(*found, strict=True)]
    assert max(errors) < (1e-3 if precision == "fp32" else 0.15), errors


def test_a_seed_gives_the_same_weights_and_features_and_losses_but_for_rounding(tones: Path, precision: Any) -> None:
    found = []
    for _ in range(2):
        trainer, steps = made(tones, GPU, precision)
        weights = [weight.detach().clone() for weight in trainer.model.parameters()]
        batch = steps[0][0]
        features_BFT, _ = trainer.spectrogram(batch.waveforms_BS.to(GPU), batch.num_samples_B, batch.augmentation)
        losses = torch.stack([trainer.train_step(step, 7, 1e-3)()[0] for step in steps])
        found.append(([*weights, features_BFT], losses))
    (same, losses), (same_again, losses_again) = found
    assert all(map(torch.equal, same, same_again))
    torch.testing.assert_close(losses, losses_again, rtol=1e-3, atol=0)


@pytest.mark.skipif(GPUS < 2, reason="fewer than two CUDA devices")
def test_two_gpus_have_the_losses_of_one(tones: Path, tmp_path: Path) -> None:
    options = ["--device", "cuda", "--batch-size", "7", "--max-steps", 20, "--target-wer", "0"]
    alone, together = (run_in(count, tones, tmp_path / str(count), *options) for count in (1, 2))
    assert values(together.stdout, "number_of_ranks") == [2], together.stderr
    losses = values(alone.stdout, "train_loss")
    assert len(losses) == 20, alone.stderr
    assert values(together.stdout, "train_loss") == pytest.approx(losses, rel=1e-2)
