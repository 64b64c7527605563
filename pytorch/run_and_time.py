"""The parent of a run, which times the benchmark: it starts the ranks, each of which is pytorch/train.py.

    sh pytorch/run_and_time.sh --config synthetic           # sets up the environment, then starts this module
    python -m pytorch.run_and_time --config synthetic

One rank or many take the same path, on every node of a run:

1. Parse the command line, lock the output folder, evict the data set from the page cache.
2. Start the ranks with torchrun's agent. They are forked from a server that has imported train.py, so that a start, or
   a restart after a rank was lost, takes no time. SIGTERM, SIGUSR1 and Ctrl-C are passed on to them.
3. Copy their standard output, which is the log, to this process's and, once the clock has started, to last_run.log. Add
   how much CPU time others took. A run survives a closed pipe or a full disk.
4. Write the report.

Environment variables:

    NPROC_PER_NODE  ranks on this node (default: one per GPU, but no more than a batch has utterances; or one)
    NNODES          nodes, on each of which this is started (default: 1)
    NODE_RANK       number of this node, from 0 (default: 0)
    MASTER_ADDR     name or address of node 0 (default: localhost)
    MASTER_PORT     free port there (default: 29500)
    MAX_RESTARTS    how many times all ranks restart from the newest checkpoint after one was lost (default: 0)
    RUN_ID          name of the run, new for every run and the same on all nodes; several nodes need it to restart

The exit status is that of the ranks; 1 if one of them was lost.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import FrameType

from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

from data.cli import INTERRUPTED, available_cores, exit_status
from data.files import locked
from data.packed import open_dataset
from pytorch import machine, mllog
from pytorch.config import Config, parse_config
from pytorch.errors import PREEMPTED, RANK_FAILED, Preempted, RunError

VARIABLES = {  # default, lowest and highest value
    "NPROC_PER_NODE": (0, 0, 1024),
    "NNODES": (1, 1, 65536),
    "NODE_RANK": (0, 0, 65535),
    "MASTER_PORT": (29500, 1, 65535),
    "MAX_RESTARTS": (0, 0, 65535),
}
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
END_LINE = "\0\n"  # after all that ranks print
END = f"\n{END_LINE}".encode()


def main(arguments: list[str] | None = None) -> int:
    """Run a command line; return the exit status, which is that of the ranks."""
    return exit_status(lambda: _run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: list[str]) -> int:
    config = parse_config(
        arguments,
        program="sh run_and_time.sh",
        description="Train DeepSpeech2 until the corpus WER of the validation set reaches the target.",
    )
    env = variables()
    log = LogCopy(config.output_dir / mllog.LOG)
    # On a file system that nodes share, one lock is enough; and more would refuse the run itself.
    config.output_dir.mkdir(parents=True, exist_ok=True)
    with locked(config.output_dir, "run") if env["NODE_RANK"] == 0 else nullcontext():
        cache_clear = machine.clear_cache(open_dataset(config.dataset_dir))
        try:
            with log.from_ranks():
                status = _launch(config, cache_clear, env)
        except RunError as error:
            raise RunError(log.failure or error) from error
    if status in (0, 1) and log.file.started:
        _write_report(log.file.path)
    return status


def variables() -> dict[str, int]:
    """Return the environment variables' values; RunError if one is wrong."""
    env = {name: _number(name) for name in VARIABLES}
    if env["NODE_RANK"] >= env["NNODES"]:
        raise RunError(f"NODE_RANK is {env['NODE_RANK']}; with NNODES={env['NNODES']} it must be less than that")
    if env["MAX_RESTARTS"] and env["NNODES"] > 1 and not os.environ.get("RUN_ID"):
        raise RunError("MAX_RESTARTS with NNODES needs RUN_ID, a name that is new for every run, the same on all nodes")
    return env


