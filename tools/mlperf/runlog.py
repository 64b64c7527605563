"""A run's log, read back with types, for the commands and pages that work on finished runs.

    log = RunLog.read(Path("results/synthetic/mlperf_ds2.log"))
    print(log.seed, log.seconds, [epoch.wer for epoch in log.epochs])

`:::MLLOG {json}` is an event; a success ends with RESULT,DEEPSPEECH2,<seed>,<seconds>,<user>,<start time>.
Before either, a line may have what srun, torchrun or kubectl have put there.

Every log that the training command has written can be read, also of runs that failed, were cut off or are older than
some event: what is absent is None or empty. Whether a log proves what it says is another question: `check.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mlperf_logging.mllog import constants

from pytorch.errors import RunError
from pytorch.metrics import ErrorCounts

TOKEN = ":::MLLOG "
RESULT = "RESULT,DEEPSPEECH2,"
CALLER = ("file", "lineno")  # metadata of every event: the line of code that logged it


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "a text": lambda value: type(value) is str,
    "an integer": lambda value: type(value) is int and abs(value) < 2**63,
    "a positive integer": lambda value: type(value) is int and 0 < value < 2**63,
    "a finite number": lambda value: type(value) in (int, float) and abs(value) < 2**63,
    "a number": lambda value: type(value) is float or (type(value) is int and abs(value) < 2**63),
}
# What is computed with has these types, as an event's value and as metadata. Versions differ in which of it they log.
_TYPES = {
    **dict.fromkeys(("configuration", "dataset", "git_commit", "validation_errors", "transcript"), "a text"),
    **dict.fromkeys(("corpus", "subset", "reference", "hypothesis", "status", "exception"), "a text"),
    **dict.fromkeys(("seed", "global_batch_size", "skipped_step", "epoch_num", "step_num", "step"), "an integer"),
    **dict.fromkeys(("train_samples", "eval_samples", "train_samples_left_out"), "an integer"),
    **dict.fromkeys(("word_errors", "character_errors"), "an integer"),
    **dict.fromkeys(("words", "characters", "utterances"), "a positive integer"),
    "checkpoint": "a finite number",
    **dict.fromkeys(("train_loss", "eval_accuracy", "learning_rate", "gradient_norm"), "a number"),
    **dict.fromkeys(("loss", "wer", "cer", "mean_utterance_wer", "sum_of_utterance_wers"), "a number"),
    **dict.fromkeys(("target_wer", "elapsed_seconds", "seconds", "data_wait_fraction"), "a number"),
    **dict.fromkeys(("utterances_per_second", "audio_seconds_per_second", "cpu_taken", "stolen"), "a number"),
}


_FORMER_NAMES = {  # in logs of earlier versions
    "averaging_decay": "ema_decay",
    "augmentation_start_epoch": "augment_from_epoch",
    "final_learning_rate_fraction": "min_lr_ratio",
    "learning_rate_anneal": "lr_gamma",
    "schedule_epochs": "lr_decay_epochs",
    "checkpoint_minutes": "checkpoint_interval_minutes",
    "collective_timeout_seconds": "dist_timeout_seconds",
}


def with_current_names(saved: dict[str, Any]) -> dict[str, Any]:
    """Return `Config.to_dict()` of a log, perhaps an earlier version's, under today's names."""
    renamed = {_FORMER_NAMES.get(name, name): value for name, value in saved.items()}
    if renamed.pop("recipe", "modern") == "reference":  # which is a configuration of its own now
        renamed["config"] = f"{renamed['config']}-2018"
    if not renamed.get("noise_probability"):  # white noise is no longer an option, and no configuration used it
        renamed = {name: value for name, value in renamed.items() if not name.startswith("noise_")}
    return renamed


@dataclass(frozen=True)
class Event:
    """A line of the log. `line` counts from 1 in the file; `metadata` is without the caller's file and line."""

    line: int
    time_ms: float
    key: str
    value: Any
    metadata: dict[str, Any]


class Result(NamedTuple):
    """The RESULT line; `line` counts from 1 in the file."""

    line: int
    seed: int
    seconds: int


@dataclass(frozen=True)
class Step:
    """An optimizer step; loss, learning rate and gradient norm are None where it was skipped as not finite."""

    number: int
    loss: float | None
    learning_rate: float | None
    gradient_norm: float | None


@dataclass(frozen=True)
class Epoch:
    """An epoch, or the part of one that a run got to. Times are seconds on the clock, of this process only."""

    number: int
    started: float
    trained: float | None  # when its training had ended
    evaluated: float | None  # when its evaluation had ended
    step: int | None  # steps of the run when its training had ended
    finished: bool | None  # False: max_steps ended it early
    loss: float | None  # mean over its steps
    throughput: dict[str, float]  # seconds, utterances_per_second, audio_seconds_per_second, data_wait_fraction
    wer: float | None  # percent, corpus WER of all validation utterances: the benchmark's figure
    errors: dict[str, ErrorCounts]  # of each validation subset, and of "all"


