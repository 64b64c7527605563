"""Nothing that this program did not make is removed or replaced: it refuses, before anything is read or downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data.download import Options, download
from data.files import MARK
from data.packed import PackedDataset, open_dataset
from tests.data.made_up import command, flac, librispeech_files, sound, write_mirror
from tests.data.misbehaving import Server, serving

ARCHIVE = "dev-clean.tar.gz"


@pytest.fixture
def server(mirror: Path) -> Iterator[Server]:
    with serving(mirror) as running:
        yield running


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of the user's in a usual layout: a manifest, its recordings in train/, and other things."""
    folder = tmp_path / "own"
    (folder / "train").mkdir(parents=True)
    (folder / "train" / "a.flac").write_bytes(flac(sound(8000)))
    (folder / "train" / "notes.txt").write_text("mine")
    (folder / "train.tsv").write_text("train/a.flac\tHELLO\n")
    return folder


def contents(folder: Path) -> dict[str, bytes | str]:
    """All files below a folder, and where links lead."""
    entries = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {str(path): str(path.readlink()) if path.is_symlink() else path.read_bytes() for path in entries}


def asks(options: Options, mirror: str | Path, *more: str) -> list[str | Path]:
    assert options.checksums is not None and options.dataset_dir is not None
    words: list[str | Path] = ["--subsets", "dev-clean", "--mirror", mirror, "--checksums", options.checksums]
    return [*words, "--dataset-dir", options.dataset_dir, *more]


def refused(folder: Path, name: str, *words: str | Path) -> None:
    """The command refuses because of `name`, in one line, and changes nothing in `folder`."""
    before = contents(folder)
    run = command("download_dataset.sh", *words)
    assert run.returncode == 1
    assert (
        f"{folder / name} exists and was not made by this program; move it away, or give another folder" in run.stderr
    )
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert contents(folder) == before


def test_recordings_that_lie_where_a_subset_would_go_are_left_alone(own: Path) -> None:
    (own / "train" / "a.flac").write_bytes(b"no audio: nothing is read before the refusal")
    refused(own, "train", "--corpus", "manifest", "--manifest", own / "train.tsv", "--dataset-dir", own)


def a_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "mine.txt").write_text("mine")


def packed_files_of_unknown_origin(path: Path) -> None:
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


