"""A logged configuration: read back by the rules of the command line, and compared with others."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mlperf_logging.mllog import constants

from pytorch.cli import RunError
from pytorch.config import CONFIGS, EVENTS, HYPERPARAMETERS, Config, fields_of, with_current_names
from tools.mlperf.events import CALLER
from tools.mlperf.logs import RunLog

# What may differ between runs of one series: the seed, where files lie (the data set's digest says what was in it), and
# what bears on runs that break off.
FREE = {"seed", *fields_of("machine", "session")}
ENVIRONMENT = "torch", "cuda", "cudnn", "threads"  # of what a log knows of its machine, what bears on time and losses


def read_configuration(plain: dict[str, Any]) -> Config:
    """The Config of which these are the plain values. Fields that are no hyperparameters may be absent in older logs.

    Raises:
        RunError: a hyperparameter is missing; a field is unknown, of the wrong type, or against its rule.
    """
    plain = with_current_names(plain)
    kinds = typing.get_type_hints(Config)
    names = [field.name for field in dataclasses.fields(Config)]
    if missing := [name for name in ("config", "precision", *HYPERPARAMETERS) if name not in plain]:
        raise RunError(f"it lacks {', '.join(missing)}")
    if unknown := [name for name in plain if name not in names]:
        raise RunError(f"it has the unknown {', '.join(unknown)}")
    for name, value in plain.items():
        if not _is_a(value, kinds[name]):
            raise RunError(f"{name} has the wrong type or an unknown value: {value!r}")
    values: dict[str, Any] = {name: Path(value) if kinds[name] is Path else value for name, value in plain.items()}
    return Config(**values)


def configuration_problem(plain: dict[str, Any], logged: dict[str, Any] | None = None) -> str:
    """What is wrong with an event's metadata; empty where nothing is. For the rules files.

    Args:
        plain: the metadata.
        logged: values that have events of their own besides, by their names in the configuration; None: not to be
            looked at.
    """
    try:
        read_configuration({name: value for name, value in plain.items() if name not in CALLER})
    except RunError as error:
        return str(error)
    if logged is not None:
        plain = with_current_names(plain)
        for name, event in EVENTS.items():
            if name not in logged or plain[name] != logged[name]:
                return f"{name} is not that of the event {event}"
    return ""


def reference_problem(plain: dict[str, Any]) -> str:
    """In what an event's metadata is not the reference recipe on LibriSpeech; empty where in nothing. For the rules."""
    reference, plain = CONFIGS["librispeech-2018"].to_dict(), with_current_names(plain)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    fixed = (name for name in HYPERPARAMETERS if not fields[name].metadata["free_in_closed"])
    return ", ".join(f"{name} is not {reference[name]}" for name in fixed if plain.get(name) != reference[name])


def differences(logs: Sequence[RunLog]) -> dict[str, list[Any]]:
    """What is not the same in all runs of a series, each with its values: the seed, paths and the commit apart."""
    names = dict.fromkeys(name for log in logs for name in log.configuration if name not in FREE)
    values: dict[str, list[Any]] = {name: [log.configuration.get(name) for log in logs] for name in names}
    known = [comparable(log) for log in logs]
    values |= {name: [each[name] for each in known] for name in known[0]}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def comparable(log: RunLog) -> dict[str, Any]:
    """What must be the same in all runs of a series besides the configuration; None where the log does not know it."""
    keys = constants.SUBMISSION_PLATFORM, constants.SUBMISSION_DIVISION, "number_of_ranks", "gru_implementation"
    return {
        "data set": log.dataset and log.dataset.digest,
        **{key: log.value(key) for key in keys},
        **{name: log.environment.get(name) for name in ENVIRONMENT},
    }


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, each) for each in typing.get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (str if kind is Path else kind)
