"""AdamW, SGD, and Muon for the GRUs' weights; the learning-rate schedule.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) moves a matrix along its momentum, with all
singular values made about equal, so that it learns in all directions at the same rate. While CTC has not begun to
align, the gradients of the GRUs have little but the difference between speech and silence in them, and under AdamW the
layers lose whatever else they tell apart; docs/recipes.md says how much that costs.

Every optimizer here changes nothing in a step whose attribute `found_inf` is not zero.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pytorch.config import Config
from pytorch.model import DeepSpeech2

GATES = 3
COEFFICIENTS, MOMENTUM = (3.4445, -4.7750, 2.0315), 0.95  # Jordan's
# Liu et al. (2025, arXiv 2502.16982) have 0.2, about what a weight moves by under AdamW. Jordan has 5 iterations, which
# raise smaller singular values, too, and cost more. docs/recipes.md says what was tried.
UPDATE_RMS, ITERATIONS = 0.6, 3


def make_optimizers(config: Config, model: DeepSpeech2) -> list[torch.optim.Optimizer]:
    """Return the configuration's optimizer, or Muon and AdamW. The learning rate is set before each step."""
    betas = config.beta1, config.beta2
    if config.optimizer == "sgd":
        momentum, decay = config.beta1, config.weight_decay
        sgd = torch.optim.SGD(
            model.parameters(), config.learning_rate, momentum, weight_decay=decay, nesterov=momentum > 0, fused=True
        )
        if momentum > 0:
            # The first step would allocate the momentum without writing to it, and leave it so if it is skipped.
            for parameter in model.parameters():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return [sgd]
    muon_params = [weight for weight in model.grus.parameters() if weight.ndim == 2 and config.optimizer == "muon"]
    adam_params = [weight for weight in model.parameters() if weight not in {*muon_params}]
    adamw = torch.optim.AdamW(adam_params, config.learning_rate, betas, weight_decay=config.weight_decay, fused=True)
    optimizers: list[torch.optim.Optimizer] = [adamw]
    if muon_params:
        compute_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        optimizers.append(Muon(muon_params, config.learning_rate, config.weight_decay, compute_dtype))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Muon for the weights [3H, I] of GRUs, whose three gates [H, I] are matrices of their own.

    torch.optim.Muon does not split gates, does not support found_inf, and always rounds to bfloat16, with which it
    takes 20 times as long on a CPU that does not multiply that natively. Here the Newton-Schulz products are in
    `compute_dtype`, and all that is kept is as precise as the weights.

    A gate of full rank moves by 0.6 of the learning rate in root mean square. Weight decay is decoupled.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.compute_dtype = compute_dtype
        for weight in self.param_groups[0]["params"]:
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step. Weights of one shape are updated together, because their matrices are small."""
        (group,) = self.param_groups
        finite = torch.as_tensor(getattr(self, "found_inf", 0.0)) == 0
        for shape in {weight.shape: None for weight in group["params"]}:
            weights = [weight for weight in group["params"] if weight.shape == shape]
            gradients = torch.stack([weight.grad for weight in weights if weight.grad is not None])
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            before = torch.stack(buffers)
            momentum = before.lerp(gradients, 1 - MOMENTUM)
            nesterov = gradients.lerp_(momentum, MOMENTUM)
            directions = nesterov.unflatten(1, (GATES, -1)).flatten(0, 1)  # each gate is a matrix of its own
            updates = newton_schulz(directions.to(self.compute_dtype)).to(momentum.dtype).reshape(momentum.shape)
            updates *= group["lr"] * UPDATE_RMS * max(directions.shape[1:]) ** 0.5
            decay = torch.where(finite, 1 - group["lr"] * group["weight_decay"], 1.0)
            torch._foreach_copy_(buffers, torch.where(finite, momentum, before).unbind())
            torch._foreach_mul_(weights, decay.to(momentum.dtype))
            torch._foreach_sub_(weights, torch.where(finite, updates, 0).unbind())


def newton_schulz(matrices_NMK: Tensor) -> Tensor:
    """Return each matrix with its singular values near 1 (0.5 to 1.3), but for those below a fortieth of its norm.

    The iteration is like Newton's and Schulz's: a polynomial of degree 5 of the singular values, over and over.
    """
    wide = matrices_NMK if matrices_NMK.shape[1] <= matrices_NMK.shape[2] else matrices_NMK.mT
    x = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        squares = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(squares, squares, squares, beta=b, alpha=c), x, beta=a)
    return x if wide is matrices_NMK else x.mT


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step of the run, which are numbered from 0."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "anneal":
        decay = config.lr_gamma ** -(step // steps_per_epoch)
    else:
        progress = min(1.0, step / (config.lr_decay_epochs * steps_per_epoch))
        decay = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * warmup * decay
