"""The command that makes a data set: what it makes, refuses, survives, and leaves alone."""

import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from data.cli import UserError
from data.corpora import CORPORA, find_corpus
from data.download import Options, download
from data.files import MARK
from data.packed import PackedDataset, open_dataset, read_dataset
from data.verify import validate
from tests.data.made_up import REPOSITORY, an4_files, command, files_below, librispeech_files, write_mirror
from tests.data.misbehaving import Server, serving

ARCHIVE = "dev-clean.tar.gz"
SUBSETS = ("dev-clean", "train-clean-100")
CONTENT = [f"{subset}/{file}" for subset in SUBSETS for file in ("audio.npy", "utterances.csv")]
COMPLETE = sorted(["dataset.json", *CONTENT])
# Prints when its imports are done, which take longer than what follows.
DOWNLOAD = "from data.download import main; print('ready', flush=True); main()"


@pytest.fixture
def server(mirror: Path) -> Iterator[Server]:
    with serving(mirror) as running:
        yield running


@pytest.fixture
def folder(options: Options) -> Path:
    """Where the data set goes."""
    assert options.dataset_dir is not None
    return options.dataset_dir


def arguments(options: Options) -> list[str]:
    names = "subsets", "mirror", "checksums", "dataset_dir"
    return [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


def contents(folder: Path) -> dict[str, bytes | str]:
    """All files below a folder, and where links lead."""
    entries = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes() for path in entries}


def larger_mirror(folder: Path) -> None:
    spoken = {f"84-1-{number:04d}": (20_000 + 97 * number, "SOME WORDS") for number in range(60)}
    write_mirror(folder, {f"{subset}.tar.gz": librispeech_files(subset, spoken) for subset in SUBSETS})


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


# What it makes


def test_the_command_prepares_a_data_set_and_a_rerun_changes_nothing(options: Options, folder: Path) -> None:
    first = command("download_dataset.sh", *arguments(options))
    assert first.returncode == 0, first.stderr
    assert "is complete: train-clean-100 4 utterances (0.00 h), dev-clean 4 utterances" in first.stdout
    assert files_below(folder) == COMPLETE
    before = {name: (folder / name).stat().st_mtime_ns for name in COMPLETE}
    assert command("download_dataset.sh", *arguments(options)).stdout == first.stdout
    assert {name: (folder / name).stat().st_mtime_ns for name in COMPLETE} == before


