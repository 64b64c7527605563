"""Where and how precisely to compute, and copies from there that nothing waits for."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pytorch import gru
from pytorch.config import Precision, RunError


def choose_device(name: str, number: int = 0) -> torch.device:
    """Device of that name; `auto` is the GPU of that number if there is one.

    Raises:
        RunError: a GPU was asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch finds no CUDA device on this machine; use --device cpu or auto")
    return torch.device(name, number) if name == "cuda" else torch.device(name)


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """fp32 or bf16; `auto` is bf16 where the device multiplies it natively. Allows TF32 on a GPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = gru.multiplies_bfloat16()
    if name == "bf16" and not native:
        print("--precision bf16: this device has no bf16 arithmetic, so fp32 would be faster", file=sys.stderr)
    return name if name != "auto" else "bf16" if native else "fp32"


def read_later(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the CPU. What is returned waits for that copy, not for what was started after it."""
    if tensor.device.type == "cpu":
        return lambda: tensor
    copy = tensor.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> Tensor:
        copied.synchronize()
        return copy

    return read
