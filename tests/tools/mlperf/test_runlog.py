"""Logs read back: of every version that has written some, marked by launchers, cut off, damaged by hand."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pytorch.errors import RunError
from tests.conftest import ROOT
from tests.tools.mlperf.forged import Forged
from tests.tools.mlperf.made_up_logs import add, made_up_log
from tools.mlperf.__main__ import main
from tools.mlperf.check import check, notes
from tools.mlperf.compare import compare
from tools.mlperf.runlog import RunLog

LAST = -1
COMMITTED = sorted((ROOT / "results").glob("*/*/result_*.txt"))


def read(log: Forged, folder: Path) -> RunLog:
    return RunLog.read(log.write(folder / "run.log"))


def test_logs_are_read_without_importing_pytorch() -> None:
    code = "import sys; from tools.mlperf.runlog import RunLog; from pathlib import Path; "
    code += f"print(RunLog.read(Path({str(COMMITTED[0])!r})).reached, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "True False\n"


@pytest.mark.parametrize("prefix", ["0: ", "[rank0]: ", "2026-11-26T04:44:12.123456789Z "])
def test_lines_that_a_launcher_has_marked_are_read(prefix: str, tmp_path: Path) -> None:
    log = made_up_log(epochs=2, steps=3)
    whole = read(log, tmp_path)
    (tmp_path / "marked.log").write_text("".join(f"{prefix}{line}\n" for line in log.text().splitlines()))
    marked = RunLog.read(tmp_path / "marked.log")
    assert (marked.result, marked.epochs, marked.steps) == (whole.result, whole.epochs, whole.steps)


def cut(text: str) -> bytes:
    return text[: text.index('"time_ms"', len(text) // 2)].encode()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda text: b"", None),
        (lambda text: b"epoch 1 loss 3\n" * 9, None),
        (lambda text: text.encode()[:999] + b"\xff\xfe\x00" + text.encode()[999:], None),
        (cut, LAST),
        (lambda text: b":::MLLOG {broken}\n" + text.encode(), 1),
        (lambda text: b":::MLLOG [1]\n" + text.encode(), 1),
        (lambda text: text.replace('"time_ms"', '"time"', 1).encode(), 1),
        (lambda text: text.replace('"time_ms": 1', '"time_ms": "x1', 1).replace(",", '",', 1).encode(), 1),
        (lambda text: text.replace("\n", "", 1).encode(), 1),
        (lambda text: 2 * text.encode(), LAST),  # a second RESULT line
    ],
)
def test_a_broken_file_is_refused_in_one_line_that_names_file_and_line(
    damage: Callable[[str], bytes], line: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.log"
    damaged = damage(made_up_log(epochs=2, steps=10).text())
    path.write_bytes(damaged)
    assert main(["check", str(path)]) == 1
    output = capsys.readouterr().out
    place = {None: "", LAST: f"{len(damaged.splitlines())}:"}.get(line, f"{line}:")
    assert output.startswith(f"{path}:{place} ")
    assert output.count("\n") == 1


def test_a_value_that_was_edited_by_hand_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    """Every value of every event, one at a time: nothing breaks, or the error names file and line."""
    log = made_up_log(epochs=1, steps=1)
    path = tmp_path / "run.log"
    refused = 0
    for number, event in enumerate(log.events):
        for holder, name in [(event, "value"), *((event["metadata"], name) for name in event["metadata"])]:
            for wrong in ("text", [1], math.nan, 10**40):
                right, holder[name] = holder[name], wrong
                log.write(path)
                holder[name] = right
                try:
                    compare(RunLog.read(path), RunLog.read(path))
                    if wrong == [1] and number % 4 == 0:  # a check takes longer
                        assert check(path)
                        notes(RunLog.read(path))
                except RunError as error:
                    refused += 1
                    assert str(error).startswith(f"{path}:{number + 1}: damaged event: "), error
    assert refused > 100


def test_an_epoch_without_a_step_has_no_rate_and_means_are_weighted_by_time(tmp_path: Path) -> None:
    """A run is resumed when only the evaluation is left; another epoch takes 3 times as long."""
    log = made_up_log(epochs=3, steps=4)
    for number, (seconds, speed) in enumerate([(20.0, 0.0), (10.0, 200.0), (30.0, 100.0)]):
        log.edit("epoch_stop", number=number, seconds=seconds, audio_seconds_per_second=speed)
    start, stop = log.positions("epoch_start")[0], log.positions("epoch_stop")[0]
    del log.events[start + 1 : stop]
    read_back = read(log, tmp_path)
    assert [bool(epoch.throughput) for epoch in read_back.epochs] == [False, True, True]
    assert read_back.mean_rate("audio_seconds_per_second") == 125.0


def test_what_an_older_or_a_truncated_log_lacks_is_none(tmp_path: Path) -> None:
    log = made_up_log(epochs=2, steps=3)
    del log.events[log.positions("eval_start")[1] :]
    log.result = None
    for key in ("dataset", "cache_clear", "git_commit"):
        log.remove(key)
    found = read(log, tmp_path)
    assert (found.dataset, found.cache_cleared, found.commit, found.status, found.seconds) == (None,) * 5
    assert [epoch.wer is None for epoch in found.epochs] == [False, True]
    assert found.last_evaluation == found.epochs[0]


def test_the_last_start_of_a_run_whose_ranks_were_restarted_is_a_log_of_its_own(tmp_path: Path) -> None:
    log, again = made_up_log(epochs=2, steps=3), made_up_log(epochs=2, steps=3)
    del log.events[log.positions("epoch_stop")[0] :]
    add(again, "git_commit", "resumed", True, elapsed_seconds=60.0)
    log.events += again.events
    last = read(log, tmp_path).last_start()
    assert (last.resumed, last.seconds_before, len(last.epochs)) == (True, 60.0, 2)
