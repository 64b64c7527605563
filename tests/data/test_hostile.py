"""Archives that are damaged or made to do damage: an error that names a file, or the very data set, nothing else."""

from __future__ import annotations

import gzip
import random
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.cli import DataError
from data.download import Options, download
from data.packed import open_dataset
from data.prepare import unpack
from tests.data.made_up import command, files_below, flac, librispeech_files, sound, write_mirror

FILES = librispeech_files("dev-clean")
FIRST = "LibriSpeech/dev-clean/84/1/84-1-0000.flac"


def tarball(files: dict[str, bytes]) -> bytes:
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))
    return stream.getvalue()


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def damaged_gzip() -> list[bytes]:
    whole = gzip.compress(tarball(FILES), mtime=0)
    places = random.Random(1)
    cut = [whole[: places.randrange(len(whole))] for _ in range(25)]
    return cut + [flipped(whole, places.randrange(len(whole)), places.randrange(8)) for _ in range(50)]


def damaged_tar() -> list[bytes]:
    """Archives that gzip finds intact, but not so the headers of their members."""
    whole = tarball(FILES)
    with tarfile.open(fileobj=BytesIO(whole)) as tar:
        headers = [member.offset for member in tar]
    places = random.Random(2)
    flips = [flipped(whole, places.choice(headers) + places.randrange(500), places.randrange(8)) for _ in range(40)]
    cuts = [whole[: places.randrange(whole.rindex(b"trans.txt") + 512)] for _ in range(20)]
    return [gzip.compress(content, 1, mtime=0) for content in flips + cuts]


def damaged_flac() -> list[bytes]:
    """Intact archives of damaged audio."""
    whole = FILES[FIRST]
    places = random.Random(3)
    hostile = [whole[: places.randrange(len(whole))] for _ in range(15)]
    hostile += [flipped(whole, places.randrange(len(whole)), places.randrange(8)) for _ in range(30)]
    hostile += [flipped(whole, places.randrange(8, 42), places.randrange(8)) for _ in range(30)]
    # Headers that promise 2**36 samples, at the lowest and the highest rate, on eight channels.
    for rate in (1, 16000, (1 << 20) - 1):
        for channels in (1, 8):
            fields = rate << 44 | (channels - 1) << 41 | 15 << 36 | (1 << 36) - 1
            hostile.append(whole[:18] + fields.to_bytes(8, "big") + whole[26:])
    hostile += [b"", b"fLaC", b"fLaC" + bytes(38), b"RIFF" + bytes(60), flac(sound(0))]
    return [gzip.compress(tarball({**FILES, FIRST: content}), 1, mtime=0) for content in hostile]


@pytest.mark.parametrize("kind", ["gzip", "tar", "flac"])
def test_a_hostile_archive_is_an_error_that_names_a_file_or_makes_no_difference(
    options: Options, mirror: Path, tmp_path: Path, kind: str
) -> None:
    asked = replace(options, subsets="dev-clean", checksums=mirror / "md5sum.txt")
    write_mirror(mirror, {"dev-clean.tar.gz": FILES})
    intact = download(replace(asked, dataset_dir=tmp_path / "intact")).digest
    archives = {"gzip": damaged_gzip, "tar": damaged_tar, "flac": damaged_flac}[kind]()
    refused = 0
    for number, content in enumerate(archives):
        write_mirror(mirror, {"dev-clean.tar.gz": content})
        path = tmp_path / str(number)
        try:
            made = download(replace(asked, dataset_dir=path))
        except DataError as error:
            refused += 1
            assert "dev-clean.tar.gz" in str(error) or ".flac" in str(error) or ".trans.txt" in str(error)
            assert "\n" not in str(error)
            assert files_below(path) == []
        else:  # such as a bit of the time in an archive's header
            assert made.digest == intact, number
    assert refused >= 0.7 * len(archives)


def test_there_are_at_least_two_hundred_of_them() -> None:
    assert len(damaged_gzip() + damaged_tar() + damaged_flac()) >= 200


def test_an_archive_that_unpacks_to_absurd_size_is_refused_by_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("LibriSpeech/zeros")
        entry.size = 100 << 20
        tar.addfile(entry, BytesIO(bytes(entry.size)))
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="refused member 'LibriSpeech/zeros': too large"):
        unpack(tmp_path / "bomb.tar.gz", tmp_path / "in")
    assert files_below(tmp_path / "in") == []


NAMES = st.lists(
    st.sampled_from(["..", ".", "", "a", "LibriSpeech", "é", "x" * 300, "\n", "~", "C:", "\\"]), min_size=1
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(NAMES, KINDS, NAMES), max_size=5))
def test_nothing_is_ever_written_outside_the_folder(
    tmp_path: Path, members: list[tuple[list[str], bytes, list[str]]]
) -> None:
    (tmp_path / "deep" / "in").mkdir(parents=True, exist_ok=True)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for parts, kind, target in members:
            entry = tarfile.TarInfo("/".join(parts))
            entry.type, entry.linkname = kind, "/".join(target)
            tar.addfile(entry, BytesIO())
    try:
        unpack(tmp_path / "a.tar.gz", tmp_path / "deep" / "in")
    except DataError as error:
        assert "a.tar.gz" in str(error)
    written = [name for name in tmp_path.rglob("*") if tmp_path / "deep" / "in" not in (name, *name.parents)]
    assert sorted(written) == [tmp_path / "a.tar.gz", tmp_path / "deep"]


def test_a_hostile_archive_is_one_line_at_the_command_and_opens_nowhere(options: Options, mirror: Path) -> None:
    write_mirror(mirror, {"dev-clean.tar.gz": damaged_flac()[-1]})
    words = ["--subsets", "dev-clean", "--mirror", options.mirror, "--checksums", str(options.checksums)]
    run = command("download_dataset.sh", *words, "--dataset-dir", str(options.dataset_dir))
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert options.dataset_dir is not None
    with pytest.raises(DataError, match="no data set in"):
        open_dataset(options.dataset_dir)
