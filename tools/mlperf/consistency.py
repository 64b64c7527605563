"""Checks across the lines of a log, for mistakes that are made in good faith and that no single line shows.

A clock that was set, a log that was cut off or pieced together from two runs, counts that do not match the rates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from mlperf_logging.mllog import constants

from pytorch.metrics import ErrorCounts
from tools.mlperf.configuration import read_configuration
from tools.mlperf.runlog import RunLog

Found = tuple[int | None, str]  # line, reason
SLACK = 1.0  # seconds that two measurements of one time may differ by


def inconsistencies(log: RunLog) -> list[Found]:
    """Return what does not agree, each with its line if there is one. The log must keep the open rules."""
    clock = clock_problem(log)
    return [*([clock] if clock else []), *_result(log), *_evaluations(log), *_learning_rates(log)]


def clock_problem(log: RunLog) -> Found | None:
    """Return how the times of any log contradict each other or its RESULT line, which another clock has measured."""
    for before, event in pairwise(log.events):
        if event.time_ms < before.time_ms - 1000 * SLACK:
            back = (before.time_ms - event.time_ms) / 1000
            return event.line, f"{event.key}: the clock was set back by {back:.1f} s"
    if log.result is not None and log.seconds is not None and abs(log.result.seconds - log.seconds) > SLACK:
        took = f"run_start to run_stop took {log.seconds:.1f} s"
        return log.result.line, f"RESULT: {log.result.seconds} s, but {took}: the clock was set"
    return None


def _result(log: RunLog) -> Iterator[Found]:
    if log.result is None:
        if log.reached:
            yield None, "the log is cut off: a success ends with a RESULT line"
        return
    if not log.reached:
        yield log.result.line, "RESULT: the run did not reach its target"
    if log.result.seed != log.seed:
        yield log.result.line, f"RESULT: the seed {log.result.seed} is not that of the event, {log.seed}"


def _evaluations(log: RunLog) -> Iterator[Found]:
    """WER is errors over words; all is the sum of the subsets; every evaluation is of the same utterances."""
    first = log.epochs[0].errors
    for epoch, accuracy in zip(log.epochs, log.all(constants.EVAL_ACCURACY), strict=False):
        line, total = accuracy.line, epoch.errors.get("all")
        if total is None or len(first) < 2 or _sizes(epoch.errors) != _sizes(first):
            yield line, f"epoch {epoch.number}: validation_errors are not of all and each subset, as those of epoch 1"
            continue
        if not math.isclose(accuracy.value, total.wer):
            wrong = f"{total.word_errors} errors in {total.words} words are {total.wer:.4f} %"
            yield line, f"epoch {epoch.number}: the WER is {accuracy.value}, but {wrong}"
        if total.utterances != log.value(constants.EVAL_SAMPLES):
            yield line, f"epoch {epoch.number}: validation_errors counts other utterances than eval_samples"
        parts = sum((counts for subset, counts in epoch.errors.items() if subset != "all"), ErrorCounts())
        if not all(math.isclose(getattr(parts, field), value) for field, value in vars(total).items()):
            yield line, f"epoch {epoch.number}: the subsets' errors do not add up to those of all"


def _sizes(errors: dict[str, ErrorCounts]) -> dict[str, tuple[int, int]]:
    return {subset: (counts.utterances, counts.words) for subset, counts in errors.items()}


def _learning_rates(log: RunLog) -> Iterator[Found]:
    from pytorch.optimizer import learning_rate  # imports PyTorch, which takes longer than the rest of a check

    config = read_configuration(log.configuration)
    steps_in_epoch = math.ceil(log.value(constants.TRAIN_SAMPLES) / config.batch_size)
    for event in log.all("train_loss"):
        step, logged = event.metadata["step_num"], event.metadata["learning_rate"]
        right = learning_rate(config, step - 1, steps_in_epoch)
        if not math.isclose(logged, right, rel_tol=1e-9, abs_tol=1e-9):
            yield event.line, f"train_loss: learning rate {logged} in step {step}; the schedule says {right}"
            return
