"""The ranks of a run, which torchrun starts (torch.distributed): one for each GPU, or a few on CPUs.

Without torchrun, world_size is 1 and the collectives here are no-ops. torchrun sets each process's rank in its
environment; `gloo` carries messages between CPUs, `nccl` those between GPUs.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch.distributed as dist
from torch import Tensor

from pytorch.errors import SIGNALS, RankFailure

Anything = TypeVar("Anything")

REPORT_SECONDS = 5.0  # for the other ranks to lose contact, too

_sums: Any = None  # group of `all_reduce_sum`, so that small messages do not queue behind gradients
_store: dist.Store | None = None  # where ranks that have lost contact say so


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
    def init(cls, device_type: str, timeout_seconds: float) -> Self:
        """Connect to the other ranks, if torchrun has started several.

        Args:
            device_type: torch's name of the kind of device.
            timeout_seconds: how long to wait for another rank before it counts as lost.

        Raises:
            RankFailure: the others did not connect.
        """
        global _sums, _store
        if torchrun_env("WORLD_SIZE", 1) == 1:
            return cls()
        timeout = timedelta(seconds=timeout_seconds)
        backend = "gloo"
        if device_type != "cpu":
            backend = f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"  # NCCL for cuda
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


class StopSignal:
    """Handles SIGTERM and SIGUSR1 by setting `requested`: the step under way is finished and saved.

    SIGINT raises KeyboardInterrupt, but once: a terminal sends Ctrl-C to a rank and to its parent, which passes it on.
    Until here, the parent has blocked these signals.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._request)
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, _interrupt_once)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _request(self, *_: object) -> None:
        self.requested = True


def _interrupt_once(*_: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Turn a failed message between CPUs into a RankFailure with the ranks that report no loss: they hang or are gone.

    A failed message between GPUs ends the process: NCCL's watchdog aborts it.
    """
    try:
        yield
    except RuntimeError as error:
        if _store is None or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        missing = "0, whose process keeps the list of the others"
        with suppress(RuntimeError):
            _store.set(f"lost-contact/{dist.get_rank()}", "")
            time.sleep(REPORT_SECONDS)
            ranks = range(dist.get_world_size())
            missing = ", ".join(str(rank) for rank in ranks if not _store.check([f"lost-contact/{rank}"])) or "none"
        text = f"rank {dist.get_rank()}: lost contact; ranks that hang or are gone: {missing} ({_first_line(error)})"
        raise RankFailure(text) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