@dataclass(frozen=True)
class Dataset:
    """What the run trained on."""

    digest: str
    corpus: str
    official: bool  # whether all archives were the published ones
    synthetic: bool


@dataclass(frozen=True)
class Transcript:
    """A validation utterance of the last evaluation, as the model understood it; wer in percent."""

    id: str
    subset: str
    reference: str
    hypothesis: str
    wer: float


@dataclass
class RunLog:
    """The log of one run. What it does not hold is None or empty."""

    path: Path
    events: list[Event]
    result: Result | None  # which only a success has

    def __post_init__(self) -> None:
        self._by_key: dict[str, list[Event]] = {}
        for event in self.events:
            self._by_key.setdefault(event.key, []).append(event)

        # --- what ran
        self.config_name: str | None = self.value("configuration")  # where the values started from
        self.configuration: dict[str, Any] = with_current_names(self.metadata("configuration"))  # Config.to_dict()
        self.seed: int | None = self.value(constants.SEED)
        self.batch_size: int | None = self.value(constants.GLOBAL_BATCH_SIZE)
        self.target_wer: float | None = self.configuration.get("target_wer")
        self.environment: dict[str, Any] = self.metadata("environment")  # hardware and software
        self.commit: str | None = self.value("git_commit")  # "unknown" where git did not know it
        self.dirty: bool | None = self.metadata("git_commit").get("uncommitted_changes")
        self.cache_cleared: bool | None = self.value(constants.CACHE_CLEAR)  # else the event's metadata says why not

        # --- what came out
        stop = self.metadata(constants.RUN_STOP)
        self.status: str | None = stop.get("status")  # None: not over, or cut off
        self.exception: str | None = stop.get("exception")  # what ended it; not in old logs
        self.reached = self.status == constants.SUCCESS  # the target, as the run says
        self.resumed = bool(self.all("resumed"))  # from a checkpoint: never an uninterrupted result
        self.seconds_before = float(self.metadata("resumed").get("elapsed_seconds", 0))  # on the clock, if resumed
        self.seconds = self._between(constants.RUN_START, constants.RUN_STOP)  # the time to target, if it was reached
        self.init_seconds = self._between(constants.INIT_START, constants.INIT_STOP)  # off the clock

    @classmethod
    def read(cls, path: Path) -> RunLog:
        """Read a file; lines that are neither events nor a result are ignored.

        Raises:
            RunError: it cannot be read, holds no event, or a line of it is damaged (with the line's number).
        """
        try:
            lines = path.read_bytes().decode().split("\n")
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RunError(f"{path}: no log: it is not text (byte {error.start})") from error
        events, results = [], []
        for number, line in enumerate(lines, start=1):
            if TOKEN in line:
                events.append(_read_event(path, number, line.partition(TOKEN)[2]))
            elif RESULT in line:
                results.append(_read_result(path, number, line.partition(RESULT)[2]))
        if not events:
            raise RunError(f"{path}: no log: it has no '{TOKEN.strip()}' line")
        if len(results) > 1:
            raise RunError(f"{path}:{results[1].line}: a second RESULT line; the first is line {results[0].line}")
        return cls(path, events, results[0] if results else None)

    def last_start(self) -> RunLog:
        """Return the log from its last start on, if ranks were lost and all were restarted from a checkpoint."""
        starts = [position for position, event in enumerate(self.events) if event.key == constants.INIT_START]
        return replace(self, events=self.events[starts[-1] :]) if len(starts) > 1 else self

    def all(self, key: str) -> list[Event]:
        """Return every event of a key, in order."""
        return self._by_key.get(key, [])

    def first(self, key: str) -> Event | None:
        """Return the first event of a key."""
        return next(iter(self.all(key)), None)

    def value(self, key: str) -> Any:
        """Return the value of the first event of a key."""
        event = self.first(key)
        return None if event is None else event.value

    def metadata(self, key: str) -> dict[str, Any]:
        """Return the metadata of the first event of a key; empty where there is none."""
        event = self.first(key)
        return {} if event is None else event.metadata

    def clock(self, event: Event) -> float:
        """Return the seconds on this process's clock at an event (negative before it started)."""
        start = self.first(constants.RUN_START) or self.events[0]
        return (event.time_ms - start.time_ms) / 1000

    def _between(self, first: str, last: str) -> float | None:
        start, stop = self.first(first), self.first(last)
        return None if start is None or stop is None else (stop.time_ms - start.time_ms) / 1000

    @property
    def dataset(self) -> Dataset | None:
        event = self.first("dataset")
        if event is None:
            return None
        official, synthetic = (event.metadata.get(name) is True for name in ("official_archives", "synthetic"))
        return Dataset(event.value, event.metadata.get("corpus", ""), official, synthetic)

    @property
    def training_utterances(self) -> int | None:
        """Size of the training set, with those utterances that are too short to be trained on; None if not known."""
        trained, left_out = self.value(constants.TRAIN_SAMPLES), self.value("train_samples_left_out")
        return None if trained is None or left_out is None else trained + left_out

    @cached_property
    def steps(self) -> list[Step]:
        """Optimizer steps in order, skipped ones included."""
        found = []
        for event in self.events:
            if event.key == "train_loss":
                rate, norm = event.metadata.get("learning_rate"), event.metadata.get("gradient_norm")
                found.append(Step(event.metadata.get("step_num", 0), event.value, rate, norm))
            elif event.key == "skipped_step":
                found.append(Step(event.value, None, None, None))
        return found

    @cached_property
    def epochs(self) -> list[Epoch]:
        """Epochs in the order of their beginning."""
        by_epoch: dict[int, list[Event]] = {}
        for event in self.events:
            if constants.EPOCH_NUM in event.metadata:
                by_epoch.setdefault(event.metadata[constants.EPOCH_NUM], []).append(event)
        starts = [(event, event.metadata.get(constants.EPOCH_NUM, 0)) for event in self.all(constants.EPOCH_START)]
        return [self._epoch(number, start, by_epoch.get(number, [])) for start, number in starts]

    def _epoch(self, number: int, start: Event, events: list[Event]) -> Epoch:
        first = {event.key: event for event in reversed(events)}
        stop, evaluated = first.get(constants.EPOCH_STOP), first.get(constants.EVAL_STOP)
        accuracy = first.get(constants.EVAL_ACCURACY)
        trained = {} if stop is None else stop.metadata
        names = "seconds", "utterances_per_second", "audio_seconds_per_second", "data_wait_fraction"
        return Epoch(
            number=number,
            started=self.clock(start),
            trained=None if stop is None else self.clock(stop),
            evaluated=None if evaluated is None else self.clock(evaluated),
            step=trained.get("step"),
            finished=trained.get("finished"),
            loss=trained.get("loss"),
            throughput={name: trained[name] for name in names if name in trained},
            wer=None if accuracy is None else accuracy.value,
            errors={event.value: _error_counts(event) for event in events if event.key == "validation_errors"},
        )

    @property
    def last_evaluation(self) -> Epoch | None:
        """The last epoch that has a WER: a run that broke off has no evaluation of the epoch under way."""
        return next((epoch for epoch in reversed(self.epochs) if epoch.wer is not None), None)

    @property
    def epochs_to_target(self) -> int | None:
        """Number of the epoch whose evaluation reached the target."""
        return self.epochs[-1].number if self.reached and self.epochs else None

    @cached_property
    def transcripts(self) -> list[Transcript]:
        """Some validation utterances, from the worst to the best."""
        return [_transcript(event) for event in self.all("transcript")]


