import resource
import sys
from pathlib import Path

import pytest

from pytorch.cli import RunError
from pytorch.tensorboard import Scalars


def write(scalars: Scalars, steps: range) -> None:
    for step in steps:
        scalars.step(step, 100.0 / step, 0.001, 2.0 * step)
    scalars.epoch(steps[-1], {"all": 40.0, "dev-clean": 30.0}, 16.0, 0.01)
    scalars.close()


def test_what_a_run_tells_is_what_tensorboard_reads(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(Scalars(tmp_path / "curves"), range(1, 7))
    write(Scalars(tmp_path / "curves", done=4), range(5, 9))  # the run was resumed from a checkpoint of its fourth step
    read = EventAccumulator(str(tmp_path / "curves")).Reload()
    curves = {name: [(event.step, event.value) for event in read.Scalars(name)] for name in read.Tags()["scalars"]}
    assert curves["train/gradient_norm"] == [(step, 2.0 * step) for step in range(1, 9)]
    assert curves["validation/wer/dev-clean"] == [(8, 30.0)]
    assert set(curves) == {
        *(f"train/{name}" for name in ("loss", "learning_rate", "gradient_norm")),
        *(f"train/{name}" for name in ("utterances_per_second", "data_wait_fraction")),
        *(f"validation/wer/{name}" for name in ("all", "dev-clean")),
    }


def test_nothing_is_written_where_nothing_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.chdir(tmp_path)
    write(Scalars(None), range(1, 3))
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_error_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match=r"pip install -e '\.\[tensorboard\]'"):
        Scalars(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"--tensorboard .*file"):
        Scalars(tmp_path / "file" / "curves")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_said_once_and_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file may grow beyond a limit for a while, which fails as a full disk does: in the writer's own thread."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (extra: tensorboard)")
    scalars = Scalars(tmp_path / "curves")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        write(scalars, range(1, 50))
        write(scalars, range(50, 60))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err.count("--tensorboard: cannot be written, so no more curves: File too large") == 1