def test_paths_are_relative_to_the_callers_folder(tmp_path: Path) -> None:
    write_mirror(tmp_path / "m", {"an4_raw.bigendian.tar.gz": an4_files()})
    words = ["--corpus", "an4", "--mirror", "m", "--checksums", "m/md5sum.txt", "--dataset-dir", "out", "--jobs", "1"]
    run = command("download_dataset.sh", *words, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    dataset = open_dataset(tmp_path / "out")
    assert dataset.splits == {"train": ["train"], "validation": ["test"], "test": []}
    assert dataset.subset("test").transcripts == ["GO TO A"]


def test_subsets_can_be_added_and_the_result_is_the_same_as_at_once(options: Options, tmp_path: Path) -> None:
    at_once = download(replace(options, dataset_dir=tmp_path / "at once"))
    validation = download(replace(options, subsets="dev-clean"))
    both = download(replace(options, subsets="train-clean-100"))
    assert list(both.summary) == list(at_once.summary) == ["train-clean-100", "dev-clean"]
    assert both.digest == at_once.digest != validation.digest


def test_archives_come_from_a_web_server_and_do_not_stay(options: Options, server: Server, folder: Path) -> None:
    download(replace(options, mirror=server.address))
    assert files_below(folder) == COMPLETE


# What it refuses


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--corpus", "timit"], "unknown corpus 'timit'; there are: librispeech, librispeech-100"),
        (["--subsets", "dev-dirty"], "librispeech has no subset 'dev-dirty'; it has: train-clean-100"),
        (["--subsets", "dev-clean", "--mirror", "nowhere"], "nowhere/dev-clean.tar.gz: No such file"),
        (["--subsets", "dev-clean", "--mirror", "m", "--checksums", "none.txt"], "none.txt"),
        (["--subsets", "dev-clean", "--mirror", "ftp://host/a,http://host/b"], "--mirror"),
        (["--subsets", "dev-clean", "--mirror", "http://host/a,folder"], "--mirror"),
        (["--subsets", "dev-clean", "--jobs", "0"], "--jobs is 0"),
        (["--corpus", "synthetic", "--mirror", "m"], "--mirror"),
        (["--corpus", "synthetic", "--manifest", "m"], "--corpus manifest and --manifest"),
        (["--corpus", "manifest"], "--corpus manifest and --manifest"),
        (["--corpus", "manifest", "--manifest", "none.tsv"], "none.tsv"),
        (["--corpus", "manifest", "--manifest", "/dev/stdin"], "/dev/stdin"),
        (["--corpus", "manifest", "--manifest", "m", "--subsets", "train,test"], "one subset"),
        (["--corpus", "manifest", "--manifest="], "--manifest has an empty value"),
        (["--subsets", "", "--mirror=", "--dataset-dir", "~/d"], "--dataset-dir is ~/d"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_exit_1(tmp_path: Path, words: list[str], fact: str) -> None:
    run = command("download_dataset.sh", *words, "--dataset-dir", "out", folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and fact in run.stderr and run.stderr.count("\n") == 1
    assert files_below(tmp_path) == []


def test_an_archive_with_a_wrong_sum_is_refused_before_unpacking(options: Options, mirror: Path, folder: Path) -> None:
    (mirror / ARCHIVE).write_bytes((mirror / ARCHIVE).read_bytes() + b"x")
    with pytest.raises(UserError, match=r"dev-clean.tar.gz .* has md5 [0-9a-f]{32}, expected [0-9a-f]{32}"):
        download(replace(options, subsets="dev-clean"))
    assert files_below(folder) == [] and (mirror / ARCHIVE).exists()
    with pytest.raises(UserError, match=r"expected 42e2234ba48799c1f50f24a7926300a1 \(337926286 bytes\)"):
        download(replace(options, subsets="dev-clean", checksums=None))
    with pytest.raises(UserError, match=r"md5sum.txt has no line for test-clean.tar.gz"):
        download(replace(options, subsets="test-clean"))


def test_a_data_set_of_other_archives_or_of_another_corpus_does_not_pass_for_the_one_asked_for(
    options: Options, dataset: PackedDataset
) -> None:
    with pytest.raises(UserError, match="holds train-clean-100 from an archive with MD5"):
        download(replace(options, checksums=None))
    with pytest.raises(UserError, match="holds the corpus librispeech, not librispeech-100"):
        download(replace(options, corpus="librispeech-100"))


def test_one_archive_that_cannot_be_had_does_not_stop_the_others(
    options: Options, server: Server, mirror: Path, folder: Path
) -> None:
    whole = (mirror / ARCHIVE).read_bytes()
    (mirror / ARCHIVE).write_bytes(whole + b"x")
    with pytest.raises(UserError, match=r"no mirror .* has md5.*--mirror"):
        download(replace(options, mirror=server.address))
    assert list(read_dataset(folder).summary) == ["train-clean-100"]
    (mirror / ARCHIVE).write_bytes(whole)
    server.requests.clear()
    assert download(replace(options, mirror=server.address)).digest == download(options).digest
    assert len(server.requests) == 1
    assert files_below(folder) == COMPLETE


def test_the_published_size_and_sum_are_asked_of_the_corpus_own_mirrors(
    options: Options, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = replace(find_corpus("librispeech"), mirrors=(f"{server.address}/first", server.address))
    monkeypatch.setitem(CORPORA, "librispeech", corpus)
    with pytest.raises(UserError, match=r"/first/dev-clean.*; .*/dev-clean.* bytes, 337926286 were published"):
        download(replace(options, subsets="dev-clean", mirror="", checksums=None))


# What it survives


def test_a_preparation_killed_ten_times_has_the_same_digest(options: Options, mirror: Path, tmp_path: Path) -> None:
    larger_mirror(mirror)
    undisturbed = download(replace(options, dataset_dir=tmp_path / "undisturbed")).digest
    path = tmp_path / "killed"
    words = [sys.executable, "-c", DOWNLOAD, *arguments(replace(options, dataset_dir=path))]
    moments = random.Random(3)
    longest, kills = 1.0, 0
    while kills < 10:
        jobs = str(2 if kills % 4 == 3 else 1)
        run = subprocess.Popen([*words, "--jobs", jobs], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert run.stdout is not None and run.stdout.readline() == b"ready\n"
        started = time.monotonic()
        try:
            _, errors = run.communicate(timeout=moments.uniform(0, longest))
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            kills += 1
            with suppress(UserError):  # unfinished, or not begun
                assert validate(open_dataset(path)) == []
        else:
            assert run.returncode == 0, errors
            assert open_dataset(path).digest == undisturbed
            longest = time.monotonic() - started  # so that kills come while there is still something to do
            shutil.rmtree(path)
    finished = download(replace(options, dataset_dir=path))
    assert finished.digest == undisturbed
    assert files_below(path) == files_below(tmp_path / "undisturbed")


def test_archives_need_room_beside_the_packed_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Mock(free=0))
    with pytest.raises(UserError, match=r"needs 180,826\.4 MB"):
        download(Options(dataset_dir=tmp_path))


def test_a_disk_that_fills_up_is_a_clear_error_and_a_rerun_finishes(
    options: Options, mirror: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger_mirror(mirror)
    expected = download(options).digest
    monkeypatch.setattr("data.fetch.check_space", lambda *arguments, **sizes: None)
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=16m", "none") as disk, serving(mirror) as server:
        asked = replace(options, dataset_dir=disk / "dataset", mirror=server.address)
        failures = 0
        for free in (0, 100_000, 600_000, 2_000_000, 3_500_000, 5_000_000, 7_000_000, 9_000_000):
            with (disk / "filler").open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, max(1, shutil.disk_usage(disk).free - free))
            try:
                download(asked)
            except UserError as error:
                assert "No space left on device" in str(error) and str(disk) in str(error)
                failures += 1
                with pytest.raises(UserError):
                    open_dataset(disk / "dataset")
            (disk / "filler").unlink()
        assert failures >= 3
        assert download(asked).digest == expected
        assert files_below(disk / "dataset") == files_below(folder)


def test_a_limit_of_file_size_is_named_with_the_file_that_meets_it(options: Options, mirror: Path) -> None:
    larger_mirror(mirror)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"unfinished/[a-z0-9-]+/audio.npy: File too large; 'ulimit -f'"):
            download(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(download(options).summary) == ["train-clean-100", "dev-clean"]


def test_a_data_set_on_a_read_only_disk_can_be_verified_and_read(
    options: Options, dataset: PackedDataset, tmp_path: Path
) -> None:
    with mounted(tmp_path / "read-only", "-o", "bind,ro", str(dataset.path)) as path:
        if os.access(path / "dataset.json", os.W_OK):
            pytest.skip("this machine mounts nothing read-only")
        run = command("verify_dataset.sh", "--dataset-dir", path)
        assert run.stdout.startswith("Dataset Checksum Passed."), run.stdout
        assert download(replace(options, dataset_dir=path)).digest == dataset.digest


# What it leaves alone: nothing is removed or replaced that it did not make


def refused(folder: Path, name: str, *words: str | Path) -> None:
    """The command refuses because of `name`, in one line, and changes nothing in `folder`."""
    before = contents(folder)
    run = command("download_dataset.sh", *words)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: {folder / name} exists and was not made by this program")
    assert run.stderr.count("\n") == 1
    assert contents(folder) == before


def a_folder(path: Path) -> None:
    path.mkdir(parents=True)
    for name in ("audio.npy", "utterances.csv"):
        (path / name).write_text("mine")


def a_file(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("mine")


def a_link(path: Path) -> None:
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir(parents=True)
    (elsewhere / MARK).write_text("even a mark")
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["dev-clean", "unfinished"])
@pytest.mark.parametrize("lay", [a_folder, a_file, a_link])
def test_whatever_lies_in_the_place_of_a_folder_of_ours_is_left_alone(
    options: Options, server: Server, folder: Path, name: str, lay: Callable[[Path], None]
) -> None:
    lay(folder / name)
    refused(folder, name, *arguments(replace(options, mirror=server.address)))
    assert server.requests == []


def test_empty_folders_are_reused(options: Options, folder: Path) -> None:
    for name in ("dev-clean", "unfinished"):
        (folder / name).mkdir(parents=True)
    assert download(options).digest


def test_what_a_user_puts_into_a_data_set_stays_when_its_audio_goes(options: Options, dataset: PackedDataset) -> None:
    (dataset.path / "dev-clean" / "audio.npy").unlink()
    (dataset.path / "dev-clean" / "notes.txt").write_text("mine")
    refused(dataset.path, "dev-clean", *arguments(options))
    (dataset.path / "dev-clean" / "notes.txt").unlink()
    (dataset.path / "dataset.json").rename(dataset.path / "mine.json")
    (dataset.path / "dataset.json").symlink_to("mine.json")
    refused(dataset.path, "dataset.json", *arguments(options))
    (dataset.path / "mine.json").rename(dataset.path / "dataset.json")
    assert download(options).digest == dataset.digest


@pytest.mark.parametrize("content", [b"RIFF", b"{}", b'{"name": "other", "version": 3}'])
def test_what_another_program_has_in_the_place_of_a_data_set_is_left_alone(
    options: Options, folder: Path, content: bytes
) -> None:
    file = folder if content == b"RIFF" else folder / "dataset.json"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    for words in (["download_dataset.sh", *arguments(options)], ["verify_dataset.sh", "--dataset-dir", str(folder)]):
        run = command(*words)
        assert run.returncode == 1 and str(folder) in run.stdout + run.stderr
        assert file.read_bytes() == content


def test_an_archive_in_a_local_mirror_is_used_if_its_sum_is_right_and_stays(options: Options, mirror: Path) -> None:
    genuine = (mirror / ARCHIVE).read_bytes()
    (mirror / ARCHIVE).write_bytes(b"mine")
    with pytest.raises(UserError, match=f"{mirror / ARCHIVE} .* has md5"):
        download(replace(options, subsets="dev-clean"))
    assert (mirror / ARCHIVE).read_bytes() == b"mine"
    (mirror / ARCHIVE).write_bytes(genuine)
    before = contents(mirror)
    download(options)
    assert contents(mirror) == before
