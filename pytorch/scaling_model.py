"""A model of a training step on many devices: operations, messages, waiting. `pytorch.scaling` prints what it says.

Nothing here was measured on a GPU. A step is computed from operations over a rate, from the latency of the recurrent
layers' time steps, and from messages of a latency and a bandwidth; waiting for the slowest rank is simulated with the
batches of `pytorch.batches` and utterance lengths drawn from published percentiles of LibriSpeech. docs/scaling.md says
where each constant comes from.

Axes: S steps, B utterances of a global batch, U of a rank's share, R ranks.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import mlperf_logging
import numpy as np
import torch

from data.corpora import CORPORA
from data.packed import Subset
from pytorch import batches
from pytorch.batches import Utterances, plan_epoch
from pytorch.bench import training_flops
from pytorch.config import CONFIGS
from pytorch.features import FREQUENCY_BINS, SAMPLE_RATE, frame_counts
from pytorch.model import GRU_LAYERS, OUTPUT_FREQUENCIES, DeepSpeech2, output_frames

Dealing = Literal["forth and back", "blocks", "at random"]  # the first is that of `pytorch.batches`

CONFIG = CONFIGS["librispeech"]
BYTES = 4  # of a gradient, and of the sums of a batch norm's backward pass
EPOCHS_AT_256 = 5.0  # to WER 23, AlgoPerf's recipe (README, section 5)
LARGE_HOURS = 60_000.0

# Percentiles of durations in seconds, from k2-fsa/icefall's egs/librispeech/ASR/local/display_manifest_statistics.py.
# Those of the training subsets are of speech at 0.9, 1 and 1.1 times its speed together.
PERCENTILES = (0, 0.1, 0.5, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 100)
DURATIONS = {
    "train-clean-100": (1.3, 1.9, 2.2, 2.5, 4.2, 6.4, 11.4, 13.8, 15.3, 16.7, 17.3, 18.1, 18.4, 18.8, 27.2),
    "train-clean-360": (1.0, 1.8, 2.2, 2.5, 4.2, 6.2, 11.2, 13.7, 15.3, 16.6, 17.3, 18.1, 18.4, 18.8, 33.0),
    "train-other-500": (0.8, 1.7, 2.1, 2.3, 3.5, 5.0, 9.8, 13.4, 15.1, 16.5, 17.2, 18.1, 18.4, 18.9, 31.0),
    "dev-clean": (1.4, 1.6, 1.8, 1.9, 2.4, 2.7, 3.8, 5.9, 9.3, 13.3, 16.4, 23.8, 28.5, 32.3, 32.6),
    "dev-other": (1.1, 1.3, 1.7, 1.8, 2.2, 2.6, 3.5, 5.3, 7.9, 12.0, 15.0, 22.2, 27.1, 32.4, 35.2),
}
TRAINING_HOURS = 960.9


@dataclass(frozen=True)
class Machine:
    """Constants of a kind of machine."""

    name: str = "8 x H100 a node, InfiniBand"
    """Heading of the tables."""
    ranks_per_node: int = 8
    """Devices, one process each."""
    peak: float = 989e12
    """Operations a second of a device (H100 SXM, bf16, dense)."""
    efficiency: float = 0.3
    """Part of it that large products and convolutions reach (assumed)."""
    recurrent_forward_seconds: float = 10e-6
    """Least time of one time step of one layer, both directions (assumed)."""
    recurrent_backward_seconds: float = 15e-6
    """The same, backward (assumed)."""
    memory_bandwidth: float = 3.35e12
    """Bytes a second, for the optimizer; infinite where the rate includes it."""
    largest_batch: int = 128
    """Utterances of one forward and backward pass; larger shares are accumulated (assumed to fit into memory)."""
    node_bandwidth: float = 0.8 * 450e9
    """Bytes a second of a device's links inside a node, one direction (NVLink 4; 80 % assumed)."""
    network_bandwidth: float = 0.8 * 400e9
    """Bytes a second of a node's network (8 x 400 Gbit/s; 80 % assumed)."""
    launch_seconds: float = 10e-6
    """Of each collective operation (assumed)."""
    node_latency: float = 2e-6
    """Of each of the 2 log2(ranks) steps inside a node (assumed)."""
    network_latency: float = 5e-6
    """Of each of the 2 log2(nodes) steps between nodes (assumed)."""