def a_broken_link(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.symlink_to("nowhere")


@pytest.mark.parametrize("name", ["dev-clean", "unfinished"])
@pytest.mark.parametrize("lay", [a_folder, packed_files_of_unknown_origin, a_file, a_link, a_broken_link])
def test_whatever_lies_in_the_place_of_a_folder_of_ours_is_left_alone(
    options: Options, server: Server, name: str, lay: Callable[[Path], None]
) -> None:
    assert options.dataset_dir is not None
    lay(options.dataset_dir / name)
    refused(options.dataset_dir, name, *asks(options, server.address))
    assert server.requests == []


@pytest.mark.parametrize("name", ["dev-clean", "unfinished"])
def test_an_empty_folder_is_in_nobodys_way(options: Options, name: str) -> None:
    assert options.dataset_dir is not None
    (options.dataset_dir / name).mkdir(parents=True)
    assert command("download_dataset.sh", *asks(options, options.mirror)).returncode == 0
    assert open_dataset(options.dataset_dir).subsets == ["dev-clean"]


def test_folders_that_earlier_versions_used_are_left_alone(options: Options) -> None:
    assert options.dataset_dir is not None
    for name in ("unpacked", "dev-clean.partial"):
        a_folder(options.dataset_dir / name)
    before = contents(options.dataset_dir)
    assert command("download_dataset.sh", *asks(options, options.mirror)).returncode == 0
    assert before.items() <= contents(options.dataset_dir).items()


def test_what_the_user_puts_into_a_subset_stays_when_its_audio_is_gone(
    options: Options, dataset: PackedDataset
) -> None:
    (dataset.path / "dev-clean" / "audio.npy").unlink()
    (dataset.path / "dev-clean" / "notes.txt").write_text("mine")
    refused(dataset.path, "dev-clean", *asks(options, options.mirror))
    (dataset.path / "dev-clean" / "notes.txt").unlink()
    assert download(options).digest == dataset.digest


@pytest.mark.parametrize("content", ["{}", '{"name": "other", "version": 3}', "no JSON"])
def test_a_data_set_of_another_program_is_left_alone(options: Options, content: str) -> None:
    assert options.dataset_dir is not None
    options.dataset_dir.mkdir()
    (options.dataset_dir / "dataset.json").write_text(content)
    for run in (
        command("download_dataset.sh", *asks(options, options.mirror)),
        command("verify_dataset.sh", "--dataset-dir", options.dataset_dir),
    ):
        assert run.returncode == 1
        assert f"{options.dataset_dir} is not a data set of this program" in run.stdout + run.stderr
        assert "remove" not in run.stdout + run.stderr
    assert list(contents(options.dataset_dir).values()) == [content.encode()]


@pytest.mark.parametrize("script", ["download_dataset.sh", "verify_dataset.sh"])
def test_a_file_that_is_named_as_the_data_set_is_left_alone(tmp_path: Path, script: str) -> None:
    (tmp_path / "talk.wav").write_bytes(b"RIFF")
    run = command(script, "--dataset-dir", "talk.wav", folder=tmp_path)
    assert run.returncode == 1
    assert "talk.wav is not a folder" in run.stdout + run.stderr and "remove" not in run.stdout + run.stderr
    assert (tmp_path / "talk.wav").read_bytes() == b"RIFF"


def test_a_link_in_the_place_of_dataset_json_is_left_alone(options: Options, dataset: PackedDataset) -> None:
    (dataset.path / "dataset.json").rename(dataset.path / "mine.json")
    (dataset.path / "dataset.json").symlink_to("mine.json")
    before = contents(dataset.path)
    run = command("download_dataset.sh", *asks(options, options.mirror))
    assert run.returncode == 1 and "dataset.json exists and was not made by this program" in run.stderr
    assert contents(dataset.path) == before


@pytest.mark.parametrize("keep", [[], ["--keep-archives"]])
def test_archives_of_a_mirror_stay_even_inside_of_the_data_set(options: Options, mirror: Path, keep: list[str]) -> None:
    assert options.dataset_dir is not None
    archives = options.dataset_dir / "archives"
    shutil.copytree(mirror, archives)
    before = contents(archives)
    run = command("download_dataset.sh", *asks(options, archives, *keep))
    assert run.returncode == 0, run.stderr
    assert contents(archives) == before


def test_an_archive_laid_by_hand_is_used_and_stays(options: Options, mirror: Path, server: Server) -> None:
    assert options.dataset_dir is not None
    archives = options.dataset_dir / "archives"
    archives.mkdir(parents=True)
    shutil.copy(mirror / ARCHIVE, archives)
    (archives / f"{ARCHIVE}.part").write_bytes(b"of a browser")
    before = contents(archives)
    assert command("download_dataset.sh", *asks(options, server.address)).returncode == 0
    assert contents(archives) == before
    assert {method for method, _ in server.requests} == {"HEAD"}


def test_an_archive_laid_by_hand_with_another_sum_is_refused_and_stays(options: Options, server: Server) -> None:
    assert options.dataset_dir is not None
    (options.dataset_dir / "archives").mkdir(parents=True)
    (options.dataset_dir / "archives" / ARCHIVE).write_bytes(b"mine")
    run = command("download_dataset.sh", *asks(options, server.address))
    assert run.returncode == 1 and "move it away to have it downloaded" in run.stderr
    assert (options.dataset_dir / "archives" / ARCHIVE).read_bytes() == b"mine"
    assert {method for method, _ in server.requests} == {"HEAD"}


def test_a_downloaded_archive_with_another_sum_stays_until_the_new_one_is_whole(
    options: Options, mirror: Path, server: Server
) -> None:
    assert options.dataset_dir is not None
    downloaded = options.dataset_dir / "unfinished" / "downloads" / ARCHIVE
    other = mirror.with_name("other")
    write_mirror(other, {ARCHIVE: librispeech_files("dev-other")})  # downloads, but holds nothing that is asked for
    with serving(other) as wrong:
        words = asks(options, wrong.address)
        words[words.index("--checksums") + 1] = other / "md5sum.txt"
        assert "holds no utterance of dev-clean" in command("download_dataset.sh", *words).stderr
    old = downloaded.read_bytes()
    (mirror / ARCHIVE).rename(mirror / "hidden")
    run = command("download_dataset.sh", *asks(options, server.address))
    assert run.returncode == 1 and "HTTP status 404" in run.stderr
    assert downloaded.read_bytes() == old
    (mirror / "hidden").rename(mirror / ARCHIVE)
    assert command("download_dataset.sh", *asks(options, server.address)).returncode == 0
    assert not downloaded.parent.parent.exists()


def test_a_linked_folder_of_archives_stays(options: Options, server: Server, tmp_path: Path) -> None:
    assert options.dataset_dir is not None
    a_link(options.dataset_dir / "archives")
    assert command("download_dataset.sh", *asks(options, server.address)).returncode == 0
    assert [Path(name).name for name in contents(options.dataset_dir / "elsewhere")] == [MARK]
    assert (options.dataset_dir / "archives").is_symlink()
