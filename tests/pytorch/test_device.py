"""Which device; what is done on accelerators, tried without one."""

import pytest
import torch

from pytorch.device import select_device
from pytorch.errors import RunError


@pytest.mark.parametrize(
    ("gpus", "name", "number", "device"),
    [
        ((None, 0), "auto", 0, "cpu"),
        (("cuda", 2), "auto", 1, "cuda:1"),
        (("cuda", 2), "cpu", 0, "cpu"),
        (("xpu", 1), "auto", 0, "xpu:0"),
        (("mps", 1), "auto", 0, "cpu"),
    ],
    indirect=["gpus"],
)
def test_auto_is_whatever_accelerator_there_is(gpus: None, name: str, number: int, device: str) -> None:
    assert select_device(name, number) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "name", "number", "message"),
    [
        ((None, 0), "cuda", 0, "--device cuda: PyTorch finds no such device on this machine; use --device cpu or auto"),
        (("cuda", 2), "auto", 2, "3 processes but only 2 GPUs on this machine; set NPROC_PER_NODE"),
    ],
    indirect=["gpus"],
)
def test_a_device_that_is_not_there_is_refused(gpus: None, name: str, number: int, message: str) -> None:
    with pytest.raises(RunError, match=message):
        select_device(name, number)
