"""Step time of the model on this machine, beside that of torch's own layers and the machine's limit.

    python -m tools.bench                                     for the librispeech configuration
    python -m tools.bench --config an4 --batch-size 16
    python -m tools.bench --hidden-size 256 --json
    OMP_NUM_THREADS=1 python -m tools.bench                   with one thread
    python -m tools.bench --table > BENCHMARKS.md             all that this page shows

Every step has a batch of its own, of noise with the durations that a batch of an epoch has: from `--shortest-seconds`
to `--longest-seconds` they rise from batch to batch. All variants take a batch in turn, in one process, so that a
machine that is busy with other things changes the ratios little; medians over the batches are compared.

"Stock" is the same model from torch's own layers in fp32: nn.Conv2d, nn.BatchNorm1d, and nn.GRU on packed sequences.
The limit is the rate of one large matrix product (1024 rows and columns, on a GPU 8192) in the precision that `auto`
selects, measured in the same run. Operations are counted on valid frames only, as if every convolution were computed
directly.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from data.cli import exit_status
from pytorch import machine
from pytorch.config import CONFIGS, Config, Device, Precision
from pytorch.device import faster_precision, select_device, select_precision
from pytorch.errors import RunError
from pytorch.features import SAMPLE_RATE, frame_counts
from pytorch.layers.batch_norm import BatchNorm
from pytorch.layers.convolution import Convolution
from pytorch.layers.gru import GRU, has_triton_kernel, implementation
from pytorch.loader import Batch
from pytorch.model import OUTPUT_FREQUENCIES, DeepSpeech2, output_frames
from pytorch.trainer import Trainer
from pytorch.warmup import random_batch, time_precisions

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    config: str = "librispeech"
    """named configuration"""
    hidden_size: int | None = None
    """units per direction of a GRU layer; None: the configuration's"""
    batch_size: int | None = None
    """utterances of a batch; None: 8"""
    shortest_seconds: float = 2.0
    """duration of the shortest utterance"""
    longest_seconds: float = 4.0
    """duration of the longest utterance"""
    repetitions: int = 5
    """timed batches"""
    device: Device = "auto"
    """where to compute; auto: the GPU if there is one"""
    json: bool = False
    """print one JSON object instead of lines"""
    table: bool = False
    """measure all cases of BENCHMARKS.md, and print that page"""


class Stock(nn.Module):
    """A layer of torch's own in the place of one of ours, with the parameters of that."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.ours = ours


class StockConvolution(Stock):
    def forward(self, input_BTFC: Tensor) -> Tensor:
        return nn.Conv2d.forward(self.ours, input_BTFC.permute(0, 3, 2, 1)).permute(0, 3, 2, 1).contiguous()


class StockBatchNorm(Stock):
    def forward(self, input_NC: Tensor) -> Tensor:
        return self.ours.clip(nn.BatchNorm1d.forward(self.ours, input_NC))


class StockGRU(Stock):
    def forward(self, sequence: PackedSequence, _offsets: Tensor | None = None) -> PackedSequence:
        outputs_NH = nn.GRU.forward(self.ours, sequence)[0].data.unflatten(1, (2, -1)).sum(1)
        return PackedSequence(outputs_NH, sequence.batch_sizes, sequence.sorted_indices, sequence.unsorted_indices)


def use_stock_layers(model: DeepSpeech2) -> None:
    """Replace the layers of a model by torch's own; the parameters stay the same tensors."""
    stock: dict[type, type[Stock]] = {Convolution: StockConvolution, BatchNorm: StockBatchNorm, GRU: StockGRU}
    for name, layer in list(model.named_modules()):
        if type(layer) in stock:
            model.set_submodule(name, stock[type(layer)](layer))


def batches_of(config: Config, options: Options, device: torch.device) -> list[Batch]:
    """Return random batches of rising durations, one for each repetition after one that warms up."""
    seconds = torch.linspace(options.shortest_seconds, options.longest_seconds, options.repetitions * config.batch_size)
    batches = [random_batch(config, each, device) for each in (seconds * SAMPLE_RATE).long().chunk(options.repetitions)]
    return [batches[-1], *batches]


