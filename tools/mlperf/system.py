"""The description of a machine that a submission has beside its results: systems/<system>.json.

What the machine says about itself is filled in; the rest says that it is not known, and waits for its owner to edit it.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlperf_logging.mllog import constants

from pytorch.machine import describe_machine
from pytorch.mllog import submission_division, submission_status

if TYPE_CHECKING:
    import torch

NOT_KNOWN = "not known"
NONE = "none"
STATUSES = {  # of the log, as the description calls them
    constants.ONPREM: "Available on-premise",
    constants.CLOUD: "Available cloud",
    "preview": "Preview",
    constants.RESEARCH: "Research, Development, or Internal (RDI)",
}


SUBMISSION = {  # fields that the environment decides
    "submitter": "SUBMISSION_ORG",
    "division": "SUBMISSION_DIVISION",
    "status": "SUBMISSION_STATUS",
}


def describe_system(name: str, device: torch.device, ranks: int = 1) -> dict[str, str]:
    """Every field that the package's system_desc_checker requires, as text, of this machine and its runs.

    Args:
        name: of the machine, in the tree.
        device: what runs compute on.
        ranks: processes of a run, each of which uses one accelerator if there are any.

    Raises:
        RunError: SUBMISSION_DIVISION or SUBMISSION_STATUS is set to what the rules do not know.
    """
    machine = describe_machine(device)
    processor = _processor(_read("/proc/cpuinfo"))
    gpus = ranks if machine["accelerators"] else 0
    memory = f"{machine['accelerator_memory_gib']} GiB" if gpus else NONE
    software = [f"{package} {machine[package]}" for package in ("numpy", "mlperf-logging")]
    software += [f"{library} {machine[library]}" for library in ("cuda", "cudnn") if library in machine]
    if image := os.environ.get("DEEPSPEECH2_IMAGE_ID"):
        software.append(f"container image {image}")
    return {
        "submitter": os.environ.get("SUBMISSION_ORG", "reference"),
        "division": submission_division(),
        "status": STATUSES[submission_status()],
        "system_name": name,
        "number_of_nodes": "1",
        "host_processors_per_node": processor["sockets"],
        "host_processor_model_name": str(machine["processor"]),
        "host_processor_core_count": processor["cores"],
        "host_processor_vcpu_count": str(machine["cores"]),
        "host_processor_frequency": processor["frequency"],
        "host_processor_caches": processor["caches"],
        "host_processor_interconnect": NOT_KNOWN,
        "host_memory_capacity": f"{machine['memory_gib']} GiB",
        "host_memory_configuration": NOT_KNOWN,
        "host_storage_type": _storage_type(),
        "host_storage_capacity": f"{shutil.disk_usage(Path(__file__).parent).total / 2**30:.0f} GiB",
        "host_networking": "not used: one node",
        "host_networking_topology": "not used: one node",
        "accelerators_per_node": str(gpus),
        "accelerator_model_name": str(machine["accelerator"]) if gpus else NONE,
        "accelerator_host_interconnect": NOT_KNOWN if gpus else NONE,
        "accelerator_frequency": NOT_KNOWN if gpus else NONE,
        "accelerator_on-chip_memories": NOT_KNOWN if gpus else NONE,
        "accelerator_memory_configuration": NOT_KNOWN if gpus else NONE,
        "accelerator_memory_capacity": memory,
        "accelerator_interconnect": NOT_KNOWN if gpus > 1 else NONE,
        "accelerator_interconnect_topology": NOT_KNOWN if gpus > 1 else NONE,
        "cooling": NOT_KNOWN,
        "hw_notes": "",
        "framework": f"PyTorch {machine['torch']}",
        "other_software_stack": ", ".join([f"Python {machine['python']}", *software]),
        "operating_system": str(machine["operating_system"]),
        "sw_notes": "",
    }


def system_name(description: dict[str, str]) -> str:
    """A name for files that tells such machines apart, like `2x-amd-epyc` or `8x-nvidia-h100`."""
    count, model = description["accelerators_per_node"], description["accelerator_model_name"]
    if count == "0":
        count, model = description["host_processor_vcpu_count"], description["host_processor_model_name"]
    model = re.sub(r"\([^)]*\)|@.*", " ", model)  # (R), (TM), the frequency
    return "-".join(re.findall(r"[a-z0-9]+", f"{count}x {model}".lower()))


def same_machine(left: dict[str, Any], right: dict[str, Any]) -> str:
    """The first of the fields that tell machines apart in which two descriptions differ; empty where there is none."""
    fields = (
        "host_processor_model_name",
        "host_processor_vcpu_count",
        "accelerator_model_name",
        "accelerators_per_node",
    )
    return next((field for field in fields if left.get(field) != right.get(field)), "")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _processor(cpuinfo: str) -> dict[str, str]:
    """Sockets, cores, frequency and caches, from the text of /proc/cpuinfo."""

    def values(key: str) -> list[str]:
        return re.findall(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)

    sockets = len(set(values("physical id")))
    cores = values("cpu cores")
    frequencies, caches = values("cpu MHz"), values("cache size")
    return {
        "sockets": str(sockets or NOT_KNOWN),
        "cores": str(sockets * int(cores[0])) if cores and sockets else NOT_KNOWN,
        "frequency": f"{max(map(float, frequencies)):.0f} MHz when this was written" if frequencies else NOT_KNOWN,
        "caches": f"{caches[0]} (last level that /proc/cpuinfo lists)" if caches else NOT_KNOWN,
    }


def _storage_type() -> str:
    """Of this machine's disks, whichever holds the data set."""
    kinds = {
        "NVMe SSD" if disk.name.startswith("nvme") else "disk" if _read(f"{disk}/queue/rotational") == "1\n" else "SSD"
        for disk in Path("/sys/block").glob("*")
        if not disk.name.startswith(("loop", "ram", "zram", "dm-", "sr"))
    }
    return " and ".join(sorted(kinds)) or NOT_KNOWN
