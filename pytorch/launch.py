"""Start the timed run: one process per GPU, with PyTorch's torchrun if there are several.

    python -m pytorch.launch --config an4           what run_and_time.sh does; all arguments are those of pytorch.train

Environment variables:

    NPROC_PER_NODE  processes on this machine (default: one per GPU, but no more than a batch has utterances; or one)
    NNODES          machines, on each of which this is started (default: 1)
    NODE_RANK       number of this machine, from 0 (default: 0)
    MASTER_ADDR     name or address of machine 0 (default: localhost)
    MASTER_PORT     free port there (default: 29500)
    MAX_RESTARTS    how many times all processes restart from the newest checkpoint after one was lost (default: 0)

The exit status is that of pytorch.train; 1 where one of several processes was lost.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import uuid
from importlib import import_module
from pathlib import Path

import torch

from data.cli import INTERRUPTED, exit_status
from pytorch import train
from pytorch.config import Config
from pytorch.errors import PREEMPTED, RANK_FAILED, Preempted, RunError

SIGNALS = "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"  # that torchrun passes on; its own choice lacks SIGUSR1
GRACE_SECONDS = 180  # that ranks have to save before torchrun kills them; the files in cluster/ grant as much
VARIABLES = {  # default, lowest and highest value
    "NPROC_PER_NODE": (0, 0, 1024),
    "NNODES": (1, 1, 65536),
    "NODE_RANK": (0, 0, 65535),
    "MASTER_PORT": (29500, 1, 65535),
    "MAX_RESTARTS": (0, 0, 65535),
}
RANK = "--rank-of-launch"  # first argument of the processes that torchrun starts


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [RANK]:
        return _run_rank(*arguments[1:])
    return exit_status(lambda: _launch(arguments))


def _launch(arguments: list[str]) -> int:
    """Train in this process, or in several; return the exit status."""
    given = variables()
    processes = processes_here(train.parse(arguments), given["NNODES"])
    if processes == given["NNODES"] == 1 and not given["MAX_RESTARTS"]:
        return train.main(arguments)
    return start("pytorch.train", arguments, processes, given)


def variables() -> dict[str, int]:
    """Return the environment variables' values; RunError if one is wrong."""
    given = {name: _number(name) for name in VARIABLES}
    if given["NODE_RANK"] >= given["NNODES"]:
        raise RunError(f"NODE_RANK is {given['NODE_RANK']}; with NNODES={given['NNODES']} it must be less than that")
    return given


def start(module: str, arguments: list[str], processes: int, given: dict[str, int]) -> int:
    """Run a module's `main(arguments, launch_id)` in several processes here; return the exit status.

    `given` are the `variables()`. Preempted if the ranks were told to stop.
    """
    if processes > 1 and not os.environ.get("OMP_NUM_THREADS"):  # they share the cores
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    # not what nohup, or a shell that starts this in the background, has it ignore
    heeded = [name for name in SIGNALS if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN]
    endpoint = f"{os.environ.get('MASTER_ADDR') or 'localhost'}:{given['MASTER_PORT']}"
    options = {
        "--nnodes": given["NNODES"],
        "--nproc-per-node": processes,
        "--max-restarts": given["MAX_RESTARTS"],
        "--rdzv-backend": "c10d",
        "--rdzv-id": "deepspeech2",
        "--rdzv-endpoint": endpoint,
        "--rdzv-conf": f"is_host={given['NODE_RANK'] == 0}",
        "--signals-to-handle": ",".join(heeded),
    }
    if given["NNODES"] == 1:  # a machine's own name may lead to an address that it does not have
        options["--local-addr"] = "localhost"
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE_SECONDS))
    # A machine that joins again could else wait forever for an address that machine 0 has told in the first round only.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Machine 0 names the launch. It is there from a launch's start to its end; other machines may join again.
    launch_id = uuid.uuid4().hex if given["NODE_RANK"] == 0 else "-"
    with tempfile.TemporaryDirectory() as folder:
        status_file = Path(folder) / "status"
        command = ["-m", "pytorch.launch", RANK, str(status_file), launch_id, module, *arguments]
        failure, status = _torchrun([*(f"{name}={value}" for name, value in options.items()), *command], endpoint)
        if failure:
            print(f"error: {failure}", file=sys.stderr)
        if status_file.exists():
            status = int(status_file.read_text())
    if status == PREEMPTED:
        raise Preempted
    return status


def _run_rank(status_file: str, launch_id: str, module: str, *arguments: str) -> int:
    """Run a module as one of torchrun's processes.

    To torchrun, a process that ends in an orderly way must end with status 0, or it would start it again: the exit
    status goes into a file.
    """
    status: int = import_module(module).main(list(arguments), None if launch_id == "-" else launch_id)
    if status == RANK_FAILED:
        return status
    try:
        Path(status_file).write_text(str(status))
    except OSError as error:
        print(f"error: {status_file}: {error.strerror}", file=sys.stderr)
        return status
    return 0


def processes_here(config: Config, machines: int = 1) -> int:
    """Return how many processes a run has on this machine.

    They are NPROC_PER_NODE, or one for each GPU, or for as many GPUs as a batch has utterances for; at least one.

    Raises:
        RunError: NPROC_PER_NODE is not a number.
    """
    if given := _number("NPROC_PER_NODE"):
        return given
    gpus = 0 if config.device == "cpu" else torch.accelerator.device_count()
    processes = min(gpus, config.batch_size // (config.gradient_accumulation_steps * machines))
    if processes < gpus:
        print(
            f"Using {max(1, processes)} of {gpus} GPUs: --batch-size {config.batch_size} cannot be split further",
            file=sys.stderr,
        )
    return max(1, processes)


def _number(name: str) -> int:
    default, lowest, highest = VARIABLES[name]
    value = os.environ.get(name) or str(default)
    if not (value.isdecimal() and lowest <= int(value) <= highest):
        raise RunError(f"{name} is {value!r}; it must be a number from {lowest} to {highest}")
    return int(value)


def _torchrun(arguments: list[str], endpoint: str) -> tuple[str, int]:
    """Run torchrun; return what went wrong, if anything did, and the exit status where no rank has told its own."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    try:
        run.main(arguments)
    except SystemExit as ended:  # wrong options
        return f"torchrun ended with status {ended.code}", 1
    except ChildFailedError as error:
        failures = (f"rank {rank} ended with status {failed.exitcode}" for rank, failed in error.failures.items())
        return f"processes of the run failed: {', '.join(failures)}; see their messages above", 1
    except RendezvousError as error:
        cause = (str(error.__cause__ or error).splitlines() or [""])[0]
        where = f"no connection at {endpoint} (MASTER_ADDR, MASTER_PORT)"
        return f"{where}; is the port free, and machine 0 there? {cause}", 1
    except SignalException as error:
        return str(error), INTERRUPTED if error.sigval == signal.SIGINT else PREEMPTED
    return "", 0


if __name__ == "__main__":
    sys.exit(main())
