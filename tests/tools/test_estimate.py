"""How long training would take: `python -m tools.estimate`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from data.cli import UserError
from data.corpora import DURATIONS, PERCENTILES
from pytorch.config import CONFIGS
from pytorch.distributed import World
from pytorch.features import SAMPLE_RATE
from pytorch.loader import TrainingLoader
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


def seconds_of(num_samples_B: np.ndarray) -> float:
    """Of a step: a fixed part, one that grows with the speech, and one that grows with the longest utterance."""
    return 0.1 + num_samples_B.sum() / SAMPLE_RATE / 400 + num_samples_B.max() / SAMPLE_RATE / 50


def test_seconds_per_epoch_are_the_sum_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    utterances, random = estimate.published_utterances(["dev-clean", "dev-other"]), np.random.default_rng(0)
    loader = TrainingLoader(utterances, replace(CONFIGS["librispeech"], batch_size=32), World())
    timed = list[float]()

    def steps(epoch: int) -> list[np.ndarray]:
        return [utterances.num_samples[indices] for indices in loader.global_batches(epoch)]

    def time_steps(_trainer: Trainer, _loader: TrainingLoader, epoch: int, start: int, stop: int) -> tuple[int, float]:
        taken = steps(epoch)[start:stop]
        timed.extend(seconds_of(step) * random.uniform(0.9, 1.1) for step in taken)
        return sum(int(step.sum()) for step in taken), sum(timed[-len(taken) :])

    monkeypatch.setattr(estimate, "time_steps", time_steps)
    found = estimate.time_epochs(cast(Trainer, None), loader, [1, 2])
    assert sum(timed) < 100
    for epoch, seconds in zip((1, 2), found, strict=True):
        exact = sum(map(seconds_of, steps(epoch)))
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
    ("options", "environment", "said", "times"),
    [
        (["--config", "nonsense"], {}, "--config nonsense", 1),
        (["--dataset-dir", "no_validation"], {}, "no_validation has no validation subset", 1),
        (["--epochs", "0"], {}, "--epochs is 0", 1),
        (["--batch-size", "200000", "--config", "librispeech"], {}, "--gradient-accumulation-steps", 1),
        (["--dataset-dir", "nowhere"], in_processes(2), "no data set in nowhere", 1),
        (["--batch-size", "1"], in_processes(2), "--batch-size 1", 1),
        (["--batch-size", "20000000"], in_processes(2), "--gradient-accumulation-steps", 2),  # as a run does, each rank
        ([], {"NNODES": "2"}, "NNODES is 2", 1),
    ],
)
def test_what_cannot_be_estimated_is_said_in_one_line(
    options: list[str], environment: dict[str, str], said: str, times: int, tones: Path, tmp_path: Path
) -> None:
    write_packed_dataset(tmp_path / "no_validation", {"train": 8})
    dataset = [] if "--config" in options else ["--dataset-dir", tones]
    where: dict[str, Any] = {"environment": environment, "folder": tmp_path}
    run = run_module_for_text("tools.estimate", *TINY, *dataset, *options, **where)
    assert (run.returncode, run.stdout) == (1, "")
    lines = run.stderr.splitlines()
    assert len(lines) == times, run.stderr
    assert all(line.startswith("error: ") and said in line for line in lines)


def test_a_corpus_without_published_durations_needs_its_data_set(tmp_path: Path) -> None:
    config = replace(CONFIGS["mini"], dataset_dir=tmp_path / "Mini-LibriSpeech_dataset")
    with pytest.raises(UserError, match=r"no data set in .*: run 'sh download_dataset.sh --corpus mini-librispeech"):
        estimate.open_utterances(config, None, World())
