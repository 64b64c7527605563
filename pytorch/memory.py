"""Memory: how much there is, and how much this process takes.

A GPU that has too little raises an error. Linux grants a process more than there is, and kills it when it uses that.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # slow to import: not for those who only read logs

    from pytorch.distributed import World

ROOT = Path("/")  # of /proc and /sys


def size() -> int:
    """Return the bytes of this machine's memory, or a container's limit if that is less."""
    limits = (limit for limit, _ in _control_groups())
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *limits])


def available() -> int:
    """Return the bytes that processes may still take, of the machine's memory and of each control group's."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    free = _fields(ROOT / "proc/meminfo").get("MemAvailable", free)  # with what the page cache would give back
    return min([free, *(limit - used for limit, used in _control_groups())])


def peak(device: torch.device) -> int:
    """Return the most bytes that tensors have taken of a GPU since `reset_peak`, or else this process of the machine.

    Mapped files, such as the data set, are left out: Linux takes their memory back when it needs it. 0 where unknown.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    fields = _fields(ROOT / "proc/self/status")
    return fields.get("VmHWM", 0) - fields.get("RssFile", 0)


def reset_peak(device: torch.device) -> None:
    """Have `peak` begin with what is taken now. Where that cannot be, it is the peak since the process began."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # no Linux, or a sandbox without this file
        (ROOT / "proc/self/clear_refs").write_text("5")  # resets VmHWM


@contextmanager
def limited(world: World) -> Iterator[None]:
    """On Linux, let this process take no more memory than there is: more raises an error, as on a GPU.

    All ranks must do this at the same time. They share what their nodes have.
    """
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    neighbors = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world.size > 1 else 1
    room = min(world.all_gather_object(available())) // neighbors
    limits = _fields(ROOT / "proc/self/status").get("VmData", 0) + room, *before
    lowest = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


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
