"""What a bad day brings: kills, full disks, a second process, a disk that cannot be written."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from data.cli import DataError
from data.download import Options, download
from data.files import MARK, locked
from data.packed import DatasetError, PackedDataset, open_dataset
from data.verify import validate
from tests.data.made_up import REPOSITORY, command, files_below, librispeech_files, write_mirror
from tests.data.misbehaving import serving

DOWNLOAD = """
import sys
from data.download import main
print("ready", flush=True)
main()
"""


@contextmanager
def mounted(path: Path, *words: str) -> Iterator[Path]:
    path.mkdir(exist_ok=True)
    mount = subprocess.run(["mount", *words, str(path)], capture_output=True, text=True)
    if mount.returncode != 0:
        pytest.skip(f"cannot mount: {mount.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def larger_mirror(folder: Path) -> None:
    spoken = {f"84-1-{number:04d}": (20_000 + 97 * number, "SOME WORDS") for number in range(60)}
    archives = {f"{subset}.tar.gz": librispeech_files(subset, spoken) for subset in ("train-clean-100", "dev-clean")}
    write_mirror(folder, archives)


def assert_whole_or_closed(dataset_dir: Path) -> None:
    try:
        dataset = open_dataset(dataset_dir)
    except DatasetError:
        return
    assert validate(dataset) == []


def test_a_preparation_killed_twenty_times_has_the_same_digest(options: Options, mirror: Path, tmp_path: Path) -> None:
    larger_mirror(mirror)
    undisturbed = download(replace(options, dataset_dir=tmp_path / "undisturbed")).digest
    dataset_dir = tmp_path / "killed"
    words = [sys.executable, "-c", DOWNLOAD, "--subsets", options.subsets, "--mirror", options.mirror, "--checksums"]
    words += [str(options.checksums), "--dataset-dir", str(dataset_dir)]
    moments = random.Random(3)
    longest, kills = 1.0, 0
    while kills < 20:
        jobs = str(2 if kills % 4 == 3 else 1)
        run = subprocess.Popen([*words, "--jobs", jobs], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert run.stdout is not None and run.stdout.readline() == b"ready\n"
        started = time.monotonic()
        try:
            _, told = run.communicate(timeout=moments.uniform(0, longest))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
            kills += 1
            assert_whole_or_closed(dataset_dir)
        else:
            assert run.returncode == 0, told
            assert open_dataset(dataset_dir).digest == undisturbed
            longest = time.monotonic() - started  # so that kills come while there is still something to do
            shutil.rmtree(dataset_dir)
    finished = download(replace(options, dataset_dir=dataset_dir))
    assert finished.digest == undisturbed
    shutil.rmtree(dataset_dir / "archives", ignore_errors=True)  # of a kill just before the last was removed
    assert files_below(dataset_dir) == files_below(tmp_path / "undisturbed")
    assert validate(finished) == []


def test_files_left_by_a_run_that_was_killed_at_its_very_end_are_removed_by_the_next(options: Options) -> None:
    before = files_below(download(options).path)
    assert options.dataset_dir is not None
    left = options.dataset_dir / "unfinished" / "unpacked" / "LibriSpeech" / "dev-clean" / "84"
    left.mkdir(parents=True)
    (options.dataset_dir / "unfinished" / MARK).touch()
    (left / "84-1-0000.flac").write_bytes(b"fLaC")
    assert files_below(download(options).path) == before


def test_decoding_processes_end_when_their_parent_is_killed(options: Options, mirror: Path, tmp_path: Path) -> None:
    larger_mirror(mirror)
    words = [sys.executable, "-c", DOWNLOAD, "--subsets", "dev-clean", "--mirror", options.mirror, "--checksums"]
    words += [str(options.checksums), "--dataset-dir", str(tmp_path / "dataset"), "--jobs", "2"]
    # The read end of a pipe that all of them inherit sees its end when the last of them is gone.
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None and run.stdout.readline() == b"ready\n"
        while not (tmp_path / "dataset" / "unfinished" / "dev-clean" / "audio.npy").exists() and run.poll() is None:
            time.sleep(0.005)
        time.sleep(0.3)  # the processes are starting, or at work
        run.send_signal(signal.SIGKILL)
        watchdog = threading.Timer(20, os._exit, [1])
        watchdog.start()
        run.stdout.read()
        watchdog.cancel()


@pytest.mark.parametrize("remote", [False, True])
def test_a_disk_that_fills_up_is_a_clear_error_and_a_rerun_finishes(
    options: Options, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    larger_mirror(mirror)
    expected = download(options).digest
    monkeypatch.setattr("data.fetch.check_space", lambda *arguments, **sizes: None)
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=16m", "none") as disk, serving(mirror) as server:
        asked = replace(options, dataset_dir=disk / "dataset", mirror=server.address if remote else options.mirror)
        failures = 0
        for free in (0, 100_000, 600_000, 2_000_000, 3_500_000, 5_000_000, 7_000_000, 9_000_000):
            with (disk / "filler").open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, max(1, shutil.disk_usage(disk).free - free))
            try:
                download(asked)
            except DataError as error:
                assert "No space left on device" in str(error) and str(disk) in str(error)
                failures += 1
                with pytest.raises(DatasetError):
                    open_dataset(disk / "dataset")
            (disk / "filler").unlink()
        assert failures >= 3
        finished = download(asked)
        assert finished.digest == expected
        assert files_below(disk / "dataset") == files_below(tmp_path / "dataset")


def test_a_data_set_on_a_read_only_disk_can_be_verified_and_read(
    options: Options, dataset: PackedDataset, tmp_path: Path
) -> None:
    with mounted(tmp_path / "read-only", "-o", "bind,ro", str(dataset.path)) as path:
        if os.access(path / "dataset.json", os.W_OK):
            pytest.skip("this machine mounts nothing read-only")
        run = command("verify_dataset.sh", "--dataset-dir", path)
        assert run.stdout.startswith("Dataset Checksum Passed."), run.stdout
        assert len(open_dataset(path).subset("dev-clean").waveform(0)) == 1000
        assert download(replace(options, dataset_dir=path)).digest == dataset.digest


def test_a_read_only_place_for_a_data_set_is_one_line(options: Options, tmp_path: Path) -> None:
    message = r"cannot write in .*: Read-only file system"
    with (
        mounted(tmp_path / "read-only", "-t", "tmpfs", "-o", "ro", "none") as path,
        pytest.raises(DataError, match=message),
    ):
        download(replace(options, dataset_dir=path / "dataset"))


def test_verification_waits_for_no_download_but_says_that_one_is_at_work(dataset: PackedDataset) -> None:
    with locked(dataset.path, "download"):
        run = command("verify_dataset.sh", "--dataset-dir", dataset.path)
    assert run.returncode == 1
    assert "another download is working in" in run.stdout


def test_two_verifications_may_work_at_once_but_no_download_beside_them(
    dataset: PackedDataset, options: Options
) -> None:
    message = "another download or verification is working in"
    with (
        locked(dataset.path, "download", shared=True),
        locked(dataset.path, "download", shared=True),
        pytest.raises(DataError, match=message),
    ):
        download(options)


def test_the_lock_of_a_killed_process_is_gone(options: Options, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    code = "import sys,time; from pathlib import Path; from data.files import locked\n"
    code += "with locked(Path(sys.argv[1]), 'download'): print('locked', flush=True); time.sleep(60)"
    words = [sys.executable, "-c", code, str(tmp_path / "dataset")]
    with subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        with pytest.raises(DataError, match="is working in"):
            download(options)
        holder.kill()
        holder.wait()
        assert download(options).digest
