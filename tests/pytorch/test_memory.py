from pathlib import Path

import pytest
import torch

from pytorch import memory
from pytorch.distributed import World
from pytorch.errors import RunError

CPU, GIB = torch.device("cpu"), 2**30
MEMINFO = "MemTotal:       16777216 kB\nMemAvailable:    8388608 kB\n"  # 16 and 8 GiB
VERSION_2 = {"memory.max": str(6 * GIB), "memory.current": str(5 * GIB), "memory.stat": f"inactive_file {2 * GIB}\n"}
VERSION_1 = {
    "memory.limit_in_bytes": str(6 * GIB),
    "memory.usage_in_bytes": str(5 * GIB),
    "memory.stat": f"total_active_file {2 * GIB}\n",
}


@pytest.mark.parametrize(
    ("groups", "folder", "files", "free"),
    [
        ("0::/\n", "", {}, 8),
        ("0::/job/step\n", "job", VERSION_2, 3),  # a limit around ours
        ("0::/job\n", "job", VERSION_2 | {"memory.max": "max"}, 8),
        ("0::/elsewhere/on/the/host\n", "", VERSION_2, 3),  # as in a container
        ("4:memory:/job\n0::/\n", "memory/job", VERSION_1, 3),
        ("4:memory:/elsewhere\n", "memory", VERSION_1, 3),
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
        (group / name).write_text(text.strip() + "\n")
    whole = memory.size()
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    assert memory.available() == free * GIB
    assert memory.size() == (whole if free == 8 else min(whole, 6 * GIB))


@pytest.mark.parametrize(("room", "tried"), [(4.0, 6), (2.0, 3), (0.3, 2)])
def test_a_size_that_needs_more_than_there_is_is_refused_before_it_is_tried(
    room: float, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` is made to take a GiB for each 1.6 units of size; there is `room` GiB."""
    sizes: list[int] = []
    monkeypatch.setattr(memory, "peak", lambda _: GIB // 10 + sizes[-1] * GIB // 1600)
    monkeypatch.setattr(memory, "available", lambda: int(room * GIB) - memory.peak(CPU))
    with pytest.raises(RunError, match=r"^smaller! .* available: \d.\d GiB"):
        memory.require(sizes.append, 6400, 6400, World(), CPU, "smaller!")
    assert len(sizes) == tried
    assert memory.peak(CPU) < room * GIB


def test_a_size_that_fits_many_times_is_not_tried_at_length(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(memory, "peak", lambda _: GIB)
    monkeypatch.setattr(memory, "available", lambda: 20 * GIB)
    memory.require(sizes.append, 640, 640, World(), CPU, "smaller!")
    assert sizes == [10, 20, 40]
    sizes.clear()
    memory.require(sizes.append, 1_280_000, 20, World(), CPU, "smaller!")
    assert sizes[0] <= 20


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux measures a process's peak anew")
def test_the_peak_is_that_of_a_stretch() -> None:
    memory.reset_peak(CPU)
    before = memory.peak(CPU)
    large = torch.ones(100 << 20, dtype=torch.uint8)
    del large
    assert 90 << 20 < memory.peak(CPU) - before < 200 << 20
    memory.reset_peak(CPU)
    assert memory.peak(CPU) < before + (50 << 20)
