"""Memory: how much there is, and that no more can be taken."""

from pathlib import Path

import pytest
import torch

from pytorch import memory
from pytorch.distributed import World

GIB = 2**30
MEMINFO = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"  # 16 and 8 GiB
PAGES = f"inactive_file {2 * GIB}\nactive_file 0\ntotal_inactive_file {2 * GIB}\ntotal_active_file 0\n"
OLD = {"memory.limit_in_bytes": str(6 * GIB), "memory.usage_in_bytes": str(5 * GIB), "memory.stat": PAGES}
LIMITED = {"memory.max": str(6 * GIB), "memory.current": str(5 * GIB), "memory.stat": PAGES}


@pytest.mark.parametrize(
    ("groups", "folder", "files", "free"),
    [
        ("0::/\n", "", {}, 8),
        ("0::/job/step\n", "job", LIMITED, 3),  # a limit around ours
        ("0::/job\n", "job", LIMITED | {"memory.max": "max"}, 8),
        ("4:memory:/job\n0::/elsewhere/on/the/host\n", "", LIMITED, 3),  # as in a container
        ("4:memory:/job/step\n0::/\n", "memory/job", OLD, 3),
    ],
)
def test_what_is_available_is_the_least_of_the_machine_and_of_its_control_groups(
    groups: str, folder: str, files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "sys/fs/cgroup" / folder
    (tmp_path / "proc/self").mkdir(parents=True)
    group.mkdir(parents=True)
    for path, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups}.items():
        (tmp_path / path).write_text(text)
    for name, text in files.items():
        (group / name).write_text(text)
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    assert memory.available() == free * GIB


def test_memory_that_is_not_there_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 256 << 20)
    with memory.limited(World()):
        torch.ones(100 << 20, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.ones(300 << 20, dtype=torch.uint8)
    torch.ones(300 << 20, dtype=torch.uint8)


def test_the_peak_is_the_most_that_was_taken() -> None:
    torch.ones(100 << 20, dtype=torch.uint8)
    assert memory.peak(torch.device("cpu")) > 100 << 20
