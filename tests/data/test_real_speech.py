"""Real speech, where it lies beside the repository: AN4 whole, and a part of LibriSpeech."""

from pathlib import Path

import pytest

from data.packed import open_dataset
from tests.data.made_up import REPOSITORY, command

SPEECH = REPOSITORY.parent / "shared" / "speech"
pytestmark = pytest.mark.skipif(not SPEECH.is_dir(), reason=f"no real speech in {SPEECH}")


@pytest.mark.parametrize(("corpus", "counts"), [("librispeech", [249, 234, 4]), ("an4", [948, 130])])
def test_real_speech_is_prepared_and_verified(tmp_path: Path, corpus: str, counts: list[int]) -> None:
    words: list[str | Path] = ["--corpus", corpus, "--mirror", SPEECH / corpus, "--dataset-dir", tmp_path]
    if corpus == "librispeech":
        words += ["--subsets", "train-clean-100,dev-clean,test-clean", "--checksums", SPEECH / corpus / "md5sum.txt"]
    made = command("download_dataset.sh", *words)
    assert made.returncode == 0, made.stderr
    dataset = open_dataset(tmp_path)
    assert [summary.utterances for summary in dataset.summary.values()] == counts
    assert dataset.official == (corpus == "an4")
    (subset,) = dataset.split("validation")
    assert sum(len(transcript.split()) for transcript in subset.transcripts) == 773 or corpus != "an4"
    assert command("verify_dataset.sh", "--dataset-dir", tmp_path).returncode == 0