def _read_event(path: Path, number: int, text: str) -> Event:
    try:
        fields = json.loads(text)
        event = Event(number, fields["time_ms"], fields["key"], fields["value"], dict(fields["metadata"] or {}))
        typed = type(event.key) is str and _CHECKS["a number"](event.time_ms) and math.isfinite(event.time_ms)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{path}:{number}: damaged event: {error!r}") from error
    if not typed:
        raise RunError(f"{path}:{number}: damaged event: its time or its key has the wrong type")
    for name in CALLER:
        event.metadata.pop(name, None)
    for name, value in {**event.metadata, event.key: event.value}.items():
        kind = _TYPES.get(name)
        if event.key == "skipped_step" and name == "utterances":  # a list of ids
            continue
        if kind is not None and not _CHECKS[kind](value):
            what = name if name == event.key else f"{event.key}'s {name}"
            raise RunError(f"{path}:{number}: damaged event: {what} is {value!r:.60}, not {kind}")
    return event


def _read_result(path: Path, number: int, line: str) -> Result:
    try:
        seed, seconds, _user, _started = line.strip().split(",")
        return Result(number, int(seed), int(seconds))
    except ValueError as error:
        raise RunError(f"{path}:{number}: damaged RESULT line: {line!r}") from error


def _transcript(event: Event) -> Transcript:
    subset, reference, hypothesis = (event.metadata.get(name, "") for name in ("subset", "reference", "hypothesis"))
    return Transcript(event.value, subset, reference, hypothesis, event.metadata.get("wer", 0.0))


def _error_counts(event: Event) -> ErrorCounts:
    return ErrorCounts(**{name: event.metadata.get(name, 0) for name in ErrorCounts.__dataclass_fields__})
