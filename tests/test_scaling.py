"""The paper plan for scale: exact cases of its model, and docs/scaling.md against the program that makes its tables."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pytorch import batches
from pytorch.batches import plan_epoch
from pytorch.bench import training_flops
from pytorch.features import SAMPLE_RATE, frame_counts
from pytorch.model import GRU_LAYERS, DeepSpeech2, output_frames
from pytorch.scaling import RANKS, TABLES, updated
from pytorch.scaling_model import (
    CONFIG,
    H100,
    H100_ETHERNET,
    MEASURED_STEP_SECONDS,
    Dealing,
    Machine,
    all_reduce_bytes,
    all_reduce_seconds,
    batch_law,
    best_batch,
    compute_seconds,
    deal,
    epoch_frames,
    flops_per_frame,
    measured_cpu,
    model_layers,
    norm_bytes,
    parameter_count,
    predict_epoch,
    predict_step,
    published_utterances,
    waiting_fraction,
)
from tests.conftest import ROOT

DOCUMENT = (ROOT / "docs" / "scaling.md").read_text()
NUMBER = re.compile(r"\d[\d,]*\.?\d*")
MACHINES = pytest.mark.parametrize("machine", [H100, H100_ETHERNET, measured_cpu()], ids=lambda machine: machine.name)


def test_the_tables_of_the_document_are_the_programs_output() -> None:
    now = updated(DOCUMENT)
    # Another processor may round the last digit otherwise.
    assert NUMBER.sub("#", DOCUMENT) == NUMBER.sub("#", now)
    written, computed = ([float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (DOCUMENT, now))
    assert written == pytest.approx(computed, rel=0.01, abs=0.11)
    assert set(re.findall(r"<!-- table: (\w+) -->", DOCUMENT)) == set(TABLES)


def test_layers_have_the_parameters_of_the_model() -> None:
    model = DeepSpeech2(CONFIG.conv_channels, CONFIG.hidden_size)
    assert parameter_count() == sum(weight.numel() for weight in model.parameters()) == 41_187_904
    assert f"{4 * parameter_count() / 1e6:.1f} MB" in DOCUMENT


def test_layers_have_the_operations_that_the_benchmark_counts() -> None:
    samples_B = torch.tensor([3 * SAMPLE_RATE, 7 * SAMPLE_RATE])
    frames = int(output_frames(frame_counts(samples_B)).sum())
    forward, step = training_flops(CONFIG, samples_B)
    assert forward == 2 * frames * sum(layer.multiplications for layer in model_layers())
    assert flops_per_frame() == pytest.approx((forward / frames, step / frames))


def test_the_cpus_rate_is_the_measured_one() -> None:
    assert f"{1000 * MEASURED_STEP_SECONDS:.0f} ms" in (ROOT / "BENCHMARKS.md").read_text()
    frames = output_frames(frame_counts((torch.linspace(2.0, 4.0, 8) * SAMPLE_RATE).long())).numpy()
    seconds = compute_seconds(measured_cpu(), deal(frames[None], 1))
    assert seconds.item() == pytest.approx(MEASURED_STEP_SECONDS)


@MACHINES
def test_one_rank_sends_nothing_and_waits_for_nobody(machine: Machine) -> None:
    step = predict_step(machine, deal(epoch_frames(128), 1))
    assert (step.norms, step.gradients, step.waiting) == (0, 0, 0)
    assert step.compute > 0
    assert all_reduce_seconds(machine, 1e9, 1) == all_reduce_bytes(1e9, 1) == 0


def test_messages_have_the_sizes_that_the_document_says() -> None:
    assert norm_bytes(800) == (8 * (2 * 800 + 1), 4 * 2 * 800)
    assert sum(layer.channels > 0 for layer in model_layers()) == 7
    assert all_reduce_bytes(100, 2) == 100
    assert all_reduce_bytes(100, 4) == 150


@MACHINES
def test_messages_take_longer_with_more_ranks_and_more_bytes(machine: Machine) -> None:
    by_ranks = [all_reduce_seconds(machine, 1e8, ranks) for ranks in RANKS]
    by_size = [all_reduce_seconds(machine, size, 64) for size in (4, 1e4, 1e6, 1e8)]
    assert by_ranks == sorted(by_ranks)
    assert by_size == sorted(by_size)


def test_nothing_is_lost_where_latency_and_bytes_cost_nothing() -> None:
    free = replace(H100, launch_seconds=0.0, node_latency=0.0, network_latency=0.0)
    free = replace(free, node_bandwidth=float("inf"), network_bandwidth=float("inf"))
    equal_SB = np.full((3, 64), 500)
    alone, many = predict_step(free, deal(equal_SB[:, :8], 1)), predict_step(free, deal(equal_SB, 8))
    assert many.total == pytest.approx(alone.total)


def test_a_step_takes_its_longest_utterance_through_all_recurrent_layers_at_least() -> None:
    fast = replace(H100, peak=1e30)
    frames_SUR = deal(np.array([[100, 400, 200, 300]]), 2)
    assert frames_SUR.tolist() == [[[400, 300], [100, 200]]]
    steps = np.array([[400, 300]])
    assert compute_seconds(fast, frames_SUR) == pytest.approx(steps * GRU_LAYERS * 25e-6)
    assert compute_seconds(replace(fast, largest_batch=1), frames_SUR) == pytest.approx(
        np.array([[500, 500]]) * GRU_LAYERS * 25e-6
    )


@MACHINES
def test_an_epoch_of_a_fixed_batch_gets_shorter_and_less_efficient_with_more_ranks(machine: Machine) -> None:
    seconds = [predict_epoch(machine, 1024, ranks).total for ranks in RANKS if ranks <= 256]
    assert seconds == sorted(seconds, reverse=True)
    efficiency = [seconds[0] / each / ranks for each, ranks in zip(seconds, RANKS, strict=False)]
    assert efficiency == sorted(efficiency, reverse=True)


@MACHINES
def test_a_group_of_its_own_never_makes_batch_norms_slower(machine: Machine) -> None:
    for ranks in (2, 16, 128):
        apart, together = (predict_epoch(machine, 32 * ranks, ranks, own_group=own) for own in (True, False))
        assert apart.step.total <= together.step.total


@pytest.mark.parametrize("how", ["forth and back", "blocks", "at random"])
@pytest.mark.parametrize("batch", [7, 8, 13])
def test_every_utterance_is_dealt_once(how: Dealing, batch: int) -> None:
    frames_SB = np.arange(1, 2 * batch + 1).reshape(2, batch)
    frames_SUR = deal(frames_SB, 4, how)
    for dealt, given in zip(frames_SUR, frames_SB, strict=True):
        assert sorted(dealt[dealt > 0].tolist()) == given.tolist()
    assert (np.diff(frames_SUR, axis=1) <= 0).all()


def test_steps_and_shares_are_those_of_the_program() -> None:
    utterances, ranks = published_utterances("train"), 24
    frames_N = output_frames(frame_counts(torch.from_numpy(utterances.samples))).numpy()
    plan = plan_epoch(utterances, np.arange(len(utterances)), 1000, seed=1, epoch=2)
    assert predict_epoch(H100, 1000, ranks).steps == len(plan) == 282
    assert {len(batch) for batch in plan} == {997, 998}
    frames_SUR = deal(epoch_frames(1000), ranks)
    for batch, frames_UR in list(zip(plan, frames_SUR, strict=True))[:9]:
        for share, frames_U in zip(batches.deal(utterances, batch, ranks), frames_UR.T, strict=True):
            assert frames_U[frames_U > 0].tolist() == frames_N[share].tolist()


def test_ranks_of_equal_lengths_lose_nothing_and_dealing_by_length_loses_least() -> None:
    assert waiting_fraction(H100, deal(np.full((2, 64), 700), 8)) == 0
    ways: tuple[Dealing, ...] = ("forth and back", "at random", "blocks")
    lost = [waiting_fraction(H100, deal(epoch_frames(1024), 64, how)) for how in ways]
    assert 0 < lost[0] < lost[1] < lost[2] < 0.1


def test_drawn_utterances_are_as_many_and_as_long_as_the_published_ones() -> None:
    training, validation = published_utterances("train"), published_utterances("validation")
    assert (len(training), len(validation)) == (281_241, 5_567)
    assert training.samples.sum() / SAMPLE_RATE / 3600 == pytest.approx(960.9, rel=1e-3)
    assert validation.samples.sum() / SAMPLE_RATE / 3600 == pytest.approx(10.7, rel=0.05)


def test_the_law_of_batches_follows_the_published_epochs() -> None:
    law = batch_law()
    assert law.epochs(law.critical) == pytest.approx(2 * law.least)
    assert [batch for batch, _ in law.points] == [512, 1024, 1536, 2048, 3072, 6144]
    for batch, epochs in law.points:
        assert law.epochs(batch) == pytest.approx(epochs, rel=0.05)
    assert law.deepspeech_epochs(256) == 5


def test_more_ranks_never_want_a_smaller_batch() -> None:
    batches = [best_batch(H100, ranks) for ranks in RANKS]
    assert batches == sorted(batches)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES.keys())
def test_every_table_is_whole(table: Callable[[Machine], str]) -> None:
    lines = table(H100).splitlines()
    assert len(lines) > 3
    assert len({line.count("|") for line in lines}) == 1
    assert "nan" not in table(H100) and "inf" not in table(H100)