class Workload:
    """A model in training, ready to step."""

    def __init__(self, config: Config, device: torch.device, precision: Precision, *, stock: bool = False) -> None:
        torch.manual_seed(0)
        self.trainer = Trainer(replace(config, precision=precision, ema_decay=0.0), device)
        if stock:
            use_stock_layers(self.trainer.model)

    def step(self, batch: Batch) -> None:
        """Take a whole training step."""
        self.trainer.train_step([batch], len(batch), self.trainer.config.learning_rate)


def time_interleaved(
    variants: Mapping[str, Callable[[Any], object]], batches: Sequence[Any], device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds that each variant takes for each batch but the first: in turn, batch by batch."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for batch in batches:
        for name, variant in variants.items():
            if device.type != "cpu":
                torch.accelerator.synchronize()
            started = time.perf_counter()
            variant(batch)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {name: times[1:] for name, times in seconds.items()}


def matmul_flops(device: torch.device, precision: Precision, repetitions: int) -> float:
    """Return the operations per second of one large matrix product."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = time_interleaved({"product": lambda _: torch.mm(left, right)}, range(repetitions * 4 + 1), device)
    return 2 * size**3 / statistics.median(seconds["product"])


def measure(config: Config, options: Options, device: torch.device) -> dict[str, Any]:
    """Return the figures of a configuration: its step in each precision, with stock layers, and the machine's limit."""
    batches = batches_of(config, options, device)
    ours = {precision: Workload(config, device, precision) for precision in PRECISIONS}
    auto = select_precision("auto", device)
    if auto == "auto":
        auto = faster_precision(time_precisions(ours["fp32"].trainer))  # as a run does
    stock = Workload(config, device, "fp32", stock=True)
    variants: dict[str, Callable[[Batch], None]] = {"stock": stock.step}
    variants |= {precision: workload.step for precision, workload in ours.items()}
    if has_triton_kernel(device, config.hidden_size, "triton"):  # proved on this GPU or not
        for kernel in ("cudnn", "triton"):
            variants[f"bf16_{kernel}_gru"] = Workload(replace(config, gru_kernel=kernel), device, "bf16").step
    times = time_interleaved(variants, batches, device)
    speech = [float(batch.num_samples_B.sum()) / SAMPLE_RATE for batch in batches[1:]]
    mean = statistics.mean(speech)  # of a batch; a disturbed step changes the median time for each second little
    seconds = {name: mean * statistics.median(np.divide(times[name], speech)) for name in times}
    step, peak = seconds[auto], matmul_flops(device, auto, options.repetitions)
    frames = [float(output_frames(frame_counts(batch.num_samples_B)).sum()) for batch in batches[1:]]
    flops = training_flops(ours[auto].trainer.model, statistics.mean(frames))
    return {
        "config": config.config,
        "hidden_size": config.hidden_size,
        "conv_channels": config.conv_channels,
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads(),
        "recurrent_layers": implementation(device, auto, config.hidden_size),
        "auto_precision": auto,
        **{f"{name}_step_ms": 1000 * value for name, value in seconds.items()},
        "auto_step_ms": 1000 * step,
        "speedup": seconds["stock"] / step,
        "fp32_speedup": seconds["stock"] / seconds["fp32"],
        "audio_seconds_per_second": mean / step,
        "gemm_peak_gflops": peak / 1e9,
        "achieved_gflops": flops / step / 1e9,
        "fraction_of_peak": flops / step / peak,
    }


def lines(row: dict[str, Any]) -> str:
    """Return the figures as lines for people."""
    found = []
    for name, value in row.items():
        if isinstance(value, float):
            value = f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
        found.append(f"{name:<32}{value}")
    return "\n".join(found)


def training_flops(model: DeepSpeech2, frames: float) -> float:
    """Return the floating-point operations of a training step on this many valid output frames.

    A multiplication with its addition counts as two. Each matrix is applied once a frame, and each convolution's kernel
    once a frame and output frequency. Batch norms, spectrogram, CTC and optimizer are left out.
    """
    conv1 = model.conv1.weight.numel() * (2 * OUTPUT_FREQUENCIES - 1)
    conv2 = model.conv2.weight.numel() * OUTPUT_FREQUENCIES
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    return 2.0 * frames * (3 * (conv1 + conv2 + matrices) - conv1)  # the features need no gradient


CASES = {  # rows of the page: what differs from `librispeech` with utterances of 2 to 4 s
    "`synthetic`": {"config": "synthetic", "batch_size": 6, "shortest_seconds": 1.5, "longest_seconds": 3.0},
    "`an4`": {"config": "an4", "batch_size": 6, "shortest_seconds": 1.5, "longest_seconds": 5.0},
    "`mini`": {"config": "mini", "batch_size": 16, "shortest_seconds": 8.0, "longest_seconds": 12.0},
    "`librispeech`, batch 8": {},
    "`librispeech`, batch 16": {"batch_size": 16, "shortest_seconds": 11.0, "longest_seconds": 14.0},
}
PAGE = """\
# Benchmarks

Written by `python -m tools.bench --table` on {date}, at commit {commit}. Every figure is *measured*, on this machine:

{machine}

A row is the median training step over {repetitions} batches of different lengths, in milliseconds. `auto` is what a run
would select. Stock is the same model from torch's own layers, in fp32. "x real time" is seconds of speech that `auto`
trains on in a second. "Of the limit" compares its operations with those of one large matrix product, measured as well.

| step | stock | fp32 | bf16 | auto | speedup | x real time | of the limit |
|---|---|---|---|---|---|---|---|
{rows}

Other programs took {others:.0%} of the CPU time meanwhile. `python -m tools.estimate` says how long a run takes."""


def page(options: Options, device: torch.device) -> str:
    """Return BENCHMARKS.md, with the figures of this machine."""
    before, rows = machine.cpu_seconds(), []
    for name, changes in CASES.items():
        chosen = replace(options, **changes)  # type: ignore[arg-type]
        row = measure(config_of(chosen), chosen, device)
        figures = [f"{row[f'{key}_step_ms']:.1f}" for key in ("stock", "fp32", "bf16")] + [row["auto_precision"]]
        speed = f"{row['audio_seconds_per_second']:.0f}", f"{row['fraction_of_peak']:.0%}"
        figures += [f"{row['speedup']:.1f} x", *speed]
        rows.append(f"| {name} | {' | '.join(figures)} |")
    spent = {name: value - before[name] for name, value in machine.cpu_seconds().items()}
    taken = max(0.0, spent.get("busy", 0.0) - spent.get("own", 0.0)) + spent.get("stolen", 0.0)
    commit, changed = machine.git_revision()
    return PAGE.format(
        date=f"{datetime.now():%Y-%m-%d}",
        commit=commit[:10] + (" with uncommitted changes" if changed else ""),
        machine="\n".join(f"- {name}: {value}" for name, value in machine.describe_machine(device).items()),
        repetitions=options.repetitions,
        rows="\n".join(rows),
        others=taken / (spent.get("all") or 1.0),
    )


def config_of(options: Options) -> Config:
    """Return the configuration to measure.

    Raises:
        RunError: there is none of that name, or a number is against its constraint.
    """
    if options.config not in CONFIGS:
        raise RunError(f"--config {options.config}: unknown; one of {', '.join(CONFIGS)}")
    if options.repetitions < 1:
        raise RunError(f"--repetitions is {options.repetitions}; it must be a positive integer")
    if not 0 < options.shortest_seconds <= options.longest_seconds < 1000:
        seconds = f"{options.shortest_seconds} to {options.longest_seconds}"
        raise RunError(f"--shortest-seconds to --longest-seconds is {seconds}; it must be in (0, 1000), shortest first")
    given: dict[str, Any] = {
        "hidden_size": options.hidden_size,
        "batch_size": 8 if options.batch_size is None else options.batch_size,
    }
    return replace(CONFIGS[options.config], **{name: value for name, value in given.items() if value is not None})


def benchmark(options: Options) -> int:
    """Measure and print; return the exit status.

    Raises:
        RunError: there is no such configuration or device, or a number is against its constraint.
    """
    config, device = config_of(options), select_device(options.device)
    if options.table:
        print(page(options, device))
        return 0
    row = measure(config, options, device)
    print(json.dumps(row, indent=2) if options.json else lines(row))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    options = tyro.cli(Options, args=arguments, prog="python -m tools.bench", description=__doc__)
    return exit_status(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
