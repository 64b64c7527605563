"""Step time of the model on this machine, beside that of torch's own layers and the machine's limit.

    python -m tools.bench                                     for the librispeech configuration
    python -m tools.bench --config an4 --batch-size 16
    python -m tools.bench --hidden-size 256 --batch-size 8 --json
    OMP_NUM_THREADS=1 python -m tools.bench                   with one thread
    python -m tools.bench --estimate --config librispeech     how long training would take, from some real steps

All variants are timed in one process, in turn, after a warm-up of each, and medians are compared, so that a machine
that is busy with other things changes the ratios little. The batch is random: utterances of 2 to 4 s, 15 labels
a second, as read English has.

"Stock" is the same model from torch's own layers in fp32: nn.Conv2d, nn.BatchNorm1d, and nn.GRU on packed sequences.
The limit is the rate of one large matrix product (1024 rows and columns, on a GPU 8192) in the precision that `auto`
selects, measured in the same run. Operations are counted on valid frames only, as if every convolution were computed
directly.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from data.cli import exit_status
from pytorch.config import CONFIGS, Config, Device, Precision
from pytorch.device import faster_precision, select_device, select_precision
from pytorch.distributed import World, report_lost_ranks, shutdown, torchrun_env
from pytorch.errors import RunError
from pytorch.features import SAMPLE_RATE, frame_counts
from pytorch.layers.batch_norm import BatchNorm
from pytorch.layers.convolution import Convolution
from pytorch.layers.gru import GRU, has_triton_kernel, implementation
from pytorch.loader import Batch
from pytorch.model import OUTPUT_FREQUENCIES, DeepSpeech2, output_frames
from pytorch.trainer import Trainer
from pytorch.warmup import random_batch, time_precisions
from tools.estimate import estimate, processes_here

PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32")
PARTS = {  # part of the step -> what the profiler calls its operations
    "convolution": ("convolution", "Convolution"),
    "recurrent loop": ("Layer", "gru", "_cudnn_rnn"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::addmm_"),
    "batch norm": ("batch_norm", "_SyncBatchNorm"),
    "spectrogram": ("fft", "stft"),
    "CTC": ("ctc",),
    "optimizer": ("_foreach", "_fused", "clip_grad", "Optimizer"),
}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    config: str = "librispeech"
    """named configuration"""
    hidden_size: int | None = None
    """units per direction of a GRU layer; None: the configuration's"""
    batch_size: int | None = None
    """utterances of the batch; None: 8, or the configuration's with --estimate"""
    shortest_seconds: float = 2.0
    """duration of the shortest utterance of the batch"""
    longest_seconds: float = 4.0
    """duration of the longest utterance of the batch"""
    repetitions: int = 5
    """timed repetitions of each variant; medians are shown"""
    device: Device = "auto"
    """where to compute; auto: the GPU if there is one"""
    estimate: bool = False
    """take some real steps, and say how long training would take; needs no data set for LibriSpeech"""
    dataset_dir: Path | None = None
    """with --estimate: a prepared data set, whose utterances are used instead of noise"""
    epochs: int | None = None
    """with --estimate: epochs to the target; None: the number known for the configuration"""
    gradient_accumulation_steps: int | None = None
    """with --estimate: microbatches into which the batch is split; None: the configuration's"""
    json: bool = False
    """print one JSON object instead of a table"""


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


def batch_of(config: Config, count: int, shortest: float, longest: float, device: torch.device) -> Batch:
    """Return a random batch of utterances of evenly spread durations (s)."""
    return random_batch(config, (torch.linspace(shortest, longest, count) * SAMPLE_RATE).long(), device)


