"""The C++ code for CPUs: the recurrent layers' loop (gru.cpp) and batch norm (batch_norm.cpp).

It is compiled at first use into one library, cached per CPU and version of the source; status() says what is in use.
The C++ takes only raw pointers and sizes, so it needs no torch headers and compiles in seconds.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NUMBERS: dict[type, Any] = {bool: ctypes.c_bool, int: ctypes.c_long, float: ctypes.c_float}
SOURCES = [Path(__file__).with_name(name) for name in ("gru.cpp", "batch_norm.cpp")]


@functools.cache
def has_native_bf16() -> bool:
    """Return whether this machine's CPU multiplies bfloat16 natively, and gains by it.

    Of Intel's, only those with AMX do: a Sapphire Rapids without it took a fifth longer than in float32.
    """
    found = torch.cpu.get_capabilities()
    intel_without_amx = "Intel" in found.get("cpu_name", "") and not found.get("amx_bf16")
    return bool(found.get("bf16") or (found.get("avx512_bf16") and not intel_without_amx))  # of ARM, of x86-64


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return what the operands of products with a weight are rounded to: autocast's type where that is enabled."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def compiler_flags(machine: str, capability: str, native_bf16: bool) -> list[str] | None:
    """Return what makes g++ or clang++ compile the library for a CPU, or None where there is no kernel for it."""
    if machine in ("aarch64", "arm64"):
        instructions = ["-march=armv8.2-a+bf16"] if native_bf16 else []  # 8.2: some CPUs with bf16 are older than 8.6
    elif capability == "AVX2":
        instructions = ["-mavx2", "-mfma"]
    elif capability == "AVX512":
        instructions = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
        if native_bf16:
            instructions.append("-mavx512bf16")
    else:
        return None
    return ["-std=c++17", "-O3", *instructions, "-fopenmp", "-fPIC", "-shared"]


def status() -> str:
    """Return what computes on a CPU: the kernels, or plain PyTorch and why."""
    library = load()
    return f"plain PyTorch: {library}" if isinstance(library, str) else f"fused kernel ({Path(library._name).stem})"


def available() -> bool:
    """Return whether there is a library; the first time, it is compiled."""
    return isinstance(load(), ctypes.CDLL)


@functools.cache
def load() -> ctypes.CDLL | str:
    """Return the library, compiled unless the cache has it; or why there is none."""
    machine, capability = platform.machine(), torch.backends.cpu.get_cpu_capability()
    flags = compiler_flags(machine, capability, has_native_bf16())
    if flags is None:
        return f"no kernel for this CPU ({machine}, {capability}): it needs AVX2"
    everything = [*(source.read_bytes() for source in SOURCES), " ".join([machine, *flags]).encode()]
    key = hashlib.sha256(b"".join(everything)).hexdigest()[:16]
    compiler = os.environ.get("CXX") or "g++"
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    try:
        library = Path(cache).expanduser() / f"deepspeech2_{key}" / f"{capability}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            # Several processes may do this at once: a finished file takes its place in one step.
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                built = Path(scratch, library.name)
                command = [*shlex.split(compiler), *flags, "-o", str(built), *map(str, SOURCES)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                built.replace(library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(error.cmd)} failed: {error.stderr.strip()}"
    except (OSError, RuntimeError, ValueError) as error:  # no compiler, no place for it, no home, CXX is not a command
        return f"no library: {error}; install g++ or set CXX ({compiler}), TORCH_EXTENSIONS_DIR ({cache})"


def call(name: str, *arguments: bool | int | float | Tensor | list[Tensor] | None) -> None:
    """Call a function of the library, without the global interpreter lock. The sources have the order of arguments.

    A contiguous tensor is passed as the address of its data, a list of them as an array of addresses.
    """
    getattr(load(), name)(*map(_passed, arguments))


def _passed(argument: bool | int | float | Tensor | list[Tensor] | None) -> ctypes._SimpleCData | ctypes.Array:
    if isinstance(argument, list):
        return (ctypes.c_void_p * len(argument))(*(tensor.data_ptr() for tensor in argument))
    if isinstance(argument, Tensor | None):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    return NUMBERS[type(argument)](argument)
