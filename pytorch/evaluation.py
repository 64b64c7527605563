"""Evaluation of a run: greedy decoding of every validation utterance, counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from mlperf_logging import mllog
from mlperf_logging.mllog import constants
from torch import Tensor

from pytorch.cli import RunError, progress_bar
from pytorch.ctc import collapse
from pytorch.device import copy_to_cpu_async
from pytorch.loader import Batch, Utterances, batch_by_padded_size, make_batch, prefetch, split_balanced
from pytorch.metrics import ErrorCounts, count_errors
from pytorch.trainer import Trainer


class Recognised(NamedTuple):
    """A validation utterance, as it was understood."""

    id: str
    subset: str
    reference: str
    hypothesis: str
    errors: ErrorCounts


@dataclass(frozen=True)
class Evaluation:
    """Every validation utterance, in order of length."""

    recognised: list[Recognised]

    @property
    def total(self) -> ErrorCounts:
        """Errors of all utterances."""
        return sum((each.errors for each in self.recognised), ErrorCounts())

    def by_subset(self) -> dict[str, ErrorCounts]:
        """Errors by subset."""
        errors: dict[str, ErrorCounts] = {}
        for each in self.recognised:
            errors[each.subset] = errors.get(each.subset, ErrorCounts()) + each.errors
        return errors

    def log_errors(self, log: mllog.mllog.MLLogger, epoch: int) -> None:
        """Log the corpus WER, and all rates of each subset."""
        total = self.total
        detail: dict[str, Any] = {constants.EPOCH_NUM: epoch, "utterances": total.utterances, "words": total.words}
        log.event(constants.EVAL_ACCURACY, total.wer, metadata=detail)
        for name, counts in [("all", total), *self.by_subset().items()]:
            rates = {"wer": counts.wer, "cer": counts.cer, "mean_utterance_wer": counts.mean_utterance_wer}
            metadata = {constants.EPOCH_NUM: epoch, **rates, **dataclasses.asdict(counts)}
            log.event("validation_errors", name, metadata=metadata)

    def log_transcripts(self, log: mllog.mllog.MLLogger) -> None:
        """Log the three worst utterances, four in the middle and the three best by WER: what the figure looks like."""
        ranked = sorted(self.recognised, key=lambda each: (-each.errors.wer, each.id))
        last, middle = len(ranked) - 1, len(ranked) // 2
        positions = np.unique(np.clip([0, 1, 2, *range(middle - 2, middle + 2), last - 2, last - 1, last], 0, last))
        for position in positions.tolist():
            each = ranked[position]
            metadata = {"subset": each.subset, "reference": each.reference, "hypothesis": each.hypothesis}
            log.event("transcript", each.id, metadata={**metadata, "wer": each.errors.wer})


@torch.no_grad()
def evaluate(
    trainer: Trainer, utterances: Utterances, capacity: int, told_to_end: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    """Recognise **every** utterance by greedy decoding, each in one of the processes; all get what all found.

    The processes get like numbers of utterances and samples, so that none waits long for the others.

    Args:
        trainer: the model and where it is.
        utterances: what to evaluate.
        capacity: samples of a batch, padding included, but for an utterance that is longer than that. What a process
            computes at once in training is known to fit into memory, together with its gradients.
        told_to_end: asked before each batch; once it says so, this process goes no further.

    Returns:
        None, in all processes, if one of them was told to end.

    Raises:
        RunError: not every utterance was counted exactly once.
    """
    trainer.eval_model.eval()
    world = trainer.world
    share = np.sort(split_balanced(utterances, np.arange(len(utterances)), world.size)[world.rank])
    plan = [share[batch] for batch in batch_by_padded_size(utterances.num_samples[share], capacity)]
    make = partial(make_batch, utterances, pinned=trainer.device.type == "cuda")
    recognised: dict[int, Recognised] = {}

    def decode(batch: Batch, best_TB: Callable[[], Tensor], frames_B: Tensor) -> None:
        hypotheses = collapse(best_TB(), frames_B)
        for index, reference, hypothesis in zip(batch.indices.tolist(), batch.transcripts, hypotheses, strict=True):
            subset = utterances.subsets[utterances.subset_of[index]].name
            errors = count_errors([reference], [hypothesis])
            recognised[index] = Recognised(utterances.id(index), subset, reference, hypothesis, errors)

    started: tuple[Batch, Callable[[], Tensor], Tensor] | None = None  # decoded while the device works on the next one
    ended = False
    with progress_bar("evaluation", len(plan), shown=world.is_main) as bar:
        for batch in prefetch(plan, make):
            ended = told_to_end()
            if ended:
                break
            logits_TBV, frames_B = trainer.logits(trainer.eval_model, batch)
            best_TB = copy_to_cpu_async(logits_TBV.argmax(dim=2))
            if started is not None:
                decode(*started)
            started = batch, best_TB, frames_B
            bar.update()
    if started is not None:
        decode(*started)
    found = world.all_gather_object((ended, list(recognised.items())))
    if any(ended for ended, _ in found):
        return None
    everything = [item for _, part in found for item in part]
    if sorted(index for index, _ in everything) != list(range(len(utterances))):
        raise RunError(
            f"evaluation counted {len(everything)} utterances, which are not the {len(utterances)} there are"
        )
    return Evaluation([each for _, each in sorted(everything)])
