"""Configurations: every hyperparameter of a run, its default, its constraint, and where it may differ.

A configuration is one `Config`. The named ones are in `CONFIGS`; any field can be changed on the command line of
`pytorch.train`, which refuses unknown names and values that break a constraint. The command line wins.
"""

import argparse
import dataclasses
import math
import os
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from mlperf_logging.mllog import constants

from pytorch.errors import RunError

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK_WER = 23.0  # the target of a LibriSpeech result

Optimizer = Literal["adamw", "sgd", "muon"]
Schedule = Literal["cosine", "anneal"]
Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda", "xpu"]
GRUKernel = Literal["auto", "cudnn", "triton"]

# Where a field may differ:
#   machine   between the processes of a run
#   session   when a run is resumed, and between the runs of a series
#   limit     when a run is resumed
#   training  nowhere, but --resume-with-changes allows it
#   model     nowhere: weights and the state of the optimizer would not fit
Scope = Literal["machine", "session", "limit", "training", "model"]


class Constraint(NamedTuple):
    """What values a field may take: in words for people, as a predicate for the command line."""

    text: str
    check: Callable[[Any], bool]


def _one_of(kind: Any) -> Constraint:
    choices = typing.get_args(kind)
    return Constraint(" or ".join(f"`{choice}`" for choice in choices), lambda value: value in choices)


POSITIVE_INTEGER = Constraint("any integer in [1, 2^31)", lambda value: 1 <= value < 2**31)
NON_NEGATIVE_INTEGER = Constraint("any integer in [0, 2^31)", lambda value: 0 <= value < 2**31)
SEED = Constraint("any integer in [0, 2^63)", lambda value: 0 <= value < 2**63)  # torch and the log take no larger one
POSITIVE = Constraint("any number in (0, 1e30]", lambda value: 0 < value <= 1e30)  # float32 holds what steps make of it
NON_NEGATIVE = Constraint("any number in [0, 1e30]", lambda value: 0 <= value <= 1e30)
DURATION = Constraint("any number in (0, 1e6]", lambda value: 0 < value <= 1e6)
FRACTION = Constraint("any number in [0, 1)", lambda value: 0 <= value < 1)
TEMPO = Constraint("any number in [0.5, 2], minimum <= maximum", lambda value: 0.5 <= value <= 2)
DECIBELS = Constraint("any number in [-60, 60], minimum <= maximum", lambda value: -60 <= value <= 60)
FREQUENCY_MASK = Constraint("any integer in [0, 161]", lambda value: 0 <= value <= 161)
OPTIMIZER, SCHEDULE = _one_of(Optimizer), _one_of(Schedule)


def _field(
    default: Any,
    constraint: Constraint | None = None,
    *,
    scope: Scope = "training",
    event: str | None = None,
    free_in_closed: bool = False,
) -> Any:
    """Declare a field.

    Args:
        default: that of `librispeech`.
        constraint: what values it may take.
        scope: where it may differ, see `Scope`.
        event: the MLPerf event that logs it, besides the event `configuration` that has every field.
        free_in_closed: whether MLPerf's closed division lets a submitter choose it.
    """
    metadata = {"constraint": constraint, "scope": scope, "event": event, "free_in_closed": free_in_closed}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunOptions:
    """What is trained on, where, and until when."""

    config: tyro.conf.Suppress[str] = _field("librispeech")
    """Name of the configuration that the values started from."""
    dataset_dir: Path = _field(ROOT / "LibriSpeech_dataset", scope="machine")
    """Packed data set, as download_dataset.sh makes it."""
    output_dir: Path = _field(ROOT / "results" / "librispeech", scope="machine")
    """Folder for checkpoint_best.pt, checkpoint_last.pt, checkpoint_previous.pt, the log and the report."""
    resume: bool = _field(False, scope="session")
    """Continue from the newest checkpoint in the output folder."""
    resume_with_changes: bool = _field(False, scope="session")
    """Resume even where configuration or data set differ from those of the checkpoint."""
    tensorboard: Path | None = _field(None, scope="machine")
    """Folder for TensorBoard curves, written during the run."""
    checkpoint_interval_minutes: float = _field(30.0, DURATION, scope="session")
    """Maximum minutes between checkpoints; one is always written after each epoch."""
    dist_timeout_seconds: float = _field(600.0, DURATION, scope="session")
    """Seconds that ranks wait for each other before one counts as lost."""
    device: Device = _field("auto", scope="machine")
    """Where to compute; auto: the GPU if there is one. cuda: NVIDIA and AMD; xpu: Intel."""
    precision: Precision = _field("auto")
    """Of matrix products and convolutions; auto: bf16 where the device has it."""
    gru_kernel: GRUKernel = _field("auto", scope="session")
    """What computes the GRUs on an NVIDIA GPU in bf16; auto: Triton on an H100 or H200, cuDNN on others."""
    seed: int = _field(1, SEED, event=constants.SEED, free_in_closed=True)
    """Determines initial weights, data order and augmentation; use a new one for every run."""
    target_wer: float = _field(BENCHMARK_WER, NON_NEGATIVE, scope="limit")
    """The run stops at this corpus word error rate, in percent, over all validation utterances."""
    max_epochs: int = _field(30, POSITIVE_INTEGER, scope="limit", free_in_closed=True)
    """Give up after this many epochs."""
    max_steps: int | None = _field(None, POSITIVE_INTEGER, scope="limit", free_in_closed=True)
    """Give up after this many optimizer steps, with a final evaluation."""


