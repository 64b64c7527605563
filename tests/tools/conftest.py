from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tools.speaking import train, write_spoken_dataset


@dataclass(frozen=True)
class Trained:
    """A checkpoint that recognises the language of tones, and the data set of it."""

    checkpoint: Path
    dataset: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("speaking")
    dataset = write_spoken_dataset(folder / "spoken", {"train": 240, "validation": 96})
    return Trained(train(dataset, folder / "results"), dataset)
