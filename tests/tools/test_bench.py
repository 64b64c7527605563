import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pytorch.config import CONFIGS
from pytorch.layers import kernels
from pytorch.model import DeepSpeech2
from pytorch.warmup import random_batch
from tests.processes import run_module_for_text
from tools import bench
from tools.bench import Options, benchmark, trainer_of, training_flops

CONFIG = dataclasses.replace(CONFIGS["synthetic"], hidden_size=16, conv_channels=2, batch_size=3)
CPU = torch.device("cpu")


def test_the_benchmark_prints_one_json_object_with_the_figures_that_scripts_read() -> None:
    options = ["--config", "synthetic", "--hidden-size", "16", "--batch-size", "2", "--repetitions", "1", "--json"]
    options += ["--shortest-seconds", "0.5", "--longest-seconds", "1"]
    run = run_module_for_text("tools.bench", *options, "--device", "cpu")
    assert (run.returncode, run.stderr) == (0, "")
    figures = json.loads(run.stdout)
    numbers = ["auto_step_ms", "bf16_step_ms", "fp32_step_ms", "stock_step_ms", "speedup", "fp32_speedup"]
    for name in [*numbers, "gemm_peak_gflops", "achieved_gflops", "fraction_of_peak", "audio_seconds_per_second"]:
        assert figures[name] > 0, name
    assert (figures["config"], figures["hidden_size"], figures["batch_size"]) == ("synthetic", 16, 2)
    assert figures["auto_precision"] == ("bf16" if kernels.has_native_bf16() else "fp32")
    assert figures["auto_step_ms"] == figures[f"{figures['auto_precision']}_step_ms"]


def test_the_page_has_a_row_of_each_case_with_machine_and_commit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"hidden_size": 8, "batch_size": 1, "shortest_seconds": 0.2, "longest_seconds": 0.5}
    monkeypatch.setattr(bench, "CASES", {"first": tiny, "second": {**tiny, "config": "an4"}})
    benchmark(Options(table=True, repetitions=2, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 150
    for name in ("first", "second"):
        (row,) = (line.split("|")[1:-1] for line in lines if line.startswith(f"| {name} |"))
        assert all(float(milliseconds) > 0 for milliseconds in row[1:4])
    assert any(line.startswith("- processor: ") for line in lines)
    assert "{" not in "".join(lines)


def test_the_stock_model_that_ours_is_compared_with_computes_the_same() -> None:
    batch = random_batch(CONFIG, torch.tensor([8000, 12000, 16000]), CPU)
    ours, theirs = trainer_of(CONFIG, CPU, "fp32"), trainer_of(CONFIG, CPU, "fp32", stock=True)
    assert all("forward" in vars(layer) for layer in theirs.model.grus)  # replaced
    losses = [trainer.loss(batch) for trainer in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for loss in losses:
        loss.backward()
    for mine, stock in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert mine.grad is not None and stock.grad is not None
        # Not their weights after a step: an optimizer's first one makes large differences of small ones.
        assert (mine.grad - stock.grad).norm() < 1e-2 * stock.grad.norm()


def test_operations_are_those_that_torch_counts_in_stock_layers() -> None:
    batch = random_batch(CONFIG, torch.tensor([16000]), CPU)  # 101 frames, 51 output frames
    trainer = trainer_of(CONFIG, CPU, "fp32", stock=True)
    features = trainer.spectrogram(batch.waveforms_BS, batch.num_samples_B)
    with FlopCounterMode(display=False) as counter:
        trainer.model(*features)[0].sum().backward()
    # nn.GRU asks for no gradient of its first states
    assert counter.get_total_flops() == pytest.approx(training_flops(DeepSpeech2(2, 16), 51), rel=1e-3)
