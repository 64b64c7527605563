import pytest
import torch

from pytorch.layers import kernels


@pytest.fixture(params=["kernel", "plain"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two CPU paths, the C++ kernel or plain PyTorch, the test is run with."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "load", lambda: "not wanted")
    elif kernels.status().startswith("plain"):
        pytest.skip(kernels.status())
    return request.param


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As many accelerators of a kind as the test asks for."""
    kind, count = request.param
    accelerator = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.delenv("NPROC_PER_NODE", raising=False)
