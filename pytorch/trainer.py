"""One optimizer step: the model, its loss on a batch, gradients over all ranks, the EMA of the weights."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytorch import memory
from pytorch.config import Config, Precision
from pytorch.ctc import LABELS, ctc_loss
from pytorch.device import copy_from_cpu_ahead, copy_to_cpu_async, explain_oom, widest_float
from pytorch.distributed import World, all_reduce_sum
from pytorch.features import SAMPLE_RATE, LogSpectrogram, draw_augmentation
from pytorch.layers import kernels
from pytorch.loader import Batch
from pytorch.model import DeepSpeech2
from pytorch.optimizer import make_optimizers

LABELS_PER_SECOND = 15  # of random transcripts, as in read English


class Trainer:
    """A model in training, initialized from torch's global generator.

    Args:
        config: its precision is fp32 or bf16; `auto` computes in fp32 until `use_precision`.
        device: where to compute.
        world: the ranks; every one of them makes a Trainer.
    """

    def __init__(self, config: Config, device: torch.device, world: World | None = None) -> None:
        self.config, self.device, self.world = config, device, world or World()
        self.spectrogram = LogSpectrogram().to(device)
        self.model = DeepSpeech2(config.conv_channels, config.hidden_size).to(device)
        if device.type == "cpu":
            kernels.load()  # compiles them, the first time
        self.ddp_model: nn.Module = self.model
        if self.world.size > 1:
            with warnings.catch_warnings():  # newer versions call it forward_sync_buffers
                warnings.simplefilter("ignore", FutureWarning)
                # Batch norms see the rows of all ranks, so their statistics are equal without a broadcast.
                self.ddp_model = DistributedDataParallel(
                    self.model, broadcast_buffers=False, gradient_as_bucket_view=True
                )
        self.ema_model = copy.deepcopy(self.model) if config.ema_decay > 0 else None
        self.ema_steps = 0  # of the run, skipped ones included
        self.optimizers = make_optimizers(config, self.model)

    @property
    def eval_model(self) -> nn.Module:
        """The model that is evaluated and kept: the EMA if there is one."""
        return self.model if self.ema_model is None else self.ema_model

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: "model" is the one that is evaluated, "trained_model" the one in training."""
        return {
            "model": self.eval_model.state_dict(),
            "trained_model": self.model.state_dict(),  # torch.save stores shared tensors once
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any], steps: int) -> None:
        """Restore `state_dict()` after `steps` steps: weights and moments, but not the hyperparameters."""
        self.model.load_state_dict(state["trained_model"])
        if self.ema_model is not None:
            self.ema_model.load_state_dict(state["model"])
        self.ema_steps = steps
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict({**saved, "param_groups": optimizer.state_dict()["param_groups"]})

    def logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return a model's logits [T, B, V] and output frames [B] (CPU) of a batch, augmented if the batch says so."""
        features = self.spectrogram(batch.waveforms_BS, batch.num_samples_B, batch.augmentation)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return model(*features)

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss on a batch: mean over its utterances."""
        logits_TBV, frames_B = self.logits(self.ddp_model, batch)
        return ctc_loss(logits_TBV, frames_B, batch.targets, batch.target_lengths_B)

    def train_step(
        self, microbatches: Sequence[Batch], global_batch_size: int, lr: float, flags: Sequence[bool] = ()
    ) -> Callable[[], Tensor]:
        """Take one optimizer step, which changes nothing on any rank if its loss or gradient norm is not finite.

        The loss is the mean over the utterances of the global batch, on whichever rank they are; its gradient, batch
        norms and so the new weights are the same on every rank.

        Args:
            microbatches: this rank's part of the global batch, to be computed one after another.
            global_batch_size: utterances of all ranks' microbatches.
            lr: learning rate.
            flags: booleans, summed over ranks together with the loss.

        Returns:
            A function that waits for the step and returns [loss, gradient norm, *flags] in `widest_float` on the CPU.
            A flag is the number of ranks on which it was set. Nothing else here waits for the device, but PyTorch's
            CTC loss.
        """
        self.model.zero_grad(set_to_none=True)
        buffers_before = [buffer.clone() for buffer in self._batch_norm_buffers()]
        # [loss, *flags], summed over ranks
        reduced = torch.tensor([0.0, *flags], dtype=widest_float(self.device)).to(self.device, non_blocking=True)
        for number, microbatch in enumerate(microbatches, start=1):
            # DDP synchronizes gradients in the last backward pass only. A single rank has no DDP, and no `no_sync`.
            sync = number == len(microbatches) or self.world.size == 1
            with nullcontext() if sync else self.ddp_model.no_sync():  # type: ignore[operator]
                loss = self.loss(microbatch) * (len(microbatch) / global_batch_size)
                (loss * self.world.size).backward()  # DDP divides the sum of gradients by the number of ranks
            reduced[0] += loss.detach()
        all_reduce_sum(reduced)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip_norm)
        result = torch.cat([reduced[:1], grad_norm.to(reduced.dtype).view(1), reduced[1:]])  # [loss, grad_norm, *flags]
        finite = result[:2].isfinite().all()  # stays on the device: `if finite` would wait for it
        for buffer, before in zip(self._batch_norm_buffers(), buffers_before, strict=True):
            torch.where(finite, buffer, before, out=buffer)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            # The convention of torch.amp.GradScaler: fused optimizers read this tensor on the device, and leave weights
            # and moments alone unless it is zero. Muon here does, too.
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        if self.ema_model is not None:
            self._update_ema(self.ema_model, finite)
        return copy_to_cpu_async(result)

    @torch.no_grad()
    def _update_ema(self, ema_model: nn.Module, finite: Tensor) -> None:
        """Move the EMA, of running statistics too, toward the model if the step was finite (a bool on the device).

        torch.optim.swa_utils.AveragedModel would wait for the device at each step.
        """
        # Ramps up, so that the first steps are soon forgotten (as TensorFlow's ExponentialMovingAverage does).
        decay = min(self.config.ema_decay, (1 + self.ema_steps) / (10 + self.ema_steps)) if self.ema_steps else 0.0
        self.ema_steps += 1
        averages = [value for value in ema_model.state_dict().values() if value.is_floating_point()]
        values = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        # An average that moves toward itself stays exactly where it is.
        targets = [torch.where(finite, value, average) for value, average in zip(values, averages, strict=True)]
        torch._foreach_lerp_(averages, targets, 1 - decay)

    def _batch_norm_buffers(self) -> list[Tensor]:
        """Return the running means and variances."""
        return [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]

    def use_precision(self, precision: Precision) -> None:
        """Compute in fp32 or bf16 from now on; the optimizers are reset."""
        self.config = replace(self.config, precision=precision)
        self.optimizers = make_optimizers(self.config, self.model)

    def time_precisions(self) -> dict[Precision, float]:
        """Return the seconds that loss and gradient of a small batch take in either precision, measured in turn.

        A CPU that has bfloat16 arithmetic is not always faster with it. All ranks must do this at the same time.
        """
        count = min(6, self.config.max_microbatch_size(self.world.size))
        batch = random_batch(self.config, torch.full((count,), 3 * SAMPLE_RATE), self.device)
        seconds: dict[Precision, float] = {"fp32": math.inf, "bf16": math.inf}
        with self._model_restored():
            begun, rounds = time.monotonic(), 0
            # The first round selects kernels, and others may be disturbed, so the least of some rounds counts.
            while self.world.broadcast_object(rounds < 3 or time.monotonic() - begun < 2, source=0):
                rounds += 1
                for precision in seconds:
                    self.config = replace(self.config, precision=precision)
                    started = time.perf_counter()
                    self.loss(batch).backward()
                    seconds[precision] = min(seconds[precision], time.perf_counter() - started)
        return seconds

    def warm_up(self, max_samples: int) -> None:
        """Train and evaluate a random batch as large as the largest one, then restore everything.

        Selects kernels, opens connections and proves that the largest batch fits, before the clock starts.

        Args:
            max_samples: of the longest training utterance.

        Raises:
            RunError: the largest batch does not fit into memory.
        """
        count = self.config.max_microbatch_size(self.world.size)
        num_samples = int(max_samples / min(1.0, self.config.tempo_min))
        advice = (
            f"a batch of {count} utterances of {num_samples / SAMPLE_RATE:.0f} s does not fit into memory; "
            f"use a smaller --batch-size than {self.config.batch_size}, or compute it in "
            f"{2 * self.config.gradient_accumulation_steps} parts: --gradient-accumulation-steps"
        )

        def step(samples: int) -> Batch:
            """Train on a batch of so many samples in all: its utterances are shorter, or if need be fewer."""
            length = min(num_samples, max(samples // count, SAMPLE_RATE // 10))
            lengths_B = torch.full((min(count, max(1, samples // length)),), length)
            batch = random_batch(self.config, lengths_B, self.device)
            parts = [batch] * self.config.gradient_accumulation_steps
            self.train_step(parts, self.config.batch_size, self.config.learning_rate)()
            return batch

        with self._model_restored(), explain_oom(advice):
            all_samples = count * num_samples
            memory.require(step, all_samples, 60 * SAMPLE_RATE, self.world, self.device, advice)
            for _ in range(min(2, self.world.size)):  # before the second step DDP rebuilds its buckets
                batch = step(all_samples)
            self.eval_model.eval()
            with torch.no_grad():
                copy_to_cpu_async(self.logits(self.eval_model, replace(batch, augmentation=None))[0].argmax(2))()

    @contextmanager
    def _model_restored(self) -> Iterator[None]:
        """Leave everything as it was before the first step."""
        config, before = self.config, {name: value.clone() for name, value in self.model.state_dict().items()}
        yield
        self.config = config
        self.model.zero_grad(set_to_none=True)
        for model in (self.model, self.eval_model):
            model.load_state_dict(before)
        self.ema_steps = 0
        self.optimizers = make_optimizers(self.config, self.model)


def random_batch(config: Config, num_samples_B: Tensor, device: torch.device) -> Batch:
    """Return noise of these lengths, augmented as the configuration says but for tempo, with random transcripts."""
    generator = np.random.default_rng(0)
    count, longest = len(num_samples_B), int(num_samples_B.max())
    waveforms_BS = torch.randint(-1000, 1000, (count, longest), dtype=torch.int16)  # first: the largest may not fit
    waveforms_BS[torch.arange(longest) >= num_samples_B[:, None]] = 0
    lengths_B = (num_samples_B * LABELS_PER_SECOND // SAMPLE_RATE).clamp(min=1)
    targets = torch.from_numpy(generator.integers(1, len(LABELS), int(lengths_B.sum())))
    own_tempo = replace(config, tempo_min=1.0, tempo_max=1.0)
    augmentation = draw_augmentation(own_tempo, np.arange(count)[:, None], np.full(count, math.inf))
    return Batch(
        indices=np.arange(count),
        waveforms_BS=copy_from_cpu_ahead(waveforms_BS, device),
        num_samples_B=num_samples_B,
        targets=copy_from_cpu_ahead(targets, device),
        target_lengths_B=lengths_B,
        transcripts=[""] * count,
        augmentation=augmentation,
    )
