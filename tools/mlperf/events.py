"""The lines of a log: `:::MLLOG {json}` is an event, and the last line of a success is its result.

RESULT,DEEPSPEECH2,<seed>,<seconds>,<user>,<start time>

Logs of other versions hold other events and other metadata. What is known by name has the type that it always had.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pytorch.cli import RunError

TOKEN = ":::MLLOG "
RESULT = "RESULT,DEEPSPEECH2,"
CALLER = ("file", "lineno")  # metadata that every event has: the line of code that logged it

# Types of what is computed with: of an event's value, by its key, and of metadata, by their name.
_VALUES = {
    **dict.fromkeys(("configuration", "dataset", "git_commit", "validation_errors", "transcript"), "text"),
    **dict.fromkeys(("seed", "global_batch_size", "skipped_step"), "integer"),
    **dict.fromkeys(("train_samples", "eval_samples", "train_samples_left_out"), "integer"),
    **dict.fromkeys(("train_loss", "eval_accuracy", "checkpoint"), "number"),
}
_METADATA = {
    **dict.fromkeys(("epoch_num", "step_num", "step", "word_errors", "character_errors"), "integer"),
    **dict.fromkeys(("words", "characters", "utterances"), "positive"),
    **dict.fromkeys(("learning_rate", "gradient_norm", "loss", "wer", "target_wer", "elapsed_seconds"), "number"),
    **dict.fromkeys(("utterances_per_second", "audio_seconds_per_second", "data_wait_fraction", "seconds"), "number"),
    **dict.fromkeys(("sum_of_utterance_wers", "mean_utterance_wer", "cer"), "number"),
    **dict.fromkeys(("corpus", "subset", "reference", "hypothesis", "status"), "text"),
    "rank_wait_fractions": "numbers",
}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_integer(value)


_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("a text", lambda value: isinstance(value, str)),
    "integer": ("an integer", _is_integer),
    "positive": ("a positive integer", lambda value: _is_integer(value) and value > 0),
    "number": ("a number", _is_number),
    "numbers": ("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))),
}


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


def read_events(path: Path) -> tuple[list[Event], Result | None]:
    """Events and result of a log; lines that are neither are ignored.

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
            events.append(_event(path, number, line.partition(TOKEN)[2]))
        elif line.startswith(RESULT):
            results.append(_result(path, number, line))
    if not events:
        raise RunError(f"{path}: no log: it has no '{TOKEN.strip()}' line")
    if len(results) > 1:
        raise RunError(f"{path}:{results[1].line}: a second RESULT line; the first is line {results[0].line}")
    return events, results[0] if results else None


def _event(path: Path, number: int, text: str) -> Event:
    try:
        fields = json.loads(text)
        event = Event(number, fields["time_ms"], fields["key"], fields["value"], dict(fields["metadata"] or {}))
        typed = isinstance(event.key, str) and not isinstance(event.time_ms, bool) and math.isfinite(event.time_ms)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise RunError(f"{path}:{number}: damaged event: {error!r}") from error
    if not typed:
        raise RunError(f"{path}:{number}: damaged event: its time or its key has the wrong type")
    for name in CALLER:
        event.metadata.pop(name, None)
    _check_types(path, event)
    return event


def _check_types(path: Path, event: Event) -> None:
    known = [(event.key, _VALUES.get(event.key), event.value)]
    if event.key != "skipped_step":  # whose utterances are a list
        known += [(f"{event.key}'s {name}", _METADATA.get(name), value) for name, value in event.metadata.items()]
    for name, kind, value in known:
        if kind is not None and not _TYPES[kind][1](value):
            raise RunError(f"{path}:{event.line}: damaged event: {name} is {value!r:.60}, not {_TYPES[kind][0]}")


def _result(path: Path, number: int, line: str) -> Result:
    try:
        seed, seconds, _user, _started = line.strip().removeprefix(RESULT).split(",")
        return Result(number, int(seed), int(seconds))
    except ValueError as error:
        raise RunError(f"{path}:{number}: damaged RESULT line: {line!r}") from error
