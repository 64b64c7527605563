import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.cli import UserError
from data.download import Options, download
from data.own_speech import read_own_speech
from data.packed import TRANSCRIPT_CHARACTERS, open_dataset
from data.readers import decode
from tests.data.made_up import command, flac, sound


def record(folder: Path, *names: str) -> None:
    """Write half a second of noise under each name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        suffix = Path(name).suffix[1:].upper()
        soundfile.write(folder / name, sound(8000), 16000, format=suffix, subtype="PCM_16")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    record(tmp_path / "speech", "a.wav", "more/b.flac")
    (tmp_path / "speech" / "list.tsv").write_text("a.wav\tGO ON\nmore/b.flac\tit's me\n")
    return tmp_path / "speech" / "list.tsv"


def test_the_command_makes_a_data_set_of_ones_own_speech(manifest: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["--corpus", "manifest", "--manifest", "speech/list.tsv", "--dataset-dir", "own"]
    made = command("download_dataset.sh", *words, folder=tmp_path)
    assert made.returncode == 0 and "read as TSV without header" in made.stderr, made.stderr
    made = command("download_dataset.sh", *words, "--subsets", "validation", folder=tmp_path)
    assert made.returncode == 0 and "warning: validation and train of own are one list" in made.stderr, made.stderr
    dataset = open_dataset(tmp_path / "own")
    assert dataset.splits == {"train": ["train"], "validation": ["validation"], "test": []}
    (train,) = dataset.split("train")
    assert list(train.ids) == ["a.wav", "more/b.flac"] and list(train.speakers) == ["", "more"]
    assert list(train.transcripts) == ["GO ON", "IT'S ME"]
    np.testing.assert_array_equal(train.waveform(0), sound(8000)[:, 0])
    verified = command("verify_dataset.sh", "--dataset-dir", tmp_path / "own")
    assert verified.stdout.startswith("Dataset Checksum Passed.")


@pytest.mark.parametrize("folder", [False, True])
def test_a_rerun_does_nothing_and_another_list_is_not_taken_for_the_same(
    manifest: Path, tmp_path: Path, folder: bool
) -> None:
    manifest = manifest.rename(manifest.with_name("metadata.tsv"))
    source = manifest.parent if folder else manifest
    asked = Options(corpus="manifest", manifest=source, dataset_dir=tmp_path / "dataset", jobs=1)
    assert download(asked).digest == download(asked).digest
    manifest.write_text("a.wav\tSTOP\n")
    with pytest.raises(UserError, match="holds train from a list with MD5 "):
        download(asked)


# By who writes them: the recordings, the texts beside them, what --manifest names, and how that is read.
SHAPES: dict[str, tuple[str, dict[str, str], str, str]] = {
    "two columns, from Windows": ("a.wav b.wav", {"l": "\ufeffa.wav\tgo on\r\n\r\nb.wav\tIT'S ME\r\n"}, "l", "TSV"),
    "Common Voice": (
        "clips/a.flac clips/b.flac",
        {"train.tsv": "client_id\tpath\tsentence\nx\ta.flac\tGo on\ny\tb.flac\tIt's me\n"},
        "train.tsv",
        "TSV with header: client_id, path, sentence",
    ),
    "Hugging Face": (
        "a.wav x/b.wav",
        {"metadata.csv": 'file_name,transcription\na.wav,"Go on"\nx/b.wav,It\'s me\n'},
        "",
        "CSV with header: file_name, transcription",
    ),
    "NeMo and WeNet": (
        "a.wav b.wav",
        {"m": '{"audio_filepath": "a.wav", "offset": 0.0, "text": "go on"}\n{"wav": "b.wav", "txt": "it\'s me"}\n'},
        "m",
        "JSON lines",
    ),
    "Kaldi": (
        "a.wav deep/b.wav",
        {"wav.scp": "u1 a.wav\nu2\tdeep/b.wav\n", "text": "u1 go on\nu2 it's me\n", "utt2spk": "u1 x\nu2 y\n"},
        "",
        "Kaldi",
    ),
    "LibriSpeech": (
        "8/1/a.flac 8/2/b.flac",
        {"8/1/8-1.trans.txt": "a GO ON\n", "8/2/8-2.trans.txt": "b IT'S ME\n"},
        "",
        "LibriSpeech",
    ),
    "a text beside each": ("x/a.wav y/b.wav", {"x/a.txt": "go\non\n", "y/b.txt": "it's me"}, "", ".txt"),
    "LJ Speech": (
        "wavs/a.wav wavs/b.wav",
        {"metadata.csv": "a|\"Go\" on.|go on\nb|It's me|it's me\n"},
        "",
        "columns with |",
    ),
    "SpeechBrain": (
        "a.wav b.wav",
        {"l": "ID,duration,wav,spk_id,wrd\n1,0.5,a.wav,x,GO ON\n2,0.5,b.wav,y,IT'S ME\n"},
        "l",
        "CSV with header: id, duration, wav, spk_id, wrd",
    ),
    "Multilingual LibriSpeech": (
        "audio/1/a.flac audio/2/b.flac",
        {"transcripts.txt": "a\tgo on\nb\tit's me\n"},
        "transcripts.txt",
        "TSV without header",
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_that_people_have_are_read_and_named(
    tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recordings, texts, source, form = SHAPES[shape]
    record(tmp_path, *recordings.split())
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    if shape == "a text beside each":  # a folder may lie elsewhere, and a link lead back
        (tmp_path / "x" / "all").symlink_to(tmp_path)
        (tmp_path / "y").symlink_to((tmp_path / "y").rename(tmp_path.with_name(f"{tmp_path.name}-y")))
    utterances = read_own_speech(tmp_path / source, 2)
    assert [(Path(each.file).stem, each.transcript) for each in utterances] == [("a", "GO ON"), ("b", "IT'S ME")]
    assert all(each.num_samples == 8000 for each in utterances)
    if any(mark in "".join(texts.values()) for mark in ("client_id", "spk_id", "u1 x")):
        assert [each.speaker for each in utterances] == ["x", "y"]
    said = capsys.readouterr().err
    assert "2 utterances, read as " in said and form in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l", "", "holds no utterance"),
        ("l", "a.wav GO ON\n", "line 1: not 2 columns: 'a.wav GO ON'"),
        ("l", "a.wav\tA\n\tB\n", "line 2: no path"),
        ("l", "a.wav\tA\na.wav\tB\n", "line 2: the same utterance twice: a.wav, first in line 1"),
        ("l", "a.wav\t \n", "line 1: the transcript is empty: a.wav"),
        ("l", "a.wav\tNO 1\n", r"line 1: '1' \(U\+0031\) in the transcript"),
        ("l", "a.wav\tA\tB\n", "line 1: not 2 columns"),
        ("l", "none.wav\tA\n", "line 1: .*none.wav is missing or not a file"),
        ("l", "more\tA\n", "line 1: .*more is missing or not a file"),
        ("l", "c\tA\n", "line 1: .*/c is missing or not a file"),  # it is in two folders
        ("l", "cafe\u0301.wav\tA\n", r"is missing or not a file; its name is spelled 'cafe\\u0301.wav'"),
        ("l", "a.wav\0\tA\n", "line 1: .*a.wav\0 is missing"),
        ("l", 'path,text\na.wav,"GO\n', "line 2: unexpected end of data"),
        ("l", '{"audio": "a.wav", "text": "A"}\n{"audio"\n', "l, line 2: not a JSON object"),
        ("l", '{"audio": "a.wav", "text": "A", "start": 1.5}\n', "line 1: part of a recording, from 1.5 on"),
        ("l", '{"audio": "a.wav", "text": "A", "duration": 0.25}\n', "line 1: part of a recording, 0.25 s of 0.5"),
        ("l", '{"audio": "a.wav", "text": NaN}\n', "line 1: a transcript that is no text: nan"),
        ("l", '{"audio": "a\\ud8ff.wav", "text": "A"}\n', r"line 1: a name that is not UTF-8: 'a\\ud8ff.wav'"),
        ("l", "path,text,text\na.wav,A,B\n", "line 1: a column occurs twice"),
        ("l", '{"text": "A"}\n', "line 1: no path: one of the fields path, file_name, audio_filepath"),
        ("wav.scp", "u1 sox a.mp3 -t wav - |\n", "utterance u1: a command"),
        ("wav.scp", "u1 a.wav\nu1 more/b.flac\n", "wav.scp: an utterance occurs twice"),
        ("segments", "u1 r 0 1\n", "segments: parts of recordings"),
        ("x.trans.txt", "b/c GO ON\n", "x.trans.txt: not one recording for a transcript: 0 for b/c"),
        ("x.txt", "GO ON\n", "x.txt: not one recording for a transcript: 0 for x"),
    ],
)
def test_what_is_wrong_with_own_speech_is_named(manifest: Path, name: str, content: str, message: str) -> None:
    record(manifest.parent, "x/c.wav", "y/c.wav")
    for file in ("text", "wav.scp"):
        if name in ("wav.scp", "segments"):
            (manifest.parent / file).write_text("u1 A\n")
    (manifest.parent / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_own_speech(manifest.parent / name if name == "l" else manifest.parent, 1)


def test_equal_complaints_are_one_line_with_their_number(manifest: Path) -> None:
    absent = "".join(f"{number}.wav\tA\n" for number in range(30))
    content = f"a.wav\tHello, world.\nclient\ta.wav\tA\nmore/b.flac\tIt\u2019s 9, 1, 1.\n{absent}"
    manifest.write_text(content, encoding="utf-8")
    (manifest.parent / "long.wav").write_bytes(flac(sound(9000))[:-5000])
    with pytest.raises(UserError) as raised:
        read_own_speech(manifest, 2)
    first, *lines = str(raised.value).splitlines()
    assert first.endswith("list.tsv, read as TSV without header: path, transcript, has 40 problems:")
    (commas,) = (line for line in lines if "','" in line)
    assert commas.startswith("line 1: ") and commas.endswith("(first of 3)")
    (missing,) = (line for line in lines if "is missing" in line)
    assert missing.startswith("line 4: ") and missing.endswith("(first of 30)")
    assert any(line.startswith("line 2: not 2 columns") and "client" in line for line in lines)
    assert len(lines) == 7


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(), st.text().map(str.encode), st.text("a.wv\t\nG' \r,|{\"}:").map(str.encode)))
def test_any_list_is_utterances_or_an_error_that_names_it(manifest: Path, content: bytes) -> None:
    manifest.write_bytes(content)
    try:
        utterances = read_own_speech(manifest, 1)
    except UserError as error:
        assert "list.tsv" in str(error) and str(error).count("\n") <= 21
    else:
        assert utterances
        assert all(set(utterance.transcript) <= set(TRANSCRIPT_CHARACTERS) for utterance in utterances)


def test_a_folder_that_cannot_be_listed_is_an_error(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scandir(path: str, real: Callable[[str], Any] = os.scandir) -> Any:
        if path.endswith("more"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    manifest.unlink()
    (manifest.parent / "a.txt").write_text("GO ON\n")
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="more: Permission denied"):
        download(Options(corpus="manifest", manifest=manifest.parent, dataset_dir=tmp_path / "dataset", jobs=1))


def test_a_data_set_may_be_made_in_the_folder_of_its_recordings(manifest: Path) -> None:
    manifest.unlink()
    for name in ("a.txt", "more/b.txt"):
        (manifest.parent / name).write_text("GO ON\n")
    options = Options(corpus="manifest", manifest=manifest.parent, dataset_dir=manifest.parent / "packed", jobs=1)
    assert download(options).summary["train"].utterances == 2


def test_a_file_that_has_changed_since_it_was_measured_is_an_error(manifest: Path) -> None:
    utterance = read_own_speech(manifest, 1)[0]
    soundfile.write(utterance.file, sound(5000), 16000)
    with pytest.raises(UserError, match=r"utterance a.wav: .* has 5000 samples, not 8000 as before"):
        decode(utterance)


def test_samples_beyond_full_scale_and_silence_are_told(
    manifest: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loud = np.repeat(np.array([0.5, 1.0, -1.0, 1.2, -1.3, 0.0]), 100)
    soundfile.write(manifest.parent / "a.wav", loud, 16000, subtype="FLOAT")
    opposite = np.stack([np.arange(8000) % 100, 50 - np.arange(8000) % 100], axis=1).astype(np.int16)
    soundfile.write(manifest.parent / "more" / "b.flac", opposite, 16000)
    options = Options(corpus="manifest", manifest=manifest, dataset_dir=tmp_path / "dataset", jobs=1)
    (train,) = download(options).split("train")
    warned = capfd.readouterr().err
    assert "a.wav: 200 samples were beyond full scale" in warned
    assert "more/b.flac: nothing but silence" in warned
    assert list(train.waveform(0)[::100]) == [16384, 32767, -32768, 32767, -32768, 0]
