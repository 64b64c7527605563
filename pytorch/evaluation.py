"""Evaluation: every utterance decoded and counted. The one that a timed run and tools/evaluate.py share."""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger
from torch import Tensor

from data.cli import progress_bar
from pytorch.ctc import collapse
from pytorch.device import copy_to_cpu_async
from pytorch.distributed import World
from pytorch.errors import RunError
from pytorch.loader import CPU, Batch, Utterances, batch_by_padded_size, prefetch, split_balanced
from pytorch.metrics import ErrorCounts, count_errors

# Starts to decode logits [T, B, V] with valid frames [B] on their device; what it returns waits for the transcripts.
Decoder: TypeAlias = Callable[[Tensor, Tensor], Callable[[], list[str]]]


def greedy_decoder(logits_TBV: Tensor, frames_B: Tensor) -> Callable[[], list[str]]:
    """Decode greedily: only the best label of each frame is copied from the device. It is -1 if logits are not finite.

    Raises:
        RunError: some are not; argmax would take NaN for a blank. The GRUs' kernel returns NaN if it has waited 5 s.
    """
    copied_TB = copy_to_cpu_async(torch.where(logits_TBV.sum(dim=2).isfinite(), logits_TBV.argmax(dim=2), -1))

    def read() -> list[str]:
        best_TB = copied_TB()
        if broken := int((best_TB < 0).any(dim=0).sum()):
            reason = "on a GPU, another program may have held multiprocessors for more than 5 s; try again without it"
            raise RunError(f"the model's output is not finite for {broken} of {len(frames_B)} utterances: {reason}")
        return collapse(best_TB, frames_B)

    return read


class Hypothesis(NamedTuple):
    """One utterance's reference and hypothesis, and the errors in it."""

    id: str
    subset: str
    reference: str
    hypothesis: str
    errors: ErrorCounts


@dataclass(frozen=True)
class Evaluation:
    """Hypotheses of every utterance, in order of length."""

    hypotheses: list[Hypothesis]

    @cached_property
    def by_subset(self) -> dict[str, ErrorCounts]:
        """Errors by subset."""
        errors: defaultdict[str, ErrorCounts] = defaultdict(ErrorCounts)
        for each in self.hypotheses:
            errors[each.subset] += each.errors
        return errors

    @cached_property
    def total(self) -> ErrorCounts:
        """Errors of all utterances."""
        return sum(self.by_subset.values(), ErrorCounts())

    def log_errors(self, log: MLLogger, epoch: int) -> None:
        """Log the corpus WER, and all rates of each subset."""
        total = self.total
        detail: dict[str, Any] = {constants.EPOCH_NUM: epoch, "utterances": total.utterances, "words": total.words}
        log.event(constants.EVAL_ACCURACY, total.wer, metadata=detail)
        for name, counts in [("all", total), *self.by_subset.items()]:
            rates = {"wer": counts.wer, "cer": counts.cer, "mean_utterance_wer": counts.mean_utterance_wer}
            metadata = {constants.EPOCH_NUM: epoch, **rates, **asdict(counts)}
            log.event("validation_errors", name, metadata=metadata)

    def log_transcripts(self, log: MLLogger) -> None:
        """Log the three worst utterances, four in the middle and the three best, as examples of what this WER means."""
        ranked = sorted(self.hypotheses, key=lambda each: (-each.errors.wer, each.id))
        middle = len(ranked) // 2
        examples = [*ranked[:3], *ranked[middle - 2 : middle + 2], *ranked[-3:]] if len(ranked) > 10 else ranked
        for each in examples:
            metadata = {"subset": each.subset, "reference": each.reference, "hypothesis": each.hypothesis}
            log.event("transcript", each.id, metadata={**metadata, "wer": each.errors.wer})


@torch.no_grad()
def evaluate(
    forward: Callable[[Batch], tuple[Tensor, Tensor]],
    utterances: Utterances,
    world: World,
    *,
    max_batch_samples: int,
    device: torch.device = CPU,
    decoder: Decoder = greedy_decoder,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Decode **every** utterance, each on one rank, and return the same result on all ranks.

    Args:
        forward: returns logits [T, B, V] and valid frames [B] of a batch, from a model in evaluation mode.
        max_batch_samples: padding included; a longer utterance is a batch of its own.
        stop_requested: asked before each batch; once it is true on a rank, the result is None on all.

    Raises:
        RunError: not every utterance was counted exactly once.
    """
    mine = np.sort(split_balanced(utterances, np.arange(len(utterances)), world.size)[world.rank])
    batches = [mine[batch] for batch in batch_by_padded_size(utterances.num_samples[mine], max_batch_samples)]
    counted: list[tuple[int, Hypothesis]] = []

    def count(batch: Batch, transcripts: Callable[[], list[str]]) -> None:
        for index, transcript in zip(batch.indices.tolist(), transcripts(), strict=True):
            reference = utterances.transcript(index)
            errors = count_errors(reference, transcript)
            name, subset = utterances.id(index), utterances.subset(index)
            counted.append((index, Hypothesis(name, subset, reference, transcript, errors)))

    decoding: deque[tuple[Batch, Callable[[], list[str]]]] = deque()
    stopped = False
    with progress_bar("evaluation", len(batches), shown=world.is_main) as bar:
        for batch in prefetch(utterances, batches, device):
            if stopped := stop_requested():
                break
            decoding.append((batch, decoder(*forward(batch))))
            if len(decoding) > 1:
                count(*decoding.popleft())  # while the device works on the newer batch
            bar.update()
    for each in decoding:
        count(*each)
    gathered = world.all_gather_object((stopped, counted))
    if any(stopped for stopped, _ in gathered):
        return None
    everything = sorted(item for _, items in gathered for item in items)
    if [index for index, _ in everything] != list(range(len(utterances))):
        raise RunError(f"evaluation counted {len(everything)} utterances instead of each of the {len(utterances)} once")
    return Evaluation([hypothesis for _, hypothesis in everything])
