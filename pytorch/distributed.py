"""The ranks of a run, which torchrun starts (torch.distributed): one for each GPU, or a few on CPUs.

Without torchrun, world_size is 1 and the collectives here are no-ops. torchrun sets each process's rank in its
environment; `gloo` carries messages between CPUs, `nccl` those between GPUs.
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

from pytorch.errors import RankFailure

Anything = TypeVar("Anything")

_store: dist.Store | None = None  # where ranks leave a note when they have lost contact
_sums: Any = None  # of `all_reduce_sum`, so that small messages do not queue behind gradients
_stop_time = math.inf  # time.monotonic() when this process received a signal to stop
_timeout_seconds = math.inf
STOP_SECONDS = 30.0  # for a step to end after a signal to stop, which torchrun sends when it has lost a rank
REPORT_SECONDS = 5.0  # for the other ranks to note a failure, too


def torchrun_env(name: str, default: int) -> int:
    """Return a variable of torchrun's; without torchrun the default, as other launchers have the same names."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else default


def run_id() -> str | None:
    """Return torchrun's id of the run, which is the same after it restarts ranks; None if the run has no id."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name  # torchrun's default


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this node

    @classmethod
    def init(cls, device_type: str, timeout_seconds: float) -> World:
        """Connect to the other ranks, if torchrun has started several.

        Args:
            device_type: torch's name of the kind of device.
            timeout_seconds: how long to wait for another rank before it counts as lost.

        Raises:
            RankFailure: the others did not connect.
        """
        global _store, _sums, _timeout_seconds
        if torchrun_env("WORLD_SIZE", 1) == 1:
            return cls()
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
        return cls(rank, size, int(os.environ["LOCAL_RANK"]))

    @property
    def is_main(self) -> bool:
        """Whether this rank logs and saves."""
        return self.rank == 0

    def print_once(self, text: str) -> None:
        """Print on standard error, on one rank."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def all_gather_object(self, obj: Anything) -> list[Anything]:
        """Gather one object from every rank, on every rank."""
        if self.size == 1:
            return [obj]
        objects: list[Anything] = [obj] * self.size
        dist.all_gather_object(objects, obj)
        return objects

    def broadcast_object(self, obj: Anything, src: int) -> Anything:
        """Return rank `src`'s object on every rank."""
        if self.size == 1:
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src=src)
        return objects[0]

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

    If another rank is lost, synchronize() blocks until NCCL's watchdog aborts the process, and SIGTERM would not be
    handled; so poll.

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
    """Handles SIGTERM and SIGUSR1 by setting `requested`: the step under way is finished and saved."""

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
