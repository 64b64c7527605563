"""The runs of a report: their logs, read and looked over, and what the page calls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants

from pytorch.config import RunError
from pytorch.mlperf.events import Event
from pytorch.mlperf.logs import RunLog

# Types of what the page computes with: of an event's value, by its key, and of metadata, by their name. The reader of
# logs takes any JSON, since logs of other versions hold other things.
_VALUES = {
    "configuration": "text",
    "seed": "integer",
    "global_batch_size": "integer",
    "dataset": "text",
    "git_commit": "text",
    "train_loss": "number",
    "skipped_step": "integer",
    "eval_accuracy": "number",
    "validation_errors": "text",
    "checkpoint": "number",
    "transcript": "text",
}
_METADATA = {
    **dict.fromkeys(("epoch_num", "step_num", "step", "word_errors", "character_errors"), "integer"),
    **dict.fromkeys(("words", "characters", "utterances"), "positive"),
    **dict.fromkeys(("learning_rate", "gradient_norm", "loss", "wer", "target_wer", "elapsed_seconds"), "number"),
    **dict.fromkeys(("utterances_per_second", "audio_seconds_per_second", "data_wait_fraction"), "number"),
    **dict.fromkeys(("sum_of_utterance_wers", "mean_utterance_wer", "cer"), "number"),
    **dict.fromkeys(("corpus", "subset", "reference", "hypothesis", "status"), "text"),
}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_IS: dict[str, Callable[[Any], bool]] = {
    "anything": lambda value: True,
    "text": lambda value: isinstance(value, str),
    "integer": _is_integer,
    "positive": lambda value: _is_integer(value) and value > 0,
    "number": lambda value: isinstance(value, Real) and not isinstance(value, bool),
}


@dataclass(frozen=True)
class Run:
    """A run of the report. `number` counts from 1, in the order of the command line."""

    number: int
    label: str
    log: RunLog

    @property
    def seconds_before(self) -> float:
        """On the clock before this process went on from a checkpoint."""
        return self.log.seconds_before

    @property
    def target(self) -> float | None:
        """WER to reach, in percent."""
        return self.log.target_wer

    @property
    def final_wer(self) -> float | None:
        """Of the last evaluation, in percent."""
        return next((epoch.wer for epoch in reversed(self.log.epochs) if epoch.wer is not None), None)

    @property
    def seconds_to_target(self) -> float | None:
        """On the clock, with the time before it was resumed; None if the target was not reached."""
        seconds = self.log.seconds
        return seconds + self.seconds_before if self.log.reached and seconds is not None else None


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the logs.

    Raises:
        RunError: one is no log, is damaged, or is named twice.
    """
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise RunError(f"{path}: named {times} times")
    logs = [_last_start(RunLog.read(path)) for path in paths]
    for log in logs:
        for event in log.events:
            _check(log.path, event)
    labels = _labels(paths)
    return [Run(number, label, log) for number, (label, log) in enumerate(zip(labels, logs, strict=True), start=1)]


def _last_start(log: RunLog) -> RunLog:
    """Without what was before the last start, where processes were lost and all started again from a checkpoint."""
    starts = [position for position, event in enumerate(log.events) if event.key == constants.INIT_START]
    return replace(log, events=log.events[starts[-1] :]) if len(starts) > 1 else log


def _check(path: Path, event: Event) -> None:
    fields = [(event.key, _VALUES.get(event.key, "anything"), event.value)]
    if event.key != "skipped_step":  # whose utterances are a list
        fields += [
            (f"{event.key}'s {name}", _METADATA.get(name, "anything"), known) for name, known in event.metadata.items()
        ]
    for name, kind, value in fields:
        if not _IS[kind](value):
            raise RunError(f"{path}:{event.line}: damaged event: {name} is {value!r:.60}, not {_A[kind]}")


_A = {"text": "a text", "integer": "an integer", "positive": "a positive integer", "number": "a number"}


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names of the files, with as many of their folders as tell them apart."""
    for parts in range(1, 1 + max(len(path.parts) for path in paths)):
        labels = ["/".join(path.with_suffix("").parts[-parts:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]
