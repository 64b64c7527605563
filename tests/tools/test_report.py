"""The report, as text; tests/pytorch/test_report_in_a_browser.py looks at it as a person does."""

import dataclasses
import hashlib
import json
import math
import random
import re
import tomllib
from pathlib import Path

import pytest

from pytorch.cli import RunError
from tests.conftest import ROOT
from tests.tools.made_up_logs import SAID, SUBSETS, add, made_up_log
from tests.tools.test_mlperf_score import series
from tools.report import page
from tools.report.__main__ import Options, main, report
from tools.report.charts import POINTS, charts, duration
from tools.report.points import running_mean, thin
from tools.report.runs import read_runs
from tools.report.tables import parts
from tools.report.transcripts import align, groups


def written(path: Path, *logs: Path) -> str:
    report(Options(logs, path / "report.html"))
    return (path / "report.html").read_text()


def figures(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html)
    assert found is not None
    return json.loads(found[1])


def test_the_page_shows_what_is_in_the_log(tmp_path: Path) -> None:
    html = written(tmp_path, made_up_log().write(tmp_path / "run.log"))
    for text in ("15.00 %", "target 23", "target reached", "made up", "dev-clean", "dev-other", "0123456789ab"):
        assert text in html, text
    assert "Before you quote these figures" not in html
    drawn = {chart["id"]: chart for chart in figures(html)["charts"]}
    assert list(drawn) == ["wer-time", "wer-epoch", "loss", "rate", "norm", "throughput", "wait"]
    lines = {line["subset"]: line["points"] for line in drawn["wer-epoch"]["series"]}
    assert list(lines) == ["all", *SUBSETS]
    assert lines["all"] == [[1, 55], [2, 35], [3, 15]]
    assert drawn["wer-time"]["series"][0]["points"][0] == [30, 55]  # trained in 20 s, evaluated in 10 s
    assert drawn["wer-time"]["targets"] == [23]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = written(tmp_path, made_up_log().write(tmp_path / "run.log"))
    assert not re.search(r'(src|href)\s*=\s*"|@import|url\(', html.replace(page._script(page.CHART_JS), ""))
    assert "default-src &#39;none&#39;" in html
    assert len(html) < 500_000


def test_whatever_a_log_holds_is_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    log = made_up_log(said=[(evil, f"'\"{evil}")] * 3, config={evil: evil})
    html = written(tmp_path, log.write(tmp_path / "run<b>.log"))
    assert evil not in html
    assert "<img" not in html
    assert "run<b>" not in html
    assert html.count("<script") == 3  # figures, library, the page's own
    assert figures(html)["runs"][0]["label"] == "run<b>"


