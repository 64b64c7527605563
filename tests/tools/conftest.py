import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.tools.speaking import train, write_spoken_dataset

# mlperf-logging reads its rules anew for each log.
setattr(yaml, "BaseLoader", getattr(yaml, "CBaseLoader", yaml.BaseLoader))  # noqa: B010


@dataclass(frozen=True)
class Trained:
    """A checkpoint that recognizes the language of tones, and the data set of it."""

    checkpoint: Path
    dataset: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers share
    folder /= "speaking"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dataset, log = folder / "spoken" / "dataset", folder / "results" / "mlperf_ds2.log"
        if not log.exists():
            write_spoken_dataset(folder / "spoken", {"train": 240, "validation": 96})
            train(dataset, log.parent)
    return Trained(log.with_name("checkpoint_best.pt"), dataset)