def nproc_per_node(config: Config, nodes: int = 1) -> int:
    """Return how many ranks a run has on this node.

    They are NPROC_PER_NODE, or one for each GPU, or for as many GPUs as a batch has utterances for; at least one.

    Raises:
        RunError: NPROC_PER_NODE is not a number.
    """
    import torch

    if number := _number("NPROC_PER_NODE"):
        return number
    gpus = 0 if config.device == "cpu" else torch.accelerator.device_count()
    processes = min(gpus, config.batch_size // (config.gradient_accumulation_steps * nodes))
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


def _launch(config: Config, cache_clear: str, env: dict[str, int]) -> int:
    """Start the ranks of this node and wait for them; return their exit status."""
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
    try:
        folder = tempfile.TemporaryDirectory()
    except OSError as error:
        raise RunError(f"there is no folder for temporary files ({error.strerror}); set TMPDIR") from error
    with folder, _signals_to_ranks() as received:
        try:
            method = _start_server()
            statuses = _torchrun(config, cache_clear, env, method, folder.name)
        except RunError as error:
            if not received:
                raise
            # A rank that a signal reaches before it can handle it is killed; so it has not failed.
            print(error, file=sys.stderr)
            statuses = [INTERRUPTED if received[0] == signal.SIGINT else PREEMPTED]
    if PREEMPTED in statuses:
        raise Preempted
    return max(statuses)


def _start_server() -> str:
    """Start the server that ranks are forked from, while this process imports torch. Return the start method."""
    method = multiprocessing.get_start_method(allow_none=True) or "forkserver"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["pytorch.train"])
        resource_tracker.ensure_running()  # which unblocks signals
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for ranks, too, until they can handle them
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return method


def _torchrun(config: Config, cache_clear: str, env: dict[str, int], method: str, folder: str) -> list[int]:
    """Run torchrun's agent; return the ranks' exit statuses. RunError if ranks failed, or did not find each other."""
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import LaunchConfig, elastic_launch

    processes, one_node = nproc_per_node(config, env["NNODES"]), env["NNODES"] == 1
    threads = max(1, min(torch.get_num_threads(), available_cores() // processes))
    # A node's own name may resolve to an address of another interface or host; port 0 is any free one.
    endpoint = f"{os.environ.get('MASTER_ADDR') or 'localhost'}:{env['MASTER_PORT']}"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # ranks print their own errors
    launch = LaunchConfig(
        min_nodes=env["NNODES"],
        max_nodes=env["NNODES"],
        nproc_per_node=processes,
        run_id=os.environ.get("RUN_ID") or (uuid.uuid4().hex if one_node else "none"),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0" if one_node else endpoint,
        rdzv_configs={"is_host": env["NODE_RANK"] == 0},
        local_addr="localhost" if one_node else os.environ.get("PET_LOCAL_ADDR"),  # torchrun's variable
        max_restarts=env["MAX_RESTARTS"],
        start_method=method,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        signals_to_handle="SIGQUIT",  # the others are handled here: the agent would not let ranks return their status
    )
    try:
        return list(elastic_launch(launch, _rank)(config, cache_clear, threads).values())
    except ChildFailedError as error:
        failures = (f"rank {rank} ended with status {failed.exitcode}" for rank, failed in error.failures.items())
        raise RunError(f"ranks of the run failed: {', '.join(failures)}; see their messages above") from error
    except RendezvousError as error:
        cause = (str(error.__cause__ or error).splitlines() or [""])[0]
        where = f"no connection at {endpoint} (MASTER_ADDR, MASTER_PORT)"
        raise RunError(f"{where}; is the port free, and node 0 up? {cause}") from error
    except SignalException as error:
        raise RunError(str(error)) from error


def _rank(config: Config, cache_clear: str, threads: int) -> int:
    """Train as one of the ranks, in a process of its own with some threads; return the exit status.

    To torchrun, a process that returns has ended in an orderly way. One that exits has failed, and may be restarted.
    """
    import torch

    from pytorch import train

    threading.Thread(target=_end_with_parent, daemon=True).start()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt_once)
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(threads)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
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
    """End this process when its parent has ended: a rank would work on unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(RANK_FAILED)


def _interrupt_once(*_: object) -> None:
    """Handle Ctrl-C, which a terminal sends to a rank and to its parent, who passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _signals_to_ranks() -> Iterator[list[int]]:
    """Pass signals on to the ranks; yield the list of those received. A second Ctrl-C kills the ranks."""
    received: list[int] = []
    reached: set[int | None] = set()  # ranks that the first one was passed on to

    def pass_on(*_: object) -> None:
        ranks = multiprocessing.active_children()
        for rank in ranks:
            if received.count(signal.SIGINT) > 1:
                rank.kill()
            elif rank.pid is not None and rank.pid not in reached:
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, received[0])
            reached.add(rank.pid)
        if not reached:  # none has started yet
            raise KeyboardInterrupt if received[0] == signal.SIGINT else Preempted

    def handle(number: int, _: FrameType | None) -> None:
        if multiprocessing.parent_process() is not None:
            os._exit(RANK_FAILED)  # a forked rank that has no handlers of its own yet
        received.append(number)
        signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)  # for ranks that are just being started
        pass_on()

    # but for what nohup, or a shell that starts this in the background, has it ignore
    handlers = {number: handle for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, pass_on)
    try:
        yield received
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


