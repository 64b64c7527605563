"""Archives that are damaged or made to do damage: an error that names a file, or the very data set, nothing else."""

import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.cli import UserError
from data.download import Options, download
from data.prepare import unpack
from tests.data.made_up import files_below, flac, librispeech_files, sound, tarball, write_mirror

FILES = librispeech_files("dev-clean")
FIRST = "LibriSpeech/dev-clean/84/1/84-1-0000.flac"


def flipped(content: bytes, position: int, bit: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def damaged_gzip() -> list[bytes]:
    whole = tarball(*FILES.items())
    places = random.Random(1)
    cut = [whole[: places.randrange(len(whole))] for _ in range(15)] + [whole[:-1]]
    return cut + [flipped(whole, places.randrange(len(whole)), places.randrange(8)) for _ in range(25)]


def damaged_flac() -> list[bytes]:
    """Intact archives of damaged audio."""
    whole = FILES[FIRST]
    places = random.Random(3)
    hostile = [whole[: places.randrange(len(whole))] for _ in range(10)]
    hostile += [flipped(whole, places.randrange(len(whole)), places.randrange(8)) for _ in range(20)]
    hostile += [flipped(whole, places.randrange(8, 42), places.randrange(8)) for _ in range(20)]
    # Headers that promise 2**36 samples, at the lowest and the highest rate, on eight channels.
    for rate in (1, 16000, (1 << 20) - 1):
        for channels in (1, 8):
            fields = rate << 44 | (channels - 1) << 41 | 15 << 36 | (1 << 36) - 1
            hostile.append(whole[:18] + fields.to_bytes(8, "big") + whole[26:])
    hostile += [b"", b"fLaC", b"fLaC" + bytes(38), b"RIFF" + bytes(60), flac(sound(0))]
    return [tarball(*{**FILES, FIRST: content}.items()) for content in hostile]


@pytest.mark.parametrize("damaged", [damaged_gzip, damaged_flac])
def test_a_hostile_archive_is_an_error_that_names_a_file_or_makes_no_difference(
    options: Options, mirror: Path, tmp_path: Path, damaged: Callable[[], list[bytes]]
) -> None:
    asked = replace(options, subsets="dev-clean", checksums=mirror / "md5sum.txt")
    write_mirror(mirror, {"dev-clean.tar.gz": FILES})
    intact = download(replace(asked, dataset_dir=tmp_path / "intact")).digest
    archives, refused = damaged(), 0
    for number, content in enumerate(archives):
        write_mirror(mirror, {"dev-clean.tar.gz": content})
        path = tmp_path / str(number)
        try:
            made = download(replace(asked, dataset_dir=path))
        except UserError as error:
            refused += 1
            assert "dev-clean.tar.gz" in str(error) or ".flac" in str(error) or ".trans.txt" in str(error)
            assert "\n" not in str(error)
            assert files_below(path) == []
        else:  # such as a bit of the time in an archive's header
            assert made.digest == intact, number
    assert refused >= 0.7 * len(archives)


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("../evil", tarfile.REGTYPE, ""),
        ("LibriSpeech/../../evil", tarfile.REGTYPE, ""),
        ("/evil", tarfile.REGTYPE, ""),
        ("LibriSpeech/evil", tarfile.SYMTYPE, "good"),
        ("LibriSpeech/evil", tarfile.LNKTYPE, "../../evil"),
        ("LibriSpeech/evil", tarfile.CHRTYPE, ""),
        ("LibriSpeech/evil", tarfile.FIFOTYPE, ""),
        ("./good", tarfile.REGTYPE, ""),
    ],
)
def test_a_member_that_is_no_plain_file_inside_or_occurs_twice_is_refused_by_name(
    tmp_path: Path, name: str, kind: bytes, link: str
) -> None:
    (tmp_path / "a.tar.gz").write_bytes(tarball(("good", b""), (name, b"", kind, link)))
    with pytest.raises(UserError, match=f"a.tar.gz: refused member '{name}'"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "in")
    assert files_below(tmp_path) == ["a.tar.gz", "in/good"]
