"""What many devices would make of a run: the tables of docs/scaling.md.

    python -m pytorch.scaling                                     all tables, for 8 H100 a node with InfiniBand
    python -m pytorch.scaling --machine.recurrent-forward-seconds 5e-6 --machine.efficiency 0.4
    python -m pytorch.scaling --update docs/scaling.md            write the tables into the document

All of it is computed or simulated (`pytorch/scaling_model.py`); nothing was measured on a GPU.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from pytorch.command import exit_status
from pytorch.config import RunError
from pytorch.features import SAMPLE_RATE
from pytorch.scaling_model import (
    BYTES,
    H100,
    H100_ETHERNET,
    LARGE_HOURS,
    TRAINING_HOURS,
    Layer,
    Machine,
    all_reduce_bytes,
    all_reduce_seconds,
    batch_law,
    best_batch,
    deal,
    epoch_frames,
    gathered_bytes,
    measured_cpu,
    model_layers,
    norm_bytes,
    norm_seconds,
    parameter_count,
    predict_epoch,
    predict_large_epoch,
    published_utterances,
    reads_at_a_stretch,
    seconds_to_target,
    waiting_fraction,
)

RANKS = tuple(2**power for power in range(11))
READ_AHEAD = 128 * 1024  # bytes that Linux reads of a mapped file at a time, unless told otherwise


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def number(value: float, digits: int = 3) -> str:
    """With so many digits that count, and no exponent."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def percent(value: float) -> str:
    """A fraction, in percent."""
    return f"{100 * value:.1f} %"


def table_model(machine: Machine) -> str:
    """Layers: parameters, bytes, operations, messages of their batch norms."""
    layers = model_layers()
    total = Layer(
        "all",
        parameter_count(),
        sum(layer.multiplications for layer in layers),
        sum(layer.channels for layer in layers),
    )
    rows = []
    for layer in [*layers, total]:
        megabytes, operations = BYTES * layer.parameters / 1e6, 2 * layer.multiplications / 1e6
        rows.append([layer.name, f"{layer.parameters:,}", number(megabytes), number(operations), layer.channels])
    return markdown(["layer", "parameters", "gradient, MB", "forward, MFLOP a frame", "normalised channels"], rows)


def table_communication(machine: Machine) -> str:
    """Bytes that a rank sends in a step and in an evaluation, and times of the messages."""
    rows = []
    for ranks in RANKS[1:]:
        size = BYTES * parameter_count()
        norms = sum(sum(norm_bytes(layer.channels)) for layer in model_layers() if layer.channels)
        rows.append(
            [
                ranks,
                number(all_reduce_bytes(size, ranks) / 1e6),
                number(all_reduce_bytes(norms, ranks) / 1e3),
                number(all_reduce_bytes(gathered_bytes(), ranks) / 1e6),
                *(
                    number(1000 * all_reduce_seconds(each, size, ranks))
                    for each in (machine, H100_ETHERNET, measured_cpu())
                ),
                *(number(1000 * sum(norm_seconds(each, ranks))) for each in (machine, H100_ETHERNET, measured_cpu())),
            ]
        )
    head = ["ranks", "gradients, MB", "batch norms, kB", "evaluation, MB"]
    head += [
        f"{what} {place}" for what in ("gradients, ms:", "norms, ms:") for place in ("InfiniBand", "Ethernet", "CPU")
    ]
    return markdown(head, rows)


