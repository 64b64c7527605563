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

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pytorch import machine
from pytorch.config import Config, Device, Precision
from pytorch.device import select_device, select_precision
from pytorch.errors import RunError
from pytorch.features import SAMPLE_RATE, frame_counts
from pytorch.layers.batch_norm import BatchNorm
from pytorch.layers.convolution import Convolution
from pytorch.layers.gru import GRU, has_triton_kernel, implementation
from pytorch.loader import Batch
from pytorch.model import OUTPUT_FREQUENCIES, DeepSpeech2, output_frames
from pytorch.trainer import Trainer
from pytorch.warmup import random_batch
from tools.cli import command, config_of, print_figures, require_positive

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    config: str = "librispeech"
    """named configuration"""
    hidden_size: int | None = None
    """units per direction of a GRU layer; None: the configuration's"""
    batch_size: int = 8
    """utterances of a batch"""
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


def stock_convolution(layer: Convolution, input_BTFC: Tensor) -> Tensor:
    return nn.Conv2d.forward(layer, input_BTFC.permute(0, 3, 2, 1)).permute(0, 3, 2, 1).contiguous()


def stock_batch_norm(layer: BatchNorm, input_NC: Tensor) -> Tensor:
    return layer.clip(nn.BatchNorm1d.forward(layer, input_NC))


def stock_gru(layer: GRU, sequence: PackedSequence, _offsets: Tensor | None = None) -> PackedSequence:
    outputs_NH = nn.GRU.forward(layer, sequence)[0].data.unflatten(1, (2, -1)).sum(1)
    return PackedSequence(outputs_NH, sequence.batch_sizes, sequence.sorted_indices, sequence.unsorted_indices)


STOCK: dict[type, Callable[..., Any]] = {Convolution: stock_convolution, BatchNorm: stock_batch_norm, GRU: stock_gru}


def use_stock_layers(model: DeepSpeech2) -> None:
    """Have the layers of a model compute what torch's own do, of which they are subclasses."""
    for layer in model.modules():
        if type(layer) in STOCK:
            layer.forward = partial(STOCK[type(layer)], layer)


def batches_of(config: Config, options: Options, device: torch.device) -> list[Batch]:
    """Return random batches of rising durations, one for each repetition after one that warms up."""
    seconds = torch.linspace(options.shortest_seconds, options.longest_seconds, options.repetitions * config.batch_size)
    batches = [random_batch(config, each, device) for each in (seconds * SAMPLE_RATE).long().chunk(options.repetitions)]
    return [batches[-1], *batches]


def trainer_of(config: Config, device: torch.device, precision: Precision, *, stock: bool = False) -> Trainer:
    """Return a model in training, of our layers or of torch's own."""
    torch.manual_seed(0)
    trainer = Trainer(replace(config, precision=select_precision(precision, device), ema_decay=0.0), device)
    if stock:
        use_stock_layers(trainer.model)
    return trainer


def step(trainer: Trainer, batch: Batch) -> None:
    """Take a whole training step."""
    trainer.train_step([batch], len(batch), trainer.config.learning_rate)


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
    trainers: dict[str, Trainer] = {precision: trainer_of(config, device, precision) for precision in PRECISIONS}
    auto = select_precision("auto", device)
    variants: dict[str, Trainer] = {"stock": trainer_of(config, device, "fp32", stock=True), **trainers}
    if has_triton_kernel(device, config.hidden_size, "triton"):  # proved on this GPU or not
        for kernel in ("cudnn", "triton"):
            variants[f"bf16_{kernel}_gru"] = trainer_of(replace(config, gru_kernel=kernel), device, "bf16")
    times = time_interleaved({name: partial(step, each) for name, each in variants.items()}, batches, device)
    speech = [float(batch.num_samples_B.sum()) / SAMPLE_RATE for batch in batches[1:]]
    mean = statistics.mean(speech)  # of a batch; a disturbed step changes the median time for each second little
    seconds = {name: mean * statistics.median(np.divide(times[name], speech)) for name in times}
    auto_seconds, peak = seconds[auto], matmul_flops(device, auto, options.repetitions)
    frames = [float(output_frames(frame_counts(batch.num_samples_B)).sum()) for batch in batches[1:]]
    flops = training_flops(trainers[auto].model, statistics.mean(frames))
    return {
        "config": config.config,
        "hidden_size": config.hidden_size,
        "conv_channels": config.conv_channels,
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads(),
        "recurrent_layers": implementation(device, auto, config.hidden_size),
        "auto_precision": auto,
        **{f"{name}_step_ms": 1000 * value for name, value in seconds.items()},
        "auto_step_ms": 1000 * auto_seconds,
        "speedup": seconds["stock"] / auto_seconds,
        "fp32_speedup": seconds["stock"] / seconds["fp32"],
        "audio_seconds_per_second": mean / auto_seconds,
        "gemm_peak_gflops": peak / 1e9,
        "achieved_gflops": flops / auto_seconds / 1e9,
        "fraction_of_peak": flops / auto_seconds / peak,
    }


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
HEADER = """\
# Benchmarks

Written by `python -m tools.bench --table` on {date}, at commit {commit}. Every figure is *measured*, on this machine:

{machine}

A row is the median training step over {repetitions} batches of different lengths, in milliseconds. `auto` is what a run
would select. Stock is the same model from torch's own layers, in fp32. "x real time" is seconds of speech that `auto`
trains on in a second. "Of the limit" compares its operations with those of one large matrix product, measured as well.

| step | stock | fp32 | bf16 | auto | speedup | x real time | of the limit |
|---|---|---|---|---|---|---|---|"""
ROW = (
    "| {name} | {stock_step_ms:.1f} | {fp32_step_ms:.1f} | {bf16_step_ms:.1f} | {auto_precision} | {speedup:.1f} x | "
    "{audio_seconds_per_second:.0f} | {fraction_of_peak:.0%} |"
)


def print_page(options: Options, device: torch.device) -> None:
    """Print BENCHMARKS.md, with the figures of this machine."""
    before = machine.cpu_seconds()
    commit, changed = machine.git_revision()
    described = [f"- {name}: {value}" for name, value in machine.describe_machine(device).items()]
    facts = {"date": f"{datetime.now():%Y-%m-%d}", "machine": "\n".join(described), "repetitions": options.repetitions}
    print(HEADER.format(commit=commit[:10] + (" with uncommitted changes" if changed else ""), **facts))
    for name, changes in CASES.items():
        chosen = replace(options, **changes)  # type: ignore[arg-type]
        print(ROW.format(name=name, **measure(config_of(chosen), chosen, device)), flush=True)
    spent = {name: value - before[name] for name, value in machine.cpu_seconds().items()}
    taken = max(0.0, spent.get("busy", 0.0) - spent.get("own", 0.0)) + spent.get("stolen", 0.0)
    others = f"Other programs took {taken / (spent.get('all') or 1.0):.0%} of the CPU time meanwhile."
    print(f"\n{others} `python -m tools.estimate` says how long a run takes.")


def benchmark(options: Options) -> None:
    """Measure and print."""
    require_positive(repetitions=options.repetitions)
    if not 0 < options.shortest_seconds <= options.longest_seconds < 1000:
        seconds = f"{options.shortest_seconds} to {options.longest_seconds}"
        raise RunError(f"--shortest-seconds to --longest-seconds is {seconds}; it must be in (0, 1000), shortest first")
    config, device = config_of(options), select_device(options.device)
    if options.table:
        print_page(options, device)
    else:
        print_figures(measure(config, options, device), options.json)


main = command("tools.bench", __doc__, Options, benchmark)

if __name__ == "__main__":
    sys.exit(main())
