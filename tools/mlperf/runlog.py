"""A run's log, read back with types, for the commands and pages that work on finished runs.

    log = RunLog.read(Path("results/synthetic/last_run.log"))
    print(log.seed, log.seconds, [epoch.wer for epoch in log.epochs])

`:::MLLOG {json}` is an event; a success ends with RESULT,DEEPSPEECH2,<seed>,<seconds>,<user>,<start time>.
Before either, a line may have what srun, torchrun or kubectl have put there.

Every log that the training command has written can be read, also of runs that failed, were cut off or are older than
some event: what is absent is None or empty. Whether a log proves what it says is another question: `check.py`.
"""

import json
from bisect import bisect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from mlperf_logging.mllog import constants

from pytorch.errors import RunError
from pytorch.metrics import ErrorCounts

TOKEN = ":::MLLOG "
RESULT = "RESULT,DEEPSPEECH2,"
CALLER = ("file", "lineno")  # metadata of every event: the line of code that logged it
RATES = "seconds", "utterances_per_second", "audio_seconds_per_second", "data_wait_fraction", "peak_memory_gib"
DAMAGES = ValueError, TypeError, KeyError, OverflowError, RecursionError  # what reading a damaged line may raise

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

    path: Path
    line: int
    time_ms: int
    key: str
    value: Any
    metadata: dict[str, Any]

    def typed(self, kind: type, name: str | None = None) -> Any:
        """Return the value, or a name's metadata, which is a str, int or float; None if absent.

        RunError, with file and line, if it is something else, or an integer of more than 64 bits.
        """
        value = self.value if name is None else self.metadata.get(name)
        too_large = isinstance(value, int) and abs(value) >= 2**63
        kinds = (int, float) if kind is float else kind
        if value is None or kind is object or (isinstance(value, kinds) and not too_large):
            return value
        wrong = f"{name or self.key} is {value!r:.60}, no {kind.__name__}"
        raise RunError(f"{self.path}:{self.line}: damaged event: {wrong}")


class Result(NamedTuple):
    """The RESULT line; `line` counts from 1 in the file."""

    line: int
    seed: int
    seconds: int


class Step(NamedTuple):
    """An optimizer step; its loss is None where it was skipped as not finite."""

    number: int
    loss: float | None


@dataclass(frozen=True)
class Epoch:
    """An epoch, or the part of one that a run got to. Times are seconds on the clock, of this process only."""

    number: int
    evaluated: float | None  # when its evaluation had ended
    step: int | None  # steps of the run when its training had ended
    loss: float | None  # mean over its steps
    throughput: dict[str, float]  # seconds, utterances_per_second, audio_seconds_per_second, data_wait_fraction
    wer: float | None  # percent, corpus WER of all validation utterances: the benchmark's figure
    errors: dict[str, ErrorCounts]  # of each validation subset, and of "all"


class Dataset(NamedTuple):
    """What the run trained on."""

    digest: str
    corpus: str


