"""The machine that a run is on: hardware, software, commit, and the operating system's page cache."""

import getpass
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.cli import available_cores
from data.packed import PackedDataset, content_files
from pytorch.config import ROOT

if TYPE_CHECKING:
    import torch  # slow to import: not for those who only read logs

MAX_CPU_TAKEN = 0.05  # part of the CPU time that others may take from a run whose time is to count


def describe_machine(device: "torch.device") -> dict[str, Any]:
    """Return the hardware and software of this machine that bear on a result."""
    import torch

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "operating_system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "mlperf-logging")},
        "accelerators": 0,
    }
    if device.type == "cuda":
        found["accelerators"] = torch.cuda.device_count()
        found["accelerator"] = torch.cuda.get_device_name()
        found["accelerator_memory_gib"] = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def _processor() -> str:
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return model[1] if model else platform.machine()  # ARM's has only numbers


def cpu_seconds() -> dict[str, float]:
    """Return the time, since the machine's start, of the CPUs that this process may use, and that of the process.

    Returns:
        "all", "busy", and "stolen" by the hypervisor for other machines; "own" of this process and its children that
        have ended. Empty where /proc/stat does not have them.
    """
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    of_cpus = [[int(value) for value in values[:8]] for name, *values in lines if name in names]
    if not of_cpus:  # some containers renumber the CPUs in /proc/stat
        return {}
    ticks = np.sum(of_cpus, 0) / os.sysconf("SC_CLK_TCK")
    user, nice, system, idle, waiting, interrupts, soft_interrupts, stolen = ticks.tolist()
    busy = user + nice + system + interrupts + soft_interrupts
    return {"all": busy + idle + waiting + stolen, "busy": busy, "stolen": stolen, "own": sum(os.times()[:4])}


def git_revision() -> tuple[str, bool | None]:
    """Return the commit of this repository, and whether the code differs from it, as revision.sh says.

    "unknown" and None without git, or where the nearest repository is another one.
    """
    command = ["/bin/sh", str(Path(__file__).with_name("revision.sh")), str(ROOT)]
    revision = os.environ.get("DEEPSPEECH2_COMMIT")  # of docker/run-dev.sh: an image needs no git
    revision = revision or subprocess.run(command, capture_output=True, text=True).stdout.strip()
    commit = revision.removesuffix("-dirty")
    return commit, None if commit == "unknown" else commit != revision


def user_name() -> str:
    """Return the user's name, or number where there is none, fit for a field of comma-separated ASCII."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # no such variable, and no such entry in the password file
        name = str(os.getuid())
    return re.sub(r"[^!-~]|,", "_", name)


def clear_cache(dataset: PackedDataset) -> str:
    """Evict a data set from the operating system's page cache. Return why that was not possible, or an empty text."""
    for name in content_files(dataset.summary):
        try:
            with (dataset.path / name).open("rb") as file:
                os.fsync(file.fileno())  # what is not yet on the disk is not dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            return f"{name}: {error.strerror}"
    return ""
