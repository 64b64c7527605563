"""The folders of a submission, as MLCommons' package_checker expects them, and the description of its machine:

<tree>/systems/<system>.json                         the machine
<tree>/results/<system>/<series>/result_<i>.txt      logs of runs, from 0
<tree>/results/<system>/<series>/failed_<i>_<n>.txt  logs of runs that broke off: no results, kept to be read
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlperf_logging.mllog import constants
from mlperf_logging.system_desc_checker import system_desc_checker

from data.files import locked
from pytorch.errors import RunError
from pytorch.machine import cpuinfo
from pytorch.mllog import submission_division, submission_status
from tools.mlperf.check import RULESET
from tools.output_files import write_output

NOT_KNOWN = "not known"
NONE = "none"
STATUSES = {  # of the log, as the description calls them
    constants.ONPREM: "Available on-premise",
    constants.CLOUD: "Available cloud",
    "preview": "Preview",
    constants.RESEARCH: "Research, Development, or Internal (RDI)",
}
VARIABLES = {"submitter": "SUBMISSION_ORG", "division": "SUBMISSION_DIVISION", "status": "SUBMISSION_STATUS"}
PROCESSOR, ACCELERATOR = "host_processor_model_name", "accelerator_model_name"
CPUS, ACCELERATORS = "host_processor_vcpu_count", "accelerators_per_node"


@dataclass(frozen=True)
class SubmissionDir:
    """The part of a submission that one series of runs on one machine fills."""

    root: Path
    system: str
    series: str

    @property
    def folder(self) -> Path:
        """Directory of the logs."""
        return self.root / "results" / self.system / self.series

    @property
    def description(self) -> Path:
        """Path of the machine's description."""
        return self.root / "systems" / f"{self.system}.json"

    def result(self, number: int) -> Path:
        """Return the path of the log of a run that ended by itself."""
        return self.folder / f"result_{number}.txt"

    def partial(self, number: int) -> Path:
        """Return the path of the log of a run that has not ended."""
        return self.folder / f"result_{number}.txt.partial"

    def set_aside(self, number: int) -> Path:
        """Rename the partial log of a run that broke off; return its new path."""
        tried = 1
        while (failed := self.folder / f"failed_{number}_{tried}.txt").exists():
            tried += 1
        return self.partial(number).rename(failed)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Make the folder, and keep other series from this machine; yield the lock, for processes that outlive this.

        RunError where the folder cannot be made, DataError where another series is under way.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be made: {error.strerror}") from error
        with locked(self.folder.parent, "series of runs") as lock:
            yield lock

    def describe(self, description: dict[str, str]) -> None:
        """Write the machine's description, unless there is one, which its owner may have edited.

        RunError where that one is of another machine or submission, or MLCommons' system_desc_checker refuses it.
        """
        path = self.description
        if not path.exists():
            write_output(path, json.dumps({**description, "system_name": self.system}, indent=2) + "\n")
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
            fields = [PROCESSOR, CPUS, ACCELERATOR, ACCELERATORS]
            fields += [field for field, variable in VARIABLES.items() if os.environ.get(variable)]
            for field in fields:
                if there.get(field) != description[field]:
                    what = f"{field} is {there.get(field)!r} there, {description[field]!r} here"
                    raise RunError(f"{path} is of another machine or submission ({what}); choose another --system")
            valid = system_desc_checker.check_system_desc(str(path), "training", RULESET)[0]
        except OSError as error:
            raise RunError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: no description of a machine: {error}") from error
        if not valid:
            raise RunError(f"{path}: refused by MLCommons' system_desc_checker; remove it to have it made again")


