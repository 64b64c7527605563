from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from data.cli import DataError
from data.prepare import unpack
from tests.data.made_up import files_below, librispeech_files, write_mirror


def write_archive(file: Path, *members: tuple[str, bytes, str]) -> Path:
    """Members are a name, a type, and where a link leads."""
    with tarfile.open(file, "w:gz") as tar:
        for name, kind, target in members:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            entry.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(entry, BytesIO(b"evil"))
    return file


@pytest.mark.parametrize(
    ("name", "kind", "target"),
    [
        ("../evil", tarfile.REGTYPE, ""),
        ("LibriSpeech/../../evil", tarfile.REGTYPE, ""),
        ("/evil", tarfile.REGTYPE, ""),
        ("LibriSpeech/evil", tarfile.SYMTYPE, "/etc/passwd"),
        ("LibriSpeech/evil", tarfile.SYMTYPE, "good"),
        ("LibriSpeech/evil", tarfile.LNKTYPE, "../../evil"),
        ("LibriSpeech/evil", tarfile.CHRTYPE, ""),
        ("LibriSpeech/evil", tarfile.FIFOTYPE, ""),
    ],
)
def test_a_member_that_is_no_plain_file_inside_is_refused_by_name(
    tmp_path: Path, name: str, kind: bytes, target: str
) -> None:
    (tmp_path / "in").mkdir()
    archive = write_archive(tmp_path / "a.tar.gz", ("good", tarfile.REGTYPE, ""), (name, kind, target))
    with pytest.raises(DataError, match=f"refused member '{name}'"):
        unpack(archive, tmp_path / "in")
    assert files_below(tmp_path) == ["a.tar.gz", "in/good"]


def test_an_archive_cut_short_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    write_mirror(tmp_path, {"a.tar.gz": librispeech_files("dev-clean")})
    whole = (tmp_path / "a.tar.gz").read_bytes()
    (tmp_path / "in").mkdir()
    for size in [*range(0, len(whole), len(whole) // 25), len(whole) - 1]:
        (tmp_path / "cut.tar.gz").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut.tar.gz is damaged or cut short"):
            unpack(tmp_path / "cut.tar.gz", tmp_path / "in")
    unpack(tmp_path / "a.tar.gz", tmp_path / "in")


def test_a_changed_byte_in_an_archive_is_an_error(tmp_path: Path) -> None:
    write_mirror(tmp_path, {"a.tar.gz": librispeech_files("dev-clean")})
    content = bytearray((tmp_path / "a.tar.gz").read_bytes())
    content[len(content) // 2] ^= 0x10
    (tmp_path / "a.tar.gz").write_bytes(content)
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"a.tar.gz is damaged or cut short"):
        unpack(tmp_path / "a.tar.gz", tmp_path / "in")
