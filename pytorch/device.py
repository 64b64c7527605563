"""Device, precision, asynchronous copies to the host, advice where memory runs out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from pytorch.cli import RunError
from pytorch.config import Precision
from pytorch.layers import kernels

NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "Storage size calculation overflowed",
    "could not create a primitive",
)  # on a CPU


def select_device(name: str, number: int = 0) -> torch.device:
    """Return the device of that name; `auto` is the GPU of that number if there is one.

    Raises:
        RunError: there is no such device, or no GPU of that number.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise RunError(f"--device {name}: unknown; one of auto, cpu, cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch finds no CUDA device on this machine; use --device cpu or auto")
    if number >= torch.cuda.device_count():
        raise RunError(
            f"{number + 1} processes but only {torch.cuda.device_count()} GPUs on this machine; set NPROC_PER_NODE"
        )
    return torch.device(name, number)


def set_device(device: torch.device) -> None:
    """Set the current CUDA device, which events and NCCL use."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextmanager
def explain_oom(advice: str) -> Iterator[None]:
    """Turn any failure to find memory, on a GPU or a CPU, into an error that gives advice.

    Raises:
        RunError: there was not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # a CPU's allocator raises a plain RuntimeError
        no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not no_memory and not any(words in str(error) for words in NO_MEMORY):
            raise
        raise RunError(advice) from error


def has_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kernels.has_native_bf16()


def select_precision(name: Precision, device: torch.device) -> Precision:
    """Return fp32 or bf16, or auto where only a measurement can tell: on a CPU that has bf16. Allows TF32 on a GPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if name == "bf16" and not has_bf16(device):
        print("--precision bf16: this device has no bf16 arithmetic, so fp32 would be faster", file=sys.stderr)
    if name != "auto":
        return name
    if not has_bf16(device):
        return "fp32"
    return "bf16" if device.type == "cuda" else "auto"


def faster_precision(seconds: Mapping[Precision, float]) -> Precision:
    """Return bf16 if it is clearly faster, by a tenth, else fp32, which is more precise."""
    return "bf16" if seconds["bf16"] < 0.9 * seconds["fp32"] else "fp32"


def copy_to_cpu_async(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU. Returns a function that waits for this copy, not for later work."""
    if tensor.device.type == "cpu":
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def read() -> Tensor:
        copied.synchronize()
        return copy

    return read
