"""Before the clock: one step and one evaluation of the largest batch, on random data.

The model, its averages and its optimizers are afterwards as they were.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pytorch import memory
from pytorch.config import Config
from pytorch.ctc import LABELS
from pytorch.device import copy_to_cpu_async, explain_oom
from pytorch.features import SAMPLE_RATE, draw_augmentation
from pytorch.loader import Batch
from pytorch.optimizer import make_optimizers
from pytorch.trainer import Trainer

LABELS_PER_SECOND = 15  # of random transcripts, as in read English


def warm_up(trainer: Trainer, max_samples: int) -> None:
    """Train and evaluate a random batch as large as the largest one, then restore everything.

    Selects kernels, opens connections and proves that the largest batch fits, before the clock starts.

    Args:
        trainer: before its first step.
        max_samples: of the longest training utterance.

    Raises:
        RunError: the largest batch does not fit into memory.
    """
    config, world, device = trainer.config, trainer.world, trainer.device
    count = config.max_microbatch_size(world.size)
    num_samples = int(max_samples / min(1.0, config.tempo_min))
    free = f" ({memory.available() / 2**30:.1f} GiB are free)" if device.type == "cpu" else ""
    advice = (
        f"a batch of {count} utterances of {num_samples / SAMPLE_RATE:.0f} s does not fit into memory{free}; use "
        f"--gradient-accumulation-steps {2 * config.gradient_accumulation_steps}, or a smaller --batch-size"
    )

    def step(count: int, num_samples: int) -> Batch:
        batch = random_batch(config, torch.full((count,), num_samples), device)
        microbatches = [batch] * config.gradient_accumulation_steps
        trainer.train_step(microbatches, config.batch_size, config.learning_rate)()
        return batch

    with _restored(trainer), explain_oom(advice):
        if device.type == "cpu" or world.size > 1:
            # Starts threads, which nothing may keep from starting. DDP rebuilds its buckets before the second step.
            step(1, SAMPLE_RATE)
        with memory.limited(world) if device.type == "cpu" else nullcontext():
            batch = step(count, num_samples)
            trainer.eval_model.eval()
            with torch.no_grad():
                copy_to_cpu_async(trainer.evaluate_logits(replace(batch, augmentation=None))[0].argmax(2))()


@contextmanager
def _restored(trainer: Trainer) -> Iterator[None]:
    """Leave a trainer as it was before its first step."""
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    yield
    trainer.model.zero_grad(set_to_none=True)
    for model in (trainer.model, trainer.eval_model):
        model.load_state_dict(before)
    trainer.ema_steps = 0
    trainer.optimizers = make_optimizers(trainer.config, trainer.model)


def random_batch(config: Config, num_samples_B: Tensor, device: torch.device) -> Batch:
    """Return noise of these lengths, augmented as the configuration says but for tempo, with random transcripts."""
    generator = np.random.default_rng(0)
    count, longest = len(num_samples_B), int(num_samples_B.max())
    waveforms_BS = torch.randint(-1000, 1000, (count, longest), dtype=torch.int16)  # first: the largest may not fit
    waveforms_BS[torch.arange(longest) >= num_samples_B[:, None]] = 0
    lengths_B = (num_samples_B * LABELS_PER_SECOND // SAMPLE_RATE).clamp(min=1)
    targets = torch.from_numpy(generator.integers(1, len(LABELS), int(lengths_B.sum())))
    own_tempo = replace(config, tempo_min=1.0, tempo_max=1.0)
    augmentation = draw_augmentation(own_tempo, [[number] for number in range(count)], np.full(count, math.inf))
    return Batch(
        indices=np.arange(count),
        waveforms_BS=waveforms_BS,
        num_samples_B=num_samples_B,
        targets=targets,
        target_lengths_B=lengths_B,
        augmentation=augmentation,
    ).to(device)
