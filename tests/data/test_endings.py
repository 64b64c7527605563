"""How a command ends when its output cannot be written or Ctrl-C is pressed: as a shell expects, and in few words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.download import Options
from data.packed import PackedDataset
from tests.data.made_up import REPOSITORY, librispeech_files, write_mirror


def line(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


@pytest.fixture
def lines(dataset: PackedDataset, options: Options) -> Iterator[list[list[str]]]:
    """Command lines of a download that has nothing to do, of a verification, and of one that finds no data set."""
    asked = ["--subsets", options.subsets, "--mirror", options.mirror, "--checksums", str(options.checksums)]
    yield [
        line("data.download", *asked, "--dataset-dir", dataset.path),
        line("data.verify", "--dataset-dir", dataset.path),
        line("data.verify", "--dataset-dir", "nowhere"),
    ]


def run(words: list[str], output: int | None, errors: int = subprocess.PIPE) -> tuple[int, bytes]:
    ended = subprocess.run(words, stdout=output, stderr=errors, cwd=REPOSITORY, timeout=60)
    return ended.returncode, ended.stderr


def test_a_reader_that_has_left_ends_a_command_silently(lines: list[list[str]]) -> None:
    for words in lines:
        reading, writing = os.pipe()
        os.close(reading)
        assert run(words, writing) == (141, b"")
        os.close(writing)


def test_a_full_disk_under_the_output_is_one_line(lines: list[list[str]]) -> None:
    message = b"error: standard output cannot be written: No space left on device\n"
    for words in lines:
        with Path("/dev/full").open("wb") as full:
            assert run(words, full.fileno()) == (1, message)


def test_a_name_that_is_not_unicode_is_printed_with_escapes(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in a UTF-8 locale other than C.UTF-8
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    asked = ["--subsets", "dev-clean", "--mirror", mirror, "--checksums", mirror / "md5sum.txt"]
    for words in (line("data.download", *asked), line("data.verify"), line("data.verify", "--quick")):
        ended = subprocess.run([*words, "--dataset-dir", str(folder)], capture_output=True, cwd=REPOSITORY, timeout=60)
        assert ended.returncode == 0, ended.stderr
        assert words[2] == "data.verify" or rb"caf\udce9 is complete" in ended.stdout


def test_ctrl_c_ends_a_download_in_one_line_with_its_decoding_processes(mirror: Path, tmp_path: Path) -> None:
    spoken = {f"84-1-{number:04d}": (160_000, "A") for number in range(400)}
    sums = write_mirror(mirror, {"dev-clean.tar.gz": librispeech_files("dev-clean", spoken)})
    words = line("data.download", "--subsets", "dev-clean", "--mirror", mirror, "--checksums", sums, "--jobs", "2")
    asked = [*words, "--dataset-dir", str(tmp_path / "dataset")]
    with subprocess.Popen(asked, stderr=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True) as process:
        assert process.stderr is not None
        audio = tmp_path / "dataset" / "unfinished" / "dev-clean" / "audio.npy"
        while process.poll() is None and not audio.exists():
            pass
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.stderr.read()
    *before, last = said.splitlines()
    assert (process.returncode, last) == (130, b"Interrupted. Run the same command to resume.")
    if before:  # on a quick machine the subset may be complete by then
        assert before == [b"dev-clean: prepared 400 utterances"]
    else:
        assert not list((tmp_path / "dataset").iterdir())
