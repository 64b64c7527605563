from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pytorch import kernels
from tests.pytorch.speaking import train, write_spoken_dataset


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


@pytest.fixture(params=["kernel", "plain"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two CPU paths, the C++ kernel or plain PyTorch, the test is run with."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "load", lambda: "not wanted")
    elif kernels.status().startswith("plain"):
        pytest.skip(kernels.status())
    return request.param