def describe_system(machine: dict[str, Any], ranks: int) -> dict[str, str]:
    """Return every field that the package's system_desc_checker requires, but for the name, as text.

    What the machine does not say of itself is "not known", and waits for its owner to edit it.

    Args:
        machine: `describe_machine` of what runs compute on.
        ranks: processes of a run, each of which uses one accelerator if there are any.

    Raises:
        RunError: SUBMISSION_DIVISION or SUBMISSION_STATUS is set to what the rules do not know.
    """
    processor = cpuinfo()
    sockets = len(set(processor.get("physical id", [])))
    cores, megahertz, caches = (processor.get(name) for name in ("cpu cores", "cpu MHz", "cache size"))
    frequency = f"{max(map(float, megahertz)):.0f} MHz when this was written" if megahertz else NOT_KNOWN
    gpus = ranks if machine["accelerators"] else 0
    of_gpu, of_gpus = NOT_KNOWN if gpus else NONE, NOT_KNOWN if gpus > 1 else NONE
    software = [f"Python {machine['python']}"]
    software += [f"{name} {machine[name]}" for name in ("numpy", "mlperf-logging", "cuda", "cudnn") if name in machine]
    if image := os.environ.get("DEEPSPEECH2_IMAGE_ID"):
        software.append(f"container image {image}")
    return {
        "submitter": os.environ.get("SUBMISSION_ORG") or "reference",
        "division": submission_division(),
        "status": STATUSES[submission_status()],
        "system_name": "",
        "number_of_nodes": "1",
        "host_processors_per_node": str(sockets or NOT_KNOWN),
        PROCESSOR: str(machine["processor"]),
        "host_processor_core_count": str(sockets * int(cores[0])) if cores and sockets else NOT_KNOWN,
        CPUS: str(machine["cores"]),
        "host_processor_frequency": frequency,
        "host_processor_caches": f"{caches[0]} (last level that /proc/cpuinfo lists)" if caches else NOT_KNOWN,
        "host_processor_interconnect": NOT_KNOWN,
        "host_memory_capacity": f"{machine['memory_gib']} GiB",
        "host_memory_configuration": NOT_KNOWN,
        "host_storage_type": _storage_type(),
        "host_storage_capacity": f"{shutil.disk_usage(Path(__file__).parent).total / 2**30:.0f} GiB",
        "host_networking": "not used: one node",
        "host_networking_topology": "not used: one node",
        ACCELERATORS: str(gpus),
        ACCELERATOR: str(machine["accelerator"]) if gpus else NONE,
        "accelerator_host_interconnect": of_gpu,
        "accelerator_frequency": of_gpu,
        "accelerator_on-chip_memories": of_gpu,
        "accelerator_memory_configuration": of_gpu,
        "accelerator_memory_capacity": f"{machine['accelerator_memory_gib']} GiB" if gpus else NONE,
        "accelerator_interconnect": of_gpus,
        "accelerator_interconnect_topology": of_gpus,
        "cooling": NOT_KNOWN,
        "hw_notes": "",
        "framework": f"PyTorch {machine['torch']}",
        "other_software_stack": ", ".join(software),
        "operating_system": str(machine["operating_system"]),
        "sw_notes": "",
    }


def system_name(description: dict[str, str]) -> str:
    """Return a name for files that tells such machines apart, like `2x-amd-epyc` or `8x-nvidia-h100`."""
    count, model = description[ACCELERATORS], description[ACCELERATOR]
    if count == "0":
        count, model = description[CPUS], description[PROCESSOR]
    model = re.sub(r"\([^)]*\)|@.*", " ", model)  # (R), (TM), the frequency
    return "-".join(re.findall(r"[a-z0-9]+", f"{count}x {model}".lower()))


def _storage_type() -> str:
    """Return the kinds of this machine's disks, whichever holds the data set."""
    kinds = set()
    for rotational in Path("/sys/block").glob("*/queue/rotational"):
        disk = rotational.parent.parent.name
        if not disk.startswith(("loop", "ram", "zram", "dm-", "sr")):
            spins = rotational.read_text() == "1\n"
            kinds.add("NVMe SSD" if disk.startswith("nvme") else "disk" if spins else "SSD")
    return " and ".join(sorted(kinds)) or NOT_KNOWN
