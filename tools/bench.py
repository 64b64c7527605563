"""How fast this machine trains, and how far that is from its limit.

    python -m tools.bench                                     one table, for the librispeech configuration
    python -m tools.bench --config an4 --batch-size 16
    python -m tools.bench --hidden-size 256 --batch-size 8 --json
    python -m tools.bench --config an4 --sweep                also over threads, batch sizes, widths and durations
    python -m tools.bench --sweep --plot sweep.svg            the same, drawn

Everything is timed in one process, the variants in turn after a warm-up, and medians are compared, so that a machine
that is busy with other things changes the ratios little. The batch is made up: utterances of 2 to 4 s, 5 labels a
second.

"Stock" is the same model from torch's own layers in fp32: nn.Conv2d, and nn.GRU on packed sequences (or, where it says
so, on padded ones). The limit is the rate of one large matrix product (1024 x 1024 x 1024) of the step's precision,
measured in the same run; operations are counted on valid frames only, as if every convolution were computed directly.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from data.packed import Subset
from pytorch.cli import RunError, exit_status
from pytorch.config import CONFIGS, Config, Precision
from pytorch.ctc import LABELS
from pytorch.device import select_device, select_precision
from pytorch.features import FREQUENCY_BINS, SAMPLE_RATE, draw_augmentation, frame_counts
from pytorch.layers import gru, kernels
from pytorch.layers.batch_norm import BatchNorm
from pytorch.layers.convolution import Convolution
from pytorch.loader import Batch, Utterances, make_batch, prefetch
from pytorch.model import GRU_LAYERS, OUTPUT_FREQUENCIES, DeepSpeech2, output_frames
from pytorch.trainer import Trainer

PARTS = {  # part of the step -> what the profiler calls its operations
    "convolution": ("convolution", "Convolution"),
    "recurrent loop": ("_Layer", "gru", "_cudnn_rnn"),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::addmm_"),
    "batch norm": ("batch_norm", "_SyncBatchNorm"),
    "spectrogram": ("fft", "stft"),
    "CTC": ("ctc",),
    "optimizer": ("_foreach", "_fused", "clip_grad", "Optimizer"),
}


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    config: str = "librispeech"
    """Named configuration."""
    hidden_size: int | None = None
    """Instead of the configuration's."""
    batch_size: int | None = 8
    """Instead of the configuration's."""
    shortest_seconds: float = 2.0
    """Duration of the shortest utterance of the batch."""
    longest_seconds: float = 4.0
    """Duration of the longest utterance of the batch."""
    repetitions: int = 5
    """Timed repetitions of each variant; medians are shown."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: Precision = "auto"
    """auto: bf16 where the device multiplies it natively."""
    sweep: bool = False
    """Also measure over threads, batch sizes, widths and durations."""
    plot: Path | None = None
    """Draw the sweep into this file (.svg, .png or .pdf); needs matplotlib."""
    json: bool = False
    """Print one JSON object instead of tables."""


class StockGRU(nn.GRU):
    """torch's own layer, on packed sequences, directions summed."""

    def forward(self, sequence: PackedSequence) -> PackedSequence:  # type: ignore[override]
        data = super().forward(sequence)[0].data.unflatten(-1, (-1, self.hidden_size)).sum(1)
        return PackedSequence(data, sequence.batch_sizes, sequence.sorted_indices, sequence.unsorted_indices)


class StockPaddedGRU(nn.GRU):
    """torch's own layer, on padded sequences: what is behind an utterance's end is computed as well."""

    def forward(self, sequence: PackedSequence) -> PackedSequence:  # type: ignore[override]
        inputs_TBI, lengths_B = pad_packed_sequence(PackedSequence(sequence.data, sequence.batch_sizes))
        outputs_TBH = super().forward(inputs_TBI)[0].unflatten(-1, (-1, self.hidden_size)).sum(2)
        return pack_padded_sequence(outputs_TBH, lengths_B)


class StockConvolution(nn.Conv2d):
    """torch's own layer, with the interface of `Convolution`."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 3, 2, 1)).permute(0, 3, 2, 1).contiguous()


class StockBatchNorm(BatchNorm):
    """torch's own layer, and its clipping behind it."""

    def forward(self, input: Tensor) -> Tensor:
        return self.clip(nn.BatchNorm1d.forward(self, input))


