"""How long training would take: `python -m tools.estimate`."""

import json
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
from tests.conftest import write_packed_dataset
from tests.processes import run_module_for_text
from tests.pytorch.test_distributed import in_processes
from tools import estimate

TINY = ["--config", "synthetic", "--hidden-size", "16", "--batch-size", "4", "--device", "cpu"]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_estimate_has_the_time_of_each_kind_of_epoch_and_of_them_all(processes: int, tones: Path) -> None:
    options = [*TINY, "--dataset-dir", tones, "--epochs", "3", "--json"]
    run = run_module_for_text("tools.estimate", *options, environment=in_processes(processes))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)  # of one rank alone
    assert (found["processes"], found["batch_size"], found["training_utterances"]) == (processes, 4, 21)
    assert (found["speech"], found["epochs"], found["epochs_source"]) == (str(tones), 3, "given")
    assert found["largest_batch"].startswith(f"{4 // processes} utterances of 1")
    assert 0 < found["peak_memory_gib"] < found["memory_gib"]
    seconds = [found["epoch_1_seconds"], *[found["epochs_2_to_3_seconds"]] * 2]
    assert found["seconds_to_target"] == pytest.approx(sum(seconds) + 3 * found["evaluation_seconds"])
    assert found["evaluation_share"] == pytest.approx(3 * found["evaluation_seconds"] / found["seconds_to_target"])
    audio = 3600 * found["training_hours"] * SAMPLE_RATE * 2 / 1e6
    assert found["read_mb_per_second"] == pytest.approx(audio / min(seconds))
    assert 0 <= found.get("cpu_taken_by_others", 0) <= 1


def test_epochs_with_and_without_augmentation_are_timed_apart_and_a_sentence_ends_the_table(tones: Path) -> None:
    options = ["--config", "an4", "--hidden-size", "8", "--dataset-dir", tones, "--epochs", "7"]
    run = run_module_for_text("tools.estimate", *options, "--device", "cpu")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    for name in ("epoch_1_seconds", "epochs_2_to_5_seconds", "epochs_6_to_7_seconds", "seconds_to_target"):
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert lines[-1].startswith("an4 with batch 6 would take 0:")


def test_made_up_utterances_have_the_published_number_hours_percentiles_and_transcripts() -> None:
    utterances = estimate.published_utterances(["train-clean-100", "train-clean-360", "train-other-500"])
    seconds = utterances.num_samples / SAMPLE_RATE
    assert len(utterances) == 281_241
    assert seconds.sum() / 3600 == pytest.approx(960.9, rel=1e-3)
    assert seconds.max() == pytest.approx(29.7, abs=0.01)
    for subset in utterances.subsets:
        inside = slice(1, -1)  # of the extremes, the table has those at another speed
        drawn = np.percentile(subset.num_samples / SAMPLE_RATE, PERCENTILES)[inside]
        np.testing.assert_allclose(drawn, DURATIONS[subset.name][inside], atol=0.05)
    validation = estimate.published_utterances(["dev-clean"])
    assert validation.ctc_feasible().all()
    characters = sum(len(validation.transcript(index)) for index in range(len(validation)))
    assert characters == pytest.approx(14 * validation.num_samples.sum() / SAMPLE_RATE, rel=0.1)


class Clock:
    """Stands for the module `time`: passes only while a step is taken."""

    now = 1.0

    def perf_counter(self) -> float:
        return self.now


class MadeUpTrainer(Trainer):
    """Takes steps of a known duration."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.random = clock, np.random.default_rng(0)
        self.config, self.device, self.model = CONFIGS["librispeech"], torch.device("cpu"), torch.nn.Module()  # type: ignore[assignment]

    def train_step(self, microbatches: Sequence[Batch], *_: Any) -> Any:
        self.clock.now += seconds_of(microbatches[0].num_samples_B.numpy()) * self.random.uniform(0.9, 1.1)
        return lambda: None


def seconds_of(num_samples_B: np.ndarray) -> float:
    """A fixed part, one that grows with the speech, and one that grows with the longest utterance."""
    return 0.1 + num_samples_B.sum() / SAMPLE_RATE / 400 + num_samples_B.max() / SAMPLE_RATE / 50


def test_seconds_per_epoch_are_the_sum_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(estimate, "time", clock)
    utterances = estimate.published_utterances(["dev-clean", "dev-other"])
    loader = TrainingLoader(utterances, replace(CONFIGS["librispeech"], batch_size=32), World())
    found = estimate.time_epochs(MadeUpTrainer(clock), loader, [1, 2])
    assert clock.now < 100
    for epoch, seconds in zip((1, 2), found, strict=True):
        batches = epoch_batches(utterances, loader.included, 32, loader.config.seed, epoch)
        exact = sum(seconds_of(utterances.num_samples[indices]) for indices in batches)
        assert exact > 120
        assert seconds == pytest.approx(exact, rel=0.05)


def test_epochs_to_the_target_depend_on_the_batch_size() -> None:
    def epochs(name: str, batch_size: int) -> int:
        return estimate.epochs_to_target(replace(CONFIGS[name], batch_size=batch_size))[0]

    assert [epochs("librispeech", size) for size in (128, 1024)] == [5, 6]  # 6.2, see docs/scaling.md
    assert epochs("an4", 6) == 3  # the committed runs'
    assert epochs("an4", 7) == CONFIGS["an4"].max_epochs
    assert epochs("mini", 16) == CONFIGS["mini"].max_epochs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config", "nonsense"], "--config nonsense"),
        (["--dataset-dir", "{tmp_path}"], "no data set in {tmp_path}"),
        (["--dataset-dir", "{no_validation}"], "{no_validation} has no validation subset"),
        (["--epochs", "0"], "--epochs is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        ([*TINY, "--config", "librispeech", "--batch-size", "200000"], "--gradient-accumulation-steps"),
    ],
)
def test_what_cannot_be_estimated_is_an_error_of_one_line(options: list[str], said: str, tmp_path: Path) -> None:
    names = {"tmp_path": tmp_path, "no_validation": write_packed_dataset(tmp_path / "half", {"train": 8})}
    run = run_module_for_text("tools.estimate", *[option.format(**names) for option in options])
    assert (run.returncode, run.stdout) == (1, "")
    assert said.format(**names) in run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "environment", "said", "times"),
    [
        (["--dataset-dir", "nowhere"], in_processes(2), "no data set in nowhere", 1),
        (["--batch-size", "1"], in_processes(2), "--batch-size 1", 1),
        (["--batch-size", "20000000"], in_processes(2), "--gradient-accumulation-steps", 2),  # as a run does, each rank
        ([], {"NNODES": "2"}, "NNODES is 2", 1),
    ],
)
def test_what_keeps_processes_from_starting_is_said_once(
    options: list[str], environment: dict[str, str], said: str, times: int, tones: Path
) -> None:
    run = run_module_for_text("tools.estimate", *TINY, "--dataset-dir", tones, *options, environment=environment)
    assert (run.returncode, run.stdout) == (1, "")
    lines = run.stderr.splitlines()
    assert len(lines) == times, run.stderr
    assert all(line.startswith("error: ") and said in line for line in lines)


def test_a_corpus_without_published_durations_needs_its_data_set(tmp_path: Path) -> None:
    config = replace(CONFIGS["mini"], dataset_dir=tmp_path / "Mini-LibriSpeech_dataset")
    with pytest.raises(DatasetError, match=r"no data set in .*: run 'sh download_dataset.sh --corpus mini-librispeech"):
        estimate.open_utterances(config, None, World())
