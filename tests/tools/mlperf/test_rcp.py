"""Reference convergence points: those that are committed, and the package's verdict on made-up runs."""

import json
import tarfile
from pathlib import Path

import pytest
from mlperf_logging.rcp_checker import rcp_checker

from pytorch.config import CONFIGS
from pytorch.errors import RunError
from tests.conftest import ROOT
from tests.tools.mlperf.test_runlog import COMMITTED
from tests.tools.mlperf.test_score import series, texts
from tools.mlperf.__main__ import main
from tools.mlperf.rcp import EPOCHS, describe, make_points, read_points
from tools.mlperf.runlog import RunLog

RCPS = ROOT / "results" / "rcps"


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """Points at three batch sizes, as the command writes them."""
    paths = []
    for batch_size, epochs in ((10, [4, 4, 5, 4, 5]), (20, [5, 6, 6, 5, 5]), (40, [8, 8, 9, 8, 8])):
        paths += series(tmp_path / f"of_{batch_size}", epochs, batch_size)
    assert main(["rcp", *texts(paths), "-o", str(tmp_path / "deep" / "rcp.json")]) == 0
    return tmp_path / "deep" / "rcp.json"


def test_points_have_the_keys_that_the_packages_checker_reads_and_what_they_were_made_of(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(reference.read_text())
    assert list(content) == ["deepspeech2_ref_10", "deepspeech2_ref_20", "deepspeech2_ref_40"]
    point = content["deepspeech2_ref_20"]
    assert (point["Benchmark"], point["BS"], point[EPOCHS]) == ("deepspeech2", 20, [5, 6, 6, 5, 5])
    assert point["Seeds"] == [1, 2, 3, 4, 5]
    assert point["Hyperparams"]["learning_rate"] == CONFIGS["synthetic"].learning_rate
    assert not {"seed", "output_dir"} & set(point["Hyperparams"])
    assert point["Subject"]["corpus"] == "tones"
    text = describe(content)
    assert "5.33" in text  # the package's mean of 5, 5, 5, 6, 6 without the lowest and the highest
    assert "the rules ask for 20 runs at each of three batch sizes; here it is 3, and at least 5 runs" in text
    assert "deepspeech2" not in rcp_checker.submission_runs["training"]  # the package is left as it was


@pytest.mark.parametrize(
    ("batch_size", "epochs", "status", "said"),
    [
        (20, [5, 6, 6], 0, "passed: RCP found"),
        (20, [9, 9, 9], 0, "passed: RCP found"),
        (20, [2, 2, 2], 1, "FAILED: RCP found"),
        (30, [7, 7, 7], 0, "passed: RCP Interpolation"),
        (80, [9, 9, 9], 1, "FAILED: Missing RCP, please submit RCP with BS = 80"),
    ],
)
def test_runs_are_checked_against_points_by_the_packages_checker(
    batch_size: int,
    epochs: list[int],
    status: int,
    said: str,
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = series(tmp_path / "runs", epochs, batch_size)
    capsys.readouterr()
    assert main(["rcp", *texts(paths), "--against", str(reference)]) == status
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": 1}', '{"a": {"Epochs to converge": [1]}}'])
def test_a_file_that_holds_no_points_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "rcp.json").write_text(content)
    with pytest.raises(RunError, match="no file of reference convergence points"):
        read_points(tmp_path / "rcp.json")


@pytest.mark.parametrize("path", [path for path in RCPS.glob("*.json") if path.stem != "librispeech"], ids=str)
def test_committed_points_are_read_by_the_packages_checker_and_are_those_of_committed_runs(
    path: Path, tmp_path: Path
) -> None:
    content = read_points(path)
    assert describe(content)
    (precision,) = {point["Precision"] for point in content.values()}
    configuration = {"config": path.stem, "precision": precision}
    for archive in (ROOT / "results" / "2-cores-zen4").glob("*.tar.xz"):  # longer series than those of single logs
        with tarfile.open(archive) as tar:
            tar.extractall(tmp_path / archive.stem, filter="data")
    archived, single = (
        [run for run in map(RunLog.read, logs) if configuration.items() <= run.configuration.items()]
        for logs in (sorted(tmp_path.rglob("result_*.txt")), (log for log in COMMITTED if "2-cores-zen5" in log.parts))
    )
    sizes = {run.configuration["batch_size"] for run in archived}
    mine = [*archived, *(run for run in single if run.configuration["batch_size"] not in sizes)]
    assert make_points([run.path for run in mine]) == content
