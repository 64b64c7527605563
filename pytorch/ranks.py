"""The processes of one run, which torchrun starts (torch.distributed): one a GPU, or a few on CPUs.

Without torchrun a run is one process, and everything here does nothing. torchrun tells each process in the environment
which one it is; `gloo` carries what CPUs say to each other, `nccl` what GPUs do.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from pytorch.command import LostProcess
from pytorch.config import RunError

Anything = TypeVar("Anything")


class _Talk:
    """What `add_up` uses: a group of its own, whose small messages need not queue behind gradients."""

    group: Any = None
    seconds: float = 0.0


_talk = _Talk()


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    restarts: int = 0  # of torchrun's workers, after one of them was lost
    store: dist.Store | None = None  # what all of them can write to

    @classmethod
    def start(cls, device_type: str, timeout_seconds: float) -> Ranks:
        """Meet the other processes, if torchrun has started this one.

        Args:
            device_type: cpu or cuda.
            timeout_seconds: how long to wait for another process before it is taken for lost.

        Raises:
            RunError: the others did not come.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        timeout = timedelta(seconds=timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            _talk.group = dist.new_group(timeout=timeout)
        except RuntimeError as error:
            raise RunError(f"the processes of this run did not find each other: {_first_line(error)}") from error
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        return cls(rank, size, int(os.environ["LOCAL_RANK"]), restarts, store)

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def say(self, text: str) -> None:
        """Print on standard error, once for all of them."""
        if self.first:
            print(text, file=sys.stderr, flush=True)

    def gather(self, thing: Anything) -> list[Anything]:
        """What each of them gives, by rank; on all of them."""
        if self.size == 1:
            return [thing]
        everything: list[Anything] = [thing] * self.size
        dist.all_gather_object(everything, thing)
        return everything

    def send(self, thing: Anything, source: int) -> Anything:
        """What the process of that rank has, on all of them."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    def lost(self, error: Exception, patience: float = 5.0) -> LostProcess:
        """What to say after a failed exchange: those that do not report one too within some seconds are named."""
        missing = "unknown, since the process that keeps the list is lost as well"
        if self.store is not None:
            try:
                self.store.set(f"failed/{self.restarts}/{self.rank}", "")
                time.sleep(patience)
                keys = {rank: f"failed/{self.restarts}/{rank}" for rank in range(self.size)}
                missing = ", ".join(str(rank) for rank, key in keys.items() if not self.store.check([key]))
            except RuntimeError:
                pass
        return LostProcess(
            f"rank {self.rank}: lost contact; ranks that hang or are gone: {missing} ({_first_line(error)})"
        )


def leave() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def together() -> bool:
    """Whether there are other processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def add_up(tensor: Tensor) -> Tensor:
    """The tensor, replaced by its sum over all processes."""
    if together():
        started = time.monotonic()
        dist.all_reduce(tensor, group=_talk.group)
        _talk.seconds += time.monotonic() - started
    return tensor


def seconds_waited() -> float:
    """How long this process has waited for others in `add_up` (on a GPU: for nothing, since it goes on meanwhile)."""
    return _talk.seconds


def is_about_contact(error: RuntimeError) -> bool:
    """Whether an error comes from an exchange between processes."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
