"""A model in training: its loss on a batch, its optimizer, the average of its weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pytorch.config import Config
from pytorch.ctc import ctc_loss
from pytorch.device import copy_to_cpu_async, explain_oom
from pytorch.distributed import World, all_reduce_sum, average_gradients, note_gradients_are_there
from pytorch.features import SAMPLE_RATE, LogSpectrogram
from pytorch.layers import kernels
from pytorch.loader import Batch
from pytorch.model import DeepSpeech2
from pytorch.optimizer import make_optimizer


@dataclass
class Trainer:
    """What a training step works with. The configuration's precision is fp32 or bf16: select_precision has chosen."""

    config: Config
    device: torch.device
    world: World
    spectrogram: LogSpectrogram
    model: DeepSpeech2
    ddp_model: nn.Module  # the model; with several processes, wrapped to average gradients over them
    ema: AveragedModel | None  # exponential moving average of the model's weights and batch-norm statistics
    optimizer: torch.optim.Optimizer

    @classmethod
    def make(cls, config: Config, device: torch.device, world: World | None = None) -> Trainer:
        """A new model, initialised from torch's global generator; on a CPU its kernel is built."""
        world = world or World()
        model = DeepSpeech2(config.conv_channels, config.hidden_size).to(device)
        if device.type == "cpu":
            kernels.load()
        ddp_model: nn.Module = model
        if world.size > 1:
            with warnings.catch_warnings():  # broadcast_buffers has a newer name that not all versions know
                warnings.simplefilter("ignore", FutureWarning)
                ddp_model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
            if device.type == "cpu":
                # a lambda, since it wants no annotations that are text
                ddp_model.register_comm_hook(None, lambda _, bucket: average_gradients(bucket))
        ema = AveragedModel(model, use_buffers=True) if config.ema_decay > 0 else None
        optimizer = make_optimizer(config, model)
        return cls(config, device, world, LogSpectrogram().to(device), model, ddp_model, ema, optimizer)

    @property
    def eval_model(self) -> nn.Module:
        """Return the model that is evaluated and kept: the EMA if there is one."""
        return self.model if self.ema is None else self.ema.module

    def logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """A model's logits [T, B, V] and output frames [B] of a batch, augmented if the batch says so."""
        waveforms_BS = batch.waveforms_BS.to(self.device, non_blocking=True)
        features = self.spectrogram(waveforms_BS, batch.num_samples_B, batch.augmentation)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return model(*features)

    def loss(self, batch: Batch) -> Tensor:
        """The model's loss on a batch: mean over its utterances."""
        logits_TBV, frames_B = self.logits(self.ddp_model, batch)
        return ctc_loss(logits_TBV, frames_B, batch.targets.to(self.device, non_blocking=True), batch.target_lengths_B)

    def step(
        self, shares: Sequence[Batch], count: int, rate: float, asked: Sequence[bool] = ()
    ) -> Callable[[], Tensor]:
        """One optimizer step, which changes nothing if its loss or gradient is not finite.

        The loss is the mean over the utterances of the global batch, whoever computes them; its gradient, batch norms
        and so the new weights are the same in every process.

        Args:
            shares: this process's part of the global batch, to be computed one after another.
            count: utterances of the global batch.
            rate: learning rate.
            asked: things that this process asks of all of them.

        Returns:
            What waits for the step and gives loss, gradient norm and, for each thing, by how many it was asked.
        """
        self.optimizer.zero_grad(set_to_none=True)
        before = [statistic.clone() for statistic in self._batch_norm_buffers()]
        said = torch.tensor([0.0, *asked], dtype=torch.float64).to(self.device, non_blocking=True)
        for share in shares:
            gradients_are_whole = share is shares[-1] or self.world.size == 1
            with nullcontext() if gradients_are_whole else self.ddp_model.no_sync():  # type: ignore[operator]
                loss = self.loss(share) * (len(share) / count)
                (loss * self.world.size).backward()  # what averages the gradients divides by that
            said[0] += loss.detach()
        if self.world.size > 1 and self.device.type == "cpu":
            note_gradients_are_there()
        all_reduce_sum(said)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip_norm)
        result = torch.cat([said[:1], norm.double().view(1), said[1:]])
        finite = result[:2].isfinite().all()
        for statistic, old in zip(self._batch_norm_buffers(), before, strict=True):
            torch.where(finite, statistic, old, out=statistic)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        if self.ema is not None:
            self._update_ema(self.ema, finite)
        return copy_to_cpu_async(result)

    def _update_ema(self, ema: AveragedModel, finite: Tensor) -> None:
        """Move the average towards the model, if the step was finite: a bool on the device, not to be waited for."""
        steps = int(ema.n_averaged)  # of the run, skipped ones included, as for the learning rate
        decay = min(self.config.ema_decay, (1 + steps) / (10 + steps))  # the first steps are soon forgotten
        move = get_ema_multi_avg_fn(decay)

        def move_if_finite(averages: Sequence[Tensor], values: Sequence[Tensor], count: Tensor | int) -> None:
            # an average that moves towards itself stays where it is, to the bit
            kept = [torch.where(finite, value, old) for value, old in zip(values, averages, strict=True)]
            move(averages, kept, count)

        ema.multi_avg_fn = move_if_finite
        ema.update_parameters(self.model)

    def _batch_norm_buffers(self) -> list[Tensor]:
        """Running means and variances of the batch norms."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]

    def warm_up(self, longest_samples: int) -> None:
        """One whole training step on made-up data as large as the largest batch, then everything as it was.

        Kernels are chosen, processes have met, and memory is known to suffice, before the clock starts.

        Raises:
            RunError: the largest batch does not fit into memory.
        """
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        parts = self.world.size * self.config.gradient_accumulation_steps
        count, samples = -(-self.config.batch_size // parts), int(longest_samples / min(1.0, self.config.tempo_min))
        with explain_oom(
            f"a batch of {count} utterances of {samples / SAMPLE_RATE:.0f} s does not fit into memory; "
            f"use a smaller --batch-size than {self.config.batch_size}, or compute it in "
            f"{2 * self.config.gradient_accumulation_steps} parts: --gradient-accumulation-steps"
        ):
            noise = torch.randint(-1000, 1000, (count, samples), dtype=torch.int16)
            lengths, ones = torch.full((count,), samples), torch.full((count,), 1)
            self.loss(Batch(np.arange(count), noise, lengths, ones, ones, ["'"] * count, None)).backward()
            make_optimizer(self.config, self.model).step()
        self.model.zero_grad(set_to_none=True)
        self.model.load_state_dict(before)