class LogCopy:
    """Copies what ranks print, the log, to standard output and to a file; adds how much CPU time others took."""

    def __init__(self, path: Path) -> None:
        self.file = mllog.LogFile(path)
        self.failure = ""  # what could not be written before the clock started
        self._cpu_seconds: dict[str, float] = {}  # when it started

    @contextmanager
    def from_ranks(self) -> Iterator[None]:
        """Copy what this process and those that it starts print."""
        sys.stdout.flush()
        standard_output, (reading, writing) = os.dup(1), os.pipe()
        os.set_blocking(standard_output, True)  # some parents' pipes are not: lines would be lost
        os.dup2(writing, 1)
        os.close(writing)
        before, sys.stdout = sys.stdout, os.fdopen(1, "w", closefd=False)  # the old one may believe in a file
        with os.fdopen(standard_output, "w", encoding="utf-8", errors="surrogateescape", closefd=False) as stream:
            log = mllog.make_logger(self.file, mllog.StandardOutput(stream))
            copy = threading.Thread(target=self._copy, args=(reading, log), daemon=True)
            copy.start()
            try:
                yield
            finally:
                with suppress(OSError):
                    os.write(1, END)
                os.dup2(standard_output, 1)
                sys.stdout = before
                copy.join()

    def _copy(self, reading: int, log: MLLogger) -> None:
        with os.fdopen(reading, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                if line == END_LINE:
                    return
                if line.strip():
                    log.logger.info(line.rstrip("\n"))
                if f'"{constants.RUN_START}"' in line:
                    self._cpu_seconds = _cpu_seconds()
                elif f'"{constants.RUN_STOP}"' in line and '"exception"' not in line:
                    self._log_cpu_taken(log)
                elif not self.file.started and (failures := mllog.failures(log)):
                    self.failure = failures[0]
                    for rank in multiprocessing.active_children():
                        rank.kill()

    def _log_cpu_taken(self, log: MLLogger) -> None:
        """Log the share of CPU time used by other programs while the clock ran; warn if the time is invalid."""
        used = {name: value - self._cpu_seconds.get(name, value) for name, value in _cpu_seconds().items()}
        if not used.get("all"):  # no Linux, or a sandbox that does not count
            return
        others, stolen = max(0.0, used["busy"] - used["own"]) / used["all"], used["stolen"] / used["all"]
        metadata = {"stolen": stolen, "involuntary_context_switches": int(used["switches"])}
        log.event("cpu_taken", others, metadata=metadata)  # as fractions of all
        if others + stolen > machine.MAX_CPU_TAKEN:
            took = f"Other programs took {others:.0%} of this machine's CPU time, and its hypervisor {stolen:.0%}"
            print(f"{took}: the run's time is not a valid benchmark result.", file=sys.stderr)


def _cpu_seconds() -> dict[str, float]:
    return machine.cpu_seconds([os.getpid(), *(rank.pid for rank in multiprocessing.active_children() if rank.pid)])


def _write_report(log: Path) -> None:
    """Write the report beside the log, in a process of its own: if it fails, the run has not."""
    if not log.exists():
        print(f"{log} is gone: there is no report", file=sys.stderr)
        return
    command = [sys.executable, "-m", "tools.report", str(log), "--output", str(log.with_name(mllog.REPORT))]
    with suppress(KeyboardInterrupt):
        subprocess.run(command, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
