from pathlib import Path

import pytest

from data.download import Options, download
from data.packed import PackedDataset
from tests.data.made_up import SPOKEN, librispeech_files, write_mirror


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A folder with made-up archives of two LibriSpeech subsets and their md5sum.txt."""
    validation = {name.replace("84", "85"): entry for name, entry in SPOKEN.items()}
    write_mirror(
        tmp_path / "mirror",
        {
            "train-clean-100.tar.gz": librispeech_files("train-clean-100"),
            "dev-clean.tar.gz": librispeech_files("dev-clean", validation),
        },
    )
    return tmp_path / "mirror"


@pytest.fixture
def options(tmp_path: Path, mirror: Path) -> Options:
    """What the user asks for to prepare both subsets of the mirror."""
    return Options(
        subsets="train-clean-100,dev-clean",
        mirror=str(mirror),
        checksums=mirror / "md5sum.txt",
        dataset_dir=tmp_path / "dataset",
        jobs=1,
    )


@pytest.fixture
def dataset(options: Options) -> PackedDataset:
    return download(options)
