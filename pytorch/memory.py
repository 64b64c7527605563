"""Memory: how much there is, how much this process takes, and whether a batch will fit, before it is tried.

A GPU that has too little raises an error. Linux grants a process more than there is, and kills it when it uses that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch.errors import RunError

if TYPE_CHECKING:
    import torch  # slow to import: not for those who only read logs

    from pytorch.distributed import World

ROOT = Path("/")  # of /proc and /sys
NOISE = 64 << 20  # bytes of growth that libraries may have taken for themselves
MARGIN = 1.3  # of a predicted growth; five configurations grew by at most 1.23 of it


def size() -> int:
    """Return the bytes of this machine's memory, or a container's limit if that is less."""
    limits = (limit for limit, _ in _control_groups())
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def available() -> int:
    """Return the bytes that processes may still take, of the machine's memory and of each control group's."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    free = _fields(ROOT / "proc/meminfo").get("MemAvailable", free)  # with what the page cache would give back
    return min([free, *(limit - used for limit, used in _control_groups())])


def reset_peak(device: torch.device) -> None:
    """Begin to measure `peak` anew."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not Linux, or not allowed: the peak is that since the start of the process
        (ROOT / "proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Return the most bytes that tensors have taken of a GPU, or else this process of the machine, since `reset_peak`.

    Mapped files, such as the data set, are left out: Linux takes their memory back when it needs it. 0 where unknown.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    fields = _fields(ROOT / "proc/self/status")
    return fields.get("VmHWM", 0) - fields.get("RssFile", 0)


def require(
    run: Callable[[int], object], largest: int, small: int, world: World, device: torch.device, advice: str
) -> None:
    """Judge whether `run(largest)` will fit into memory, from its peaks at smaller sizes; on accelerators do nothing.

    From each size to the next, twice as large, the peak grows twice as much as before. This ends before a size is tried
    for which there is too little, or as soon as not even half of all growth to come would fit. It also ends where all
    that the process holds might grow in proportion to the size, and would fit. All ranks must do this at the same time.

    Args:
        run: takes a size.
        largest: size to be judged.
        small: size that surely fits; the first one to be tried is no larger, and at most a 64th of the largest.
        world: the ranks.
        device: where `run` computes.
        advice: what to do where it will not fit.

    Raises:
        RunError: it will not fit; begins with the advice.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world.size > 1 else 1
    before, parts = 0, max(64, 1 << (largest // small).bit_length())
    while parts > 1:
        reset_peak(device)
        run(max(1, largest // parts))
        now = peak(device)
        measured = world.all_gather_object((now, now - before, now + available() // neighbors))
        now, growth, room = min(measured, key=lambda each: each[2] - each[0])  # where least is left
        if now * parts < room:
            return
        rest = 2 * growth * (parts - 1)  # of the growth, in proportion
        hopeless = growth > NOISE and now + rest // 2 > room
        if before and (hopeless or now + int(MARGIN * 2 * growth) > room):
            needed, there = (now + rest) / 2**30, room / 2**30
            raise RunError(f"{advice} (about {needed:.1f} GiB; available: {there:.1f} GiB)")
        before, parts = now, parts // 2


def _control_groups() -> Iterator[tuple[int, int]]:
    """Yield limit and use, in bytes, of the limited memory control groups around this process, of version 2 or 1."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            prefix = "total_" if controllers else ""
            names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
            top = ROOT / "sys/fs/cgroup" / controllers
            group = top / path.lstrip("/")
            for folder in (group, *group.parents):  # a container sees its own group as the top one
                if not folder.is_relative_to(top):
                    break
                try:
                    limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
                    pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):  # no such group here, or "max"
                    continue
                files = int(pages.get(f"{prefix}inactive_file", 0)) + int(pages.get(f"{prefix}active_file", 0))
                yield limit, max(0, used - files)  # files could be dropped


def _fields(file: Path) -> dict[str, int]:
    """Return the bytes that a file of /proc says, by name; empty where there is no such file."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[2:] == ["kB"]}
