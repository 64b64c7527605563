"""The parent of a run, which times the benchmark: it starts the ranks, each of which is pytorch/train.py.

    sh pytorch/run_and_time.sh --config synthetic           # sets up the environment, then starts this module
    python -m pytorch.run_and_time --config synthetic

One rank or many take the same path, on every node of a run:

1. Parse the command line, lock the output folder, evict the data set from the page cache.
2. Start the ranks with torchrun's agent. They are forked from a server that has imported train.py, so that a start, or
   a restart after a rank was lost, takes no time. SIGTERM, SIGUSR1 and Ctrl-C are passed on to them.
3. Write the report.

Environment variables, which docs/runs.md explains, say how many ranks there are on how many nodes.

The exit status is that of the ranks; 1 if one of them was lost.
"""

import logging
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from contextlib import nullcontext, suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import FrameType

from data.cli import INTERRUPTED, available_cores, exit_status
from data.files import locked
from data.packed import open_dataset
from pytorch import machine, mllog
from pytorch.config import Config, parse_config
from pytorch.errors import PREEMPTED, RANK_FAILED, SIGNALS, Preempted, RunError

VARIABLES = {  # default, lowest and highest value
    "NPROC_PER_NODE": (0, 0, 1024),
    "NNODES": (1, 1, 65536),
    "NODE_RANK": (0, 0, 65535),
    "MASTER_PORT": (29500, 1, 65535),
    "MAX_RESTARTS": (0, 0, 65535),
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return the exit status, which is that of the ranks."""
    return exit_status(lambda: _run(sys.argv[1:] if arguments is None else arguments), arguments)


def _run(arguments: list[str]) -> int:
    description = "Train DeepSpeech2 until the corpus WER of the validation set reaches the target."
    config = parse_config(arguments, program="sh run_and_time.sh", description=description)
    env = variables()
    log = config.output_dir / mllog.LOG
    dataset = open_dataset(config.dataset_dir)
    # On a file system that nodes share, one lock is enough; and more would refuse the run itself.
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(config.output_dir, "run") if env["NODE_RANK"] == 0 else nullcontext():
        cache_clear, before = machine.clear_cache(dataset), _modified(log)
        statuses = _launch(config, cache_clear, env)
    status, wrote_the_log = max(statuses.values()), 0 in statuses  # rank 0, on this node, did
    if wrote_the_log and status in (0, 1) and _modified(log) != before:
        _write_report(log)
    return status


def _modified(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def variables() -> dict[str, int]:
    """Return the environment variables' values; RunError if one is wrong."""
    env = {}
    for name, (default, lowest, highest) in VARIABLES.items():
        value = os.environ.get(name) or str(default)
        if not (value.isdecimal() and lowest <= int(value) <= highest):
            raise RunError(f"{name} is {value!r}; it must be a number from {lowest} to {highest}")
        env[name] = int(value)
    if env["NODE_RANK"] >= env["NNODES"]:
        raise RunError(f"NODE_RANK is {env['NODE_RANK']}; with NNODES={env['NNODES']} it must be less than that")
    if env["MAX_RESTARTS"] and env["NNODES"] > 1 and not os.environ.get("RUN_ID"):
        raise RunError("MAX_RESTARTS with NNODES needs RUN_ID, a name that is new for every run, the same on all nodes")
    return env


def nproc_per_node(config: Config) -> int:
    """Return how many ranks a run has on this node; RunError if a variable is wrong.

    They are NPROC_PER_NODE, or one for each GPU, or for as many GPUs as a batch has utterances for; at least one.
    """
    import torch

    env = variables()
    if env["NPROC_PER_NODE"]:
        return env["NPROC_PER_NODE"]
    gpus = 0 if config.device == "cpu" else torch.accelerator.device_count()
    processes = min(gpus, config.batch_size // (config.gradient_accumulation_steps * env["NNODES"]))
    if processes < gpus:
        used = f"Using {max(1, processes)} of {gpus} GPUs"
        print(f"{used}: --batch-size {config.batch_size} cannot be split further", file=sys.stderr)
    return max(1, processes)


def _launch(config: Config, cache_clear: str, env: dict[str, int]) -> dict[int, int]:
    """Start the ranks of this node and wait for them; return the exit status of each."""
    # The GNU C library returns large blocks to the system when they are freed; on a CPU each step then waits for the
    # same memory to be mapped again, a page at a time.
    os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "100000000000")
    # Gradients and the batch norms' sums have communicators of their own. Two are safe beside each other only if their
    # kernels start in the order of the host's calls, and if they leave multiprocessors to the GRU's kernel.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    os.environ.setdefault("NCCL_MAX_CTAS", "16")
    # Otherwise a rejoining node waits forever: node 0 publishes its store's address only in the first rendezvous round.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    _start_server()
    received = _pass_signals_on()
    try:
        statuses = _torchrun(config, cache_clear, env)
    except RunError as error:
        if not received:
            raise
        print(error, file=sys.stderr)  # ranks were killed by a second Ctrl-C, or did not all stop in time
        raise (KeyboardInterrupt if received[0] == signal.SIGINT else Preempted) from error
    if PREEMPTED in statuses.values():
        raise Preempted
    return statuses


def _start_server() -> None:
    """Start the server that ranks are forked from, while this process imports torch."""
    multiprocessing.set_forkserver_preload(["pytorch.train"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for ranks, too, until they have a StopSignal
    resource_tracker.ensure_running()  # with SIGUSR1 blocked; and it unblocks the others here
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # whose exception an import may lose
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import torch.distributed.launcher  # noqa: F401


def _torchrun(config: Config, cache_clear: str, env: dict[str, int]) -> dict[int, int]:
    """Run torchrun's agent; return its ranks' exit statuses. RunError if ranks failed, or did not find each other."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    one_node = env["NNODES"] == 1
    # A node's own name may resolve to an address of another interface or host; port 0 is any free one.
    endpoint = f"{os.environ.get('MASTER_ADDR') or 'localhost'}:{env['MASTER_PORT']}"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks print their own errors
    with tempfile.TemporaryDirectory() as folder:
        launch = LaunchConfig(
            min_nodes=env["NNODES"],
            max_nodes=env["NNODES"],
            nproc_per_node=nproc_per_node(config),
            run_id=os.environ.get("RUN_ID") or (uuid.uuid4().hex if one_node else "none"),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0" if one_node else endpoint,
            # In seconds: a machine that is short of memory answers even itself late.
            rdzv_configs={"is_host": env["NODE_RANK"] == 0, "read_timeout": 600 if one_node else 60},
            local_addr="localhost" if one_node else os.environ.get("PET_LOCAL_ADDR"),  # torchrun's variable
            max_restarts=env["MAX_RESTARTS"],
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGQUIT",  # others are handled here: the agent would not let ranks return their status
        )
        try:
            return elastic_launch(launch, _rank)(config, cache_clear)
        except ChildFailedError as error:
            failures = (f"rank {rank} ended with status {failed.exitcode}" for rank, failed in error.failures.items())
            raise RunError(f"ranks of the run failed: {', '.join(failures)}; see their messages above") from error
        except RendezvousError as error:
            cause = (str(error.__cause__ or error).splitlines() or [""])[0]
            where = f"no connection at {endpoint} (MASTER_ADDR, MASTER_PORT)"
            raise RunError(f"{where}; is the port free, and node 0 up? {cause}") from error


def _rank(config: Config, cache_clear: str) -> int:
    """Train as one of the ranks, in a process of its own; return the exit status.

    To torchrun, a process that returns has ended in an orderly way. One that exits has failed, and may be restarted.
    """
    import torch

    from pytorch import train

    threading.Thread(target=_end_with_parent, daemon=True).start()
    if not os.environ.get("OMP_NUM_THREADS"):
        share = available_cores() // int(os.environ["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, min(torch.get_num_threads(), share)))
    try:
        status = train.run_rank(config, cache_clear)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the status is decided
    except KeyboardInterrupt:
        status = INTERRUPTED  # torch would end without a status, which its agent would wait for
    except Exception:
        traceback.print_exc()  # torchrun would only write it into a file
        status = RANK_FAILED
    if status == RANK_FAILED:
        sys.exit(status)
    return status


def _end_with_parent() -> None:
    """Wait for the end of the parent, then end this rank. If the parent was killed, it would disturb the next run."""
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(RANK_FAILED)


def _pass_signals_on() -> list[int]:
    """From now on, pass the first signal on to each rank. Return the list to which signals are added when they come.

    A second Ctrl-C, or ten seconds after the first, kills the ranks: one may wait for another that has ended.
    """
    received: list[int] = []
    reached: set[int | None] = set()  # ranks that the first one was passed on to

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        if not reached and not multiprocessing.active_children():  # none has started yet
            raise KeyboardInterrupt if received[0] == signal.SIGINT else Preempted

    def pass_on() -> None:
        while not received:
            time.sleep(0.1)
        kill_time = time.monotonic() + 10 if received[0] == signal.SIGINT else math.inf
        while True:  # also for ranks that are just being started
            kill = received.count(signal.SIGINT) > 1 or time.monotonic() > kill_time
            for rank in multiprocessing.active_children():
                if kill:
                    rank.kill()
                elif rank.pid is not None and rank.pid not in reached:
                    with suppress(ProcessLookupError):
                        os.kill(rank.pid, received[0])
                reached.add(rank.pid)
            time.sleep(0.1)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it, or a shell that starts this in the background
            signal.signal(number, handle)
    threading.Thread(target=pass_on, daemon=True).start()
    return received


def _write_report(log: Path) -> None:
    """Write the report beside the log, in a process of its own: if it fails, the run has not."""
    command = [sys.executable, "-m", "tools.report", str(log), "--output", str(log.with_name(mllog.REPORT))]
    with suppress(KeyboardInterrupt, Preempted):
        subprocess.run(command, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
