import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pytorch.config import CONFIGS
from pytorch.model import DeepSpeech2
from pytorch.optimizer import ITERATIONS, MOMENTUM, UPDATE_RMS, Muon, learning_rate, make_optimizers, newton_schulz

LEARNING_RATE, WEIGHT_DECAY = 1e-2, 0.1


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(weights: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator)


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 5)), torch.zeros(2, 3, 5))


@pytest.mark.parametrize("shape", [(48, 24), (48, 8)])
def test_each_gate_moves_as_under_torch_s_muon(shape: tuple[int, int]) -> None:
    (weight,) = parameters(shape)
    separate = [nn.Parameter(gate.detach().clone()) for gate in weight.chunk(3)]
    muon = Muon([weight], LEARNING_RATE, WEIGHT_DECAY)
    faster = UPDATE_RMS / 0.2  # the latter is what match_rms_adamw stands for
    rates = LEARNING_RATE * faster, WEIGHT_DECAY / faster, MOMENTUM
    theirs = torch.optim.Muon(separate, *rates, ns_steps=ITERATIONS, adjust_lr_fn="match_rms_adamw")
    start = weight.detach().clone()
    for step in range(3):
        set_gradients([weight], step)
        assert weight.grad is not None
        for gate, gradient in zip(separate, weight.grad.chunk(3), strict=True):
            gate.grad = gradient.clone()
        muon.step()
        theirs.step()
    moved, expected = weight.detach() - start, torch.cat([*separate]).detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()  # torch's rounds to bfloat16


def test_muon_has_the_grus_weights_and_adamw_all_other_parameters() -> None:
    model = DeepSpeech2(conv_channels=2, hidden_size=4)
    adamw, muon = make_optimizers(dataclasses.replace(CONFIGS["synthetic"], optimizer="muon"), model)
    sizes = [sum(weight.numel() for weight in each.param_groups[0]["params"]) for each in (adamw, muon)]
    assert sizes[1] == sum(weight.numel() for name, weight in model.grus.named_parameters() if "weight" in name)
    assert sum(sizes) == sum(weight.numel() for weight in model.parameters())


def test_a_step_that_is_left_out_changes_nothing_and_leaves_no_trace() -> None:
    def run(found: list[int]) -> list[Tensor]:
        weights = parameters((12, 4), (6, 2))
        muon = Muon(weights, LEARNING_RATE, WEIGHT_DECAY)
        for number in found:
            set_gradients(weights, 0)
            if number:
                for weight in weights:
                    weight.grad = torch.full_like(weight, float("nan"))
            muon.found_inf = torch.tensor(float(number))  # type: ignore[attr-defined]
            muon.step()
        return [*weights, *(value for state in muon.state.values() for value in state.values())]

    assert all(map(torch.equal, run([0, 0]), run([1, 0, 1, 0])))


def test_the_cosine_schedule_warms_up_falls_and_stays() -> None:
    config = CONFIGS["synthetic"]
    rates = [learning_rate(config, step, 100) for step in range(100 * config.lr_decay_epochs + 500)]
    top = config.learning_rate
    assert rates[0] == pytest.approx(top / config.warmup_steps)
    assert max(rates) <= top
    assert rates[-1] == rates[-400] == pytest.approx(top * config.min_lr_ratio)
    after = rates[config.warmup_steps :]
    assert after == sorted(after, reverse=True)


def test_the_annealing_schedule_divides_once_an_epoch() -> None:
    config = dataclasses.replace(CONFIGS["librispeech"], schedule="anneal", warmup_steps=0, learning_rate=3e-4)
    assert learning_rate(config, 99, 100) == 3e-4
    assert learning_rate(config, 100, 100) == pytest.approx(3e-4 / 1.1)
    assert learning_rate(config, 250, 100) == pytest.approx(3e-4 / 1.1**2)
