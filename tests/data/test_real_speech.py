"""Real speech, where it lies beside the repository: AN4 whole, and a part of LibriSpeech."""

import random
from pathlib import Path

import pytest

from data.packed import AUDIO_FILE, AUDIO_HEADER_BYTES, open_dataset
from tests.data.made_up import REPOSITORY, command
from tests.data.misbehaving import Answer, serving

SPEECH = REPOSITORY.parent / "shared" / "speech"
pytestmark = pytest.mark.skipif(not SPEECH.is_dir(), reason=f"no real speech in {SPEECH}")


@pytest.mark.parametrize("corpus", ["librispeech", "an4"])
def test_real_speech_comes_over_http_and_one_changed_sample_is_located(tmp_path: Path, corpus: str) -> None:
    with serving(SPEECH / corpus) as server:
        cuts = random.Random(5)

        def behave(path: str, number: int, answer: Answer) -> None:
            answer.body = answer.body[: cuts.randrange(1 << 20, 1 << 25)]

        server.behave = behave
        words: list[str | Path] = ["--corpus", corpus, "--mirror", server.address, "--dataset-dir", tmp_path]
        if corpus == "librispeech":
            words += ["--subsets", "train-clean-100,dev-clean,test-clean"]
            words += ["--checksums", SPEECH / corpus / "md5sum.txt"]
        made = command("download_dataset.sh", *words)
    assert made.returncode == 0, made.stderr
    assert "trying again in" in made.stderr
    dataset = open_dataset(tmp_path)
    counts = {name: summary.utterances for name, summary in dataset.summary.items()}
    assert list(counts.values()) == ([948, 130] if corpus == "an4" else [249, 234, 4])
    assert dataset.official == (corpus == "an4")
    assert command("verify_dataset.sh", "--dataset-dir", tmp_path).returncode == 0
    (subset,) = dataset.split("validation")
    words_spoken = sum(len(transcript.split()) for transcript in subset.transcripts)
    assert words_spoken == 773 or corpus != "an4"
    last = len(subset) - 1
    changed = int(subset.offsets[last]) + 4321
    with (tmp_path / subset.name / AUDIO_FILE).open("r+b") as stream:
        stream.seek(AUDIO_HEADER_BYTES + 2 * changed)
        stream.write((int(subset.audio[changed]) ^ 1).to_bytes(2, "little", signed=True))
    run = command("verify_dataset.sh", "--dataset-dir", tmp_path)
    assert run.returncode == 1
    assert f"{subset.name}: utterance {subset.ids[last]} has changed" in run.stdout
    assert command("verify_dataset.sh", "--dataset-dir", tmp_path, "--quick").returncode == 0