def table_waiting(machine: Machine) -> str:
    """Time lost to unequal ranks, for ways of dealing and of batching."""
    cpu = measured_cpu()
    lengths = np.random.default_rng(1).permutation(np.sort(epoch_frames(1024).ravel()))
    rows = []
    for ranks, share in ((8, 16), (8, 128), (64, 16), (64, 128), (512, 16)):
        batch = ranks * share
        plans = (
            ("like lengths", "forth and back", epoch_frames(batch)),
            ("like lengths", "blocks", epoch_frames(batch)),
            ("like lengths", "at random", epoch_frames(batch)),
            ("any lengths", "forth and back", lengths[: len(lengths) // batch * batch].reshape(-1, batch)),
            ("any lengths", "at random", lengths[: len(lengths) // batch * batch].reshape(-1, batch)),
        )
        lost = []
        for _, how, frames_SB in plans:
            frames_SUR = deal(frames_SB, ranks, how)  # type: ignore[arg-type]
            lost.append(" / ".join(percent(waiting_fraction(each, frames_SUR)) for each in (machine, cpu)))
        rows.append([ranks, share, *lost])
    return markdown(["ranks", "utterances a rank", *(f"{kind}, {how}" for kind, how, _ in plans)], rows)


def table_strong(machine: Machine) -> str:
    """A fixed global batch on more and more devices."""
    rows = []
    for ranks in RANKS:
        row: list[object] = [ranks]
        for batch in (128, 1024, 8192):
            if ranks > batch:
                row += ["", ""]
                continue
            one, epoch = predict_epoch(machine, batch, 1), predict_epoch(machine, batch, ranks)
            row += [percent(one.total / epoch.total / ranks), number(epoch.total)]
        one, epoch = predict_large_epoch(machine, 8192, 1), predict_large_epoch(machine, 8192, ranks)
        rows.append([*row, percent(one.total / epoch.total / ranks), number(epoch.total / 60)])
    head = ["GPUs"]
    head += [f"batch {batch:,}: {what}" for batch in (128, 1024, 8192) for what in ("efficiency", "epoch, s")]
    return markdown([*head, "60,000 h, batch 8,192: efficiency", "epoch, min"], rows)


def table_step(machine: Machine) -> str:
    """Where the time of a step goes, in ms, with 32 utterances a device."""
    rows = []
    for ranks in RANKS:
        step, slow = (predict_epoch(each, 32 * ranks, ranks).step for each in (machine, H100_ETHERNET))
        parts = [step.compute, step.waiting, step.norms, step.gradients, step.other, step.total]
        parts += [predict_epoch(machine, 32 * ranks, ranks, own_group=False).step.total]
        parts += [slow.total, predict_epoch(H100_ETHERNET, 32 * ranks, ranks, own_group=False).step.total]
        rows.append([ranks, *(number(1000 * part) for part in parts)])
    head = [
        "GPUs",
        "compute",
        "waiting",
        "batch norms",
        "gradients",
        "other",
        "step",
        "step, one group for all messages",
    ]
    return markdown([*head, "100 Gbit/s Ethernet: step", "step, one group"], rows)


def table_weak(machine: Machine) -> str:
    """A batch that grows with the devices."""
    rows = []
    for ranks in RANKS:
        row: list[object] = [ranks]
        for share in (32, 128):
            batch = share * ranks
            one, epoch = predict_epoch(machine, share, 1), predict_epoch(machine, batch, ranks)
            row += [
                f"{batch:,}",
                percent(one.training / epoch.training / ranks),
                number(epoch.total),
                number(predict_large_epoch(machine, batch, ranks).total / 60),
                number(batch_law().deepspeech_epochs(epoch.batch), 2),
                number(seconds_to_target(machine, batch, ranks) / 60),
            ]
        rows.append(row)
    head = ["GPUs"]
    for share in (32, 128):
        what = ("batch", "efficiency", "epoch, s", "60,000 h: epoch, min", "epochs to WER 23", "to WER 23, min")
        head += [f"{share} a GPU: {each}" if each == "batch" else each for each in what]
    return markdown(head, rows)


def table_batch(machine: Machine) -> str:
    """Published epochs to the target of MLPerf's RNN-T by batch, and the law fitted to them."""
    law = batch_law()
    rows = [
        [f"{batch:,}", number(epochs), number(law.epochs(batch)), number(law.epochs(batch) / law.least, 3)]
        for batch, epochs in law.points
    ]
    rows.append(["fit", "", f"{number(law.least)} (1 + batch / {number(law.critical, 2)})", ""])
    return markdown(["batch", "epochs, mean of the published runs", "law", "examples, relative to a small batch"], rows)


def table_best(machine: Machine) -> str:
    """The best global batch for a number of devices, on three networks."""
    rows = []
    machines = (machine, H100_ETHERNET, measured_cpu())
    for ranks in RANKS:
        row: list[object] = [ranks]
        for each in machines:
            batch = best_batch(each, ranks)
            seconds, alone = seconds_to_target(each, batch, ranks), seconds_to_target(each, best_batch(each, 1), 1)
            row += [f"{batch:,}", number(seconds / 3600), number(alone / seconds)]
        rows.append(row)
    head = ["ranks"]
    for each in machines:
        head += [f"{each.name}: batch", "to WER 23, h", "times as fast"]
    return markdown(head, rows)


def table_sensitivity(machine: Machine) -> str:
    """Other values of what was assumed: one changed at a time, 128 devices with a batch of 4096."""
    changes: dict[str, Machine] = {
        "as assumed": machine,
        "half the time of a recurrent step": replace(
            machine,
            recurrent_forward_seconds=machine.recurrent_forward_seconds / 2,
            recurrent_backward_seconds=machine.recurrent_backward_seconds / 2,
        ),
        "twice the time of a recurrent step": replace(
            machine,
            recurrent_forward_seconds=machine.recurrent_forward_seconds * 2,
            recurrent_backward_seconds=machine.recurrent_backward_seconds * 2,
        ),
        "half the rate": replace(machine, efficiency=machine.efficiency / 2),
        "twice the rate": replace(machine, efficiency=machine.efficiency * 2),
        "a tenth of the network's bandwidth": replace(machine, network_bandwidth=machine.network_bandwidth / 10),
        "ten times the network's latency": replace(machine, network_latency=machine.network_latency * 10),
    }
    rows = []
    for name, each in changes.items():
        alone, one, many = (predict_epoch(each, *point) for point in ((32, 1), (4096, 1), (4096, 128)))
        rows.append(
            [
                name,
                number(1000 * many.step.total),
                number(many.total),
                percent(alone.training / many.training / 128),
                percent(one.total / many.total / 128),
            ]
        )
    return markdown(["", "step, ms", "epoch, s", "efficiency, weak (32 a GPU)", "strong (batch 4,096 on 1 GPU)"], rows)


def table_input(machine: Machine) -> str:
    """What the devices ask of the storage, with 128 utterances a device."""
    seconds = TRAINING_HOURS * 3600 / len(published_utterances("train"))
    size = seconds * SAMPLE_RATE * 2
    rows = []
    for ranks in RANKS:
        epoch = predict_epoch(machine, 128 * ranks, ranks)
        rate = epoch.batch / ranks / epoch.step.total
        at_once = min(ranks, machine.ranks_per_node)
        rows.append(
            [
                ranks,
                number(rate),
                number(rate * size / 1e6),
                number(at_once * rate * size / 1e9),
                number(ranks * rate * size / 1e9),
                number(1000 / rate),
                number(1000 / rate / math.ceil(size / READ_AHEAD)),
                number(ranks * rate),
            ]
        )
    head = ["GPUs", "utterances/s a GPU", "MB/s a GPU", "GB/s a node", "GB/s in all", "ms for a reader to read one"]
    return markdown([*head, "ms for each of its 128 KiB reads", "objects or ranges/s in all"], rows)


def table_layout(machine: Machine) -> str:
    """How utterances of a batch lie in the packed file."""
    rows = [
        [f"{batch:,}", *(number(reads_at_a_stretch(batch, epoch)) for epoch in (1, 2))] for batch in (128, 1024, 8192)
    ]
    return markdown(["batch", "utterances side by side: epoch 1", "later epochs"], rows)


def table_size(machine: Machine) -> str:
    """Sizes of both data sets, and what each process holds of them."""
    utterances, opened, held = 281_241, 1.90, 75e6  # data/README.md, "Speed": measured
    rows = []
    for hours in (TRAINING_HOURS, LARGE_HOURS):
        factor = hours / TRAINING_HOURS
        rows.append(
            [
                number(hours),
                f"{round(utterances * factor):,}",
                number(hours * 3600 * SAMPLE_RATE * 2 / 1e9),
                number(held * factor / 1e9),
                number(8 * held * factor / 1e9),
                number(opened * factor),
            ]
        )
    head = [
        "hours",
        "utterances",
        "audio.npy, GB",
        "index in memory, GB a process",
        "of 8 processes, GB",
        "opens in, s",
    ]
    return markdown(head, rows)


TABLES: dict[str, Callable[[Machine], str]] = {
    name.removeprefix("table_"): function for name, function in list(globals().items()) if name.startswith("table_")
}


# --- command line


def updated(document: str, machine: Machine = H100) -> str:
    """The document with its tables made anew: what is between `<!-- table: NAME -->` and `<!-- end -->`."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n)(?:.*?\n)??(<!-- end -->)",
        lambda found: found[1] + TABLES[found[2]](machine) + "\n" + found[3],
        document,
        flags=re.DOTALL,
    )


@dataclass(frozen=True)
class Arguments:
    """What to compute."""

    machine: Machine = H100
    """Constants of the machine with GPUs."""
    update: Path | None = None
    """Write the tables into this document, instead of printing them."""


def main() -> int:
    """Run the command line; returns the exit status."""
    arguments = tyro.cli(Arguments, prog="python -m pytorch.scaling", description=__doc__)

    def work() -> None:
        if arguments.update is None:
            for name, table in TABLES.items():
                print(f"{name}: {table.__doc__}\n\n{table(arguments.machine)}\n")
            return
        try:
            arguments.update.write_text(updated(arguments.update.read_text(), arguments.machine))
        except OSError as error:
            raise RunError(f"--update {arguments.update}: {error}") from error

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