def test_runs_are_shown_side_by_side_with_what_differs(tmp_path: Path) -> None:
    logs = [
        made_up_log(seed=seed, config={"batch_size": 8 * seed}).write(tmp_path / f"seed{seed}.log") for seed in (1, 2)
    ]
    html = written(tmp_path, *logs)
    differing = html[html.index("Where the runs differ") :].partition("</table>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', differing) == ["seed", "batch size"]
    assert len(figures(html)["runs"]) == 2


def test_runs_of_the_same_file_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        paths.append(made_up_log().write(tmp_path / name / "mlperf_ds2.log"))
    assert [run.label for run in read_runs(paths)] == ["one/mlperf_ds2", "two/mlperf_ds2"]
    with pytest.raises(RunError, match="named 2 times"):
        read_runs([paths[0], tmp_path / "two" / ".." / "one" / "mlperf_ds2.log"])


@pytest.mark.parametrize(
    ("made", "warning"),
    [
        ({"reached": False}, "The target WER of 23 was not reached; the best was 30.00."),
        ({"resumed": 100.0}, "The run was resumed after 100 s"),
        ({"dirty": True}, "uncommitted changes"),
        ({"cleared": False}, "the page cache was not cleared (audio.npy is still cached)"),
        ({"synthetic": True}, "No LibriSpeech result: the speech is synthetic"),
        ({"official": False}, "No LibriSpeech result: the archives were not the official ones"),
        ({"config": {"target_wer": 50.0}}, "No LibriSpeech result: the target is 50.0, not 23.0"),
        ({"config": {"hidden_size": 400}}, "No LibriSpeech result: hidden_size is 400, not 800"),
    ],
)
def test_the_page_warns_of_what_is_no_plain_result(made: dict, warning: str, tmp_path: Path) -> None:
    html = written(tmp_path, made_up_log(**made).write(tmp_path / "run.log"))
    assert warning in html
    assert "Before you quote these figures" in html


def test_a_resumed_runs_time_adds_up(tmp_path: Path) -> None:
    path = made_up_log(resumed=100.0).write(tmp_path / "run.log")
    (run,) = read_runs([path])
    assert run.seconds_to_target == 100 + 3 * 30 + 2 * 0.5
    assert figures(written(tmp_path, path))["charts"][0]["series"][0]["points"][0][0] == 100 + 30


def test_the_parts_of_a_runs_time_add_up_to_all_of_it(tmp_path: Path) -> None:
    (run,) = read_runs([made_up_log().write(tmp_path / "run.log")])
    spent = parts(run)
    assert dataclasses.astuple(spent) == pytest.approx(
        (60, 3 * 20, 3 * 10, 2 * 0.5, 0)
    )  # the last save is off the clock
    assert spent.total - spent.init == pytest.approx(run.log.seconds)


def test_checkpoints_within_an_epoch_are_no_training(tmp_path: Path) -> None:
    log = made_up_log(epochs=1)
    add(log, "train_loss", "checkpoint", 0.25, number=20, step_num=20)
    (run,) = read_runs([log.write(tmp_path / "run.log")])
    assert dataclasses.astuple(parts(run)) == pytest.approx((60, 20 - 0.25, 10, 0.25, 0))


def test_of_a_run_whose_processes_were_started_again_the_last_start_is_shown(tmp_path: Path) -> None:
    log, again = made_up_log(reached=False), made_up_log(resumed=50.0)
    again.write(tmp_path / "alone.log")
    log.events += again.events
    runs = read_runs([log.write(tmp_path / "run.log"), tmp_path / "alone.log"])
    assert runs[0].seconds_to_target == runs[1].seconds_to_target == 50 + 91


def test_a_log_without_some_of_the_events_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    log = made_up_log()
    log.events = [event for event in log.events if event["key"] not in ("environment", "git_commit")]
    html = written(tmp_path, log.write(tmp_path / "run.log"))
    assert "Not in the log: environment, commit" in html
    assert "target reached" in html
    assert {"wer-time", "loss"} <= {chart["id"] for chart in figures(html)["charts"]}


def test_the_score_of_enough_runs_is_that_of_the_rules_or_says_why_there_is_none(tmp_path: Path) -> None:
    paths = series(tmp_path / "series", epochs=[2, 3, 7])  # of 110 s each
    assert 'class="score"' not in written(tmp_path, *paths[:2])
    assert "Score: 330.0 s, the mean without the fastest and the slowest of 3 runs." in written(tmp_path, *paths)
    assert "No score: " in written(tmp_path, *paths[:2], made_up_log(seed=2).write(tmp_path / "other.log"))
    missed = series(tmp_path / "missed", epochs=[2, 2, 2], missed=2)
    assert "No score: 2 runs did not reach the target; at most 1 may." in written(tmp_path, *missed)


def test_a_log_that_ends_anywhere_is_shown_or_refused_with_its_line(tmp_path: Path) -> None:
    text = made_up_log(epochs=2, steps=3).text().rstrip("\n")
    path = tmp_path / "run.log"
    page_of_it = tmp_path / "report.html"
    refused = 0
    for end in [*range(1, len(text), 97), len(text)]:
        path.write_text(text[:end])
        page_of_it.unlink(missing_ok=True)
        try:
            html = written(tmp_path, path)
        except RunError as error:
            refused += 1
            assert str(error).startswith(str(path)), error
            assert not page_of_it.exists()
        else:
            assert "</html>" in html
            assert ("The log ends before the run did" in html) is ("run_stop" not in text[:end])
    assert refused > 20


def test_a_value_of_another_type_is_refused_with_its_line(tmp_path: Path) -> None:
    """Every value of every event, one at a time: the page is written, or the error names file and line."""
    log = made_up_log(epochs=1, steps=1, said=SAID[:1])
    path = tmp_path / "run.log"
    refused = 0
    for number, event in enumerate(log.events):
        for held in (event, event["metadata"]):
            for name in ["value"] if held is event else list(held):
                for wrong in (None, "text", [1], math.nan):
                    right, held[name] = held[name], wrong
                    log.write(path)
                    held[name] = right
                    try:
                        page.render(read_runs([path]))
                    except RunError as error:
                        refused += 1
                        assert str(error).startswith(f"{path}:{number + 1}: "), error
    assert refused > 100


def test_garbage_is_an_error_of_one_line_and_leaves_the_page_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    garbage = tmp_path / "garbage.log"
    existing = tmp_path / "report.html"
    existing.write_text("earlier")
    for content in (b"", b"hello\n", random.Random(0).randbytes(1000), b':::MLLOG {"key": 1}\n', b":::MLLOG [1]\n"):
        garbage.write_bytes(content)
        assert main([str(garbage), "-o", str(existing)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {garbage}") and error.count("\n") == 1
    assert main(["-o", str(existing)]) == 1
    assert main([str(tmp_path / "not-there.log"), "-o", str(existing)]) == 1
    good = made_up_log().write(tmp_path / "run.log")
    assert main([str(good), "-o", str(tmp_path / "no-such-folder" / "report.html")]) == 1
    assert existing.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["garbage.log", "report.html", "run.log"]


def test_a_long_runs_page_stays_small_and_says_so(tmp_path: Path) -> None:
    long, short = made_up_log(steps=34_000), made_up_log(seed=2, steps=1000)
    html = written(tmp_path, long.write(tmp_path / "long.log"), short.write(tmp_path / "short.log"))
    assert len(html) < 1_500_000
    for chart in figures(html)["charts"]:
        for faint in (True, False):
            assert sum(len(line["points"]) for line in chart["series"] if line["faint"] is faint) <= POINTS
    assert "Of up to 102,000 steps at most 1,000 points are drawn" in html


def test_thinning_keeps_the_peaks() -> None:
    points = [(float(step), math.sin(step)) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[8765] = (8765.0, -99.0)
    thinned = thin(points, 200)
    assert len(thinned) <= 200
    assert {points[4321], points[8765]} <= set(thinned)
    assert thinned == sorted(thinned)
    assert thin(points[:200], 200) == points[:200]


@pytest.mark.parametrize(
    ("count", "shown"),
    [(10, ["012", "3456", "789"]), (12, ["012", "4567", "9AB"]), (7, ["01", "234", "56"]), (2, ["01"])],
)
def test_transcripts_are_the_worst_the_middle_and_the_best(count: int, shown: list[str], tmp_path: Path) -> None:
    log = made_up_log(said=[(f"{number:X}", "x") for number in range(count)])
    (run,) = read_runs([log.write(tmp_path / "run.log")])
    assert ["".join(each.transcript.reference for each in group.utterances) for group in groups(run)] == shown


def test_all_files_of_the_page_are_part_of_the_installed_package() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for top in ("data", "pytorch", "tools") for path in (ROOT / top).rglob("__init__.py")}
    assert set(known["packages"]) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    for package, patterns in known["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        others = {path for path in folder.iterdir() if path.suffix not in (".py", ".sh") and path.is_file()}
        assert others <= {path for pattern in patterns for path in folder.glob(pattern)}


def test_the_running_mean_of_a_constant_is_it() -> None:
    points = [(float(step), 7.0) for step in range(100)]
    assert running_mean(points) == points
    assert running_mean([]) == []


def test_steps_without_a_loss_are_left_out_of_the_curve(tmp_path: Path) -> None:
    log = made_up_log(epochs=1, steps=3)
    add(log, "train_loss", "skipped_step", 4, number=2, reason="not finite", utterances=[])
    add(log, "skipped_step", "train_loss", math.nan, step_num=5)
    runs = read_runs([log.write(tmp_path / "run.log")])
    (loss,) = (chart for chart in charts(runs) if chart.id == "loss")
    assert [x for x, _ in loss.series[0].points] == [1, 2, 3]
    assert "1 steps were skipped" in page.render(runs)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("A B C", "A X C", "A=A B~X C=C"),
        ("A B C", "A C", "A=A B- C=C"),
        ("A C", "A B C", "A=A +B C=C"),
        ("A B C D", "X Y", None),
        ("A", "", "A-"),
        ("A B", "A B", "A=A B=B"),
    ],
)
def test_words_are_aligned_with_their_errors(reference: str, hypothesis: str, expected: str | None) -> None:
    words = list(align(reference.split(), hypothesis.split()))
    forms = {"equal": "{1}={2}", "substituted": "{1}~{2}", "deleted": "{1}-", "inserted": "+{2}"}
    if expected is not None:
        assert " ".join(forms[word.kind].format(*word) for word in words) == expected
    assert " ".join(word.reference for word in words if word.reference) == reference
    assert " ".join(word.hypothesis for word in words if word.hypothesis) == hypothesis


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.25, "3.2 s"), (126.4, "126 s"), (1601, "26 min 41 s"), (344_806, "95 h 46 min")]
)
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_library_is_the_published_one() -> None:
    """dist/chart.umd.min.js of npm's chart.js 4.6.1."""
    digest = hashlib.sha256((page.FOLDER / page.CHART_JS).read_bytes()).hexdigest()
    assert digest == "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"
