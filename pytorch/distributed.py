"""The processes of one run, which torchrun starts (torch.distributed): one a GPU, or a few on CPUs.

Without torchrun a run is one process, and everything here does nothing. torchrun tells each process in the environment
which one it is; `gloo` carries what CPUs say to each other, `nccl` what GPUs do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future

from pytorch.cli import RankFailure

LAUNCH = "DEEPSPEECH2_LAUNCH"  # where launch.py on machine 0 tells the name of this launch
Anything = TypeVar("Anything")


class _Talk:
    """What this module keeps of the processes' talk."""

    store: dist.Store | None = None  # what all of them can write to
    group: Any = None  # of `all_reduce_sum`: one of its own, so that small messages do not queue behind gradients
    seconds: float = 0.0  # stood still in `all_reduce_sum` and `note_gradients_are_there`
    last_gradients: float = 0.0  # time.monotonic() when the last gradients of a backward pass were there


_talk = _Talk()


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    launch: str | None = None  # name of the launch, which stays when torchrun starts processes again; None: no torchrun

    @classmethod
    def start(cls, device_type: str, timeout_seconds: float) -> World:
        """Meet the other processes, if torchrun has started this one.

        Args:
            device_type: cpu or cuda.
            timeout_seconds: how long to wait for another process before it is taken for lost.

        Raises:
            RankFailure: the others did not come.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        die_with_parent()
        timeout = timedelta(seconds=timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            _talk.store = store
            _talk.group = dist.new_group(timeout=timeout)
        except RuntimeError as error:
            raise RankFailure(f"the processes of this run did not find each other: {_first_line(error)}") from error
        world = cls(rank, size, int(os.environ["LOCAL_RANK"]))
        # torchrun's count of restarts tells less: those after a machine has joined again are not in it.
        names = [name for name in world.all_gather_object(os.environ.get(LAUNCH)) if name]
        return replace(world, launch=names[0] if names else None)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and saves."""
        return self.rank == 0

    def print_once(self, text: str) -> None:
        """Print on standard error, once for all of them."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def all_gather_object(self, thing: Anything) -> list[Anything]:
        """What each of them gives, by rank; on all of them."""
        if self.size == 1:
            return [thing]
        everything: list[Anything] = [thing] * self.size
        dist.all_gather_object(everything, thing)
        return everything

    def broadcast_object(self, thing: Anything, source: int) -> Anything:
        """What the process of that rank has, on all of them."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=source)
        return box[0]

    def tell(self, what: str) -> None:
        """Let all of them know something; none waits for it."""
        if _talk.store is not None:
            _talk.store.set(what, "")

    def told(self, what: str) -> bool:
        """Whether one of them has told that."""
        return _talk.store is not None and bool(_talk.store.check([what]))


def die_with_parent() -> None:
    """On Linux, be killed with torchrun: orphans would go on beside the processes that take their place."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def shutdown() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Whether there are other processes."""
    return dist.is_initialized() and dist.get_world_size() > 1


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The tensor, replaced by its sum over all processes."""
    if is_distributed():
        started = time.monotonic()
        dist.all_reduce(tensor, group=_talk.group)
        _talk.seconds += time.monotonic() - started
    return tensor


def average_gradients(bucket: dist.GradBucket) -> Future[Tensor]:
    """What DistributedDataParallel does with gradients by itself, noting when: for a hook of it, on a CPU."""
    _talk.last_gradients = time.monotonic()
    return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


def note_gradients_are_there() -> None:
    """To be called when the backward pass is over, on a CPU: since its last gradients were there, it has but waited."""
    _talk.seconds += time.monotonic() - _talk.last_gradients


def seconds_waited() -> float:
    """How long this process has stood still for others and for messages: sums of batch norms and loss, and gradients.

    Not in it: the part of the gradients' messages that goes on behind the backward pass. On a GPU, which goes on
    meanwhile, this says nothing.
    """
    return _talk.seconds


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Turn the failure of an exchange into a RankFailure: those that do not report one too within some seconds."""
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
    store, attempt = _talk.store, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if store is None:
        raise RuntimeError("no store")
    keys = [f"failed/{attempt}/{rank}" for rank in range(dist.get_world_size())]
    store.set(keys[dist.get_rank()], "")
    time.sleep(patience)
    return [rank for rank, key in enumerate(keys) if not store.check([key])]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