class Transcript(NamedTuple):
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
        self.config_name: str | None = self.value("configuration", str)  # where the values started from
        self.configuration: dict[str, Any] = with_current_names(self.metadata("configuration"))  # Config.to_dict()
        self.seed: int | None = self.value(constants.SEED, int)
        self.batch_size: int | None = self.value(constants.GLOBAL_BATCH_SIZE, int)
        self.target_wer: float | None = self.value("configuration", float, "target_wer")
        self.environment: dict[str, Any] = self.metadata("environment")  # hardware and software
        self.commit: str | None = self.value("git_commit", str)  # "unknown" where git did not know it
        self.dirty: bool | None = self.metadata("git_commit").get("uncommitted_changes")
        self.cache_cleared: bool | None = self.value(constants.CACHE_CLEAR)  # else the event's metadata says why not

        # --- what came out
        self.status: str | None = self.value(constants.RUN_STOP, str, "status")  # None: still running, or truncated
        self.exception: str | None = self.value(constants.RUN_STOP, str, "exception")  # what ended it; not in old logs
        self.reached = self.status == constants.SUCCESS  # the target, as the run says
        self.resumed = bool(self.all("resumed"))  # from a checkpoint: never an uninterrupted result
        self.seconds_before = float(self.value("resumed", float, "elapsed_seconds") or 0)  # on the clock, if resumed
        self.seconds = self.clock(self.first(constants.RUN_STOP))  # the time to target, if it was reached
        self.cpu_taken: float = self.value("cpu_taken", float) or 0.0  # fraction that other programs took
        self.cpu_stolen: float = self.value("cpu_taken", float, "stolen") or 0.0  # and the hypervisor
        stepped = [event for event in self.events if event.key in ("train_loss", "skipped_step")]
        self.steps = [_step(event) for event in stepped]
        self.epochs = self._epochs([event.line for event in stepped])  # in the order of their beginning
        self.transcripts = [_transcript(event) for event in self.all("transcript")]  # from the worst to the best
        datasets = [Dataset(event.typed(str) or "", event.typed(str, "corpus") or "") for event in self.all("dataset")]
        self.dataset = datasets[0] if datasets else None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file; lines that are neither events nor a result are ignored.

        RunError if it cannot be read, holds no event, or a line of it is damaged (with the line's number).
        """
        try:
            lines = path.read_bytes().decode().split("\n")
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RunError(f"{path}: no log: it is not text (byte {error.start})") from error
        events, results = [], []
        for number, line in enumerate(lines, start=1):
            try:
                if TOKEN in line:
                    events.append(_event(path, number, line.partition(TOKEN)[2]))
                elif RESULT in line:
                    seed, seconds, _user, _started = line.partition(RESULT)[2].strip().split(",")
                    results.append(Result(number, int(seed), int(seconds)))
            except DAMAGES as error:
                what = "event" if TOKEN in line else "RESULT line"
                raise RunError(f"{path}:{number}: damaged {what}: {error!r:.200}") from error
        if not events:
            raise RunError(f"{path}: no log: it has no '{TOKEN.strip()}' line")
        if len(results) > 1:
            raise RunError(f"{path}:{results[1].line}: a second RESULT line; the first is line {results[0].line}")
        return cls(path, events, results[0] if results else None)

    def last_start(self) -> Self:
        """Return the log from its last start on, if ranks were lost and all were restarted from a checkpoint."""
        starts = [position for position, event in enumerate(self.events) if event.key == constants.INIT_START]
        return replace(self, events=self.events[starts[-1] :]) if len(starts) > 1 else self

    def all(self, key: str) -> list[Event]:
        """Return every event of a key, in order."""
        return self._by_key.get(key, [])

    def first(self, key: str) -> Event | None:
        """Return the first event of a key."""
        return next(iter(self.all(key)), None)

    def value(self, key: str, kind: type = object, name: str | None = None) -> Any:
        """Return the value of the first event of a key, or a name's metadata, typed as by `Event.typed`."""
        event = self.first(key)
        return None if event is None else event.typed(kind, name)

    def metadata(self, key: str) -> dict[str, Any]:
        """Return the metadata of the first event of a key; empty where there is none."""
        event = self.first(key)
        return {} if event is None else event.metadata

    def clock(self, event: Event | None) -> float | None:
        """Return the seconds on this process's clock at an event; None without the event, or if it never started."""
        start = self.first(constants.RUN_START)
        return None if event is None or start is None else (event.time_ms - start.time_ms) / 1000

    @property
    def last_evaluation(self) -> Epoch | None:
        """The last epoch that has a WER: a run that broke off has no evaluation of the epoch under way."""
        return next((epoch for epoch in reversed(self.epochs) if epoch.wer is not None), None)

    @property
    def epochs_to_target(self) -> int | None:
        """Number of the epoch whose evaluation reached the target."""
        return self.epochs[-1].number if self.reached and self.epochs else None

    def mean_rate(self, name: str) -> float | None:
        """Return the mean of one of RATES over all training of this process; None if there was none."""
        parts = [epoch.throughput for epoch in self.epochs if {name, "seconds"} <= epoch.throughput.keys()]
        seconds = sum(part["seconds"] for part in parts)
        return sum(part[name] * part["seconds"] for part in parts) / seconds if seconds else None

    def _epochs(self, step_lines: list[int]) -> list[Epoch]:
        by_epoch: dict[int, dict[str, list[Event]]] = {}
        for event in self.events:
            if constants.EPOCH_NUM in event.metadata:
                of_epoch = by_epoch.setdefault(event.typed(int, constants.EPOCH_NUM), {})
                of_epoch.setdefault(event.key, []).append(event)
        starts = [(event, event.metadata.get(constants.EPOCH_NUM, 0)) for event in self.all(constants.EPOCH_START)]
        return [self._epoch(number, start, by_epoch.get(number, {}), step_lines) for start, number in starts]

    def _epoch(self, number: int, start: Event, events: dict[str, list[Event]], step_lines: list[int]) -> Epoch:
        keys = constants.EPOCH_STOP, constants.EVAL_STOP, constants.EVAL_ACCURACY
        stop, evaluated, accuracy = (next(iter(events.get(key, [])), None) for key in keys)
        rates = {}
        # Without a step, it was resumed when only the evaluation was left: it has no rates.
        if stop is not None and bisect(step_lines, start.line) < bisect(step_lines, stop.line):
            rates = {name: stop.typed(float, name) for name in RATES if name in stop.metadata}
        return Epoch(
            number=number,
            evaluated=self.clock(evaluated),
            step=None if stop is None else stop.typed(int, "step"),
            loss=None if stop is None else stop.typed(float, "loss"),
            throughput=rates,
            wer=None if accuracy is None else accuracy.typed(float),
            errors={event.typed(str): _error_counts(event) for event in events.get("validation_errors", [])},
        )


def _event(path: Path, line: int, text: str) -> Event:
    fields = json.loads(text)
    metadata = {name: value for name, value in (fields["metadata"] or {}).items() if name not in CALLER}
    event = Event(path, line, int(fields["time_ms"]), fields["key"], fields["value"], metadata)
    hash(event.key)
    return event


def _step(event: Event) -> Step:
    if event.key == "skipped_step":
        return Step(event.typed(int) or 0, None)
    return Step(event.typed(int, "step_num") or 0, event.typed(float))


def _transcript(event: Event) -> Transcript:
    subset, reference, hypothesis = (event.typed(str, name) or "" for name in ("subset", "reference", "hypothesis"))
    return Transcript(event.typed(str) or "", subset, reference, hypothesis, event.typed(float, "wer") or 0.0)


def _error_counts(event: Event) -> ErrorCounts:
    return ErrorCounts(**{name: event.typed(float, name) or 0 for name in ErrorCounts.__dataclass_fields__})
