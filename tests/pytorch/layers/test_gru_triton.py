"""The GRU layer's Triton kernels without a GPU: their arithmetic in Triton's interpreter, and what they compile to.

Run as a module, it prints the relative errors of a case in JSON: Triton chooses its interpreter when it is imported.
What only a GPU can show (bfloat16, waiting for one another, times): test_gpu.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from pytorch.layers import gru

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
INPUTS = 7
# Hidden size, lengths; tiles of 4 rows and 16 units. The last one has those of GPUs.
CASES: list[tuple[int, list[int]]] = [
    (40, [4, 3, 3, 2, 1]),  # three programs a direction for the first four utterances; the third has 8 units
    (16, [3, 3, 3, 3, 2, 2, 1, 1, 1]),
    (33, [4, 2]),
    (24, [1]),
    (100, [3, 2, 1]),
]


def run(layer: nn.GRU, sequence: PackedSequence, stock: bool) -> list[Tensor]:
    """Outputs, and the gradients of inputs and parameters for some gradient of the outputs."""
    from pytorch.layers import gru_triton

    data, weights = sequence.data.requires_grad_(), list(layer.parameters())
    if stock:
        outputs_NH = layer(sequence._replace(data=data))[0].data.unflatten(1, (-1, layer.hidden_size)).sum(1)
    else:
        offsets = torch.nn.functional.pad(sequence.batch_sizes.cumsum(0), (1, 0)).int()
        outputs_NH = gru_triton.Layer.apply(data, sequence.batch_sizes, offsets, True, *weights)
        with torch.no_grad():
            inference_NH = gru_triton.Layer.apply(data, sequence.batch_sizes, offsets, False, *weights)
            assert torch.equal(outputs_NH, inference_NH)
    d_outputs_NH = torch.randn(outputs_NH.shape, generator=torch.Generator().manual_seed(0)).to(outputs_NH)
    return [outputs_NH.detach(), *torch.autograd.grad(outputs_NH, [data, *weights], d_outputs_NH)]


def errors(case: int) -> list[float]:
    """Return the relative errors against nn.GRU in float64."""
    from pytorch.layers import gru_triton

    if case < len(CASES) - 1:
        gru_triton.TILES[9, 0] = gru_triton.Tiles(4, 16, 16, 1), gru_triton.Tiles(4, 16, 32, 4)
    hidden, lengths = CASES[case]
    torch.manual_seed(0)
    layer = nn.GRU(INPUTS, hidden, bidirectional=True)
    sequence = pack_padded_sequence(torch.randn(max(lengths), len(lengths), INPUTS), torch.tensor(lengths))
    actual = run(layer, sequence, stock=False)
    expected = run(layer.double(), sequence._replace(data=sequence.data.detach().double()), stock=True)
    assert all(a.shape == e.shape and a.dtype == torch.float32 for a, e in zip(actual, expected, strict=True))
    return [float((a - e).norm() / e.norm()) for a, e in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_outputs_and_gradients_are_those_of_stock_gru(case: int) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pytorch.layers.test_gru_triton", str(case)]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in process.stderr:
        pytest.skip("Triton 3.6's interpreter does not work with NumPy 2.4")
    assert process.returncode == 0, process.stderr
    assert max(json.loads(process.stdout)) < 1e-6, process.stdout


def test_where_the_backward_kernel_does_not_run_cudnn_computes_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch.layers import gru_triton

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs_NI: Tensor, batch_sizes: Tensor, keep: bool, *weights: Tensor) -> Tensor:
            return weights[0].sum()

        @staticmethod
        def backward(ctx: Any, *d_outputs: Tensor) -> Any:
            raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(gru_triton, "supported", lambda device, hidden_size: True)
    monkeypatch.setattr(gru_triton, "Layer", Broken)
    with torch.inference_mode(), pytest.warns(UserWarning, match="failed: out of resource: shared memory"):
        assert not gru.has_triton_kernel.__wrapped__(torch.device("cpu"), 8)
    monkeypatch.setattr(
        Broken, "backward", lambda ctx, *d_outputs: (None,) * 3 + (d_outputs[0].expand(24, 8),) + (None,) * 7
    )
    with torch.inference_mode():
        assert gru.has_triton_kernel.__wrapped__(torch.device("cpu"), 8)


def compile_for_hopper(kernel: Any, tile: dict[str, int], **constants: Any) -> Any:
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants |= {name: size for name, size in tile.items() if name != "num_warps"} | {"D": 2, "H": 800, "WAIT": True}
    pointers = {"biases": "*fp32", "offsets": "*i32", "counters": "*i32", "carry": "*fp32", "d_outputs": "*fp32"}
    numbers = dict.fromkeys(["N", "B", "T", "first", "last", "first_block"], "i32")
    types = dict.fromkeys(kernel.arg_names, "*bf16") | pointers | numbers | dict.fromkeys(constants, "constexpr")
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, type in enumerate(signature.values()) if type.startswith("*")}
    options = {"num_warps": tile["num_warps"], "num_stages": 1, "launch_cooperative_grid": True}
    return compile(ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_on_hopper_weights_stay_in_shared_memory_and_programs_see_what_others_wrote(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton

    from pytorch.layers import gru_triton

    if name == "forward":
        compiled = compile_for_hopper(gru_triton._forward, gru_triton.FORWARD, KEEP=True)
    else:
        compiled = compile_for_hopper(gru_triton._backward, gru_triton.BACKWARD)
    assert 2 * 32 * 2400 < compiled.metadata.shared <= 227 * 1024
    ptx = compiled.asm["ptx"]
    before, after = ptx.split("acquire", maxsplit=1)
    assert "wgmma.mma_async" not in before and "ld.global.cg" not in before  # what others wrote is read after waiting
    assert "wgmma.mma_async" in after and "ld.global.cg" in after
    assert ".gpu.release" in after
    loop = after[: after.rindex(".gpu.release")]
    assert "ld.global.v4" not in loop  # between waiting and arriving, nothing is read but what others wrote
    cubin = tmp_path / "cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack and int(stack[1]) <= 64, usage  # bytes of registers that do not fit


if __name__ == "__main__":
    print(json.dumps(errors(int(sys.argv[1]))))