def stock(model: DeepSpeech2, layer: type[nn.GRU] = StockGRU) -> DeepSpeech2:
    """The same model with the same weights, from torch's own layers. The modules are converted in place."""
    for module in model.modules():
        if isinstance(module, gru.GRU):
            module.__class__ = layer  # type: ignore[assignment]
        elif isinstance(module, Convolution):
            module.__class__ = StockConvolution  # type: ignore[assignment]
        elif isinstance(module, BatchNorm):
            module.__class__ = StockBatchNorm  # type: ignore[assignment]
    return model


def random_batch(config: Config, count: int, shortest: float, longest: float) -> Batch:
    """Noise of evenly spread durations, with random transcripts of 5 labels a second."""
    generator = torch.Generator().manual_seed(0)
    num_samples_B = (torch.linspace(shortest, longest, count) * SAMPLE_RATE).long()
    waveforms_BS = torch.randint(-1000, 1000, (count, int(num_samples_B.max())), dtype=torch.int16, generator=generator)
    waveforms_BS[torch.arange(waveforms_BS.shape[1]) >= num_samples_B[:, None]] = 0
    lengths_B = (num_samples_B * 5 // SAMPLE_RATE).clamp(min=1)
    targets = torch.randint(1, len(LABELS), (int(lengths_B.sum()),), generator=generator)
    seeds = np.stack([np.arange(count)] * 2, axis=1)
    still = replace(config, tempo_min=1.0, tempo_max=1.0)  # so that durations are what was asked for
    augmentation = draw_augmentation(still, seeds, np.full(count, np.inf))
    return Batch(np.arange(count), waveforms_BS, num_samples_B, targets, lengths_B, [""] * count, augmentation)


def training_flops(config: Config, num_samples_B: Tensor) -> tuple[float, float]:
    """Floating-point operations (two for a multiplication with addition) of a forward pass and of a training step."""
    frames = int(output_frames(frame_counts(num_samples_B)).sum())
    channels, hidden = config.conv_channels, config.hidden_size
    conv1 = -(-FREQUENCY_BINS // 2) * channels * 41 * 11
    conv2 = OUTPUT_FREQUENCIES * channels * channels * 21 * 11
    inputs = OUTPUT_FREQUENCIES * channels + hidden * (GRU_LAYERS - 1)
    recurrent = 2 * 3 * hidden * (inputs + hidden * GRU_LAYERS)
    forward = 2.0 * frames * (conv1 + conv2 + recurrent + hidden * len(LABELS))
    return forward, 3 * forward - 2.0 * frames * conv1  # the features need no gradient


def time_interleaved(variants: Sequence[Callable[[], object]], repetitions: int, device: torch.device) -> list[float]:
    """Median seconds of each variant: all warmed up, then run in turn."""
    seconds: list[list[float]] = [[] for _ in variants]
    for repetition in range(repetitions + 1):
        for variant, times in zip(variants, seconds, strict=True):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            variant()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repetition > 0:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


class Workload:
    """A model in training and a batch, ready to step."""

    def __init__(
        self, config: Config, batch: Batch, device: torch.device, precision: Precision, stock_gru: type | None = None
    ) -> None:
        torch.manual_seed(0)
        self.trainer = Trainer(replace(config, precision=precision, ema_decay=0.0), device)
        self.batch = batch
        if stock_gru is not None:
            stock(self.trainer.model, stock_gru)

    def infer(self) -> None:
        """Forward only, with the loss."""
        with torch.inference_mode():
            self.trainer.model.eval()
            self.trainer.loss(self.batch)
            self.trainer.model.train()

    def step(self) -> None:
        """A whole training step."""
        self.trainer.train_step([self.batch], len(self.batch), self.trainer.config.learning_rate)


def gemm_peak(device: torch.device, precision: Precision, repetitions: int) -> float:
    """Operations per second of one large matrix product."""
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    (seconds,) = time_interleaved([lambda: torch.mm(left, right)], repetitions * 4, device)
    return 2 * size**3 / seconds


def profile_step(workload: Workload) -> dict[str, float]:
    """Milliseconds of a step by part, from the profiler: own time of the operations, grouped."""
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
    """The part of the innermost of this operation and those around it that is in PARTS, but all of a convolution's."""
    part, inside = "the rest", event
    while inside is not None:
        found = next((part for part, names in PARTS.items() if any(name in inside.name for name in names)), None)
        if found == "convolution":
            return found
        if part == "the rest" and found is not None:
            part = found
        inside = inside.cpu_parent
    return part


def data_wait(workload: Workload, steps: int) -> float:
    """Part of the time of some steps that is spent waiting for their batches, made in the background as in a run."""
    batch = workload.batch
    samples = batch.num_samples_B.numpy()
    audio = np.concatenate([row[:length] for row, length in zip(batch.waveforms_BS.numpy(), samples, strict=True)])
    count = len(samples)
    transcripts = ["A" * int(length) for length in batch.target_lengths_B]
    offsets = np.cumsum(samples) - samples
    utterances = Utterances([Subset("noise", audio, offsets, samples, [""] * count, [""] * count, transcripts)])
    augment, pinned = (workload.trainer.config, 1), workload.trainer.device.type == "cuda"
    batches = prefetch(
        [np.arange(count)] * (steps + 1), partial(make_batch, utterances, augment=augment, pin_memory=pinned)
    )
    next(batches)
    workload.step()  # time for the reader to get ahead, as it has in all steps of an epoch but the first
    waiting, started = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        workload.batch = next(batches)
        waiting += time.perf_counter() - asked
        workload.step()
        if pinned:
            torch.cuda.synchronize()
    workload.batch = batch
    return waiting / (time.perf_counter() - started)


def measure(config: Config, arguments: Arguments, device: torch.device) -> dict[str, Any]:
    """One row: this configuration's step against stock layers and against the machine's limit."""
    batch = random_batch(config, config.batch_size, arguments.shortest_seconds, arguments.longest_seconds)
    precision = select_precision(arguments.precision, device)
    ours, ours_fp32 = Workload(config, batch, device, precision), Workload(config, batch, device, "fp32")
    packed, padded = (Workload(config, batch, device, "fp32", layer) for layer in (StockGRU, StockPaddedGRU))
    variants = [ours.step, packed.step, padded.step, ours.infer, packed.infer]
    variants += [ours_fp32.step, ours_fp32.infer] if precision != "fp32" else []
    seconds = time_interleaved(variants, arguments.repetitions, device)
    step, stock_step, padded_step, infer, stock_infer = seconds[:5]
    fp32_step, fp32_infer = seconds[5:] or (step, infer)
    peak = gemm_peak(device, precision, arguments.repetitions)
    forward_flops, step_flops = training_flops(config, batch.num_samples_B)
    audio_seconds = float(batch.num_samples_B.sum()) / SAMPLE_RATE
    return {
        "config": config.config,
        "hidden_size": config.hidden_size,
        "conv_channels": config.conv_channels,
        "batch_size": config.batch_size,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "recurrent_layers": "cuDNN" if device.type == "cuda" else kernels.status(),
        "step_ms": 1000 * step,
        "stock_packed_step_ms": 1000 * stock_step,
        "stock_padded_step_ms": 1000 * padded_step,
        "speedup": stock_step / step,
        "fp32_speedup": stock_step / fp32_step,
        "padded_speedup": padded_step / step,
        "forward_ms": 1000 * infer,
        "forward_speedup": stock_infer / infer,
        "fp32_forward_speedup": stock_infer / fp32_infer,
        "audio_seconds_per_second": audio_seconds / step,
        "gemm_peak_gflops": peak / 1e9,
        "achieved_gflops": step_flops / step / 1e9,
        "fraction_of_peak": step_flops / step / peak,
        "forward_fraction_of_peak": forward_flops / infer / peak,
        "data_wait_fraction": data_wait(ours, arguments.repetitions),
        "parts": profile_step(ours),
        "stock_parts": profile_step(packed),
    }


def sweep(config: Config, arguments: Arguments, device: torch.device) -> list[dict[str, Any]]:
    """Rows over threads, batch sizes, hidden sizes and durations, one changed at a time: what, and its value."""
    rows = []
    threads = torch.get_num_threads()
    if device.type == "cpu":
        for count in sorted({1, 2, 4, 8, 16, 32, threads} & set(range(1, threads + 1))):
            torch.set_num_threads(count)
            rows.append(measure(config, arguments, device) | {"swept": "threads", "value": count})
        torch.set_num_threads(threads)
    for count in (1, 4, 8, 16, 32):
        changed = replace(config, batch_size=count)
        rows.append(measure(changed, arguments, device) | {"swept": "utterances in a batch", "value": count})
    for count in (96, 192, 256, 512, 800):
        changed = replace(config, hidden_size=count)
        rows.append(measure(changed, arguments, device) | {"swept": "hidden size", "value": count})
    for longest in (4.0, 8.0, 16.0):
        longer = replace(arguments, shortest_seconds=longest / 2, longest_seconds=longest)
        rows.append(measure(config, longer, device) | {"swept": "seconds of the longest utterance", "value": longest})
    return rows


def table(row: dict[str, Any]) -> str:
    """A row for people."""
    lines = [
        f"configuration {row['config']}: 5 x {row['hidden_size']}, {row['conv_channels']} channels, "
        f"batch {row['batch_size']}, {row['precision']}, {row['threads']} threads, {row['recurrent_layers']}",
        f"training step    {row['step_ms']:9.1f} ms   stock layers {row['stock_packed_step_ms']:9.1f} ms   "
        f"{row['speedup']:.2f} x as fast ({row['fp32_speedup']:.2f} x in fp32; {row['padded_speedup']:.2f} x padded "
        f"ones)",
        f"forward only     {row['forward_ms']:9.1f} ms   {row['forward_speedup']:.2f} x as fast as stock layers",
        f"waits for data   {row['data_wait_fraction']:9.1%}",
        f"trains {row['audio_seconds_per_second']:.0f} s of speech a second",
        f"{row['achieved_gflops']:.0f} of {row['gemm_peak_gflops']:.0f} GFLOP/s of a large matrix product: "
        f"{row['fraction_of_peak']:.0%}",
        *(
            f"{title} (ms, profiled): " + ", ".join(f"{name} {value:.0f}" for name, value in row[key].items())
            for title, key in (("by part", "parts"), ("stock layers", "stock_parts"))
        ),
    ]
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw how a step's time grows with each thing that was swept, ours and stock, into a file.

    Raises:
        RunError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError("--plot needs matplotlib: pip install matplotlib") from error
    swept = list(dict.fromkeys(row["swept"] for row in rows))
    figure = Figure(figsize=(4 * len(swept), 3.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(swept), squeeze=False)[0], swept, strict=True):
        points = sorted((row["value"], row) for row in rows if row["swept"] == name)
        values = [value for value, _ in points]
        for key, label, marker in (("stock_packed_step_ms", "stock layers", "s"), ("step_ms", "this model", "o")):
            axes.loglog(values, [row[key] for _, row in points], marker=marker, label=label)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        axes.set_xlabel(name)
        axes.set_ylabel("training step (ms)")
        axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise RunError(f"--plot {path}: {error}") from error


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = tyro.cli(Arguments, prog="python -m tools.bench", description=__doc__)
    return exit_status(lambda: benchmark(arguments))


def benchmark(arguments: Arguments) -> None:
    """Measure and print what was asked for.

    Raises:
        RunError: there is no such configuration or device, a number is against its rule, or the plot cannot be drawn.
    """
    if arguments.plot is not None and not arguments.sweep:
        raise RunError("--plot draws a sweep: give --sweep as well")
    if arguments.config not in CONFIGS:
        raise RunError(f"--config {arguments.config}: unknown; one of {', '.join(CONFIGS)}")
    config = CONFIGS[arguments.config]
    if arguments.repetitions < 1:
        raise RunError(f"--repetitions is {arguments.repetitions}; it must be any positive integer")
    given = {"hidden_size": arguments.hidden_size, "batch_size": arguments.batch_size}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    device = select_device(arguments.device)
    row = measure(config, arguments, device)
    rows = sweep(config, arguments, device) if arguments.sweep else []
    if arguments.plot is not None:
        draw(rows, arguments.plot)
    if arguments.json:
        print(json.dumps(row | {"sweep": rows} if rows else row, indent=2))
        return
    print(table(row))
    for swept in rows:
        print(
            f"{swept['swept']:>32} {swept['value']:5g}: {swept['step_ms']:9.1f} ms a step, "
            f"{swept['speedup']:.2f} x stock, {swept['audio_seconds_per_second']:6.0f} s of speech a second, "
            f"{swept['fraction_of_peak']:.0%} of the limit"
        )


if __name__ == "__main__":
    sys.exit(main())
