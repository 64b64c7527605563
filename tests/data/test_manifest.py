from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.cli import DataError
from data.download import Options, download
from data.packed import TRANSCRIPT_CHARACTERS, open_dataset
from data.readers import decode, read_manifest
from data.verify import validate
from tests.data.made_up import command, encoded, flac, sound, tone

HALF_A_SECOND = {"a.wav": "GO ON", "more/b.flac": "it's me"}


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    (folder / "more").mkdir(parents=True)
    (folder / "a.wav").write_bytes(encoded(tone(16000), 16000, "WAV", "PCM_16"))
    (folder / "more" / "b.flac").write_bytes(flac(tone(44100, 2), 44100))
    lines = "".join(f"{path}\t{transcript}\n" for path, transcript in HALF_A_SECOND.items())
    (folder / "list.tsv").write_text(lines)
    return folder / "list.tsv"


@pytest.fixture
def asked(manifest: Path, tmp_path: Path) -> Options:
    return Options(corpus="manifest", manifest=manifest, dataset_dir=tmp_path / "dataset", jobs=1)


def test_the_command_makes_a_data_set_of_ones_own_speech(manifest: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["--corpus", "manifest", "--manifest", "speech/list.tsv", "--dataset-dir", "own"]
    made = command("download_dataset.sh", *words, folder=tmp_path)
    assert made.returncode == 0, made.stderr
    made = command("download_dataset.sh", *words, "--subsets", "validation", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    dataset = open_dataset(tmp_path / "own")
    assert dataset.splits == {"train": ["train"], "validation": ["validation"], "test": []}
    (train,) = dataset.split("train")
    assert list(train.ids) == ["a.wav", "more/b.flac"] and list(train.speakers) == ["", "more"]
    assert list(train.transcripts) == ["GO ON", "IT'S ME"]
    np.testing.assert_array_equal(train.waveform(0), tone(16000)[:, 0])
    assert np.abs(train.waveform(1)[200:-200] - tone(16000)[200:-200, 0]).max() < 30
    verified = command("verify_dataset.sh", "--dataset-dir", tmp_path / "own")
    assert verified.stdout.startswith("Dataset Checksum Passed.")


def test_a_rerun_does_nothing_and_another_manifest_is_not_taken_for_the_same(asked: Options, manifest: Path) -> None:
    first = download(asked)
    assert download(asked).digest == first.digest
    assert validate(first) == []
    manifest.write_text("a.wav\tSTOP\n")
    with pytest.raises(DataError, match=r"holds train from an archive with MD5 .* or the --manifest"):
        download(asked)


def test_a_manifest_makes_one_subset(asked: Options) -> None:
    for subsets in ("train,test", "train,validation,test"):
        with pytest.raises(DataError, match="a manifest makes one subset"):
            download(replace(asked, subsets=subsets))


def test_byte_order_mark_windows_line_ends_and_empty_lines_are_nothing_special(manifest: Path) -> None:
    manifest.write_bytes(b"\xef\xbb\xbfa.wav\tGO ON\r\n\r\nmore/b.flac\tON\r\n")
    assert [utterance.transcript for utterance in read_manifest(manifest, 2)] == ["GO ON", "ON"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"list.tsv holds no utterance"),
        (b"a.wav GO ON\n", "line 1: 1 columns, not the two of path<TAB>transcript: 'a.wav GO ON'"),
        (b"a.wav\tA\n\tB\n", "line 2: 2 columns, not the two of path<TAB>transcript"),
        (b"a.wav\tA\na.wav\tB\n", r"line 2: utterance a.wav occurs twice, first in line 1"),
        (b"a.wav\t \n", r"line 1: the transcript of utterance a.wav is empty"),
        (b"a.wav\tNO 1\n", r"line 1: the first of 1 '1' \(U\+0031\) in transcripts; only A-Z"),
        (b"a.wav\tA\tB\n", r"line 1: 3 columns, not the two of path<TAB>transcript"),
        (b"none.wav\tA\n", r"line 1: .*none.wav is missing or not a file"),
        (b"more\tA\n", r"line 1: .*more is missing or not a file"),
        (b"\xff\tA\n", r"cannot read the manifest"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_named(manifest: Path, content: bytes, message: str) -> None:
    manifest.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_manifest(manifest, 1)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(), st.text().map(str.encode), st.text("a.wv\t\nG' \r").map(str.encode)))
def test_any_manifest_is_utterances_or_an_error_that_names_it(manifest: Path, content: bytes) -> None:
    manifest.write_bytes(content)
    try:
        utterances = read_manifest(manifest, 1)
    except DataError as error:
        assert "list.tsv" in str(error) and str(error).count("\n") <= 21
    else:
        assert utterances
        assert all(set(utterance.transcript) <= set(TRANSCRIPT_CHARACTERS) for utterance in utterances)


def test_samples_beyond_full_scale_and_silence_are_told(
    asked: Options, manifest: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loud = np.repeat(np.array([0.5, 1.0, -1.0, 1.2, -1.3, 0.0]), 100)
    (manifest.parent / "a.wav").write_bytes(encoded(loud, 16000, "WAV", "FLOAT"))
    (manifest.parent / "more" / "b.flac").write_bytes(flac(np.concatenate([tone(16000), 200 - tone(16000)], axis=1)))
    (train,) = download(asked).split("train")
    said = capfd.readouterr().err
    assert "warning: train: 2 utterances to check:\na.wav: 200 samples were beyond full scale" in said
    assert "more/b.flac: nothing but silence; do its channels cancel each other?" in said
    assert list(train.waveform(0)[::100]) == [16384, 32767, -32768, 32767, -32768, 0]


def test_all_that_is_wrong_with_a_manifest_is_told_at_once(manifest: Path) -> None:
    absent = "".join(f"{number}.wav\tA\n" for number in range(30))
    content = f"a.wav\tHello, world.\nclient\ta.wav\tA\nmore/b.flac\tIt\u2019s 9, 1, 1.\n{absent}cafe\u0301.wav\tA\n"
    manifest.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        read_manifest(manifest, 2)
    first, *lines = str(raised.value).splitlines()
    assert first.endswith("list.tsv has 37 problems:") and lines[-1] == "... and 17 more" and len(lines) == 21
    assert lines[0].startswith("line 1: the first of 3 ',' (U+002C) in transcripts; only A-Z, apostrophe and space")
    assert "line 3: the first of 1 '\u2019' (U+2019) in transcripts" in "\n".join(lines)
    assert "line 2: 3 columns, not the two of path<TAB>transcript: 'client\\ta.wav\\tA'" in lines
    assert any(line.startswith("line 4: ") and line.endswith("0.wav is missing or not a file") for line in lines)


def test_a_name_that_looks_like_another_is_spelled_out(manifest: Path) -> None:
    manifest.write_text("cafe\u0301.wav\tA\n", encoding="utf-8")
    (manifest.parent / "caf\u00e9.wav").write_bytes(encoded(tone(16000), 16000, "WAV", "PCM_16"))
    with pytest.raises(DataError, match=r"line 1: .* is missing or not a file; its name is spelled 'cafe\\u0301.wav'"):
        read_manifest(manifest, 1)


def test_a_file_that_has_changed_since_it_was_measured_is_an_error(manifest: Path) -> None:
    utterance = read_manifest(manifest, 1)[0]
    Path(utterance.file).write_bytes(encoded(sound(5000), 16000, "WAV", "PCM_16"))
    with pytest.raises(DataError, match=r"utterance a.wav: .* has 5000 samples, not 8000 as before"):
        decode(utterance)
