from __future__ import annotations

import pytest

from pytorch.layers import kernels


@pytest.fixture(params=["kernel", "plain"])
def cpu_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two CPU paths, the C++ kernel or plain PyTorch, the test is run with."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "load", lambda: "not wanted")
    elif kernels.status().startswith("plain"):
        pytest.skip(kernels.status())
    return request.param
