"""How long training would take: `python -m tools.bench --estimate`."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.corpora import DURATIONS, PERCENTILES
from data.packed import DatasetError
from pytorch.config import CONFIGS
from pytorch.distributed import World
from pytorch.features import SAMPLE_RATE
from pytorch.loader import Batch, TrainingLoader, epoch_batches
from pytorch.trainer import Trainer
from tests.conftest import ROOT, write_packed_dataset
from tests.processes import run_module_for_text
from tests.pytorch.test_distributed import in_processes
from tools import estimate

TRAIN = ["train-clean-100", "train-clean-360", "train-other-500"]
TINY = ["--estimate", "--config", "synthetic", "--hidden-size", "16", "--batch-size", "4", "--device", "cpu"]


def test_an_estimate_has_the_time_of_each_kind_of_epoch_and_of_them_all(tones: Path) -> None:
    run = run_module_for_text("tools.bench", *TINY, "--dataset-dir", tones, "--epochs", "3", "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["batch_size"], found["training_utterances"], found["epochs"]) == (4, 21, 3)
    assert (found["speech"], found["epochs_source"]) == (str(tones), "given")
    assert found["processes"] == 1
    assert found["largest_batch"].startswith("4 utterances of 1")
    assert 0 < found["peak_memory_gib"] < found["memory_gib"]
    seconds = [found["epoch_1_seconds"], *[found["epochs_2_to_3_seconds"]] * 2]
    assert found["epoch_1_plus_minus"] > 0
    assert found["seconds_to_target"] == pytest.approx(sum(seconds) + 3 * found["evaluation_seconds"])
    assert found["evaluation_share"] == pytest.approx(3 * found["evaluation_seconds"] / found["seconds_to_target"])
    audio = 3600 * found["training_hours"] * SAMPLE_RATE * 2 / 1e6
    assert found["read_mb_per_second"] == pytest.approx(audio / min(seconds))


def test_an_estimate_takes_as_many_processes_as_a_run(tones: Path) -> None:
    options = [*TINY, "--dataset-dir", tones, "--epochs", "3", "--json"]
    run = run_module_for_text("tools.bench", *options, environment=in_processes(2))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)  # of one rank alone
    assert (found["processes"], found["training_utterances"]) == (2, 21)
    assert found["largest_batch"].startswith("2 utterances of 1")
    assert 0 < found["peak_memory_gib"] < found["memory_gib"]
    training = found["epoch_1_seconds"] + 2 * found["epochs_2_to_3_seconds"]
    assert found["seconds_to_target"] == pytest.approx(training + 3 * found["evaluation_seconds"])


def test_an_estimate_stays_away_from_several_machines(tones: Path) -> None:
    run = run_module_for_text("tools.bench", *TINY, "--dataset-dir", tones, environment={"NNODES": "2"})
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "error: NNODES is 2; the time on one machine can be estimated: unset it\n"


class OtherClock(World):
    """Rank 1, to which rank 0 says that the time of a stretch is over; exchanges are noted."""

    def __init__(self, *told: Any) -> None:
        super().__init__(rank=1, size=2)
        object.__setattr__(self, "told", list(told))

    def broadcast_object(self, thing: Any, source: int) -> Any:
        return self.told.pop(0)  # type: ignore[attr-defined]

    def barrier(self) -> None:
        pass


def test_rank_0_alone_decides_how_many_steps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(estimate, "time", clock)
    utterances = estimate.published_utterances(["dev-clean"])
    config = replace(CONFIGS["librispeech"], batch_size=32)
    for limit, told, steps in ((0.0, (False, False, True), 3), (1e9, (True,), 1), (math.inf, (), 8)):
        loader = TrainingLoader(utterances, config, OtherClock(*told, [4, 5, 6.0]))
        trainer = MadeUpTrainer(clock)
        assert estimate.time_steps(trainer, loader, 1, 0, 8, limit) == [4, 5, 6.0]
        assert trainer.steps == steps


def test_epochs_with_and_without_augmentation_are_timed_apart_and_the_table_has_a_line_of_each(tones: Path) -> None:
    options = ["--estimate", "--config", "an4", "--hidden-size", "8", "--dataset-dir", tones, "--epochs", "7"]
    run = run_module_for_text("tools.bench", *options, "--device", "cpu")
    assert run.returncode == 0, run.stderr
    names = [line.split()[0] for line in run.stdout.splitlines()]
    for name in ("epoch_1_seconds", "epochs_2_to_5_seconds", "epochs_6_to_7_seconds", "time_to_target"):
        assert names.count(name) == 1


def test_made_up_utterances_have_the_published_number_hours_and_percentiles() -> None:
    utterances = estimate.published_utterances(TRAIN)
    seconds = utterances.num_samples / SAMPLE_RATE
    assert len(utterances) == 281_241
    assert seconds.sum() / 3600 == pytest.approx(960.9, rel=1e-3)
    assert seconds.max() == pytest.approx(29.7, abs=0.01)
    for subset in utterances.subsets:
        durations = subset.num_samples / SAMPLE_RATE
        inside = slice(1, -1)  # of the extremes, the table has those at another speed
        drawn = np.percentile(durations, PERCENTILES)[inside]
        np.testing.assert_allclose(drawn, DURATIONS[subset.name][inside], atol=0.05)
    batches = epoch_batches(utterances, np.arange(len(utterances)), 128, 1, 2)
    assert len(batches) == 2198
    assert sum(map(len, batches)) == 281_241


def test_the_transcript_of_a_made_up_utterance_is_as_long_as_its_speech_makes_likely() -> None:
    utterances = estimate.published_utterances(["dev-clean"])
    assert utterances.ctc_feasible().all()
    characters = sum(len(utterances.transcript(index)) for index in range(len(utterances)))
    assert characters == pytest.approx(14 * utterances.num_samples.sum() / SAMPLE_RATE, rel=0.1)


class Clock:
    """Stands for the module `time`: passes only while a step is taken."""

    now = 1.0

    def perf_counter(self) -> float:
        return self.now


class MadeUpTrainer(Trainer):
    """Takes steps of a known duration."""

    def __init__(self, clock: Clock) -> None:
        self.steps = 0
        self.clock, self.random = clock, np.random.default_rng(0)
        self.config, self.device, self.model = CONFIGS["librispeech"], torch.device("cpu"), torch.nn.Module()  # type: ignore[assignment]

    def train_step(self, microbatches: Sequence[Batch], *_: Any) -> Any:
        self.steps += 1
        self.clock.now += seconds_of(microbatches[0].num_samples_B.numpy()) * self.random.uniform(0.9, 1.1)
        return lambda: None


def seconds_of(num_samples_B: np.ndarray) -> float:
    """A fixed part, one that grows with the speech, and one that grows with the longest utterance."""
    return 0.1 + num_samples_B.sum() / SAMPLE_RATE / 400 + num_samples_B.max() / SAMPLE_RATE / 50


def test_seconds_per_epoch_are_the_sum_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(estimate, "time", clock)
    utterances = estimate.published_utterances(["dev-clean", "dev-other"])
    config = replace(CONFIGS["librispeech"], batch_size=32)
    loader = TrainingLoader(utterances, config, World())
    found = estimate.time_epochs(MadeUpTrainer(clock), loader, [1, 2])
    assert clock.now < 90
    for epoch, (seconds, two_errors) in zip((1, 2), found, strict=True):
        batches = epoch_batches(utterances, loader.included, 32, config.seed, epoch)
        exact = sum(seconds_of(utterances.num_samples[indices]) for indices in batches)
        assert exact > 120
        assert seconds == pytest.approx(exact, rel=0.02)
        assert 0.001 * exact < two_errors < 0.05 * exact  # the longest batches are off the line


def test_two_standard_errors_cover_what_stretches_of_uneven_speed_leave_open() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        samples = random.uniform(1, 3, 12)
        timed = np.stack([np.full(12, 2), samples, 2 * 0.5 + 3 * samples + random.normal(0, 0.5, 12)], axis=1)
        seconds, two_errors = estimate.extrapolate(timed, 200, 220)
        covered += abs(seconds - (200 * 0.5 + 3 * 220)) < two_errors
    assert 0.88 < covered / 500 < 0.98  # 95 % if there were many stretches


def test_epochs_to_the_target_are_those_of_the_committed_runs() -> None:
    for name in ("an4", "synthetic"):
        points = json.loads((ROOT / "results" / "rcps" / f"{name}.json").read_text()).values()
        epochs = next(point["Epochs to converge"] for point in points if point["BS"] == CONFIGS[name].batch_size)
        assert estimate.EPOCHS[name][0] == statistics.median(epochs)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--estimate", "--config", "nonsense"], "--config nonsense: unknown"),
        (["--estimate", "--dataset-dir", "{tmp_path}"], "no data set in {tmp_path}"),
        (["--estimate", "--dataset-dir", "{no_validation}"], "{no_validation} has no validation subset"),
        (["--estimate", "--epochs", "0"], "--epochs is 0"),
        (["--estimate", "--batch-size", "0"], "--batch-size is 0"),
        (["--epochs", "3"], "--epochs goes with --estimate"),
        (["--estimate", "--longest-seconds", "30"], "--longest-seconds does not go with --estimate"),
        ([*TINY, "--config", "librispeech", "--batch-size", "200000"], "does not fit into memory; use a smaller"),
    ],
)
def test_what_cannot_be_estimated_is_an_error_of_one_line(options: list[str], said: str, tmp_path: Path) -> None:
    names = {"tmp_path": tmp_path, "no_validation": write_packed_dataset(tmp_path / "half", {"train": 8})}
    run = run_module_for_text("tools.bench", *[option.format(**names) for option in options])
    assert (run.returncode, run.stdout) == (1, "")
    assert said.format(**names) in run.stderr
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said", "times"),
    [
        (["--dataset-dir", "nowhere"], "no data set in nowhere", 1),
        (["--batch-size", "1"], "--batch-size 1: cannot be divided into 2 parts", 1),
        (["--batch-size", "2"], "leave one of 1, which cannot be divided into 2 microbatches", 1),
        (["--batch-size", "20000000"], "does not fit into memory; use a smaller", 2),  # as a run does, on each rank
    ],
)
def test_what_keeps_processes_from_starting_is_said_once(
    options: list[str], said: str, times: int, tones: Path
) -> None:
    given = [*TINY, "--dataset-dir", tones, *options]
    run = run_module_for_text("tools.bench", *given, environment=in_processes(2))
    assert (run.returncode, run.stdout) == (1, "")
    lines = run.stderr.splitlines()
    assert len(lines) == times, run.stderr
    assert all(line.startswith("error: ") and said in line for line in lines)


def test_a_corpus_without_published_durations_needs_its_data_set(tmp_path: Path) -> None:
    config = replace(CONFIGS["mini"], dataset_dir=tmp_path / "Mini_dataset")
    with pytest.raises(DatasetError, match=r"no data set in .*Mini_dataset: run 'sh download_dataset.sh'"):
        estimate.open_utterances(config, None, World())
