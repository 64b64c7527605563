"""The lines of a log: `:::MLLOG {json}` is an event, and the last line of a success is its result.

RESULT,DEEPSPEECH2,<seed>,<seconds>,<user>,<start time>
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pytorch.config import RunError

TOKEN = ":::MLLOG "
RESULT = "RESULT,DEEPSPEECH2,"
CALLER = ("file", "lineno")  # metadata that every event has: the line of code that logged it


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
    user: str
    started: str


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
    return event


def _result(path: Path, number: int, line: str) -> Result:
    try:
        seed, seconds, user, started = line.strip().removeprefix(RESULT).split(",")
        return Result(number, int(seed), int(seconds), user, started)
    except ValueError as error:
        raise RunError(f"{path}:{number}: damaged RESULT line: {line!r}") from error