H100 = Machine()
H100_ETHERNET = replace(
    H100, name="8 x H100 a node, 100 Gbit/s Ethernet", network_bandwidth=0.8 * 12.5e9, network_latency=30e-6
)
MEASURED_STEP_SECONDS = 0.512  # BENCHMARKS.md, "A training step": 5 x 800, batch 8 of 2 to 4 s, two cores, bf16


def measured_cpu() -> Machine:
    """Two cores a node, at the measured rate of a whole step, on 10 Gbit/s Ethernet."""
    samples_B = (torch.linspace(2.0, 4.0, 8) * SAMPLE_RATE).long()
    rate = training_flops(CONFIG, samples_B)[1] / MEASURED_STEP_SECONDS
    return replace(
        H100_ETHERNET,
        name="2 CPU cores a node, 10 Gbit/s Ethernet",
        ranks_per_node=1,
        peak=rate,
        efficiency=1.0,
        recurrent_forward_seconds=0.0,
        recurrent_backward_seconds=0.0,
        memory_bandwidth=math.inf,
        largest_batch=8,
        network_bandwidth=0.8 * 1.25e9,
        launch_seconds=20e-6,
        network_latency=50e-6,
    )


@dataclass(frozen=True)
class Layer:
    """A layer: parameters with its batch norm's, multiplications for an output frame, normalised channels."""

    name: str
    parameters: int
    multiplications: int
    channels: int


