"""One optimizer step: the model, its loss on a batch, gradients over all ranks, the EMA of the weights."""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pytorch.config import Config
from pytorch.ctc import ctc_loss
from pytorch.device import copy_to_cpu_async
from pytorch.distributed import World, all_reduce_sum
from pytorch.features import LogSpectrogram
from pytorch.loader import Batch
from pytorch.model import DeepSpeech2
from pytorch.optimizer import make_optimizers


class Trainer:
    """A model in training, initialized from torch's global generator. Every rank makes one."""

    def __init__(self, config: Config, device: torch.device, world: World | None = None) -> None:
        self.config, self.device, self.world = config, device, world or World()
        self.spectrogram = LogSpectrogram().to(device)
        self.model = DeepSpeech2(config.conv_channels, config.hidden_size).to(device)
        for layer in self.model.grus:
            layer.kernel = config.gru_kernel  # type: ignore[assignment]
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

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss on a batch: mean over its utterances."""
        logits_TBV, frames_B = self._logits(self.ddp_model, batch)
        return ctc_loss(logits_TBV, frames_B, batch.targets, batch.target_lengths_B)

    def evaluate_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the evaluated model's logits [T, B, V] and output frames [B] (CPU) of a batch."""
        return self._logits(self.eval_model, batch)

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        features = self.spectrogram(batch.waveforms_BS, batch.num_samples_B, batch.augmentation)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return model(*features)

    def train_step(
        self, microbatches: Sequence[Batch], global_batch_size: int, lr: float, flags: Sequence[bool] = ()
    ) -> Callable[[], Tensor]:
        """Take one optimizer step, which changes nothing on any rank if its loss or gradient norm is not finite.

        The loss is the mean over the utterances of the global batch, on whichever rank they are; its gradient, batch
        norms and so the new weights are the same on every rank.

        Args:
            microbatches: this rank's part of the global batch, to be computed one after another.
            global_batch_size: utterances of all ranks' microbatches.
            flags: booleans, summed over ranks together with the loss.

        Returns:
            A function that waits for the step and returns [loss, gradient norm, *flags] in float64 on the CPU.
            A flag is the number of ranks on which it was set. Nothing else here waits for the device, but PyTorch's
            CTC loss.
        """
        self.model.zero_grad(set_to_none=True)
        statistics = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]  # of batch norms
        statistics_before = torch.cat(statistics)  # a forward pass that is not finite leaves NaN in them
        # [loss, *flags], summed over ranks
        reduced = torch.tensor([0.0, *flags], dtype=torch.float64).to(self.device, non_blocking=True)
        for number, microbatch in enumerate(microbatches, start=1):
            # DDP synchronizes gradients in the last backward pass only. A single rank has no DDP, and no `no_sync`.
            sync = number == len(microbatches) or self.world.size == 1
            with nullcontext() if sync else self.ddp_model.no_sync():  # type: ignore[operator]
                loss = self.loss(microbatch) * (len(microbatch) / global_batch_size)
                # DDP divides the sum of gradients by the number of ranks.
                loss.backward(loss.new_full((), self.world.size))
            reduced[0] += loss.detach()
        all_reduce_sum(reduced)
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip_norm)
        result = torch.cat([reduced[:1], grad_norm.to(reduced.dtype).view(1), reduced[1:]])  # [loss, grad_norm, *flags]
        finite = result[:2].isfinite().all()  # stays on the device: `if finite` would wait for it
        restored = torch.where(finite, torch.cat(statistics), statistics_before)
        torch._foreach_copy_(statistics, restored.split([len(buffer) for buffer in statistics]))
        found_inf = (~finite).float()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            # The convention of torch.amp.GradScaler: fused optimizers read this tensor on the device, and leave weights
            # and moments alone unless it is zero. Muon here does, too.
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
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
        averages, values = (
            [value for value in (*model.parameters(), *model.buffers()) if value.is_floating_point()]
            for model in (ema_model, self.model)
        )
        # Even a step that is skipped leaves finite values, so that 0 times the difference moves nothing.
        differences = torch._foreach_sub(values, averages)
        torch._foreach_mul_(differences, finite * (1 - decay))
        torch._foreach_add_(averages, differences)
