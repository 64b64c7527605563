"""What the command lines of tools/ share. tyro makes them of dataclasses; an error is one line (data/cli.py)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tyro

from data.cli import exit_status
from pytorch.config import CONFIGS, Config
from pytorch.errors import RunError


def command(
    module: str, description: str | None, form: Any, work: Callable[[Any], object] = lambda result: result
) -> Callable[..., int]:
    """Return the function `main` of a command, which takes a command line and returns the exit status.

    Args:
        module: what `python -m` starts.
        description: what the help begins with.
        form: a class whose fields are the options, or a function whose parameters they are, or one for each subcommand.
        work: takes the class's instance, or what the function has returned. A UserError that it raises is printed.
    """
    parse: Any = tyro.extras.subcommand_cli_from_dict if isinstance(form, dict) else tyro.cli
    program = f"python -m {module}"

    def main(arguments: Sequence[str] | None = None) -> int:
        return exit_status(lambda: work(parse(form, args=arguments, prog=program, description=description)), arguments)

    return main


def require_positive(**values: int) -> None:
    """Raise RunError where an option is not a positive integer."""
    for name, value in values.items():
        if value < 1:
            raise RunError(f"--{name.replace('_', '-')} is {value}; it must be a positive integer")


def config_of(options: Any) -> Config:
    """Return the configuration `options.config` with the hyperparameters among the options that are not None.

    RunError if there is none of that name, or a number is against its constraint.
    """
    if options.config not in CONFIGS:
        raise RunError(f"--config {options.config}: unknown; one of {', '.join(CONFIGS)}")
    names = "hidden_size", "batch_size", "gradient_accumulation_steps", "device"
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    return replace(CONFIGS[options.config], **given)


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """Print figures by their names: a line each for people, or one JSON object for scripts."""
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    for name, value in figures.items():
        if isinstance(value, float):
            value = f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
        print(f"{name:<32}{value}")
