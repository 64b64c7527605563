"""The C++ library for CPUs other than this one, against torch in float64: older ones of its kind, and ARM's emulated.

Needs g++; for ARM, Debian's g++-aarch64-linux-gnu and qemu-user (sh tests/packages.sh). Says nothing about speed.
"""

import ctypes
import os
import re
import shlex
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pytorch.layers import kernels
from tests.pytorch.layers import test_batch_norm, test_gru

CROSS_COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu"


class CPU(NamedTuple):
    """What kernels.compiler_flags asks, and which model qemu emulates, if it must: the oldest that fits the flags."""

    machine: str
    capability: str
    native_bf16: bool
    model: str = ""


SUBSETS = {"AVX2": ("AVX2",), "AVX512": ("AVX2", "AVX512")}  # what runs on which capability
CPUS = {
    "AVX2": CPU("x86_64", "AVX2", False),
    "AVX-512 without bf16": CPU("x86_64", "AVX512", False),
    "ARMv8.0": CPU("aarch64", "DEFAULT", False, "cortex-a53"),
    "ARM with bf16": CPU("aarch64", "DEFAULT", True, "max"),  # Debian 12's qemu has no other model with bf16
}


@pytest.fixture(scope="module", params=CPUS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[CPU, Path]:
    """A CPU, and the library for it."""
    cpu = CPUS[request.param]
    compiler = [CROSS_COMPILER] if cpu.model else shlex.split(os.environ.get("CXX", "g++"))
    for command in (compiler[0], *EMULATOR[: bool(cpu.model)]):
        if not shutil.which(command):
            pytest.skip(f"there is no {command} (Debian: sh tests/packages.sh)")
    if not cpu.model and cpu.capability not in SUBSETS.get(torch.backends.cpu.get_cpu_capability(), ()):
        pytest.skip(f"this CPU has no {cpu.capability}")
    library = tmp_path_factory.mktemp("library") / "kernels.so"
    flags = kernels.compiler_flags(cpu.machine, cpu.capability, cpu.native_bf16)
    assert flags is not None
    subprocess.run([*compiler, *flags, "-o", str(library), *map(str, kernels.SOURCES)], check=True)
    if cpu.model:
        sources = "".join(source.read_text().partition('extern "C" {')[2] for source in kernels.SOURCES)
        declarations = "".join(f"{each};\n" for each in re.findall(r"^void \w+\([^)]*\)", sources, re.MULTILINE))
        library.with_name("functions.h").write_text(f'#include <cstdint>\nextern "C" {{\n{declarations}}}\n')
        program = Path(__file__).with_name("call_kernel.cpp")
        options = ["-std=c++17", "-I", str(library.parent), "-o", str(library.with_name("call"))]
        subprocess.run([*compiler, *options, str(program), str(library)], check=True)
    return cpu, library


@pytest.fixture
def other_cpu(built: tuple[CPU, Path], monkeypatch: pytest.MonkeyPatch) -> CPU:
    """The layers compute with the library for this CPU."""
    cpu, library = built
    monkeypatch.setattr(kernels, "has_native_bf16", lambda: cpu.native_bf16)
    if cpu.model:
        command = [*EMULATOR, cpu.model, str(library.with_name("call"))]
        monkeypatch.setattr(kernels, "call", partial(call_emulated, command))
        monkeypatch.setattr(kernels, "available", lambda: True)
    else:
        monkeypatch.setattr(kernels, "load", lambda: ctypes.CDLL(str(library)))
    return cpu


def call_emulated(command: list[str], name: str, *arguments: Any) -> None:
    """Do as kernels.call, but in another process."""
    arrays: list[np.ndarray] = []

    def encoded(argument: Any) -> bytes:
        if isinstance(argument, Tensor):
            arrays.append(argument.detach().view(-1).view(torch.uint8).numpy())
            return struct.pack("q", arrays[-1].size) + arrays[-1].tobytes()
        if isinstance(argument, list):
            return struct.pack("q", len(argument)) + b"".join(map(encoded, argument))
        return struct.pack("q", -1) if argument is None else bytes(kernels._passed(argument))

    result = subprocess.run([*command, name], input=b"".join(map(encoded, arguments)), capture_output=True)
    assert result.returncode == 0, result.stderr
    after = np.frombuffer(result.stdout, np.uint8)
    assert len(after) == sum(array.size for array in arrays)
    for array in arrays:
        array[:], after = after[: array.size], after[array.size :]


@pytest.mark.parametrize(("hidden_size", "threads"), [(1, 1), (5, 2), (17, 3), (50, 1), (50, 5)])
def test_the_gru_layer_is_that_of_torch_with_any_number_of_threads(
    hidden_size: int, threads: int, other_cpu: CPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    test_gru.assert_like_stock([12, 11, 11, 9, 8, 8, 7, 7, 4, 3, 1], hidden_size)


@pytest.mark.parametrize("hidden_size", [5, 17, 50])
def test_bfloat16_rounds_the_operands_of_the_gru_layer_and_nothing_else(hidden_size: int, other_cpu: CPU) -> None:
    test_gru.test_bfloat16_rounds_the_operands_and_nothing_else(hidden_size)


@pytest.mark.parametrize("clamp", test_batch_norm.LIMITS)
@pytest.mark.parametrize(("count", "channels"), [(3, 5), (1000, 4), (50, 800)])
def test_batch_norm_is_that_of_torch(count: int, channels: int, clamp: tuple[float, float], other_cpu: CPU) -> None:
    test_batch_norm.test_batch_norm_and_its_gradients_are_those_of_torch_in_float64(count, channels, clamp, "kernel")


def test_batch_norm_rounds_rows_of_bfloat16_once(other_cpu: CPU) -> None:
    test_batch_norm.test_rows_of_bfloat16_stay_so_and_are_rounded_once("kernel")


def test_what_is_not_finite_stays_so(other_cpu: CPU) -> None:
    test_gru.test_what_is_not_finite_stays_so()
    test_batch_norm.test_a_number_that_is_none_reaches_the_output("kernel")


def test_the_library_multiplies_bfloat16_natively_only_where_the_cpu_does(built: tuple[CPU, Path]) -> None:
    cpu, library = built
    objdump = CROSS_COMPILER.replace("g++", "objdump") if cpu.model else "objdump"
    code = subprocess.run([objdump, "-d", str(library)], capture_output=True, text=True, check=True).stdout
    assert ("bfdot" in code or "vdpbf16ps" in code) == cpu.native_bf16
