"""The ranks of a run, which torchrun starts (torch.distributed): one for each GPU, or a few on CPUs.

Without torchrun a run is one rank, and but for `StopSignal` everything here does nothing. torchrun tells each process
in the environment which rank it is; `gloo` carries messages between CPUs, `nccl` those between GPUs.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.cli import die_with_parent
from pytorch.errors import RankFailure

Anything = TypeVar("Anything")

_store: dist.Store | None = None  # where ranks leave a note when they have lost contact
_sums: Any = None  # of `all_reduce_sum`, so that small messages do not queue behind gradients
_stop_time = math.inf  # time.monotonic() when this process was told to stop
_timeout_seconds = math.inf
STOP_SECONDS = 30.0  # for a step to end after a signal to stop, which torchrun sends when it has lost a rank
REPORT_SECONDS = 5.0  # for the other ranks to note a failure, too


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    launch_id: str | None = None  # names a launch, also when torchrun starts its processes again; None: no torchrun

    @classmethod
    def init(cls, device_type: str, timeout_seconds: float, launch_id: str | None = None) -> World:
        """Connect to the other ranks, if torchrun has started this process.

        Args:
            device_type: torch's name of the kind of device.
            timeout_seconds: how long to wait for another rank before it counts as lost.
            launch_id: the launch's, on the machine that knows it.

        Raises:
            RankFailure: the others did not connect.
        """
        global _store, _sums, _timeout_seconds
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls(launch_id=launch_id)
        die_with_parent()  # torchrun, so that no orphan outlives a restart
        timeout = timedelta(seconds=timeout_seconds)
        backend = "gloo"
        if device_type != "cpu":
            backend = f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"  # NCCL for cuda
        _timeout_seconds = timeout_seconds
        try:
            _store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout)
            _sums = dist.new_group(timeout=timeout)
        except RuntimeError as error:
            raise RankFailure(f"the ranks of this run could not connect: {_first_line(error)}") from error
        world = cls(rank, size, int(os.environ["LOCAL_RANK"]))
        # torchrun's count of restarts tells less: those after a machine has joined again are not in it.
        known = [name for name in world.all_gather_object(launch_id) if name]
        return cls(rank, size, world.local_rank, known[0] if known else None)

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and saves."""
        return self.rank == 0

    def print_once(self, text: str) -> None:
        """Print on standard error, on one rank."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def all_gather_object(self, thing: Anything) -> list[Anything]:
        """Gather one object from every rank, on every rank."""
        if self.size == 1:
            return [thing]
        gathered: list[Anything] = [thing] * self.size
        dist.all_gather_object(gathered, thing)
        return gathered

    def broadcast_object(self, thing: Anything, source: int) -> Anything:
        """Return the object of rank `source` on every rank."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    def barrier(self) -> None:
        """Wait until every rank gets here."""
        self.all_gather_object(None)


def shutdown() -> None:
    """Disconnect from the other ranks."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Return whether there are other ranks."""
    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Replace a tensor by its sum over all ranks, and return it."""
    if is_distributed():
        dist.all_reduce(tensor, group=_sums)
    return tensor


def wait_for(event: torch.Event) -> None:
    """Wait for an event on this rank's accelerator.

    A message between GPUs that never comes raises nothing here: it would be waited for until NCCL's watchdog aborts
    the process, and no signal to stop would be heeded.

    Raises:
        DistError: it did not come in time, or another rank has failed.
    """
    if not is_distributed():
        event.synchronize()
        return
    started = looked = time.monotonic()
    while not event.query():
        time.sleep(0.0005)
        now = time.monotonic()
        if now > min(started + _timeout_seconds, max(started, _stop_time) + STOP_SECONDS):
            raise dist.DistError("the device did not end the step")
        if now > looked + 1:
            looked = now
            if _failed_ranks():
                raise dist.DistError("another rank has failed")


class StopSignal:
    """Remembers that this process was told to stop. The step under way is finished and saved."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.request)

    def request(self, *_: object) -> None:
        """Handle a signal."""
        global _stop_time
        self.requested, _stop_time = True, time.monotonic()


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Turn a failed exchange into a RankFailure that names the ranks which do not report one too within seconds."""
    try:
        yield
    except BaseException as error:
        about_contact = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
        if not (is_distributed() and about_contact and isinstance(error, RuntimeError)):
            _note_failure()  # others may wait for this rank
            raise
        missing = "unknown, because the process that keeps the list is among them"
        with suppress(RuntimeError):
            missing = ", ".join(map(str, _unresponsive_ranks())) or "none, but one has failed"
        text = f"rank {dist.get_rank()}: lost contact; ranks that hang or are gone: {missing} ({_first_line(error)})"
        raise RankFailure(text) from error


def _unresponsive_ranks() -> list[int]:
    if _store is None:
        raise RuntimeError("no store")
    _note_failure()
    time.sleep(REPORT_SECONDS)
    failed = _failed_ranks()
    return [rank for rank in range(dist.get_world_size()) if rank not in failed]


def _note_failure() -> None:
    if _store is not None and is_distributed():
        with suppress(RuntimeError):  # the process that keeps the list is gone
            _store.set(_failure_key(dist.get_rank()), "")


def _failed_ranks() -> list[int]:
    """Return the ranks that have noted a failure; RuntimeError if the process that keeps the list is gone."""
    assert _store is not None
    return [rank for rank in range(dist.get_world_size()) if _store.check([_failure_key(rank)])]


def _failure_key(rank: int) -> str:
    return f"failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
