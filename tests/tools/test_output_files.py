import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.processes import run_module
from tests.tools.conftest import Trained


@pytest.mark.parametrize("path", ["", "~/out"])
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("tools.evaluate", ["none.pt", "--dataset-dir", "none", "--output"]),
        ("tools.report", ["none.log", "--output"]),
        ("tools.mlperf", ["rcp", "none.log", "--output"]),
        ("data.verify", ["--dataset-dir"]),
    ],
)
def test_no_command_writes_where_nobody_means(module: str, arguments: list[str], path: str, tmp_path: Path) -> None:
    run = run_module(module, *arguments, path, folder=tmp_path)
    assert run.returncode == 1 and not list(tmp_path.iterdir())
    wrong = "has an empty value" if path == "" else "is ~/out: your shell did not expand the ~; write $HOME"
    assert run.stderr.decode() == f"error: {arguments[-1]} {wrong}\n"


def test_standard_input_that_is_closed_is_an_empty_file(trained: Trained) -> None:
    command = [sys.executable, "-m", "tools.transcribe", str(trained.checkpoint), "-"]
    run = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, cwd=ROOT)
    assert run.returncode == 1 and run.stderr.startswith(b"error: standard input is empty (0 bytes)\n")


def test_what_may_not_be_read_is_said_so(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "talks" / "private").mkdir(parents=True)
    (tmp_path / "talks" / "talk.wav").touch()
    for name in ("talks/private", "model.pt", "lm.arpa"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0)
    # root may read everything, without its capabilities it may not
    mortal = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    asked: list[tuple[list[str | Path], str]] = [
        ([trained.checkpoint, "talks"], "talks/private: "),
        (["model.pt", "talks/talk.wav"], "model.pt: not a checkpoint of this project, or damaged ("),
        (
            [trained.checkpoint, "talks/talk.wav", "--lm", "lm.arpa", "--alpha", "1"],
            "lm.arpa is not an ARPA file, or is damaged (",
        ),
    ]
    for words, name in asked:
        command = [*mortal, sys.executable, "-m", "tools.transcribe", *words]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert run.returncode == 1 and run.stderr.startswith(f"error: {name}Permission denied"), run.stderr
