import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pytorch.cli import RunError
from pytorch.config import CONFIGS
from pytorch.layers import kernels
from tests.processes import run_module_for_text
from tools.bench import Arguments, StockPaddedGRU, Workload, benchmark, draw, random_batch, stock, training_flops

CONFIG = dataclasses.replace(CONFIGS["synthetic"], hidden_size=16, conv_channels=2)
CPU = torch.device("cpu")


def test_the_benchmark_prints_one_json_object_with_the_figures_that_scripts_read() -> None:
    options = ["--config", "synthetic", "--hidden-size", "16", "--batch-size", "2", "--repetitions", "1", "--json"]
    options += ["--shortest-seconds", "0.5", "--longest-seconds", "1"]
    run = run_module_for_text("tools.bench", *options, "--device", "cpu")
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    numbers = ["step_ms", "stock_packed_step_ms", "speedup", "forward_speedup", "fp32_speedup", "gemm_peak_gflops"]
    for name in [*numbers, "achieved_gflops", "fraction_of_peak"]:
        assert figures[name] > 0, name
    assert (figures["config"], figures["hidden_size"], figures["batch_size"]) == ("synthetic", 16, 2)
    assert figures["precision"] == ("bf16" if kernels.has_native_bf16() else "fp32")
    assert 0 <= figures["data_wait_fraction"] < 1
    assert figures["parts"]["convolution"] > 0


def test_a_sweep_is_drawn_into_a_file(tmp_path: Path) -> None:
    rows = [
        {"swept": name, "value": value, "step_ms": 10.0 * value, "stock_packed_step_ms": 30.0 * value}
        for name in ("threads", "hidden size")
        for value in (2, 1)
    ]
    draw(rows, tmp_path / "sweep.svg")
    drawn = (tmp_path / "sweep.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("threads", "hidden size", "training step (ms)", "stock layers"))
    with pytest.raises(RunError, match=r"--plot .*no-such-folder"):
        draw(rows, tmp_path / "no-such-folder" / "sweep.svg")


def test_a_plot_without_a_sweep_is_an_error_of_one_line() -> None:
    run = run_module_for_text("tools.bench", "--plot", "sweep.svg")
    assert (run.returncode, run.stderr) == (1, "error: --plot draws a sweep: give --sweep as well\n")


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
        ({"device": "x"}, "--device x: unknown"),
    ],
)
def test_an_impossible_value_is_an_error_that_names_it(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RunError, match=said):
        benchmark(Arguments(**wrong))


def test_the_stock_model_that_ours_is_compared_with_computes_the_same() -> None:
    ours = Workload(CONFIG, random_batch(CONFIG, 3, 0.5, 1.0), CPU, "fp32")
    theirs = copy.deepcopy(ours)
    theirs.trainer.model = stock(theirs.trainer.model)
    assert type(theirs.trainer.model.grus[0]) is not type(ours.trainer.model.grus[0])
    torch.testing.assert_close(ours.trainer.loss(ours.batch), theirs.trainer.loss(theirs.batch), rtol=1e-5, atol=1e-5)


def test_on_utterances_of_one_length_padded_layers_compute_the_same_as_well() -> None:
    ours = Workload(CONFIG, random_batch(CONFIG, 2, 0.7, 0.7), CPU, "fp32")
    theirs = copy.deepcopy(ours)
    theirs.trainer.model = stock(theirs.trainer.model, StockPaddedGRU)
    torch.testing.assert_close(ours.trainer.loss(ours.batch), theirs.trainer.loss(theirs.batch), rtol=1e-5, atol=1e-5)


def test_operations_are_counted_as_the_layers_have_weights() -> None:
    samples = torch.tensor([16000])  # 101 frames, 51 output frames
    forward, step = training_flops(CONFIG, samples)
    model = Workload(CONFIG, random_batch(CONFIG, 1, 0.5, 0.5), CPU, "fp32").trainer.model
    grus = sum(weight.numel() for gru in model.grus for name, weight in gru.named_parameters() if "weight" in name)
    conv1, conv2 = model.conv1.weight.numel() * 81, model.conv2.weight.numel() * 41
    assert forward == pytest.approx(2 * 51 * (grus + conv1 + conv2 + model.classifier.weight.numel()))
    assert step == pytest.approx(3 * forward - 2 * 51 * conv1)