class Workload:
    """A model in training and a batch, ready to step."""

    def __init__(
        self, config: Config, batch: Batch, device: torch.device, precision: Precision, *, stock: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.trainer = Trainer(replace(config, precision=precision, ema_decay=0.0), device)
        self.batch = batch
        if stock:
            use_stock_layers(self.trainer.model)

    def forward(self) -> None:
        """Run forward only, with the loss."""
        with torch.inference_mode():
            self.trainer.model.eval()
            self.trainer.loss(self.batch)
            self.trainer.model.train()

    def step(self) -> None:
        """Run a whole training step."""
        self.trainer.train_step([self.batch], len(self.batch), self.trainer.config.learning_rate)


def time_interleaved(
    variants: Mapping[str, Callable[[], object]], repetitions: int, device: torch.device
) -> dict[str, float]:
    """Return the median seconds of each variant: all warmed up, then run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 1):
        for name, variant in variants.items():
            if device.type != "cpu":
                torch.accelerator.synchronize()
            started = time.perf_counter()
            variant()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if repetition > 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def matmul_flops(device: torch.device, precision: Precision, repetitions: int) -> float:
    """Return the operations per second of one large matrix product."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    seconds = time_interleaved({"product": lambda: torch.mm(left, right)}, repetitions * 4, device)
    return 2 * size**3 / seconds["product"]


def profile_step(workload: Workload) -> dict[str, float]:
    """Return the milliseconds of a step by part, from the profiler: own time of the operations, grouped."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler reports an error where there is no GPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    if workload.trainer.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        workload.step()
        if workload.trainer.device.type == "cuda":
            torch.cuda.synchronize()
    milliseconds = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a GPU's time is that of the operation that started it
        own = event.self_cpu_time_total if workload.trainer.device.type == "cpu" else event.self_device_time_total
        milliseconds[_part(event)] += own / 1000
    return milliseconds


def _part(event: Any) -> str:
    """Return the part of the innermost operation around an event that is in PARTS, but all of a convolution's."""
    part, inside = "the rest", event
    while inside is not None:
        found = next((part for part, names in PARTS.items() if any(name in inside.name for name in names)), None)
        if found == "convolution":
            return found
        if part == "the rest" and found is not None:
            part = found
        inside = inside.cpu_parent
    return part


def measure(config: Config, options: Options, device: torch.device) -> dict[str, Any]:
    """Return the figures of a configuration: its step in each precision, with stock layers, and the machine's limit."""
    batch = batch_of(config, config.batch_size, options.shortest_seconds, options.longest_seconds, device)
    ours = {precision: Workload(config, batch, device, precision) for precision in PRECISIONS}
    auto = select_precision("auto", device)
    if auto == "auto":
        auto = faster_precision(time_precisions(ours["fp32"].trainer))  # as a run does
    stock = Workload(config, batch, device, "fp32", stock=True)
    variants = {"stock_packed_step": stock.step, "stock_packed_forward": stock.forward}
    for precision, workload in ours.items():
        variants |= {f"{precision}_step": workload.step, f"{precision}_forward": workload.forward}
    if has_triton_kernel(device, config.hidden_size, "triton"):  # tested on this GPU or not
        for kernel in ("cudnn", "triton"):
            variants[f"bf16_{kernel}_gru_step"] = Workload(
                replace(config, gru_kernel=kernel), batch, device, "bf16"
            ).step
    seconds = time_interleaved(variants, options.repetitions, device)
    step, forward = seconds[f"{auto}_step"], seconds[f"{auto}_forward"]
    seconds |= {"auto_step": step, "auto_forward": forward}
    peak = matmul_flops(device, auto, options.repetitions)
    frames = int(output_frames(frame_counts(batch.num_samples_B)).sum())
    forward_flops, step_flops = training_flops(ours[auto].trainer.model, frames)
    return {
        "config": config.config,
        "hidden_size": config.hidden_size,
        "conv_channels": config.conv_channels,
        "batch_size": config.batch_size,
        "threads": torch.get_num_threads(),
        "recurrent_layers": implementation(device, auto, config.hidden_size),
        "auto_precision": auto,
        **{f"{name}_ms": 1000 * value for name, value in seconds.items()},
        "speedup": seconds["stock_packed_step"] / step,
        "fp32_speedup": seconds["stock_packed_step"] / seconds["fp32_step"],
        "forward_speedup": seconds["stock_packed_forward"] / forward,
        "fp32_forward_speedup": seconds["stock_packed_forward"] / seconds["fp32_forward"],
        "audio_seconds_per_second": float(batch.num_samples_B.sum()) / SAMPLE_RATE / step,
        "gemm_peak_gflops": peak / 1e9,
        "achieved_gflops": step_flops / step / 1e9,
        "fraction_of_peak": step_flops / step / peak,
        "forward_fraction_of_peak": forward_flops / forward / peak,
        "step_parts_ms": profile_step(ours[auto]),
        "stock_step_parts_ms": profile_step(stock),
    }


def table(row: dict[str, Any]) -> str:
    """Return the figures as lines for people."""
    lines = []
    for name, value in row.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {milliseconds:.1f}" for part, milliseconds in value.items())
        if isinstance(value, float):
            value = f"{value:.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
        lines.append(f"{name:<32}{value}")
    return "\n".join(lines)


def training_flops(model: DeepSpeech2, frames: int) -> tuple[float, float]:
    """Return the floating-point operations of a forward pass and of a training step on this many valid output frames.

    A multiplication with its addition counts as two. Each matrix is applied once a frame, and each convolution's kernel
    once a frame and output frequency. Batch norms, spectrogram, CTC and optimizer are left out.
    """
    conv1 = model.conv1.weight.numel() * (2 * OUTPUT_FREQUENCIES - 1)
    conv2 = model.conv2.weight.numel() * OUTPUT_FREQUENCIES
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    forward = 2.0 * frames * (conv1 + conv2 + matrices)
    return forward, 3 * forward - 2.0 * frames * conv1  # the features need no gradient


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(Options, args=arguments, prog="python -m tools.bench", description=__doc__)
    status = exit_status(lambda: benchmark(options, arguments))
    shutdown()
    return status


def benchmark(options: Options, arguments: list[str]) -> int:
    """Measure and print; return the exit status. The arguments are for ranks to be started.

    Raises:
        RunError: there is no such configuration or device, or a number is against its constraint.
        DataError: see `estimate`.
    """
    if options.config not in CONFIGS:
        raise RunError(f"--config {options.config}: unknown; one of {', '.join(CONFIGS)}")
    if options.repetitions < 1:
        raise RunError(f"--repetitions is {options.repetitions}; it must be a positive integer")
    if not 0 < options.shortest_seconds <= options.longest_seconds < 1000:
        seconds = f"{options.shortest_seconds} to {options.longest_seconds}"
        raise RunError(f"--shortest-seconds to --longest-seconds is {seconds}; it must be in (0, 1000), shortest first")
    only_estimate = "dataset_dir", "epochs", "gradient_accumulation_steps"
    never_estimate = "shortest_seconds", "longest_seconds", "repetitions"
    for name in never_estimate if options.estimate else only_estimate:
        if getattr(options, name) != getattr(Options, name):
            raise RunError(
                f"--{name.replace('_', '-')} {'does not go' if options.estimate else 'goes'} with --estimate"
            )
    if options.epochs is not None and options.epochs < 1:
        raise RunError(f"--epochs is {options.epochs}; it must be a positive integer")
    names = "device", "hidden_size", "batch_size", "gradient_accumulation_steps"
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config = replace(CONFIGS[options.config], **({} if options.estimate else {"batch_size": 8}) | given)
    device = select_device(options.device)
    ranks = torchrun_env("WORLD_SIZE", 1)
    if options.estimate and ranks == 1 and (processes := processes_here(config, options.dataset_dir)) > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        return subprocess.run([*torchrun, "-m", "tools.bench", *arguments]).returncode
    with report_lost_ranks():
        world = World.init(device.type, config.dist_timeout_seconds)
        device = select_device(options.device, world.local_rank)
        if options.estimate:
            row = estimate(config, device, options.dataset_dir, options.epochs, world)
        else:
            row = measure(config, options, device)
    if world.is_main:
        print(json.dumps(row, indent=2) if options.json else table(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
