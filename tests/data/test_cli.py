"""How a command ends, and what it may use."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from data import cli
from data.download import Options
from data.packed import PackedDataset
from tests.data.made_up import REPOSITORY, librispeech_files, write_mirror


def line(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def run(words: list[str], output: int | None = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(words, stdout=output, stderr=subprocess.PIPE, cwd=REPOSITORY, timeout=60)


@pytest.fixture
def lines(dataset: PackedDataset, options: Options) -> list[list[str]]:
    """Command lines of a download that has nothing to do, and of a verification."""
    asked = ["--subsets", options.subsets, "--mirror", options.mirror, "--checksums", str(options.checksums)]
    return [
        line("data.download", *asked, "--dataset-dir", dataset.path),
        line("data.verify", "--dataset-dir", dataset.path),
    ]


def test_output_without_reader_or_room_ends_a_command_in_at_most_a_line(lines: list[list[str]]) -> None:
    for words in lines:
        reading, writing = os.pipe()
        os.close(reading)
        ended = run(words, writing)
        assert ended.returncode == 141 and b"rror" not in ended.stderr
        os.close(writing)
        with Path("/dev/full").open("wb") as full:
            ended = run(words, full.fileno())
        assert ended.returncode == 1 and b"Traceback" not in ended.stderr
        assert ended.stderr.endswith(b": No space left on device\n")


def test_help_is_laid_out_in_the_narrowest_terminal(lines: list[list[str]]) -> None:
    for words in lines:
        assert run(["env", "COLUMNS=5", *words, "--help"]).returncode == 0


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EFBIG, errno.ESTALE, errno.ENETDOWN])
def test_whatever_the_system_refuses_is_one_line(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_status(Mock(side_effect=OSError(number, os.strerror(number), "a/file"))) == 1
    assert capfd.readouterr().err == f"error: a/file: {os.strerror(number)}\n"
    nowhere = FileNotFoundError(errno.ENOENT, "No usable temporary directory")
    assert cli.exit_status(Mock(side_effect=nowhere)) == 1
    assert capfd.readouterr().err == "error: No usable temporary directory\n"


def test_a_name_that_is_not_unicode_is_escaped(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "utf-8:strict")  # as in a UTF-8 locale other than C.UTF-8
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    asked = ["--subsets", "dev-clean", "--mirror", mirror, "--checksums", mirror / "md5sum.txt"]
    for words in (line("data.download", *asked), line("data.verify")):
        ended = run([*words, "--dataset-dir", str(folder)])
        assert ended.returncode == 0, ended.stderr
        assert words[2] == "data.verify" or rb"caf\udce9 is complete" in ended.stdout


def test_ctrl_c_ends_a_download_in_one_line(mirror: Path, tmp_path: Path) -> None:
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


def test_a_containers_quota_of_cpu_time_limits_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(cli.os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "cpu").mkdir()
    assert cli.available_cores() == 64
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for name, quota, cores in (
        ("cpu/cpu.cfs_quota_us", "-1", 64),
        ("cpu/cpu.cfs_quota_us", "300000", 3),
        ("cpu.max", "max 100000", 3),
        ("cpu.max", "150000 100000", 2),
    ):
        (tmp_path / name).write_text(f"{quota}\n")
        assert cli.available_cores() == cores
