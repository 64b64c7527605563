"""Memory: how much this process takes, and that it can take no more than there is.

A GPU that has too little raises an error. Linux grants a process more than there is, and kills it when it uses that.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from pytorch.distributed import World, torchrun_env

ROOT = Path("/")  # of /proc and /sys


def peak(device: torch.device) -> int:
    """Return the most bytes that tensors have taken of a GPU since `reset_peak`, or else this process of the machine.

    Mapped files, such as the data set, are left out: Linux takes their memory back when it needs it. 0 where unknown.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = _fields("proc/self/status")
    return status.get("VmHWM", 0) - status.get("RssFile", 0)


def reset_peak(device: torch.device) -> None:
    """Have `peak` begin with what is taken now. Where that cannot be, it is the peak since the process began."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # a sandbox without this file
            (ROOT / "proc/self/clear_refs").write_text("5")  # resets VmHWM


@contextmanager
def limited(world: World) -> Iterator[None]:
    """Let this process take no more memory than there is: more raises an error, as on a GPU.

    All ranks must do this at the same time. They share what their nodes have.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    room = min(world.all_gather_object(available())) // torchrun_env("LOCAL_WORLD_SIZE", 1)
    limits = _fields("proc/self/status").get("VmData", 0) + room, *before
    lowest = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def available() -> int:
    """Return the bytes that processes may still take, of the machine's memory and of each control group's."""
    free = [_fields("proc/meminfo")["MemAvailable"]]  # with what the page cache would give back
    groups = ROOT / "proc/self/cgroup"
    entries = [line.split(":", 2) for line in groups.read_text().splitlines()] if groups.exists() else []
    own = {controllers: path.lstrip("/") for _, controllers, path in entries}
    versions = ("", "max", "current", ""), ("memory", "limit_in_bytes", "usage_in_bytes", "total_")  # 2 and 1
    for controllers, limit_name, used_name, prefix in versions:
        group = ROOT / "sys/fs/cgroup" / controllers / own.get(controllers, "")
        for folder in (group, *group.parents):  # a container sees its own group as the top one
            with suppress(OSError, ValueError):  # no such group here, or no limit: "max"
                limit, used = (int((folder / f"memory.{name}").read_text()) for name in (limit_name, used_name))
                pages = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                files = int(pages[f"{prefix}inactive_file"]) + int(pages[f"{prefix}active_file"])  # could be dropped
                free.append(limit - max(0, used - files))
    return min(free)


def _fields(file: str) -> dict[str, int]:
    """Return the bytes that a file of /proc says, by name."""
    lines = [line.split() for line in (ROOT / file).read_text().splitlines()]
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[2:] == ["kB"]}
