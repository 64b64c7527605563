"""Configurations: every hyperparameter of a run, its default, and the rule that it obeys.

    python -m pytorch.config            prints the table of hyperparameters that README.md holds

A configuration is one `Config`. The named ones are in `CONFIGS`; any field can be changed on the command line of
`pytorch.train`, which refuses unknown names and values against the rule. The command line wins.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from pytorch.cli import RunError

ROOT = Path(__file__).resolve().parent.parent

Optimizer = Literal["adamw", "sgd", "muon"]
Schedule = Literal["cosine", "anneal"]
Precision = Literal["auto", "fp32", "bf16"]


class Rule(NamedTuple):
    """What values a hyperparameter may take: in words for people, as a predicate for the command line."""

    words: str
    holds: Callable[[Any], bool]


def _one_of(kind: Any) -> Rule:
    choices = typing.get_args(kind)
    return Rule(" or ".join(f"`{choice}`" for choice in choices), lambda value: value in choices)


POSITIVE_INTEGER = Rule("any positive integer", lambda value: value >= 1)
NON_NEGATIVE_INTEGER = Rule("any integer >= 0", lambda value: value >= 0)
POSITIVE = Rule("any number in (0, 1e30]", lambda value: 0 < value <= 1e30)  # float32 holds what steps make of it
NON_NEGATIVE = Rule("any number in [0, 1e30]", lambda value: 0 <= value <= 1e30)
FRACTION = Rule("any number in [0, 1)", lambda value: 0 <= value < 1)
PROBABILITY = Rule("any number in [0, 1]", lambda value: 0 <= value <= 1)
TEMPO = Rule("any number in [0.5, 2], minimum <= maximum", lambda value: 0.5 <= value <= 2)
DECIBELS = Rule("any number in [-60, 60], minimum <= maximum", lambda value: -60 <= value <= 60)
FREQUENCY_MASK = Rule("any integer in [0, 161]", lambda value: 0 <= value <= 161)
OPTIMIZER, SCHEDULE = _one_of(Optimizer), _one_of(Schedule)


def _field(default: Any, rule: Rule, *, tunable: bool = True) -> Any:
    return dataclasses.field(default=default, metadata={"rule": rule, "tunable": tunable})


@dataclass(frozen=True)
class Config:
    """A run, complete. The defaults are those of `librispeech` with its modern recipe."""

    config: tyro.conf.Suppress[str] = "librispeech"
    """Name of the configuration that the values started from."""
    recipe: tyro.conf.Suppress[str] = "modern"
    """Name of the recipe that the values started from."""

    # --- the run
    dataset_dir: Path = ROOT / "LibriSpeech_dataset"
    """Packed data set, as download_dataset.sh makes it."""
    output_dir: Path = ROOT / "results" / "librispeech"
    """Folder for checkpoint_best.pt, checkpoint_last.pt and checkpoint_previous.pt."""
    resume: bool = False
    """Go on from the newest checkpoint in the output folder."""
    resume_with_changes: bool = False
    """Resume even where configuration or data set differ from those of the checkpoint."""
    tensorboard: Path | None = None
    """Folder to write curves for TensorBoard into while the run goes on."""
    checkpoint_minutes: float = _field(30.0, POSITIVE, tunable=False)
    """Longest time between checkpoints, which there are after each epoch in any case."""
    collective_timeout_seconds: float = _field(600.0, POSITIVE, tunable=False)
    """How long processes wait for each other before one is taken for lost."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: the GPU if there is one."""
    precision: Precision = "auto"
    """Of the operands of matrix products and convolutions (sums, states, loss, batch norms and optimizer are always
    fp32); auto: bf16 where the device multiplies it natively. fp32 means TF32 on GPUs that have it."""
    seed: int = _field(1, NON_NEGATIVE_INTEGER)
    """Decides initial weights, data order and augmentation; a new one for every run."""
    target_wer: float = _field(23.0, NON_NEGATIVE)
    """Corpus word error rate, in percent, of all validation utterances at which the run stops."""
    max_epochs: int = _field(30, POSITIVE_INTEGER)
    """Give up after so many epochs."""
    max_steps: int | None = _field(None, POSITIVE_INTEGER)
    """Give up after so many optimizer steps, with an evaluation."""

    # --- the model
    hidden_size: int = _field(800, POSITIVE_INTEGER)
    """Units of each direction of each of the five GRU layers."""
    conv_channels: int = _field(32, POSITIVE_INTEGER)
    """Channels of both convolutions."""

    # --- optimisation
    batch_size: int = _field(128, POSITIVE_INTEGER)
    """Global batch size, in utterances: those of one optimizer step, on all devices."""
    gradient_accumulation_steps: int = _field(1, POSITIVE_INTEGER)
    """Parts that each device's share of the batch is computed in, one after another."""
    optimizer: Optimizer = _field("adamw", OPTIMIZER)
    """adamw, sgd with Nesterov momentum, or muon: Muon for the GRUs' weights and AdamW for all others."""
    learning_rate: float = _field(1e-3, POSITIVE)
    """Base (highest) learning rate."""
    schedule: Schedule = _field("cosine", SCHEDULE)
    """cosine: falls over schedule_epochs; anneal: divided by learning_rate_anneal after each epoch."""
    schedule_epochs: int = _field(15, POSITIVE_INTEGER)
    """Length of the cosine, in epochs."""
    final_learning_rate_fraction: float = _field(0.03, FRACTION)
    """Where the cosine ends, as a part of the learning rate."""
    learning_rate_anneal: float = _field(1.1, POSITIVE)
    """Divisor of the learning rate after each epoch, for schedule anneal."""
    warmup_steps: int = _field(1000, NON_NEGATIVE_INTEGER)
    """Steps over which the learning rate rises linearly."""
    beta1: float = _field(0.9, FRACTION)
    """AdamW's first coefficient; sgd's momentum."""
    beta2: float = _field(0.98, FRACTION)
    """AdamW's second coefficient."""
    weight_decay: float = _field(0.01, NON_NEGATIVE)
    """Decoupled weight decay of AdamW and Muon; L2 penalty of sgd."""
    gradient_clip_norm: float = _field(100.0, POSITIVE)
    """Largest norm of the gradient."""
    averaging_decay: float = _field(0.0, FRACTION)
    """Decay per step, in the end, of the moving average of the weights, which is what is evaluated; 0: no average."""

    # --- augmentation of training utterances
    augmentation_start_epoch: int = _field(1, POSITIVE_INTEGER)
    """First epoch with augmentation; those before it take the utterances as they are."""
    tempo_min: float = _field(0.85, TEMPO)
    """Slowest tempo."""
    tempo_max: float = _field(1.15, TEMPO)
    """Fastest tempo."""
    gain_min_db: float = _field(-6.0, DECIBELS)
    """Lowest gain."""
    gain_max_db: float = _field(8.0, DECIBELS)
    """Highest gain."""
    noise_probability: float = _field(0.0, PROBABILITY)
    """Part of the utterances that white noise is added to."""
    noise_min_snr_db: float = _field(10.0, DECIBELS)
    """Lowest ratio of the utterance's power to the noise's."""
    noise_max_snr_db: float = _field(30.0, DECIBELS)
    """Highest ratio of the utterance's power to the noise's."""
    frequency_masks: int = _field(2, NON_NEGATIVE_INTEGER)
    """SpecAugment: masks along frequency."""
    frequency_mask_bins: int = _field(27, FREQUENCY_MASK)
    """SpecAugment: widest mask along frequency, in bins."""
    time_masks: int = _field(10, NON_NEGATIVE_INTEGER)
    """SpecAugment: masks along time."""
    time_mask_fraction: float = _field(0.05, FRACTION)
    """SpecAugment: longest mask along time, as a part of the utterance."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            rule, value = field.metadata.get("rule"), getattr(self, field.name)
            if rule is not None and value is not None and not rule.holds(value):
                raise RunError(f"--{field.name.replace('_', '-')} is {value}; it must be {rule.words}")
        ranges = ("tempo_min", "tempo_max"), ("gain_min_db", "gain_max_db"), ("noise_min_snr_db", "noise_max_snr_db")
        for low, high in ranges:
            if getattr(self, low) > getattr(self, high):
                raise RunError(
                    f"--{low.replace('_', '-')} {getattr(self, low)} is above "
                    f"--{high.replace('_', '-')} {getattr(self, high)}"
                )

    def plain(self) -> dict[str, str | int | float | bool | None]:
        """Fields as plain values, for logs and checkpoints; paths inside the repository are relative to it."""
        return {key: _relative(value) if isinstance(value, Path) else value for key, value in vars(self).items()}


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _named(name: str, dataset: str, **values: Any) -> Config:
    return Config(config=name, dataset_dir=ROOT / dataset, output_dir=ROOT / "results" / name, **values)


# Widths and schedules differ; topology, features, labels, loss and metric never do.
CONFIGS: dict[str, Config] = {
    "librispeech": _named("librispeech", "LibriSpeech_dataset"),
    "librispeech-100": _named(
        "librispeech-100", "LibriSpeech-100_dataset", batch_size=64, schedule_epochs=40, max_epochs=60
    ),
    "mini": _named(
        "mini",
        "Mini_dataset",
        hidden_size=256,
        conv_channels=16,
        batch_size=16,
        schedule_epochs=60,
        max_epochs=80,
        warmup_steps=200,
    ),
    "an4": _named(
        "an4",
        "AN4_dataset",
        hidden_size=128,
        conv_channels=8,
        batch_size=6,
        optimizer="muon",
        learning_rate=1.5e-3,
        schedule_epochs=20,
        max_epochs=20,
        warmup_steps=30,
        weight_decay=0.1,
        averaging_decay=0.99,
        augmentation_start_epoch=6,
        gain_min_db=0.0,
        gain_max_db=0.0,
        frequency_mask_bins=20,
        time_masks=2,
    ),
    "synthetic": _named(
        "synthetic",
        "Synthetic_dataset",
        hidden_size=168,
        conv_channels=4,
        batch_size=6,
        optimizer="muon",
        learning_rate=1.5e-3,
        schedule_epochs=8,
        max_epochs=20,
        warmup_steps=30,
        weight_decay=0.1,
        averaging_decay=0.99,
        tempo_min=0.9,
        tempo_max=1.1,
        gain_min_db=0.0,
        gain_max_db=0.0,
        frequency_mask_bins=10,
        time_masks=2,
    ),
}

# The recipe of 2018 (REFERENCE: MLPerf v0.5 speech recognition). Its tempo and gain came from one `sox` process per
# utterance; ours are computed on the device.
REFERENCE_RECIPE: dict[str, Any] = {
    "recipe": "reference",
    "optimizer": "sgd",
    "learning_rate": 3e-4,
    "beta1": 0.9,
    "weight_decay": 0.0,
    "schedule": "anneal",
    "learning_rate_anneal": 1.1,
    "warmup_steps": 0,
    "gradient_clip_norm": 200.0,
    "averaging_decay": 0.0,
    "frequency_masks": 0,
    "time_masks": 0,
}
RECIPES = ("modern", "reference")


def parse_config(arguments: Sequence[str], *, program: str, description: str) -> Config:
    """Configuration from a command line: `[--config NAME] [--recipe NAME] [--any-field VALUE ...]`.

    Raises:
        RunError: unknown configuration or recipe, or a value against its rule. Unknown field names end the process with
            status 2 and a message, as is usual for command lines.
    """
    rest = list(arguments)
    name = _take(rest, "--config", tuple(CONFIGS), "librispeech")
    recipe = _take(rest, "--recipe", RECIPES, "modern")
    default = CONFIGS[name]
    if recipe == "reference":
        default = dataclasses.replace(default, **REFERENCE_RECIPE)
    return tyro.cli(
        Config,
        default=default,
        args=rest,
        prog=program,
        description=f"{description}\n\nFirst of all: --config {{{','.join(CONFIGS)}}} (default: librispeech) and "
        f"--recipe {{{','.join(RECIPES)}}} (default: modern) choose the defaults shown below; here: {name}, {recipe}.",
    )


def _take(arguments: list[str], option: str, choices: tuple[str, ...], default: str) -> str:
    """Take `option VALUE` or `option=VALUE` out of `arguments`: tyro needs the defaults before it parses the rest."""
    value = default
    for position, argument in enumerate(arguments):
        if argument == option:
            if position + 1 == len(arguments):
                raise RunError(f"{option} needs a value: one of {', '.join(choices)}")
            value = arguments[position + 1]
            del arguments[position : position + 2]
            break
        if argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
            del arguments[position]
            break
    if value not in choices:
        raise RunError(f"{option} {value}: unknown; one of {', '.join(choices)}")
    return value


def hyperparameter_table() -> str:
    """Markdown table of every hyperparameter that the command line takes: rule and default of each configuration."""
    names = list(CONFIGS)
    reference = dataclasses.replace(CONFIGS["librispeech"], **REFERENCE_RECIPE)
    rows = [
        f"| hyperparameter | rule | {' | '.join(names)} | librispeech, recipe `reference` |",
        "|" + "---|" * (len(names) + 3),
    ]
    for field in dataclasses.fields(Config):
        if not field.metadata.get("tunable"):
            continue
        rule = field.metadata["rule"]
        values = [getattr(config, field.name) for config in (*CONFIGS.values(), reference)]
        shown = " | ".join("none" if value is None else f"{value}" for value in values)
        rows.append(f"| `--{field.name.replace('_', '-')}` | {rule.words} | {shown} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(hyperparameter_table() + "\n")
