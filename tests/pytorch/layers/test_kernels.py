"""The C++ library: compiled once, kept, and done without where it cannot be had."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from pytorch.layers import kernels
from pytorch.layers.gru import GRU


@pytest.fixture
def fresh_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """As in a process that has no kernel yet, with an empty cache, whose folder this is."""
    if "it needs AVX2" in kernels.status():
        pytest.skip(kernels.status())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    kernels.load.cache_clear()
    yield tmp_path / "cache"
    kernels.load.cache_clear()


@pytest.mark.parametrize("command", ["no-such-compiler", " ", '"g++'])
def test_a_compiler_that_cannot_be_started_is_named_and_done_without(
    fresh_kernel: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("CXX", command)
    assert kernels.status().startswith("plain PyTorch: no library: ")
    assert f"install g++ or set CXX ({command})" in kernels.status()
    assert GRU(3, 4)(pack_sequence([torch.ones(2, 3)])).data.shape == (2, 4)


def test_a_compiler_error_is_told_and_leaves_nothing(fresh_kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = fresh_kernel.with_name("broken-compiler")
    compiler.write_text("#!/bin/sh\necho no space left >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert kernels.status().startswith("plain PyTorch: ") and kernels.status().endswith("failed: no space left")
    assert [path for path in fresh_kernel.rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_is_told(fresh_kernel: Path) -> None:
    fresh_kernel.touch()
    assert f"TORCH_EXTENSIONS_DIR ({fresh_kernel})" in kernels.status()


def test_an_older_cpu_is_told(fresh_kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert kernels.status() == "plain PyTorch: no kernel for this CPU (x86_64, DEFAULT): it needs AVX2"


def test_a_built_kernel_needs_no_compiler(fresh_kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "")  # as good as not set
    kernels.load()
    status = kernels.status()
    if status.startswith("plain"):
        pytest.skip(status)
    assert status.startswith("fused kernel")
    kernels.load.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert kernels.status() == status


@pytest.mark.parametrize(
    ("capabilities", "gains"),
    [
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_bf16": True, "amx_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": False}, False),
        ({"bf16": True}, True),
    ],
)
def test_bf16_is_for_cpus_that_gain_by_it(
    capabilities: dict[str, bool], gains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert kernels.has_native_bf16.__wrapped__() == gains
