"""The GRU layer's Triton kernels without a GPU: their arithmetic in Triton's interpreter, and what they compile to.

Run as a module, it prints in JSON what the interpreter computes: Triton chooses it when it is imported.
What only a GPU can show (bfloat16, waiting for one another, times): test_gpu.py.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pytorch.layers import gru
from tests.conftest import ROOT
from tests.pytorch.layers.test_gru import INPUTS, pack, run

triton = pytest.importorskip("triton", reason="Triton is not installed")
gru_triton = pytest.importorskip("pytorch.layers.gru_triton")

# Hidden size, lengths; tiles of 4 rows and 16 units. The last one has those of GPUs.
CASES: list[tuple[int, list[int]]] = [
    (40, [4, 3, 3, 2, 1]),  # three programs a direction for the first four utterances; the third has 8 units
    (16, [3, 3, 3, 3, 2, 2, 1, 1, 1]),
    (33, [4, 1]),
    (100, [3, 2, 1]),
]
FAULTS = ["", "a NaN", "a gradient", "an error"]  # of the kernels in the second block of rows


class InTriton(gru.GRU):
    """A layer that the kernels compute, in training and in inference."""

    def forward(self, sequence: PackedSequence, offsets: Tensor | None = None) -> PackedSequence:  # type: ignore[override]
        given = sequence.data, sequence.batch_sizes, None
        outputs_NH, inference_NH = (gru_triton.Layer.apply(*given, keep, *self.parameters()) for keep in (True, False))
        assert torch.equal(outputs_NH, inference_NH)
        return sequence._replace(data=outputs_NH)


def errors(case: int) -> list[float]:
    """Return the norms of the errors against nn.GRU in float64."""
    tile = {"R": 4, "U": 16, "num_warps": 4}
    small = {(9, 0): (tile | {"K": 16, "AHEAD": 1}, tile | {"K": 32, "AHEAD": 4})}
    hidden, lengths = CASES[case]
    torch.manual_seed(0)
    layer, stock = InTriton(INPUTS, hidden), nn.GRU(INPUTS, hidden, bidirectional=True).double()
    stock.load_state_dict(layer.state_dict())
    with mock.patch.dict(gru_triton.TILES, small if case < len(CASES) - 1 else {}):
        actual = run(layer, pack(lengths))
    expected = run(stock, pack(lengths, torch.float64))
    assert all(a.shape == e.shape and a.dtype == torch.float32 for a, e in zip(actual, expected, strict=True))
    return [float((a - e).norm()) for a, e in zip(actual, expected, strict=True)]


def trial(fault: str) -> tuple[bool, str]:
    """Return whether a run would take the kernels if they had this fault, and what it says."""
    launch = gru_triton._launch

    def launch_with_a_fault(
        kernel: Any, given: Any, results: tuple[Tensor, ...], batch_sizes: Tensor, *more: Any
    ) -> None:
        if fault == "an error":
            raise RuntimeError("out of resource: shared memory")
        launch(kernel, given, results, batch_sizes, *more)
        if batch_sizes[0] > 64 and fault == ("a gradient" if kernel is gru_triton._backward else "a NaN"):
            results[0][..., 64, :] = float("nan") if fault == "a NaN" else 9.0

    gru.has_triton_kernel.cache_clear()
    with (
        mock.patch.object(gru_triton, "_launch", launch_with_a_fault),
        mock.patch.object(gru_triton, "supported", return_value=True),
        warnings.catch_warnings(record=True) as warned,
    ):
        taken = gru.has_triton_kernel(torch.device("cpu"), 24, "triton")
    return taken, " ".join(str(warning.message) for warning in warned)


@pytest.fixture(scope="module")
def interpreted() -> Any:
    """What this module prints with Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pytorch.layers.test_gru_triton"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in process.stderr:
        pytest.skip("Triton 3.6's interpreter does not work with NumPy 2.4")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_outputs_and_gradients_are_those_of_stock_gru(case: int, interpreted: Any) -> None:
    assert all(error < 2e-5 for error in interpreted["errors"][case])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_trial_takes_the_kernels_only_if_several_blocks_of_rows_give_what_nn_gru_gives(
    fault: str, interpreted: Any
) -> None:
    taken, said = interpreted["trials"][fault]
    assert taken is (fault == "")
    assert ("cuDNN computes the GRUs" in said) is (fault != "")


def compile_for(capability: tuple[int, int], kernel: Any, tile: dict[str, int]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[str, Any] = tile | {"H": 800, "WAIT": True, "carry": None}
    warps = constants.pop("num_warps")
    pointers = {"biases": "*fp32", "offsets": "*i32", "counters": "*i32", "d_outputs": "*fp32"}
    numbers = dict.fromkeys(["N", "B", "T", "first", "last", "first_block", "keep"], "i32")
    types = dict.fromkeys(kernel.arg_names, "*bf16") | pointers | numbers | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, type in enumerate(signature.values()) if type.startswith("*")}
    options = {"num_warps": warps, "num_stages": 1, "launch_cooperative_grid": True}
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return triton.compile(ASTSource(kernel, signature, constants, aligned), target=target, options=options)


# The shared memory (bytes) that a program may have, by compute capability.
SHARED_MEMORY = {(8, 0): 166_912, (8, 9): 101_376, (9, 0): 232_448, (12, 0): 101_376}
COMPILED = [*itertools.product(SHARED_MEMORY, (False, True), [0]), ((9, 0), False, 16)]  # 16 units for few rows


@pytest.mark.parametrize(("capability", "backward", "units"), COMPILED)
def test_weights_stay_in_shared_memory_and_programs_see_what_others_wrote(
    capability: tuple[int, int], backward: bool, units: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert set(gru_triton.TILES) == set(SHARED_MEMORY)
    tile = gru_triton.TILES[capability][backward]
    tile = tile | {"U": units or tile["U"]}
    compiled = compile_for(capability, gru_triton._backward if backward else gru_triton._forward, tile)
    assert 2 * tile["U"] * 2400 < compiled.metadata.shared <= SHARED_MEMORY[capability]
    product = "wgmma.mma_async" if capability == (9, 0) else "mma.sync"
    before, after = compiled.asm["ptx"].split("acquire", maxsplit=1)
    assert product not in before and "ld.global.cg" not in before  # what others wrote is read after waiting
    assert product in after and "ld.global.cg" in after
    assert ".gpu.release" in after
    loop = after[: after.rindex(".gpu.release")]
    assert "ld.global.v4" not in loop  # between waiting and arriving, nothing is read but what others wrote
    if capability == (9, 0):  # the figures of docs/gpu.md
        assert loop.count("wgmma.wait_group") <= (38 if backward else 26)
        assert loop.count("bar.sync") <= (83 if backward else 29)
    cubin = tmp_path / "cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack and int(stack[1]) <= (16 if capability == (8, 0) and not backward else 0), usage  # spilled bytes


if __name__ == "__main__":
    all_errors, trials = [errors(case) for case in range(len(CASES))], {fault: trial(fault) for fault in FAULTS}
    print(json.dumps({"errors": all_errors, "trials": trials}))
