import dataclasses
import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pytorch.config import CONFIGS
from pytorch.errors import RunError
from pytorch.layers import kernels
from pytorch.model import DeepSpeech2
from tests.processes import run_module_for_text
from tools.bench import Options, StockGRU, Workload, batch_of, benchmark, training_flops

CONFIG = dataclasses.replace(CONFIGS["synthetic"], hidden_size=16, conv_channels=2)
CPU = torch.device("cpu")


def test_the_benchmark_prints_one_json_object_with_the_figures_that_scripts_read() -> None:
    options = ["--config", "synthetic", "--hidden-size", "16", "--batch-size", "2", "--repetitions", "1", "--json"]
    options += ["--shortest-seconds", "0.5", "--longest-seconds", "1"]
    run = run_module_for_text("tools.bench", *options, "--device", "cpu")
    assert run.returncode == 0, run.stderr
    assert "ERROR" not in run.stderr  # nor what the profiler says where there is no GPU
    figures = json.loads(run.stdout)
    numbers = ["auto_step_ms", "bf16_step_ms", "fp32_step_ms", "stock_packed_step_ms", "speedup", "forward_speedup"]
    for name in [*numbers, "fp32_speedup", "gemm_peak_gflops", "achieved_gflops", "fraction_of_peak"]:
        assert figures[name] > 0, name
    assert (figures["config"], figures["hidden_size"], figures["batch_size"]) == ("synthetic", 16, 2)
    assert figures["auto_precision"] in (("bf16", "fp32") if kernels.has_native_bf16() else ("fp32",))
    assert figures["auto_step_ms"] == figures[f"{figures['auto_precision']}_step_ms"]
    assert figures["step_parts_ms"]["convolution"] > 0


def test_an_unknown_configuration_is_an_error_of_one_line() -> None:
    run = run_module_for_text("tools.bench", "--config", "nonsense")
    assert run.returncode == 1
    assert run.stderr.startswith("error: --config nonsense")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"repetitions": 0}, "--repetitions is 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"hidden_size": -1}, "--hidden-size is -1"),
    ],
)
def test_an_impossible_value_is_an_error_that_names_it(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RunError, match=said):
        benchmark(Options(**wrong), [])


def test_the_stock_model_that_ours_is_compared_with_computes_the_same() -> None:
    batch = batch_of(CONFIG, 3, 0.5, 1.0, CPU)
    ours, theirs = Workload(CONFIG, batch, CPU, "fp32"), Workload(CONFIG, batch, CPU, "fp32", stock=True)
    assert isinstance(theirs.trainer.model.grus[0], StockGRU)
    losses = [workload.trainer.loss(batch) for workload in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for mine, stock in zip(ours.trainer.model.parameters(), theirs.trainer.model.parameters(), strict=True):
        assert mine.grad is not None and stock.grad is not None
        # Not their weights after a step: an optimizer's first one makes large differences of small ones.
        assert (mine.grad - stock.grad).norm() < 1e-2 * stock.grad.norm()


def test_operations_are_those_that_torch_counts_in_stock_layers() -> None:
    batch = batch_of(CONFIG, 1, 1.0, 1.0, CPU)  # 16000 samples: 101 frames, 51 output frames
    trainer = Workload(CONFIG, batch, CPU, "fp32", stock=True).trainer
    features = trainer.spectrogram(batch.waveforms_BS, batch.num_samples_B)
    with FlopCounterMode(display=False) as counter:
        trainer.model(*features)[0].sum().backward()
    # nn.GRU asks for no gradient of its first states
    assert counter.get_total_flops() == pytest.approx(training_flops(DeepSpeech2(2, 16), 51)[1], rel=1e-3)
