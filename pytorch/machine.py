"""The machine that a run is on: hardware, software, commit, and the operating system's page cache."""

from __future__ import annotations

import ctypes
import getpass
import mmap
import os
import platform
import re
import resource
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.cli import available_cores
from data.packed import PackedDataset, content_files
from pytorch import memory
from pytorch.config import ROOT

if TYPE_CHECKING:
    import torch  # slow to import: not for those who only read logs

MAX_CPU_TAKEN = 0.05  # part of the CPU time that others may take from a run whose time is to count


def told_by_torchrun(name: str, default: int) -> int:
    """Return a variable of torchrun's; without torchrun the default, as other launchers have the same names."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the hardware and software of this machine that bear on a result."""
    import torch

    packages = "torch", "numpy", "mlperf-logging"
    found: dict[str, Any] = {
        "processor": next(iter(cpuinfo().get("model name", [])), platform.processor() or platform.machine()),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory.size() / 2**30, 1),
        "operating_system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "accelerators": 0,
    }
    if device.type == "cuda":
        found["accelerators"] = torch.cuda.device_count()
        found["accelerator"] = torch.cuda.get_device_name()
        found["accelerator_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def cpuinfo() -> dict[str, list[str]]:
    """Return each field of /proc/cpuinfo with its value for each logical CPU; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, list[str]] = {}
    for name, separator, value in (line.partition(":") for line in lines):
        if separator:
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def cpu_seconds() -> dict[str, float]:
    """Return the time, since the machine's start, of the CPUs that this process may use, and this process's own.

    Returns:
        "all", "busy", and "stolen" by the hypervisor for other machines; "own", and the "switches" of this process to
        others before its time was up. Empty where /proc/stat does not have them.
    """
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return {}
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    of_cpus = [[int(value) for value in values[:8]] for name, *values in lines if name in names]
    if not of_cpus:  # in some containers /proc/stat counts them anew
        return {}
    ticks = np.sum(of_cpus, 0)
    user, nice, system, idle, waiting, interrupts, soft_interrupts, stolen = (ticks / os.sysconf("SC_CLK_TCK")).tolist()
    busy = user + nice + system + interrupts + soft_interrupts
    return {
        "all": busy + idle + waiting + stolen,
        "busy": busy,
        "stolen": stolen,
        "own": sum(os.times()[:4]),
        "switches": resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw,
    }


def git_revision() -> tuple[str, bool | None]:
    """Return the commit of this repository, and whether the code differs from it.

    The code is what is tracked, and untracked sources that a command would run. "unknown" and None without git.
    """
    if told := os.environ.get("DEEPSPEECH2_COMMIT"):  # by docker/run-dev.sh: an image needs no git
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    if shutil.which("git") is None:
        return "unknown", None
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    sources = ("data/*.py", "pytorch/*.py", "pytorch/*.cpp", "tools/*.py")
    untracked_sources = ["ls-files", "--others", "--exclude-standard", *sources]
    answers = [
        subprocess.run([*git, *command], capture_output=True, text=True)
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"], untracked_sources)
    ]
    if any(answer.returncode for answer in answers):
        return "unknown", None
    return answers[0].stdout.strip(), any(answer.stdout.strip() for answer in answers[1:])


def user_name() -> str:
    """Return the user's name, or number where there is none, fit for a field of comma-separated ASCII."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no such variable, and no such entry in the password file
        name = str(os.getuid())
    return re.sub(r"[^!-~]|,", "_", name)


def clear_cache(dataset: PackedDataset) -> str:
    """Evict a data set from the operating system's page cache.

    Returns:
        Why that was not possible, for the first file of which some of it is still there; empty if nothing is.
    """
    if not hasattr(os, "posix_fadvise") or not hasattr(ctypes.CDLL(None), "mincore"):
        return "this operating system offers no way to do so"
    for name in content_files(dataset.subsets):
        dataset_file = dataset.path / name
        try:
            if dataset_file.stat().st_uid != os.geteuid() and not os.access(dataset_file, os.W_OK):
                return f"{name} is another user's: Linux shows what is cached only to users who may write to the file"
            if left := _evict(dataset_file):
                return f"{left} pages of {name} are still cached: another process may be using it"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return ""


def _evict(path: Path) -> int:
    """Evict a file from the page cache; return how many of its pages are still there.

    A page that is just being read or written goes a moment later.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for _ in range(10):
            os.fsync(descriptor)  # what is not yet on the disk is not dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if not (left := _cached_pages(descriptor)):
                break
            time.sleep(0.1)
        return left
    finally:
        os.close(descriptor)


def _cached_pages(descriptor: int) -> int:
    """Return how many pages of a file are in memory, without reading it, which would bring them there."""
    size = os.fstat(descriptor).st_size
    if not size:
        return 0
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapped:
        start = np.frombuffer(mapped, np.uint8)
        cached = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        library = ctypes.CDLL(None, use_errno=True)
        failed = library.mincore(
            ctypes.c_void_p(start.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(cached.ctypes.data)
        )
        del start  # else the mapping could not be closed
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(np.count_nonzero(cached & 1))