@functools.cache
def model_layers() -> list[Layer]:
    """The layers of the benchmark's model, in the order of the forward pass."""
    with torch.device("meta"):
        model = DeepSpeech2(CONFIG.conv_channels, CONFIG.hidden_size)
    convolutions = [(model.conv1, model.norm1, -(-FREQUENCY_BINS // 2)), (model.conv2, model.norm2, OUTPUT_FREQUENCIES)]
    recurrent = [(gru, norm, 1) for gru, norm in zip(model.grus, model.norms, strict=True)]
    layers = []
    for number, (layer, norm, positions) in enumerate([*convolutions, *recurrent]):
        assert isinstance(norm, torch.nn.BatchNorm1d)
        name = f"convolution {number + 1}" if number < 2 else f"GRU {number - 1}"
        weights = sum(weight.numel() for weight in layer.parameters() if weight.dim() > 1)
        count = sum(weight.numel() for module in (layer, norm) for weight in module.parameters())
        layers.append(Layer(name, count, weights * positions, norm.num_features))
    classifier = model.classifier.weight.numel()
    return [*layers, Layer("linear", classifier, classifier, 0)]


def parameter_count() -> int:
    """Of the benchmark's model."""
    return sum(layer.parameters for layer in model_layers())


# --- messages


def all_reduce_bytes(size: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring all-reduce, or another one that needs the least bandwidth."""
    return 2 * (ranks - 1) / ranks * size


def all_reduce_seconds(machine: Machine, size: float, ranks: int) -> float:
    """Time of one all-reduce of `size` bytes: a tree's latency and a ring's bandwidth, as NCCL chooses them."""
    if ranks == 1:
        return 0.0
    inside, nodes = min(ranks, machine.ranks_per_node), math.ceil(ranks / machine.ranks_per_node)
    latency = 2 * math.log2(inside) * machine.node_latency + 2 * math.log2(nodes) * machine.network_latency
    bandwidth = min(machine.node_bandwidth, machine.network_bandwidth) if nodes > 1 else machine.node_bandwidth
    return machine.launch_seconds + latency + all_reduce_bytes(size, ranks) / bandwidth


def norm_bytes(channels: int) -> tuple[int, int]:
    """Bytes of a synchronised batch norm's messages: sums, squares and count (float64) forward; two sums backward."""
    return 8 * (2 * channels + 1), BYTES * 2 * channels


# --- a step


@dataclass(frozen=True)
class Step:
    """Mean seconds of a step, by what they go into."""

    compute: float  # mean over ranks
    waiting: float  # for the slowest rank
    norms: float  # messages of batch norms
    gradients: float  # the part of the gradients' all-reduce that no backward pass hides
    other: float  # optimizer; the messages of loss and flags

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.norms + self.gradients + self.other


def compute_seconds(machine: Machine, frames_SUR: np.ndarray, training: bool = True) -> np.ndarray:
    """Seconds [S, R] of each rank's passes, without messages.

    Args:
        machine: constants.
        frames_SUR: output frames, of each rank the longest first; 0 where a rank has fewer utterances.
        training: forward and backward, not forward only.
    """
    latency = machine.recurrent_forward_seconds + machine.recurrent_backward_seconds * training
    longest_SR = frames_SUR[:, :: machine.largest_batch].sum(1)  # of each pass
    return frames_SUR.sum(1) * flops_per_frame()[training] / (machine.peak * machine.efficiency) + (
        longest_SR * GRU_LAYERS * latency
    )


@functools.cache
def flops_per_frame() -> tuple[float, float]:
    """Operations for an output frame: forward; forward and backward."""
    samples_B = torch.tensor([10 * SAMPLE_RATE])
    frames = int(output_frames(frame_counts(samples_B)).sum())
    forward, step = training_flops(CONFIG, samples_B)
    return forward / frames, step / frames


def backward_messages(
    machine: Machine, frames: float, longest: float, ranks: int, own_group: bool
) -> tuple[float, float]:
    """Seconds that a backward pass waits for batch norms, and seconds that gradients take after its end.

    Each layer's gradient is one message, which starts when the layer is done and the one before has been sent; a batch
    norm's message is waited for at once. In a group of their own, batch norms do not queue behind gradients.

    Args:
        machine: constants.
        frames, longest: output frames of the pass, and of its longest utterance.
        ranks: how many.
        own_group: whether batch norms have a process group of their own.
    """
    now = sent = norms = 0.0
    for number, layer in reversed(list(enumerate(model_layers()))):
        if layer.channels:
            begin = now if own_group else max(now, sent)
            end = begin + all_reduce_seconds(machine, norm_bytes(layer.channels)[1], ranks)
            norms, now = norms + end - now, end
            sent = sent if own_group else end
        operations = 2.0 * layer.multiplications * (1 if number == 0 else 2)  # the features need no gradient
        now += operations * frames / (machine.peak * machine.efficiency)
        now += longest * machine.recurrent_backward_seconds * layer.name.startswith("GRU")
        sent = max(now, sent) + all_reduce_seconds(machine, BYTES * layer.parameters, ranks)
    return norms, max(0.0, sent - now)


def predict_step(machine: Machine, frames_SUR: np.ndarray, own_group: bool = True) -> Step:
    """The mean step of an epoch whose utterances are dealt like this."""
    _, utterances, ranks = frames_SUR.shape
    seconds_SR = compute_seconds(machine, frames_SUR)
    passes = math.ceil(utterances / machine.largest_batch)
    longest = float(frames_SUR[:, :: machine.largest_batch].mean())
    norms, gradients = backward_messages(machine, float(frames_SUR.sum(1).mean()) / passes, longest, ranks, own_group)
    # only the last pass sends gradients, so in the others norms queue behind nothing
    forward, undisturbed = norm_seconds(machine, ranks)
    norms += passes * forward + (passes - 1) * undisturbed
    # AdamW reads weight, gradient and two moments and writes all but the gradient; loss and flags are one message
    optimizer = 7 * BYTES * parameter_count() / machine.memory_bandwidth
    other = optimizer + all_reduce_seconds(machine, 24, ranks)
    compute = float(seconds_SR.mean())
    return Step(compute, float(seconds_SR.max(1).mean()) - compute, norms, gradients, other)


def norm_seconds(machine: Machine, ranks: int) -> tuple[float, float]:
    """Seconds of the batch norms' messages of a forward and of a backward pass, each sent at once."""
    sizes = [norm_bytes(layer.channels) for layer in model_layers() if layer.channels]
    forward, backward = (
        sum(all_reduce_seconds(machine, size, ranks) for size in way) for way in zip(*sizes, strict=True)
    )
    return forward, backward


# --- utterances and how they are dealt


@functools.cache
def published_utterances(split: str) -> Utterances:
    """As many utterances as LibriSpeech's training or validation set has, of lengths drawn from published percentiles.

    Training lengths are scaled to the published hours. There is no audio and no transcript.
    """
    random = np.random.default_rng(0)
    subsets = []
    for subset in CORPORA["librispeech"].subsets:
        if subset.split == split:
            places = random.uniform(0, 100, subset.utterances)
            subsets.append(np.interp(places, PERCENTILES, DURATIONS[subset.name]))
    seconds = np.sort(np.concatenate(subsets))
    if split == "train":
        seconds *= TRAINING_HOURS * 3600 / seconds.sum()
    return _silent_utterances(split, (seconds * SAMPLE_RATE).astype(np.int64))


def _silent_utterances(name: str, samples: np.ndarray) -> Utterances:
    """Utterances that have lengths only."""
    offsets = np.cumsum(samples) - samples
    return Utterances([Subset(name, np.empty(0, np.int16), offsets, samples, [""] * len(samples), [], [])])


@functools.cache
def dealt_places(batch: int, ranks: int) -> np.ndarray:
    """Places [U, R], in a batch sorted from short to long, of the utterances that each rank gets; -1 for none."""
    places_UR = np.full((math.ceil(batch / ranks), ranks), -1)
    by_length = _silent_utterances("places", np.arange(batch))
    for rank, places in enumerate(batches.deal(by_length, np.arange(batch), ranks)):
        places_UR[: len(places), rank] = places
    return places_UR


def deal(frames_SB: np.ndarray, ranks: int, how: Dealing = "forth and back") -> np.ndarray:
    """Utterances of each step dealt to ranks: frames [S, U, R], of each rank the longest first; 0 for none."""
    steps, batch = frames_SB.shape
    if how == "forth and back":
        ascending = np.concatenate([np.sort(frames_SB, axis=1), np.zeros((steps, 1), frames_SB.dtype)], axis=1)
        return ascending[:, dealt_places(batch, ranks)]
    share = math.ceil(batch / ranks)
    padded = np.zeros((steps, share * ranks), frames_SB.dtype)
    padded[:, :batch] = frames_SB
    padded = np.random.default_rng(0).permuted(padded, axis=1) if how == "at random" else -np.sort(-padded, axis=1)
    if how == "blocks":
        return padded.reshape(steps, ranks, share).transpose(0, 2, 1)
    return -np.sort(-padded.reshape(steps, share, ranks), axis=1)


@functools.cache
def epoch_frames(batch_size: int, full: bool = False) -> np.ndarray:
    """Output frames [S, B] of an epoch's batches as `plan_epoch` makes them; 0 where one is a little smaller.

    Args:
        batch_size: the largest batch.
        full: leave some utterances out, so that all batches are that large, as those of a much larger set are.
    """
    utterances = published_utterances("train")
    included = np.arange(len(utterances))
    if full:
        count = len(included) // batch_size * batch_size
        included = np.sort(np.random.default_rng(2).choice(included, count, replace=False))
    plan = plan_epoch(utterances, included, batch_size, 1, epoch=2)
    frames_N = output_frames(frame_counts(torch.from_numpy(utterances.samples))).numpy()
    frames_SB = np.zeros((len(plan), max(map(len, plan))), frames_N.dtype)
    for frames_B, batch in zip(frames_SB, plan, strict=True):
        frames_B[: len(batch)] = frames_N[batch]
    return frames_SB


def waiting_fraction(machine: Machine, frames_SUR: np.ndarray) -> float:
    """Part of all ranks' time that goes into waiting for the slowest of a step."""
    seconds_SR = compute_seconds(machine, frames_SUR)
    return float(1 - seconds_SR.mean() / seconds_SR.max(1).mean())


def reads_at_a_stretch(batch_size: int, epoch: int) -> float:
    """Utterances that lie side by side in the packed file, in the mean over an epoch's batches."""
    count = len(published_utterances("train"))
    plan = plan_epoch(published_utterances("train"), np.arange(count), batch_size, 1, epoch)
    return count / sum(1 + int((np.diff(np.sort(batch)) > 1).sum()) for batch in plan)


# --- epochs


@functools.cache
def evaluation_seconds(machine: Machine, ranks: int) -> float:
    """An evaluation of all validation utterances: the slowest rank, and the gathering of its counts and transcripts."""
    samples = torch.from_numpy(published_utterances("validation").samples)
    frames_SB = output_frames(frame_counts(samples)).numpy()[None]
    slowest = float(compute_seconds(machine, deal(frames_SB, ranks), training=False).max())
    return slowest + all_reduce_seconds(machine, gathered_bytes(), ranks)


def gathered_bytes() -> int:
    """Bytes of an evaluation's transcripts, at 15 characters a second, hypotheses and references, and 64 of counts."""
    utterances = published_utterances("validation")
    return int(2 * 15 * utterances.samples.sum() / SAMPLE_RATE + 64 * len(utterances))


@dataclass(frozen=True)
class Epoch:
    """A predicted epoch."""

    step: Step
    steps: int
    utterances: int
    evaluation: float

    @property
    def batch(self) -> float:
        """Utterances of the mean step: batches are cut evenly, so they may be smaller than was asked for."""
        return self.utterances / self.steps

    @property
    def training(self) -> float:
        """Seconds without the evaluation."""
        return self.step.total * self.steps

    @property
    def total(self) -> float:
        return self.training + self.evaluation


@functools.cache
def predict_epoch(machine: Machine, batch_size: int, ranks: int, own_group: bool = True) -> Epoch:
    """An epoch of LibriSpeech after the first, with its evaluation."""
    frames_SB = epoch_frames(batch_size)
    step = predict_step(machine, deal(frames_SB, ranks), own_group)
    return Epoch(step, len(frames_SB), len(published_utterances("train")), evaluation_seconds(machine, ranks))


@functools.cache
def predict_large_epoch(machine: Machine, batch_size: int, ranks: int) -> Epoch:
    """The same of 60,000 h of speech of the same lengths, without evaluation."""
    step = predict_step(machine, deal(epoch_frames(batch_size, full=True), ranks))
    utterances = round(len(published_utterances("train")) * LARGE_HOURS / TRAINING_HOURS)
    return Epoch(step, math.ceil(utterances / batch_size), utterances, evaluation=0.0)


@dataclass(frozen=True)
class BatchLaw:
    """Epochs to a target = least * (1 + batch / critical): arXiv 1812.06162, in epochs for examples."""

    least: float
    critical: float
    points: tuple[tuple[int, float], ...]

    def epochs(self, batch: float) -> float:
        """Epochs to MLPerf RNN-T's target."""
        return self.least * (1 + batch / self.critical)

    def deepspeech_epochs(self, batch: float) -> float:
        """Epochs to WER 23, with RNN-T's critical batch and the 5 epochs at batch 256 of AlgoPerf's recipe."""
        return EPOCHS_AT_256 * self.epochs(batch) / self.epochs(256)


@functools.cache
def batch_law() -> BatchLaw:
    """Least squares over the reference convergence points of MLPerf's RNN-T, which `mlperf-logging` holds."""
    file = Path(mlperf_logging.__file__).parent / "rcp_checker" / "training_3.1.0" / "rcps_rnnt.json"
    content = json.loads(file.read_text())
    points = sorted((point["BS"], float(np.mean(point["Epochs to converge"]))) for point in content.values())
    batches, epochs = np.array(points).T
    slope, least = np.polyfit(batches, epochs, 1)
    return BatchLaw(float(least), float(least / slope), tuple(points))


def seconds_to_target(machine: Machine, batch_size: int, ranks: int) -> float:
    """Predicted seconds to WER 23 on 960 h, with the part of the last epoch that is needed."""
    epoch = predict_epoch(machine, batch_size, ranks)
    return batch_law().deepspeech_epochs(epoch.batch) * epoch.total


def best_batch(machine: Machine, ranks: int) -> int:
    """The global batch, a power of two from 128 to 16,384, with the least predicted time to the target."""
    return min(
        (2**power for power in range(7, 15) if 2**power >= ranks), key=lambda b: seconds_to_target(machine, b, ranks)
    )
