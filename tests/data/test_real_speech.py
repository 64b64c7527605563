"""Real speech, where it lies beside the repository: AN4 whole, and a part of LibriSpeech."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.packed import open_dataset
from tests.data.made_up import REPOSITORY, command

SPEECH = REPOSITORY.parent / "shared" / "speech"
pytestmark = pytest.mark.skipif(not SPEECH.is_dir(), reason=f"no real speech in {SPEECH}")


def test_an4_has_its_published_counts_and_is_recognised_as_the_complete_archive(tmp_path: Path) -> None:
    made = command("download_dataset.sh", "--corpus", "an4", "--mirror", SPEECH / "an4", "--dataset-dir", tmp_path)
    assert made.returncode == 0, made.stderr
    dataset = open_dataset(tmp_path)
    assert dataset.official
    assert dataset.summary["train"].utterances == 948
    assert dataset.summary["train"].speakers == 74
    assert round(dataset.summary["train"].hours, 2) == 0.71
    (validation,) = dataset.split("validation")
    assert len(validation) == 130
    assert sum(len(transcript.split()) for transcript in validation.transcripts) == 773
    assert command("verify_dataset.sh", "--dataset-dir", tmp_path).returncode == 0


def test_a_part_of_librispeech_is_prepared_and_marked_as_a_part(tmp_path: Path) -> None:
    mirror = SPEECH / "librispeech"
    words: list[str | Path] = [
        "--subsets",
        "train-clean-100,dev-clean,test-clean",
        "--mirror",
        mirror,
        "--dataset-dir",
        tmp_path,
    ]
    refused = command("download_dataset.sh", *words)
    assert refused.returncode == 1 and "expected 2a93770f6d5c6c964bc36631d331a522" in refused.stderr
    made = command("download_dataset.sh", *words, "--checksums", mirror / "md5sum.txt")
    assert made.returncode == 0, made.stderr
    dataset = open_dataset(tmp_path)
    counts = {name: summary.utterances for name, summary in dataset.summary.items()}
    assert counts == {"train-clean-100": 249, "dev-clean": 234, "test-clean": 4}
    assert not dataset.official
    assert command("verify_dataset.sh", "--dataset-dir", tmp_path).stdout.startswith("Dataset Checksum Passed.")
