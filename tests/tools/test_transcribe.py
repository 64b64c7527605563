"""Transcription, by the command that a user types, of a language that a model has learned, and of everything else."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import Any

import Levenshtein
import numpy as np
import pytest
import soundfile

from tests.conftest import ROOT
from tests.processes import Popen, run_module
from tests.tools.conftest import Trained
from tests.tools.speaking import RATE, random_words, speak
from tools.transcribe import main

LONG = random_words(150, 5)


def command(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return run_module("tools.transcribe", *arguments, **options)


@pytest.fixture(scope="module")
def sentence(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A recording and its transcript."""
    words = random_words(3, 8)
    file = tmp_path_factory.mktemp("sentence") / "sentence.wav"
    soundfile.write(file, speak(words, 8)[0], RATE)
    return file, " ".join(words)


@pytest.fixture(scope="module")
def long(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What is heard of a recording much longer than a piece, as JSON objects."""
    file = tmp_path_factory.mktemp("long") / "long.flac"
    soundfile.write(file, speak(LONG, 5)[0], RATE)
    run = command(trained.checkpoint, file, "--format", "json")
    assert run.returncode == 0, run.stderr
    assert re.search(rb"real-time factor 0\.\d+, .* MiB of memory", run.stderr)
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_long_recording_has_every_word_once_across_all_seams(long: list[dict]) -> None:
    assert len(long) > 5
    heard = [word["word"] for piece in long for word in piece["words"]]
    kinds = [kind for kind, *_ in Levenshtein.editops(LONG, heard)]
    assert kinds.count("insert") == kinds.count("delete") == 0
    assert len(kinds) <= len(LONG) / 20  # a word heard wrong now and then


def test_words_have_the_times_at_which_they_were_spoken_and_confidences(long: list[dict]) -> None:
    times = speak(LONG, 5)[1]
    words = [word for piece in long for word in piece["words"]]
    assert len(words) == len(times)
    middles = np.array([(word["start"] + word["end"]) / 2 for word in words])
    errors = np.abs(middles - np.mean(times, axis=1))
    assert np.median(errors) < 0.15
    assert errors.max() < 0.5
    assert all(0 < word["confidence"] <= 1 for word in words)
    assert all(piece["text"] == " ".join(word["word"] for word in piece["words"]) for piece in long)


def test_standard_input_is_a_file_or_raw_audio(sentence: tuple[Path, str], trained: Trained) -> None:
    file, expected = sentence
    assert command(trained.checkpoint, "-", given=file.read_bytes()).stdout.decode() == f"{expected}\n"
    raw = soundfile.read(file, dtype="int16")[0].astype("<i2").tobytes()
    assert command(trained.checkpoint, "-", "--raw-rate", "16000", given=raw).stdout.decode() == f"{expected}\n"
    odd = command(trained.checkpoint, "-", "--raw-rate", "16000", given=raw + b"x")
    assert odd.stdout.decode() == f"{expected}\n"
    assert odd.returncode == 1
    assert b"standard input ends in the middle of a 16-bit sample" in odd.stderr


@pytest.mark.parametrize("raw", [True, False])
def test_an_interrupted_live_recording_is_recognized_to_where_it_came(
    raw: bool, sentence: tuple[Path, str], trained: Trained
) -> None:
    content = sentence[0].read_bytes()
    content = content[44:] if raw else content[:40] + b"\xff\xff\xff\xff" + content[44:]
    asked = [str(trained.checkpoint), "-", *(["--raw-rate", "16000"] if raw else [])]
    pipe = subprocess.PIPE
    with Popen([sys.executable, "-m", "tools.transcribe", *asked], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(content)
        process.stdin.flush()
        while int.from_bytes(fcntl.ioctl(process.stdin, termios.FIONREAD, bytes(4)), sys.byteorder):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read().decode() == f"{sentence[1]}\n"
        assert b"Traceback" not in process.stderr.read()
        process.stdin.close()
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["talk.txt", "link.flac"])
def test_a_recording_is_never_replaced_by_a_transcript(name: str, sentence: tuple[Path, str], trained: Trained) -> None:
    folder = Path(tempfile.mkdtemp(dir=sentence[0].parent))
    shutil.copy(sentence[0], folder / "talk.txt")
    (folder / "link.flac").symlink_to("talk.txt")
    (folder / "link.txt").hardlink_to(folder / "talk.txt")
    run = command(trained.checkpoint, name, "--output-dir", ".", "--overwrite", folder=folder)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: {name.split('.')[0]}.txt is an input".encode())
    assert (folder / "talk.txt").read_bytes() == sentence[0].read_bytes()


def test_a_full_temporary_folder_is_named(sentence: tuple[Path, str], trained: Trained, tmp_path: Path) -> None:
    limits = ["prlimit", "--fsize=9000", sys.executable, "-m", "tools.transcribe", str(trained.checkpoint), "-"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    run = subprocess.run(limits, input=sentence[0].read_bytes(), capture_output=True, cwd=ROOT, env=environment)
    assert run.returncode == 1
    (line, *_) = run.stderr.decode().splitlines()
    assert line.startswith("error: ") and str(tmp_path) in line
    assert not list(tmp_path.iterdir())


def test_a_bad_file_among_many_is_named_and_the_others_are_done(
    sentence: tuple[Path, str], trained: Trained, tmp_path: Path
) -> None:
    file, expected = sentence
    (tmp_path / "bad.wav").write_text("no audio at all\n" * 100)
    (tmp_path / "link.wav").symlink_to("absent.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    for name, samples in (("sample.wav", [1]), ("constant.wav", [1234] * 48000)):
        soundfile.write(tmp_path / name, np.array(samples, dtype=np.int16), RATE)
    copy = shutil.copy(file, tmp_path / "copy.wav")
    bad = [tmp_path / name for name in ("bad.wav", "absent.wav", "link.wav", "pipe.wav")]
    run = command(trained.checkpoint, file, *bad, tmp_path / "sample.wav", tmp_path / "constant.wav", copy)
    assert run.returncode == 1
    heard = dict(line.split("\t") for line in run.stdout.decode().splitlines())
    assert heard.pop(str(file)) == heard.pop(str(copy)) == expected
    assert heard.keys() <= {str(tmp_path / "sample.wav")}
    errors = [line for line in run.stderr.decode().splitlines() if line.startswith("error: ")]
    assert all(error.startswith(f"error: {name} ") for error, name in zip(errors, bad, strict=True))
    assert b"4 of 8 recordings could not be read" in run.stderr


def test_folders_are_searched_and_each_recording_gets_a_file_of_its_own(
    sentence: tuple[Path, str], trained: Trained, tmp_path: Path
) -> None:
    file, expected = sentence
    for name in ("talks/one.wav", "talks/deep/one.wav", "talks/deep/two.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / name)
    (tmp_path / "talks" / "notes.txt").write_text("no audio")
    (tmp_path / "talks" / "._one.wav").write_bytes(b"\0\5\x16\7" + bytes(60))  # what macOS knows about one.wav
    for form, suffix in (("text", "txt"), ("json", "jsonl"), ("srt", "srt"), ("vtt", "vtt")):
        run = command(trained.checkpoint, tmp_path / "talks", "--output-dir", tmp_path / form, "--format", form)
        assert run.returncode == 0, run.stderr
        assert run.stdout == b""
        assert b"left out, as not audio by their names: 1 x .txt, 1 x .wav" in run.stderr
        written = sorted(str(path.relative_to(tmp_path / form)) for path in (tmp_path / form).rglob("*.*"))
        assert written == [f"deep/one.{suffix}", f"deep/two.{suffix}", f"one.{suffix}"]
    assert (tmp_path / "text" / "one.txt").read_text() == f"{expected}\n"
    again = command(trained.checkpoint, tmp_path / "talks", "--output-dir", tmp_path / "text")
    assert again.returncode == 1
    assert b"deep/one.txt exists already, and so do 2 more; give another output, or --overwrite" in again.stderr
    (tmp_path / "text" / "one.txt").write_text("mine")
    again = command(trained.checkpoint, tmp_path / "talks", "--output-dir", tmp_path / "text", "--overwrite")
    assert again.returncode == 0
    assert (tmp_path / "text" / "one.txt").read_text() == f"{expected}\n"
    caption = (tmp_path / "srt" / "one.srt").read_text().splitlines()
    assert caption[0] == "1"
    assert caption[1].startswith("00:00:00,") and " --> 00:00:0" in caption[1]
    assert caption[2] == expected
    assert (tmp_path / "vtt" / "one.vtt").read_text().startswith("WEBVTT\n\n00:00:00.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to transcribe"),
        (["a.wav", "--raw-rate", "8000"], "--raw-rate is for standard input alone"),
        (["a.wav", "b.wav", "--format", "srt"], "needs an --output-dir"),
        (["a.wav", "a.flac", "--output-dir", "out"], "would both be written"),
        (["a.wav", "--batch-size", "0"], "--batch-size is 0"),
        (["FOLDER"], "FOLDER is a folder without audio files"),
    ],
)
def test_what_cannot_be_done_is_an_error_of_one_line(
    arguments: list[str], message: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("FOLDER", str(tmp_path)) for word in (*arguments, message)]
    assert main([str(trained.checkpoint), *words[:-1], "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert words[-1] in said
    assert said.count("\n") == 1


def test_four_hours_of_silence_pass_in_little_memory(trained: Trained, tmp_path: Path) -> None:
    file = tmp_path / "silence.wav"
    samples = 4 * 3600 * RATE
    soundfile.write(file, np.zeros(0, dtype=np.int16), RATE)
    header = bytearray(file.read_bytes()[:44])
    header[4:8], header[40:44] = (36 + 2 * samples).to_bytes(4, "little"), (2 * samples).to_bytes(4, "little")
    with file.open("wb") as stream:  # sparse: it takes no room on the disk
        stream.write(header)
        stream.truncate(44 + 2 * samples)
    code = (
        "import resource, sys; from tools.transcribe import main; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; status = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before); sys.exit(status)"
    )
    line = [sys.executable, "-c", code, str(trained.checkpoint), str(file)]
    run = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "14400.0 s of audio" in run.stderr
    assert f"{file}: no word was recognized" in run.stderr
    (grown,) = run.stdout.splitlines()  # KiB; no word
    assert int(grown) < 300_000