@dataclass(frozen=True)
class ModelOptions:
    """Widths; the topology is the same for all."""

    hidden_size: int = _field(800, POSITIVE_INTEGER, scope="model")
    """Units of each direction of each of the five GRU layers."""
    conv_channels: int = _field(32, POSITIVE_INTEGER, scope="model")
    """Channels of both convolutions."""


@dataclass(frozen=True)
class OptimizationOptions:
    """What makes a step of a batch."""

    batch_size: int = _field(128, POSITIVE_INTEGER, event=constants.GLOBAL_BATCH_SIZE, free_in_closed=True)
    """Global batch size: utterances of one optimizer step, on all devices."""
    gradient_accumulation_steps: int = _field(
        1, POSITIVE_INTEGER, event=constants.GRADIENT_ACCUMULATION_STEPS, free_in_closed=True
    )
    """Number of microbatches into which each device's share of the batch is split."""
    optimizer: Optimizer = _field("muon", OPTIMIZER, scope="model", event=constants.OPT_NAME)
    """adamw, sgd with Nesterov momentum, or muon: Muon for the GRUs' weights and AdamW for all others."""
    learning_rate: float = _field(1.5e-3, POSITIVE, event=constants.OPT_BASE_LR, free_in_closed=True)
    """Base (highest) learning rate."""
    schedule: Schedule = _field("cosine", SCHEDULE, event=constants.OPT_LR_DECAY_SCHEDULE)
    """cosine: falls over lr_decay_epochs; anneal: divided by lr_gamma after each epoch."""
    lr_decay_epochs: int = _field(15, POSITIVE_INTEGER)
    """Length of the cosine, in epochs."""
    min_lr_ratio: float = _field(0.03, FRACTION)
    """Where the cosine ends, as a fraction of the learning rate."""
    lr_gamma: float = _field(1.1, POSITIVE, free_in_closed=True)
    """Divisor of the learning rate after each epoch, for schedule anneal."""
    warmup_steps: int = _field(1000, NON_NEGATIVE_INTEGER, event=constants.OPT_LR_WARMUP_STEPS, free_in_closed=True)
    """Steps over which the learning rate rises linearly."""
    beta1: float = _field(0.9, FRACTION)
    """AdamW's first coefficient; sgd's momentum."""
    beta2: float = _field(0.98, FRACTION)
    """AdamW's second coefficient."""
    weight_decay: float = _field(0.1, NON_NEGATIVE, event=constants.OPT_WEIGHT_DECAY)
    """Decoupled weight decay of AdamW and Muon; L2 penalty of sgd."""
    gradient_clip_norm: float = _field(100.0, POSITIVE, event=constants.OPT_GRADIENT_CLIP_NORM)
    """Maximum norm of the gradient."""
    ema_decay: float = _field(0.99, FRACTION, event=constants.MODEL_EVAL_EMA_FACTOR)
    """Final decay per step of the exponential moving average of the weights, which is what is evaluated; 0: no EMA."""


