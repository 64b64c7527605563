"""A model in training: its loss on a batch, its optimizer, the average of its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pytorch import gru
from pytorch.batches import Batch
from pytorch.config import Config, RunError
from pytorch.decoder import BLANK
from pytorch.devices import read_later
from pytorch.features import SAMPLE_RATE, LogSpectrogram
from pytorch.model import DeepSpeech2


@dataclass
class Learner:
    """What a training step works with. The configuration's precision is fp32 or bf16: choose_precision has chosen."""

    config: Config
    device: torch.device
    spectrogram: LogSpectrogram
    model: DeepSpeech2
    averaged: AveragedModel | None  # exponential moving average of the model's weights and batch-norm statistics
    optimizer: torch.optim.Optimizer

    @classmethod
    def make(cls, config: Config, device: torch.device) -> Learner:
        """A new model, initialised from torch's global generator; on a CPU its kernel is built."""
        model = DeepSpeech2(config.conv_channels, config.hidden_size).to(device)
        if device.type == "cpu":
            gru.build_kernel()
        averaged = AveragedModel(model, use_buffers=True) if config.averaging_decay > 0 else None
        return cls(config, device, LogSpectrogram().to(device), model, averaged, make_optimizer(config, model))

    @property
    def evaluated(self) -> nn.Module:
        """What is evaluated and kept: the average if there is one."""
        return self.model if self.averaged is None else self.averaged.module

    def logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """A model's logits [T, B, V] and output frames [B] of a batch, augmented if the batch says so."""
        waveforms_BS = batch.waveforms_BS.to(self.device, non_blocking=True)
        features = self.spectrogram(waveforms_BS, batch.samples_B, batch.augmentation)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return model(*features)

    def loss(self, batch: Batch) -> Tensor:
        """The model's loss on a batch."""
        logits_TBV, frames_B = self.logits(self.model, batch)
        return ctc_loss(logits_TBV, frames_B, batch.targets.to(self.device, non_blocking=True), batch.target_lengths_B)

    def step(self, batch: Batch, rate: float) -> Callable[[], Tensor]:
        """One optimizer step, which changes nothing if its loss or gradient is not finite.

        Args:
            batch: of training utterances.
            rate: learning rate.

        Returns:
            What waits for the step and gives loss and gradient norm [2].
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip_norm)
        result = torch.stack([loss.detach(), norm])
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.found_inf = (~result.isfinite().all()).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.averaged is not None:
            steps = int(self.averaged.n_averaged)
            decay = min(self.config.averaging_decay, (1 + steps) / (10 + steps))  # the first steps are soon forgotten
            self.averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
            self.averaged.update_parameters(self.model)
        return read_later(result)

    def warm_up(self, longest_samples: int) -> None:
        """One whole training step on made-up data as large as the largest batch, then everything as it was.

        Kernels are chosen, and memory is known to suffice, before the clock starts.

        Raises:
            RunError: the largest batch does not fit into memory.
        """
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        count, samples = self.config.batch_size, int(longest_samples / min(1.0, self.config.tempo_min))
        noise = torch.randint(-1000, 1000, (count, samples), dtype=torch.int16)
        lengths, ones = torch.full((count,), samples), torch.full((count,), 1)
        try:
            self.loss(Batch(np.arange(count), noise, lengths, ones, ones, ["'"] * count, None)).backward()
            make_optimizer(self.config, self.model).step()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise RunError(
                f"a batch of {count} utterances of {samples / SAMPLE_RATE:.0f} s does not fit into memory; "
                f"use a smaller --batch-size than {count}"
            ) from error
        self.model.zero_grad(set_to_none=True)
        self.model.load_state_dict(before)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The configuration's optimizer; its learning rate is set before each step.

    The fused implementations leave everything as it is in a step whose `found_inf` is not zero.
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            config.learning_rate,
            momentum=config.beta1,
            nesterov=config.beta1 > 0,
            weight_decay=config.weight_decay,
            fused=True,
        )
    betas = config.beta1, config.beta2
    return torch.optim.AdamW(
        model.parameters(), config.learning_rate, betas, weight_decay=config.weight_decay, fused=True
    )


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step.

    Args:
        config: schedule and its values.
        step: of the run, from 0.
        steps_per_epoch: in the whole epoch.
    """
    rise = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "anneal":
        fall = config.learning_rate_anneal ** -(step // steps_per_epoch)
    else:
        way = min(1.0, step / (config.schedule_epochs * steps_per_epoch))
        end = config.final_learning_rate_fraction
        fall = end + (1 - end) * 0.5 * (1 + math.cos(math.pi * way))
    return config.learning_rate * rise * fall


def ctc_loss(logits_TBV: Tensor, frames_B: Tensor, targets: Tensor, target_lengths_B: Tensor) -> Tensor:
    """CTC loss in float32: mean over utterances of the negative log-likelihood (nats) of each transcript."""
    log_probabilities = logits_TBV.float().log_softmax(2)
    total = nn.functional.ctc_loss(log_probabilities, targets, frames_B, target_lengths_B, blank=BLANK, reduction="sum")
    return total / len(frames_B)
