"""A logged configuration, held against the constraints of the command line and the reference recipe."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pytorch.config import CONFIGS, EVENTS, HYPERPARAMETERS, Config
from pytorch.errors import RunError
from tools.mlperf.runlog import CALLER, with_current_names


def read_configuration(plain: dict[str, Any]) -> Config:
    """Return the Config of which these are the plain values. Older logs may lack fields that are no hyperparameters.

    Raises:
        RunError: a hyperparameter is missing; a field is unknown, of the wrong type, or breaks its constraint.
    """
    plain = with_current_names(plain)
    kinds = typing.get_type_hints(Config)
    if missing := [name for name in ("config", "precision", *HYPERPARAMETERS) if name not in plain]:
        raise RunError(f"it lacks {', '.join(missing)}")
    if unknown := [name for name in plain if name not in Config.__dataclass_fields__]:
        raise RunError(f"it has unknown fields: {', '.join(unknown)}")
    for name, value in plain.items():
        if not _is_a(value, kinds[name]):
            raise RunError(f"{name} has the wrong type or an unknown value: {value!r}")
    values: dict[str, Any] = {name: Path(value) if kinds[name] is Path else value for name, value in plain.items()}
    return Config(**values)


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_is_a(value, each) for each in typing.get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (str if kind is Path else kind)


def configuration_problem(plain: dict[str, Any], logged: dict[str, Any] | None = None) -> str:
    """Return what is wrong with the metadata of the event `configuration`, or nothing. For the rules files.

    Args:
        plain: the metadata.
        logged: values of the events that log a field once more, by the field's name.
    """
    try:
        read_configuration({name: value for name, value in plain.items() if name not in CALLER})
    except RunError as error:
        return str(error)
    plain = with_current_names(plain)
    for name, value in (logged or {}).items():
        if plain[name] != value:
            return f"{name} is not that of the event {EVENTS[name]}"
    return ""


def reference_problem(plain: dict[str, Any]) -> str:
    """Return in what a configuration is not the reference recipe on LibriSpeech, or nothing. For the rules files."""
    reference, plain = CONFIGS["librispeech-2018"].to_dict(), with_current_names(plain)
    fixed = [field for field in dataclasses.fields(Config) if not field.metadata["free_in_closed"]]
    names = [field.name for field in fixed if field.name in HYPERPARAMETERS]
    return ", ".join(f"{name} is not {reference[name]}" for name in names if plain.get(name) != reference[name])
