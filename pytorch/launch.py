"""Start the timed run in as many processes as there are devices, by PyTorch's own torchrun if that is more than one.

    python -m pytorch.launch --config an4           what run_and_time.sh does; all arguments are those of pytorch.train

Environment variables:

    NPROC_PER_NODE  processes on this machine (default: one a GPU, or one)
    NNODES          machines, on each of which this is started (default: 1)
    NODE_RANK       number of this machine, from 0 (default: 0)
    MASTER_ADDR     name or address of machine 0 (default: localhost)
    MASTER_PORT     free port there (default: 29500)
    MAX_RESTARTS    how often all processes start again from the newest checkpoint after one was lost (default: 0)

The exit status is that of pytorch.train. A process that ends in an orderly way, whatever came out, is no failure to
torchrun, which would only start it again; it leaves its exit status in a file.
"""

from __future__ import annotations

import os
import sys
import tempfile
import uuid
from pathlib import Path

import torch

from pytorch import train
from pytorch.cli import RunError
from pytorch.distributed import LAUNCH

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # that torchrun passes on; its own choice lacks SIGUSR1
LONGEST_GRACE_SECONDS = 180  # of those in cluster/: how long processes have to save before torchrun kills them
HIGHEST_PORT = 65535
VARIABLES = {"NPROC_PER_NODE": 0, "NNODES": 1, "NODE_RANK": 0, "MASTER_PORT": 29500, "MAX_RESTARTS": 0}


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        given = {name: _number(name, default) for name, default in VARIABLES.items()}
        if not 0 < given["MASTER_PORT"] <= HIGHEST_PORT:
            raise RunError(f"MASTER_PORT is {given['MASTER_PORT']}; it must be a number from 1 to {HIGHEST_PORT}")
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    processes = processes_here()
    if processes == given["NNODES"] == 1 and not given["MAX_RESTARTS"]:
        return train.main(arguments)
    if processes > 1 and not os.environ.get("OMP_NUM_THREADS"):  # they share the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    options = [
        *("--nnodes", str(given["NNODES"]), "--nproc-per-node", str(processes)),
        *("--max-restarts", str(given["MAX_RESTARTS"]), "--rdzv-backend", "c10d", "--rdzv-id", "deepspeech2"),
        *("--rdzv-endpoint", f"{os.environ.get('MASTER_ADDR', 'localhost')}:{given['MASTER_PORT']}"),
        *("--rdzv-conf", f"is_host={given['NODE_RANK'] == 0}", "--signals-to-handle", SIGNALS),
    ]
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(LONGEST_GRACE_SECONDS))
    os.environ.pop(LAUNCH, None)
    if given["NODE_RANK"] == 0:  # it is there from a launch's start to its end; other machines may join again
        os.environ[LAUNCH] = uuid.uuid4().hex
    # A machine that joins again could else wait forever for an address that machine 0 has told in the first round only.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        os.environ[train.STATUS_FILE] = str(status_file)
        failure = _torchrun([*options, "-m", "pytorch.train", *arguments])
        if failure:
            print(f"error: {failure}", file=sys.stderr)
        return int(status_file.read_text()) if status_file.exists() else int(failure is not None)


def processes_here() -> int:
    """How many processes a run has on this machine; RunError where NPROC_PER_NODE is no number."""
    return _number("NPROC_PER_NODE", 0) or max(1, torch.cuda.device_count())


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal():
        raise RunError(f"{name} is {value!r}; it must be a number")
    return int(value)


def _torchrun(arguments: list[str]) -> str | None:
    """Returns what went wrong, if anything did."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run.main(arguments)
    except SystemExit as ended:  # wrong options
        return f"torchrun ended with status {ended.code}"
    except ChildFailedError as error:
        failures = (f"rank {rank} ended with status {failed.exitcode}" for rank, failed in error.failures.items())
        return f"the run has lost processes: {', '.join(failures)}; what they said is above"
    except (SignalException, RendezvousError) as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
