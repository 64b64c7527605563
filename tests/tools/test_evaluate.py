"""Evaluation of a trained model, by the command that a user types."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch

from data.packed import open_dataset
from pytorch.evaluation import Hypothesis
from pytorch.metrics import count_errors
from tests.conftest import ROOT
from tests.processes import Popen, run_module_for_text
from tests.pytorch.test_train import small_run
from tests.tools.conftest import Trained
from tools.evaluate import Spoken, bootstrap_intervals, score, table, trn_ids
from tools.recognizer import select_subsets

FP32 = ["--precision", "fp32"]  # in which rounding changes no transcript of these
AS_DECODED = jiwer.Compose([jiwer.ReduceToListOfListOfChars()])  # jiwer would strip spaces


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_module_for_text("tools.evaluate", *arguments)


def summary(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "summary.json").read_text())["scores"]


def pairs(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "utterances.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one epoch, which makes many errors."""
    folder = tmp_path_factory.mktemp("untrained")
    assert small_run(tones, folder, "--max-epochs", "1", "--target-wer", "1000").returncode == 0
    return folder / "checkpoint_best.pt"


@pytest.fixture(scope="module")
def evaluated(tones: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    subsets = "tones-train,tones-validation"
    run = command(checkpoint, "--dataset-dir", tones, "--split", subsets, "--output", folder, *FP32)
    assert run.returncode == 0, run.stderr
    assert "tones-train" in run.stdout
    assert "real-time factor" in run.stdout
    assert run.stdout.endswith("fp32\n")
    return folder


def test_files_are_written_even_if_whoever_reads_the_table_has_left(
    tones: Path, checkpoint: Path, tmp_path: Path
) -> None:
    reader, gone = os.pipe()
    os.close(reader)
    options = [checkpoint, "--dataset-dir", tones, "--output", tmp_path / "files"]
    words = list(map(str, [sys.executable, "-m", "tools.evaluate", *options]))
    run = Popen(words, cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, text=True)
    os.close(gone)
    _, errors = run.communicate(timeout=300)
    assert (run.returncode, errors) == (141, "")
    assert len(pairs(tmp_path / "files")) == 7
    assert summary(tmp_path / "files")


def test_the_figures_of_each_subset_and_of_all_equal_those_of_jiwer(evaluated: Path) -> None:
    everything = pairs(evaluated)
    assert len(everything) == 28
    for name, figures in summary(evaluated).items():
        chosen = [pair for pair in everything if name in ("all", pair["subset"])]
        references, hypotheses = ([pair[side] for pair in chosen] for side in ("reference", "hypothesis"))
        words, characters = (
            jiwer.process_words(references, hypotheses),
            jiwer.process_characters(references, hypotheses, AS_DECODED, AS_DECODED),
        )
        assert figures["wer"] == pytest.approx(100 * words.wer)
        assert figures["cer"] == pytest.approx(100 * characters.cer)
        for edits, measured in (("word_edits", words), ("character_edits", characters)):
            expected = {kind: getattr(measured, kind) for kind in ("insertions", "deletions", "substitutions")}
            assert figures[edits] == expected
        each = [jiwer.wer(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses, strict=True)]
        assert figures["mean_utterance_wer"] == pytest.approx(100 * np.mean(each))


def test_a_trained_model_has_the_error_rate_that_its_training_logged(trained: Trained, tmp_path: Path) -> None:
    run = command(trained.checkpoint, "--dataset-dir", trained.dataset, "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    saved = torch.load(trained.checkpoint, weights_only=True)
    logged = saved["progress"]["best_wer"]
    assert summary(tmp_path)["all"]["wer"] == pytest.approx(logged)
    assert logged < 5
    assert run.stdout.endswith(f"{saved['config']['precision']}\n")


def test_two_processes_with_other_batches_report_the_same_as_one_and_recognize_each_utterance_once(
    tones: Path, checkpoint: Path, evaluated: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "-m"]
    subsets = "tones-train,tones-validation"
    options: list[str | Path] = ["--dataset-dir", tones, "--split", subsets, "--batch-size", "3", "--output", tmp_path]
    run = run_module_for_text(*torchrun, "tools.evaluate", checkpoint, *options, *FP32)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("real-time factor") == 1
    assert pairs(tmp_path) == pairs(evaluated)
    assert summary(tmp_path) == summary(evaluated)


def test_transcription_files_hold_every_pair_under_ids_that_begin_with_the_speaker(evaluated: Path) -> None:
    expected = [pair for pair in pairs(evaluated) if pair["subset"] == "tones-validation"]
    for side, key in (("ref", "reference"), ("hyp", "hypothesis")):
        lines = (evaluated / f"tones-validation.{side}.trn").read_text().splitlines()
        assert lines == [f"{pair[key]} (1-{pair['id']})" for pair in expected]
    assert not list(evaluated.glob("*.partial"))


def hypothesis(id: str, text: str = "A B C D") -> Hypothesis:
    return Hypothesis(id, "s", "A B C D", text, count_errors("A B C D", text))


def test_ids_for_sclite_are_unique_and_have_neither_blanks_nor_parentheses() -> None:
    awkward = ["my rec (1).wav", "my%20rec%281).wav", "b-c", "c"]
    spoken = [(speaker, hypothesis(id)) for speaker in ("", "a", "a-b", "a_b") for id in awkward]
    ids = trn_ids(spoken)
    assert len(set(ids)) == len(ids)
    assert not set(" ()\t").intersection("".join(ids))
    assert [id.split("-")[0] for id in ids[::4]] == ["unknown", "a", "a%2Db", "a%5Fb"]
    assert trn_ids([("84", hypothesis("84-121-0000")), ("85", hypothesis("85-121-0000"))]) == [
        "84-121-0000",
        "85-121-0000",
    ]


def test_bootstrap_intervals_cover_the_rate_and_shrink_with_the_square_root_of_the_utterances() -> None:
    random = np.random.default_rng(1)

    def interval(utterances: int) -> tuple[float, float]:
        words = random.integers(5, 15, utterances)
        errors = random.binomial(words, 0.2)
        return bootstrap_intervals(np.stack([errors, words, errors, words], axis=1))[0]

    low, high = interval(400)
    assert low < 20 < high
    # 4000 words with 20 % errors: a standard deviation of 0.63
    assert high - low == pytest.approx(2 * 1.96 * 0.63, rel=0.2)
    assert (high - low) / np.subtract(*interval(6400)[::-1]) == pytest.approx(4, rel=0.2)


def test_a_fixed_set_has_the_same_interval_every_time_and_equal_utterances_have_none() -> None:
    counts = np.random.default_rng(2).integers(1, 9, (50, 4))
    assert bootstrap_intervals(counts) == bootstrap_intervals(counts)
    assert bootstrap_intervals(np.tile([1, 4, 2, 16], (9, 1))) == ((25, 25), (12.5, 12.5))


def test_where_speakers_differ_the_interval_over_speakers_is_the_wider_one() -> None:
    texts = {"good": "A B C D", "bad": "X X X X"}
    spoken: list[Spoken] = [
        (f"{name}{who}", hypothesis(f"{name}{who}-{number}", text))
        for name, text in texts.items()
        for who in range(5)
        for number in range(20)
    ]
    figures = score(spoken)
    assert figures["wer"] == 50
    assert figures["speakers"] == 10
    assert figures["wer_interval_over_speakers"] is not None
    low, high = figures["wer_interval_over_speakers"]
    assert high - low > 3 * (figures["wer_interval"][1] - figures["wer_interval"][0])
    assert score(spoken[:20])["wer_interval_over_speakers"] is None


def test_speakers_that_are_not_known_are_not_one_speaker() -> None:
    figures = score([("", hypothesis("1")), ("", hypothesis("2")), ("x", hypothesis("3"))])
    assert (figures["speakers"], figures["wer_interval_over_speakers"]) == (None, None)
    lines = table({"all": figures}).splitlines()
    assert lines[1].count("not known") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "test"], "has no test subset; it has: tones-train, tones-validation"),
        (["--split", "dev-clean"], "has no subset 'dev-clean'"),
        (["--batch-size", "0"], "--batch-size is 0; it must be a positive integer"),
        (["--lm", "nowhere.arpa"], "nowhere.arpa"),
        (["--beam", "0"], "--beam is 0"),
        (["--alpha", "0.25"], "give --lm as well"),
        (["--alpha", "nan"], "--alpha is nan"),
        (["--dataset-dir", "nothing"], "nothing"),
        (["--output", __file__], f"error: {__file__}: "),
    ],
)
def test_what_cannot_be_done_is_an_error_of_one_line(
    options: list[str], message: str, tones: Path, checkpoint: Path
) -> None:
    run = command(checkpoint, "--dataset-dir", tones, *options)
    assert run.returncode == 1
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_checkpoint_that_is_damaged_or_absent_is_named(tones: Path, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.pt").write_bytes(checkpoint.read_bytes()[:1000])
    for name in ("damaged.pt", "nowhere.pt"):
        run = command(tmp_path / name, "--dataset-dir", tones)
        assert (run.returncode, run.stderr.count("\n")) == (1, 1)
        assert name in run.stderr


def test_a_subset_is_found_by_its_name_if_the_split_of_that_name_is_empty(tones: Path) -> None:
    """As AN4's test set, which is its validation set."""
    dataset = dataclasses.replace(open_dataset(tones), splits={"tones-validation": []})
    assert [subset.name for subset in select_subsets(dataset, "tones-validation")] == ["tones-validation"]
