"""The ranks of a run, which torchrun starts (torch.distributed): one for each GPU, or a few on CPUs.

Without torchrun a run is one rank, and everything here does nothing. torchrun tells each process in the environment
which rank it is; `gloo` carries messages between CPUs, `nccl` those between GPUs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from data.files import die_with_parent
from pytorch.cli import RankFailure

Anything = TypeVar("Anything")

_store: dist.Store | None = None  # where ranks leave a note when they have lost contact
_sums: Any = None  # of `all_reduce_sum`, so that small messages do not queue behind gradients


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
            device_type: cpu or cuda.
            timeout_seconds: how long to wait for another rank before it is taken for lost.
            launch_id: the launch's, on the machine that knows it.

        Raises:
            RankFailure: the others did not come.
        """
        global _store, _sums
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls(launch_id=launch_id)
        die_with_parent()  # torchrun, so that no orphan outlives a restart
        timeout = timedelta(seconds=timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        try:
            _store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=timeout)
            _sums = dist.new_group(timeout=timeout)
        except RuntimeError as error:
            raise RankFailure(f"the ranks of this run did not find each other: {_first_line(error)}") from error
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


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Turn a failed exchange into a RankFailure that names the ranks which do not report one too within seconds."""
    try:
        yield
    except RuntimeError as error:
        about_contact = isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)
        if not (is_distributed() and about_contact):
            raise
        missing = "unknown, since the process that keeps the list is one of them"
        with suppress(RuntimeError):
            missing = ", ".join(map(str, _unresponsive_ranks()))
        text = f"rank {dist.get_rank()}: lost contact; ranks that hang or are gone: {missing} ({_first_line(error)})"
        raise RankFailure(text) from error


def _unresponsive_ranks(patience: float = 5.0) -> list[int]:
    if _store is None:
        raise RuntimeError("no store")
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    keys = [f"failed/{attempt}/{rank}" for rank in range(dist.get_world_size())]
    _store.set(keys[dist.get_rank()], "")
    time.sleep(patience)
    return [rank for rank, key in enumerate(keys) if not _store.check([key])]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
