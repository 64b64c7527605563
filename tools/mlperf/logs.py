"""A run's log, read back: what happened, with types, for the commands and pages that work on finished runs.

    log = RunLog.read(Path("results/synthetic/mlperf_ds2.log"))
    print(log.seed, log.seconds, [epoch.wer for epoch in log.epochs])

Reading accepts every log that the training command has written, also of runs that failed, were cut off or are older
than some event: what is absent is None or empty. Whether a log proves what it says is another question: `check.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants

from pytorch.config import with_current_names
from pytorch.metrics import ErrorCounts
from tools.mlperf.events import Event, Result, read_events


@dataclass(frozen=True)
class Step:
    """An optimizer step; loss, learning rate and gradient norm are None where it was skipped as not finite."""

    number: int
    seconds: float  # on the clock when it was logged
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
    rank_wait_fractions: list[float]  # of its time, that each process waited for the others
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


@dataclass(frozen=True)
class RunLog:
    """The log of one run."""

    path: Path
    events: list[Event]
    result: Result | None  # which only a success has

    @classmethod
    def read(cls, path: Path) -> RunLog:
        """Read a file; RunError where it is no log, or a line of it is damaged."""
        return cls(path, *read_events(path))

    def all(self, key: str) -> Iterator[Event]:
        """Every event of a key, in order."""
        return (event for event in self.events if event.key == key)

    def first(self, key: str) -> Event | None:
        """The first event of a key."""
        return next(self.all(key), None)

    def value(self, key: str) -> Any:
        """Value of the first event of a key."""
        event = self.first(key)
        return None if event is None else event.value

    def metadata(self, key: str) -> dict[str, Any]:
        """Metadata of the first event of a key; empty where there is none."""
        event = self.first(key)
        return {} if event is None else event.metadata

    def clock(self, event: Event) -> float:
        """Seconds on this process's clock at an event (negative before it started)."""
        start = self.first(constants.RUN_START)
        return (event.time_ms - (start or self.events[0]).time_ms) / 1000

    @property
    def configuration(self) -> dict[str, Any]:
        """Every field of the Config, as plain values."""
        return with_current_names(self.metadata("configuration"))

    @property
    def config_name(self) -> str | None:
        """Of the named configuration that the values started from."""
        return self.value("configuration")

    @property
    def seed(self) -> int | None:
        return self.value(constants.SEED)

    @property
    def batch_size(self) -> int | None:
        """Global batch size, in utterances."""
        return self.value(constants.GLOBAL_BATCH_SIZE)

    @property
    def target_wer(self) -> float | None:
        return self.configuration.get("target_wer")

    @property
    def dataset(self) -> Dataset | None:
        event = self.first("dataset")
        if event is None:
            return None
        known = event.metadata
        return Dataset(
            event.value, known.get("corpus", ""), known.get("official_archives") is True, known.get("synthetic") is True
        )

    @property
    def training_utterances(self) -> int | None:
        """Of the training set, those included that are too short to be trained on; None where that is not known."""
        trained, left_out = self.value(constants.TRAIN_SAMPLES), self.value("train_samples_left_out")
        return None if trained is None or left_out is None else trained + left_out

    @property
    def environment(self) -> dict[str, Any]:
        """Hardware and software."""
        return self.metadata("environment")

    @property
    def commit(self) -> str | None:
        """Of this repository; "unknown" where git did not know it."""
        return self.value("git_commit")

    @property
    def dirty(self) -> bool | None:
        """Whether files differed from the commit; None where that is not known."""
        return self.metadata("git_commit").get("uncommitted_changes")

    @property
    def cache_cleared(self) -> bool | None:
        """Whether the data set was not in memory when the clock started; the event's metadata may say why not."""
        return self.value(constants.CACHE_CLEAR)

    @property
    def status(self) -> str | None:
        """ "success", "aborted", or None for a run that is not over or was cut off."""
        return self.metadata(constants.RUN_STOP).get("status")

    @property
    def reached(self) -> bool:
        """Whether the run says that it reached its target."""
        return self.status == constants.SUCCESS

    @property
    def resumed(self) -> bool:
        """Whether it went on from a checkpoint: never an uninterrupted result."""
        return self.first("resumed") is not None

    @property
    def seconds_before(self) -> float:
        """On the clock of the processes that a resumed run goes on from."""
        return float(self.metadata("resumed").get("elapsed_seconds", 0))

    @property
    def seconds(self) -> float | None:
        """From run_start to run_stop: the time of the run, if it reached the target and was not resumed."""
        stop = self.first(constants.RUN_STOP)
        return None if stop is None else self.clock(stop)

    @property
    def init_seconds(self) -> float | None:
        """From init_start to init_stop, off the clock."""
        start, stop = self.first(constants.INIT_START), self.first(constants.INIT_STOP)
        return None if start is None or stop is None else (stop.time_ms - start.time_ms) / 1000

    @cached_property
    def steps(self) -> list[Step]:
        """Optimizer steps in order, skipped ones included."""
        found = []
        for event in self.events:
            if event.key == "train_loss":
                known = event.metadata
                rate, norm = known.get("learning_rate"), known.get("gradient_norm")
                found.append(Step(known.get("step_num", 0), self.clock(event), event.value, rate, norm))
            elif event.key == "skipped_step":
                found.append(Step(event.value, self.clock(event), None, None, None))
        return found

    @cached_property
    def epochs(self) -> list[Epoch]:
        """Epochs in the order of their beginning."""
        return [self._epoch(start) for start in self.all(constants.EPOCH_START)]

    def _epoch(self, start: Event) -> Epoch:
        number = start.metadata.get(constants.EPOCH_NUM, 0)
        of_epoch = [event for event in self._by_epoch.get(number, []) if event is not start]
        by_key = {event.key: event for event in reversed(of_epoch)}  # the first of each key
        stop, accuracy = by_key.get(constants.EPOCH_STOP), by_key.get(constants.EVAL_ACCURACY)
        evaluated = by_key.get(constants.EVAL_STOP)
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
            rank_wait_fractions=trained.get("rank_wait_fractions", []),
            wer=None if accuracy is None else accuracy.value,
            errors={event.value: _errors(event) for event in of_epoch if event.key == "validation_errors"},
        )

    @cached_property
    def _by_epoch(self) -> dict[Any, list[Event]]:
        found: dict[Any, list[Event]] = {}
        for event in self.events:
            if constants.EPOCH_NUM in event.metadata:
                found.setdefault(event.metadata[constants.EPOCH_NUM], []).append(event)
        return found

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


def _transcript(event: Event) -> Transcript:
    known = event.metadata
    subset, reference, hypothesis = (known.get(name, "") for name in ("subset", "reference", "hypothesis"))
    return Transcript(event.value, subset, reference, hypothesis, known.get("wer", 0.0))


def _errors(event: Event) -> ErrorCounts:
    counts = {name: event.metadata.get(name, 0) for name in ErrorCounts.__dataclass_fields__}
    return ErrorCounts(**counts)
