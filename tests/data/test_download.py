from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data.cli import DataError
from data.corpora import CORPORA, find_corpus
from data.download import Options, download
from data.fetch import read_checksums
from data.files import MARK
from data.packed import PackedDataset, open_dataset, read_dataset
from tests.data.made_up import (
    REPOSITORY,
    SPOKEN,
    TAR,
    an4_files,
    command,
    files_below,
    flac,
    librispeech_files,
    sound,
    write_mirror,
)
from tests.data.misbehaving import Answer, Server, serving

COMPLETE = [
    "dataset.json",
    "dev-clean/audio.npy",
    "dev-clean/utterances.csv",
    "train-clean-100/audio.npy",
    "train-clean-100/utterances.csv",
]


@pytest.fixture
def server(mirror: Path) -> Iterator[Server]:
    with serving(mirror) as running:
        yield running


def arguments(options: Options) -> list[str]:
    pairs = {
        "--subsets": options.subsets,
        "--mirror": options.mirror,
        "--checksums": str(options.checksums),
        "--dataset-dir": str(options.dataset_dir),
    }
    return [word for pair in pairs.items() for word in pair]


def test_the_command_prepares_a_data_set_and_a_rerun_changes_nothing(options: Options, tmp_path: Path) -> None:
    first = command("download_dataset.sh", *arguments(options), folder=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "is complete: train-clean-100 4 utterances (0.00 h), dev-clean 4 utterances" in first.stdout
    assert "archives other than the published ones" in first.stderr
    assert files_below(tmp_path / "dataset") == COMPLETE
    before = {name: (tmp_path / "dataset" / name).stat() for name in COMPLETE}
    second = command("download_dataset.sh", *arguments(options), folder=tmp_path)
    assert second.returncode == 0
    assert "is complete already" in second.stdout
    assert {name: (tmp_path / "dataset" / name).stat().st_mtime_ns for name in COMPLETE} == {
        name: stat.st_mtime_ns for name, stat in before.items()
    }


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
    assert validation.subsets == ["dev-clean"]
    both = download(replace(options, subsets="train-clean-100"))
    assert both.subsets == at_once.subsets == ["train-clean-100", "dev-clean"]
    assert both.digest == at_once.digest != validation.digest


def test_what_a_killed_run_left_behind_does_not_matter(options: Options, dataset: PackedDataset) -> None:
    shutil.rmtree(dataset.path / "dev-clean")  # the kill came after it was entered, before it was renamed
    for name in ("unpacked/LibriSpeech", "dev-clean"):
        (dataset.path / "unfinished" / name).mkdir(parents=True)
        (dataset.path / "unfinished" / name / "audio.npy").write_bytes(b"rest")
    (dataset.path / "unfinished" / MARK).touch()
    assert download(options).digest == dataset.digest
    assert files_below(dataset.path) == COMPLETE


def test_a_subset_without_its_files_is_prepared_again(options: Options, dataset: PackedDataset) -> None:
    shutil.rmtree(dataset.path / "dev-clean")
    assert download(options).digest == dataset.digest
    assert files_below(dataset.path) == COMPLETE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "timit"], "unknown corpus 'timit'; there are: librispeech, librispeech-100"),
        (["--subsets", "dev-dirty"], "librispeech has no subset 'dev-dirty'; it has: train-clean-100"),
        (["--subsets", "dev-clean", "--mirror", "nowhere"], "the mirror nowhere has no file dev-clean.tar.gz"),
        (["--subsets", "dev-clean", "--mirror", "m", "--checksums", "none.txt"], "cannot read the checksums none.txt"),
        (["--subsets", "dev-clean", "--jobs", "0"], "--jobs is 0"),
        (["--corpus", "synthetic", "--mirror", "m"], "the synthetic corpus is made on this machine"),
        (["--corpus", "synthetic", "--manifest", "m"], "--corpus manifest and --manifest FILE go together"),
        (["--corpus", "manifest"], "--corpus manifest and --manifest FILE go together"),
        (
            ["--corpus", "manifest", "--manifest", "none.tsv"],
            "the manifest none.tsv is missing, or is not a regular file",
        ),
        (
            ["--corpus", "manifest", "--manifest", "/dev/stdin"],
            "the manifest /dev/stdin is missing, or is not a regular",
        ),
        (["--corpus", "manifest", "--manifest="], "--manifest has an empty value"),
        (
            ["--subsets", "", "--mirror=", "--dataset-dir", "~/d"],
            "--dataset-dir is ~/d: your shell did not expand the ~",
        ),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_exit_1(tmp_path: Path, words: list[str], message: str) -> None:
    run = command("download_dataset.sh", *words, "--dataset-dir", "out", folder=tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: {message}") and run.stderr.count("\n") == 1
    assert files_below(tmp_path) == []


def test_an_archive_with_a_wrong_sum_is_refused_before_it_is_unpacked(options: Options, mirror: Path) -> None:
    (mirror / "dev-clean.tar.gz").write_bytes((mirror / "dev-clean.tar.gz").read_bytes() + b"x")
    assert options.dataset_dir is not None
    with pytest.raises(DataError, match=r"dev-clean.tar.gz .* has MD5 [0-9a-f]{32}, expected [0-9a-f]{32}: damaged"):
        download(replace(options, subsets="dev-clean"))
    assert files_below(options.dataset_dir) == []
    assert (mirror / "dev-clean.tar.gz").exists()


def test_without_checksums_only_the_published_archive_is_accepted(options: Options) -> None:
    message = r"expected 42e2234ba48799c1f50f24a7926300a1 \(337926286 bytes\).*re-issued once"
    with pytest.raises(DataError, match=message):
        download(replace(options, subsets="dev-clean", checksums=None))


def test_a_data_set_from_other_archives_does_not_pass_for_the_published_one(
    options: Options, dataset: PackedDataset
) -> None:
    with pytest.raises(DataError, match="holds train-clean-100 from an archive with MD5"):
        download(replace(options, checksums=None))


def test_a_folder_that_holds_another_corpus_is_refused(options: Options, dataset: PackedDataset) -> None:
    with pytest.raises(DataError, match="holds the corpus librispeech, not librispeech-100"):
        download(replace(options, corpus="librispeech-100"))


def test_a_second_download_into_the_same_folder_is_refused(options: Options, dataset: PackedDataset) -> None:
    folder = os.open(dataset.path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        with pytest.raises(DataError, match="another download or verification is working in"):
            download(options)
    finally:
        os.close(folder)


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_read(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))(10, 10, 0)
    monkeypatch.setattr("data.fetch.shutil.disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"dataset needs 0.1 MB of free disk space, 0.0 MB are free: make room there"):
        download(options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("85-1-0001.flac", flac(sound(1000))[:-700], "85-1-0001"),
        ("85-1.trans.txt", b"85-1-0000 A\n85-1-0001 B#\n", "utterance 85-1-0001 has the character '#'"),
    ],
)
def test_bad_content_is_named_and_leaves_no_data_set(
    options: Options, mirror: Path, name: str, content: bytes, message: str
) -> None:
    files = librispeech_files("dev-clean", {key.replace("84", "85"): entry for key, entry in SPOKEN.items()})
    write_mirror(mirror, {"dev-clean.tar.gz": {**files, f"LibriSpeech/dev-clean/85/1/{name}": content}})
    run = command("download_dataset.sh", *arguments(replace(options, subsets="dev-clean")))
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and message in run.stderr and run.stderr.count("\n") == 1
    assert options.dataset_dir is not None and files_below(options.dataset_dir) == []


def test_archives_come_from_a_web_server_and_are_removed_when_packed(
    options: Options, server: Server, tmp_path: Path
) -> None:
    fetched = download(replace(options, mirror=server.address, dataset_dir=tmp_path / "fetched"))
    assert fetched.digest == download(options).digest
    assert files_below(tmp_path / "fetched") == COMPLETE


def test_archives_are_kept_on_request_and_then_not_fetched_again(
    options: Options, server: Server, tmp_path: Path
) -> None:
    keeping = replace(options, mirror=server.address, keep_archives=True)
    digest = download(keeping).digest
    kept = ["archives/dev-clean.tar.gz", "archives/train-clean-100.tar.gz"]
    assert files_below(tmp_path / "dataset") == [*kept, *COMPLETE]
    for file in COMPLETE:
        (tmp_path / "dataset" / file).unlink()
    server.requests.clear()
    assert download(keeping).digest == digest
    assert {method for method, _ in server.requests} == {"HEAD"}
    script = f"cd '{tmp_path}/dataset' && export LC_ALL=C && {TAR} $(ls */*.npy */*.csv) | sha256sum"
    summed = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout.split()[0]
    assert summed == digest


def test_a_downloaded_archive_that_is_no_longer_wanted_is_fetched_anew(
    options: Options, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / "dataset" / "unfinished" / "downloads" / "dev-clean.tar.gz"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of other --checksums")
    (left.parent.parent / MARK).touch()
    assert download(replace(options, mirror=server.address)).subsets == ["train-clean-100", "dev-clean"]
    assert "downloading again" in capsys.readouterr().err
    assert files_below(tmp_path / "dataset") == COMPLETE


def test_one_archive_that_cannot_be_had_does_not_stop_the_others(
    options: Options, server: Server, mirror: Path, tmp_path: Path
) -> None:
    whole = (mirror / "dev-clean.tar.gz").read_bytes()
    (mirror / "dev-clean.tar.gz").write_bytes(whole + b"x")
    with pytest.raises(DataError, match=r"no mirror .* has MD5.*; --mirror takes another address, or a folder"):
        download(replace(options, mirror=server.address))
    assert read_dataset(tmp_path / "dataset").subsets == ["train-clean-100"]
    (mirror / "dev-clean.tar.gz").write_bytes(whole)
    server.requests.clear()
    assert download(replace(options, mirror=server.address)).digest == download(options).digest
    assert len([method for method, _ in server.requests if method == "GET"]) == 1
    assert files_below(tmp_path / "dataset") == COMPLETE


def test_mirrors_are_tried_in_the_order_given(
    options: Options, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    def behave(path: str, number: int, answer: Answer) -> None:
        if path.startswith("/first/"):
            answer.status, answer.headers, answer.body = 404, {"Content-Length": "0"}, b""

    server.behave = behave
    mirrors = f"{server.address}/first, {server.address}/second"
    assert download(replace(options, subsets="dev-clean", mirror=mirrors)).subsets == ["dev-clean"]
    assert f"warning: {server.address}/first/dev-clean.tar.gz: HTTP status 404" in capsys.readouterr().err


def test_the_published_size_and_sum_are_asked_of_the_corpus_own_mirrors(
    options: Options, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = replace(find_corpus("librispeech"), mirrors=(server.address,))
    monkeypatch.setitem(CORPORA, "librispeech", corpus)
    message = r"no mirror delivered dev-clean.tar.gz: .* bytes, 337926286 were published: .*re-issued once"
    with pytest.raises(DataError, match=message):
        download(replace(options, subsets="dev-clean", mirror="", checksums=None))


@pytest.mark.parametrize("mirrors", ["ftp://host/a,http://host/b", "http://host/a,folder"])
def test_mirrors_that_are_neither_a_folder_nor_web_addresses_are_refused(options: Options, mirrors: str) -> None:
    with pytest.raises(DataError, match="--mirror is one folder, or addresses that begin with http"):
        download(replace(options, mirror=mirrors))


def test_a_download_killed_twenty_times_ends_bit_identical(tmp_path: Path) -> None:
    files = {f"LibriSpeech/filler{number}": random.Random(number).randbytes(1 << 20) for number in range(24)}
    write_mirror(tmp_path / "m", {"dev-clean.tar.gz": {**files, **librispeech_files("dev-clean")}})

    def slowly(path: str, number: int, answer: Answer) -> None:
        time.sleep(0.005)

    with serving(tmp_path / "m") as server:
        server.behave = slowly
        code = (
            "import sys; from pathlib import Path; from data.corpora import Archive; from data import fetch;"
            "fetch.CHUNK_BYTES = 1 << 14;"
            "wanted = Archive('dev-clean.tar.gz', 0, sys.argv[1]);"
            "fetch.fetch(wanted, [sys.argv[2]], Path(sys.argv[3]), lambda count: None)"
        )
        target = tmp_path / "out" / "dev-clean.tar.gz"
        target.parent.mkdir()
        md5 = read_checksums(tmp_path / "m" / "md5sum.txt")["dev-clean.tar.gz"]
        words = [sys.executable, "-c", code, md5, server.address, str(target)]
        part, sizes = target.with_name(target.name + ".part"), [0]
        for number in range(20):
            run = subprocess.Popen(words, cwd=REPOSITORY)
            # At a random moment after it has come a little further, which keeps the test short on any machine.
            while run.poll() is None and (not part.exists() or part.stat().st_size <= sizes[-1]):
                time.sleep(0.001)
            time.sleep(random.Random(number).random() * 0.003)
            run.send_signal(signal.SIGKILL)
            run.wait()
            sizes.append(part.stat().st_size if part.exists() else sizes[-1])
        subprocess.run(words, cwd=REPOSITORY, check=True)
    assert target.read_bytes() == (tmp_path / "m" / "dev-clean.tar.gz").read_bytes()
    assert files_below(target.parent) == ["dev-clean.tar.gz"]
    assert len(set(sizes)) > 3


@pytest.mark.parametrize("line", ["hello world", "d41d8cd98f00b204e9800998ecf8427e", "z" * 32 + "  a.tar.gz"])
def test_a_checksums_file_of_another_format_is_an_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "md5sum.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match="not an md5sum line"):
        read_checksums(tmp_path / "md5sum.txt")


def test_an_archive_that_the_checksums_file_does_not_name_is_an_error(options: Options) -> None:
    with pytest.raises(DataError, match=r"md5sum.txt has no line for test-clean.tar.gz"):
        download(replace(options, subsets="test-clean"))


def test_help_shows_the_defaults() -> None:
    run = command("download_dataset.sh", "--help")
    assert run.returncode == 0
    assert "(default: librispeech)" in run.stdout