@dataclass(frozen=True)
class AugmentationOptions:
    """Of training utterances, drawn anew in every epoch."""

    augment_from_epoch: int = _field(6, POSITIVE_INTEGER)
    """First epoch with augmentation; earlier epochs leave the utterances unchanged."""
    tempo_min: float = _field(0.85, TEMPO)
    """Slowest tempo."""
    tempo_max: float = _field(1.15, TEMPO)
    """Fastest tempo."""
    gain_min_db: float = _field(-6.0, DECIBELS)
    """Lowest gain."""
    gain_max_db: float = _field(8.0, DECIBELS)
    """Highest gain."""
    frequency_masks: int = _field(2, NON_NEGATIVE_INTEGER)
    """SpecAugment: masks along frequency."""
    frequency_mask_bins: int = _field(27, FREQUENCY_MASK)
    """SpecAugment: widest mask along frequency, in bins."""
    time_masks: int = _field(10, NON_NEGATIVE_INTEGER)
    """SpecAugment: masks along time."""
    time_mask_fraction: float = _field(0.05, FRACTION)
    """SpecAugment: longest mask along time, as a fraction of the utterance."""


@dataclass(frozen=True)
class Config(AugmentationOptions, OptimizationOptions, ModelOptions, RunOptions):
    """A run, complete: all groups, in the order of --help. The defaults are those of `librispeech`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            constraint, value = field.metadata["constraint"], getattr(self, field.name)
            if constraint is not None and value is not None and not constraint.check(value):
                raise RunError(f"--{field.name.replace('_', '-')} is {value}; it must be {constraint.text}")
        if self.resume_with_changes and not self.resume:
            raise RunError("--resume-with-changes has no effect without --resume; add it")
        for low, high in ("tempo_min", "tempo_max"), ("gain_min_db", "gain_max_db"):
            if getattr(self, low) > getattr(self, high):
                raise RunError(
                    f"--{low.replace('_', '-')} {getattr(self, low)} is above "
                    f"--{high.replace('_', '-')} {getattr(self, high)}"
                )

    def num_microbatches(self, world_size: int) -> int:
        """Return into how many microbatches a global batch is divided, on all ranks."""
        return world_size * self.gradient_accumulation_steps

    def max_microbatch_size(self, world_size: int) -> int:
        """Return the utterances of the largest microbatch."""
        return math.ceil(self.batch_size / self.num_microbatches(world_size))

    def to_dict(self) -> dict[str, str | int | float | bool | None]:
        """Return the fields as plain values, for logs and checkpoints; paths in the repository are relative to it."""
        return {key: _relative(value) if isinstance(value, Path) else value for key, value in vars(self).items()}


def fields_of(*scopes: Scope) -> list[str]:
    """Return the names of the fields that have one of these scopes."""
    return [field.name for field in dataclasses.fields(Config) if field.metadata["scope"] in scopes]


HYPERPARAMETERS = [
    field.name
    for field in dataclasses.fields(Config)
    if field.metadata["constraint"] is not None and field.metadata["scope"] != "session"
]
EVENTS = {field.name: field.metadata["event"] for field in dataclasses.fields(Config) if field.metadata["event"]}


def _relative(path: Path) -> str:
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return os.fsencode(path).decode(errors="backslashreplace")  # names are bytes, and need not be text


def _named(name: str, dataset: str, **values: Any) -> Config:
    return Config(config=name, dataset_dir=ROOT / dataset, output_dir=ROOT / "results" / name, **values)


# For corpora of a few minutes, of which an epoch has a hundred steps or so
_TINY: dict[str, Any] = {"batch_size": 6, "max_epochs": 20, "warmup_steps": 30, "time_masks": 2}
_TINY |= {"gain_min_db": 0.0, "gain_max_db": 0.0}

# Widths and schedules differ; topology, features, labels, loss and metric never do.
CONFIGS: dict[str, Config] = {
    "librispeech": _named("librispeech", "LibriSpeech_dataset"),
    "librispeech-100": _named(
        "librispeech-100", "LibriSpeech-100_dataset", target_wer=50.0, batch_size=64, lr_decay_epochs=40, max_epochs=60
    ),
    "mini": _named(
        "mini",
        "Mini-LibriSpeech_dataset",
        target_wer=85.0,
        hidden_size=256,
        conv_channels=16,
        batch_size=16,
        lr_decay_epochs=10,
        max_epochs=20,
        warmup_steps=100,
    ),
    "rehearsal": _named(
        "rehearsal",
        "Rehearsal_dataset",
        hidden_size=192,
        conv_channels=8,
        batch_size=8,
        lr_decay_epochs=4,
        max_epochs=10,
        warmup_steps=60,
    ),
    "an4": _named(
        "an4",
        "AN4_dataset",
        hidden_size=128,
        conv_channels=8,
        lr_decay_epochs=20,
        frequency_mask_bins=20,
        **_TINY,
    ),
    "synthetic": _named(
        "synthetic",
        "Synthetic_dataset",
        hidden_size=168,
        conv_channels=4,
        lr_decay_epochs=8,
        augment_from_epoch=1,
        tempo_min=0.9,
        tempo_max=1.1,
        frequency_mask_bins=10,
        **_TINY,
    ),
    # MLPerf v0.5 speech recognition, of 2018. Its tempo and gain came from one `sox` process per utterance;
    # ours are computed on the device.
    "librispeech-2018": _named(
        "librispeech-2018",
        "LibriSpeech_dataset",
        optimizer="sgd",
        learning_rate=3e-4,
        weight_decay=0.0,
        schedule="anneal",
        warmup_steps=0,
        gradient_clip_norm=200.0,
        ema_decay=0.0,
        augment_from_epoch=1,
        frequency_masks=0,
        time_masks=0,
    ),
}


def scaled(config: Config, batch_size: int) -> Config:
    """Return a configuration for another global batch size, by the rules that docs/recipes.md compares."""
    k = batch_size / config.batch_size
    return dataclasses.replace(
        config,
        batch_size=batch_size,
        learning_rate=config.learning_rate * math.sqrt(k),
        warmup_steps=round(config.warmup_steps / math.sqrt(k)),
        beta2=max(0.9, 1 - (1 - config.beta2) * k),
        ema_decay=config.ema_decay**k if config.ema_decay else 0.0,
    )


@dataclass(frozen=True)
class _CommandLine:
    """A configuration by groups, as --help shows it."""

    run: RunOptions
    model: ModelOptions
    optimization: OptimizationOptions
    augmentation: AugmentationOptions


def parse_config(arguments: Sequence[str], *, program: str, description: str) -> Config:
    """Parse a command line: `[--config NAME] [--scale-to-batch-size N] [--any-field VALUE ...]`.

    Raises:
        RunError: a value breaks its constraint. Unknown names end the process with status 2 and a message, as is usual
            for command lines.
    """
    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--config", choices=CONFIGS, default="librispeech")
    first.add_argument("--scale-to-batch-size", type=int)
    chosen, rest = first.parse_known_args(arguments)  # tyro needs the defaults before it parses the other options
    size, defaults = chosen.scale_to_batch_size, CONFIGS[chosen.config]
    if size is not None and not POSITIVE_INTEGER.check(size):
        raise RunError(f"--scale-to-batch-size is {size}; it must be {POSITIVE_INTEGER.text}")
    defaults = defaults if size is None else scaled(defaults, size)
    groups = [
        kind(**{field.name: getattr(defaults, field.name) for field in dataclasses.fields(kind)})
        for kind in reversed(Config.__bases__)
    ]
    parsed = tyro.cli(
        tyro.conf.OmitArgPrefixes[_CommandLine],
        default=_CommandLine(*groups),
        args=rest,
        prog=program,
        description=f"{description}\n\n--config {{{','.join(CONFIGS)}}} (default: librispeech) chooses the defaults "
        f"shown below; here: {chosen.config}. --scale-to-batch-size N changes them for another global batch size.",
    )
    return Config(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})
