"""MLCommons' package checker on a submission's tree, with this benchmark's name added."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.tools.mlperf.forged import Forged, made_up, reference
from tools.mlperf import package
from tools.mlperf.__main__ import main
from tools.mlperf.check import NEWEST
from tools.mlperf.rcp import make_points


def write_runs(folder: Path, epochs: int = 3) -> list[Path]:
    """Ten runs of the closed division that take this many epochs."""
    folder.mkdir(parents=True)
    wers = [*(40.0 - number for number in range(epochs - 1)), 22.0]
    logs = [made_up(reference(seed=seed, batch_size=2**17), wers=wers, division="closed") for seed in range(10)]
    return [log.write(folder / f"result_{number}.txt") for number, log in enumerate(logs)]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A submission to the closed division, and points that it is checked against."""
    runs = write_runs(tmp_path / "tree" / "results" / "box" / "deepspeech2")
    (tmp_path / "tree" / "systems").mkdir()
    description = json.loads((ROOT / "systems" / "2-cores-zen5.json").read_text())
    (tmp_path / "tree" / "systems" / "box.json").write_text(json.dumps({**description, "division": "closed"}))
    monkeypatch.setattr(package, "RCPS", tmp_path / "rcps.json")
    package.RCPS.write_text(json.dumps(make_points(runs)))
    return tmp_path / "tree"


def edit(tree: Path, key: str, value: object, **metadata: Any) -> None:
    for number in (0, 1):  # of ten, one may be wrong
        path = tree / "results" / "box" / "deepspeech2" / f"result_{number}.txt"
        log = Forged.of(path)
        log.edit(key, value, **metadata)
        log.write(path)


def converge_faster(tree: Path) -> None:
    slower = write_runs(tree.parent / "slower", epochs=5)
    package.RCPS.write_text(json.dumps(make_points(slower)))


def test_a_submission_that_keeps_all_rules_passes(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tree.rglob("*"))
    assert main(["check", str(tree), "--package"]) == 0
    assert f"under the rules of {NEWEST}" in capsys.readouterr().out
    assert sorted(tree.rglob("*")) == before


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tree: edit(tree, "tensor_parallelism", 0), "result_0.txt:"),
        (lambda tree: edit(tree, "seed", 5), "Seed checker failed"),
        (converge_faster, "RCP Test Failed: FAILED: RCP found"),
        (
            lambda tree: package.RCPS.write_bytes((ROOT / "results/rcps/librispeech.json").read_bytes()),
            "Nobody has made",
        ),
        (lambda tree: (tree / "results/box/deepspeech2/result_9.txt").unlink(), "found 9, expected 10"),
        (lambda tree: (tree / "systems/box.json").write_text("{}"), "division"),
        (lambda tree: (tree / "systems/box.json").unlink(), "box.json"),
        (lambda tree: (tree / "results").rename(tree / "runs"), "no submission"),
    ],
    ids=["a log", "seeds", "too fast", "no points", "too few", "half a description", "no description", "no results"],
)
def test_a_submission_is_refused_with_its_reason(
    spoil: Callable[[Path], object],
    said: str,
    tree: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(tree)
    assert main(["check", str(tree), "--package"]) == 1
    assert said in caplog.text + capsys.readouterr().out
