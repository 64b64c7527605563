"""Device, precision, asynchronous copies to the host, advice where memory runs out."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pytorch.config import Precision
from pytorch.errors import RunError
from pytorch.layers import kernels

# What errors of a CPU's allocator and of oneDNN say
NO_MEMORY = "can't allocate memory", "not enough memory", "size calculation overflowed", "could not create a primitive"


def select_device(name: str, number: int = 0) -> torch.device:
    """Return the device of that name; `auto` is the accelerator (torch's word for GPUs and the like), if there is one.

    Args:
        name: auto, cpu, cuda (NVIDIA, and AMD by ROCm) or xpu (Intel).
        number: of the accelerator.

    Raises:
        RunError: there is no such device, or none of that number.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "cpu" or (name == "auto" and (accelerator is None or accelerator.type == "mps")):  # has no float64
        return torch.device("cpu")
    if accelerator is None or name not in ("auto", accelerator.type):
        raise RunError(f"--device {name}: PyTorch finds no such device on this machine; use --device cpu or auto")
    if number >= (count := torch.accelerator.device_count()):
        raise RunError(f"{number + 1} processes but only {count} GPUs on this machine; set NPROC_PER_NODE")
    return torch.device(accelerator.type, number)


def set_device(device: torch.device) -> None:
    """Set the current accelerator, which events and messages between ranks use."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)


@contextmanager
def explain_oom(advice: str) -> Iterator[None]:
    """Turn out-of-memory errors, on GPU or CPU, into a RunError with advice.

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
    if device.type == "cpu":
        return kernels.has_native_bf16()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu" and torch.xpu.is_bf16_supported()


def select_precision(name: Precision, device: torch.device) -> Precision:
    """Return bf16 if the device has it, unless the name is fp32. Allows TF32 on a GPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    if name != "fp32" and has_bf16(device):
        return "bf16"
    if name == "bf16":
        print("This device has no bf16 arithmetic, or none that is faster: the precision is fp32", file=sys.stderr)
    return "fp32"


def copy_to_cpu_async(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU. Return a function that waits for this copy, not for later work."""
    if tensor.device.type == "cpu":
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)
    copied = torch.Event(tensor.device)
    copied.record(torch.accelerator.current_stream(tensor.device))

    def read() -> Tensor:
        copied.synchronize()
        return copy

    return read
