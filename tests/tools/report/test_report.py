"""The report, as text; report/test_page.py looks at it as a person does."""

import hashlib
import json
import math
import os
import random
import re
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pytorch.errors import RunError
from tests.conftest import ROOT
from tests.tools.mlperf.forged import Forged
from tests.tools.mlperf.made_up_logs import SAID, SUBSETS, add, made_up_log
from tests.tools.mlperf.test_score import series
from tools.output_files import write_output
from tools.report import render
from tools.report.__main__ import main
from tools.report.charts import POINTS, charts, downsample, means, median_curve
from tools.report.runs import Run, read_series
from tools.report.tables import duration, parts
from tools.report.transcripts import align


def written(folder: Path, *logs: Path) -> str:
    page = folder / "report.html"
    if main([*map(str, logs), "-o", str(page)]) != 0:
        raise RunError("no page")
    return page.read_text()


def figures(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', html)
    assert found is not None
    return json.loads(found[1])


def lines(html: str, chart: str, *, faint: bool = False) -> dict[str, list]:
    """Points of a chart's lines by their names."""
    (found,) = (each for each in figures(html)["charts"] if each["id"] == chart)
    return {line["name"]: line["points"] for line in found["lines"] if line["faint"] is faint}


def headline(html: str) -> list[str]:
    return [re.sub("<.*?>", "", item) for item in re.findall(r"<li>(<strong>.*?)</li>", html)]


def run_of(log: Forged, folder: Path) -> Run:
    (only,) = read_series([log.write(folder / "run.log")])
    return only.runs[0]


def test_the_page_shows_what_is_in_the_log(tmp_path: Path) -> None:
    html = written(tmp_path, made_up_log().write(tmp_path / "run.log"))
    assert headline(html) == [
        "15.00 % word error rate, target 23",
        "91.5 s to the target",
        "3 epochs",
        "1 x real time in training",
    ]
    for text in ("target reached", "made up", "dev-clean", "dev-other", "0123456789ab"):
        assert text in html, text
    assert "Before you quote these figures" not in html
    ids = [chart["id"] for chart in figures(html)["charts"]]
    assert ids == ["wer-time", "wer-epoch", "throughput", "wait", "loss", "rate", "norm"]
    by_epoch = lines(html, "wer-epoch")
    assert list(by_epoch) == ["WER (%)", *(f"WER (%) {name}" for name in SUBSETS)]
    assert [number for number, _ in by_epoch["WER (%)"]] == [1, 2, 3]
    assert [wer for _, wer in by_epoch["WER (%)"]] == pytest.approx([55, 35, 15], abs=0.01)
    assert lines(html, "wer-time")["WER (%)"][0][0] == 30.5  # trained in 20 s, saved, evaluated in 10 s
    assert figures(html)["charts"][0]["targets"] == [23]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    html = written(tmp_path, made_up_log().write(tmp_path / "run.log"))
    assert not re.search(r'(src|href)\s*=\s*"|@import|url\(', html.replace(render._script(render.CHART_JS), ""))
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
    assert "run&lt;b&gt;" in html


def test_runs_that_differ_only_in_their_seeds_are_one_series_with_its_spread(tmp_path: Path) -> None:
    paths = series(tmp_path / "series", epochs=[2, 3, 7])  # of 110 s each
    html = written(tmp_path, *paths)
    assert headline(html) == [
        "330.0 s score",
        "3 of 3 runs reached the target",
        "330.0 s median time to the target (220.0 s to 12 min 50 s)",
    ]
    assert [each["label"] for each in figures(html)["series"]] == ["synthetic"]
    row = re.findall("<td>(.*?)</td>", html[html.index("Series: median") :].partition("</tr>\n</tbody>")[0])
    assert row == ["3 of 3 reached", "20.00", "330.0 (220.0 to 770.0)", "3 (2 to 7)", "9.1%", "330.0"]
    assert [row in html for row in ("seed 1", "seed 2", "seed 3")] == [True] * 3
    assert [x for x, _ in lines(html, "wer-epoch")["WER (%)"]] == [1, 2, 3]  # half of the runs have three epochs
    assert "The rules ask for 10 runs for a score; this one is of 3." in html


def test_a_series_without_a_score_says_why(tmp_path: Path) -> None:
    missed = series(tmp_path / "missed", epochs=[2, 2, 2], missed=2)
    html = written(tmp_path, *missed)
    assert "No score: 2 runs did not reach the target; at most 1 may." in html
    assert headline(html)[0] == "1 of 3 runs reached the target"
    assert "score" not in " ".join(headline(written(tmp_path, *missed[:2])))


def test_series_of_several_configurations_are_shown_side_by_side_with_what_differs(tmp_path: Path) -> None:
    paths = [*series(tmp_path / "a", [2, 2, 2]), *series(tmp_path / "b", [4, 4, 4], batch_size=20)]
    html = written(tmp_path, *paths)
    names = [each["label"] for each in figures(html)["series"]]
    assert names == ["synthetic, batch size 10", "synthetic, batch size 20"]
    assert headline(html)[:2] == [f"220.0 s score of {names[0]}", f"440.0 s score of {names[1]}"]
    differing = html[html.index("Where the series differ") :].partition("</table>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', differing) == ["batch size"]


def test_what_only_some_series_have_is_no_common_fact() -> None:
    paths = [ROOT / "results" / machine / "an4" / "result_0.txt" for machine in ("1-h200", "2-cores-zen5")]
    differing, _, common = render.render(read_series(paths)).partition("The same in all")
    assert "<td>NVIDIA H200</td>" in differing
    assert "NVIDIA H200" not in common.partition("</dl>")[0]


def test_labels_and_colors_of_many_series_are_all_different(tmp_path: Path) -> None:
    config = [{"batch_size": 8 * number} for number in range(1, 41)]
    html = written(
        tmp_path, *(made_up_log(epochs=1, steps=2, config=each).write(tmp_path / f"{each}.log") for each in config)
    )
    shown = figures(html)["series"]
    assert len({each["label"] for each in shown}) == len({each["hue"] for each in shown}) == 40


def test_runs_of_the_same_seed_are_told_apart_by_their_files(tmp_path: Path) -> None:
    paths = []
    for name in ("before", "after", os.fsdecode(b"caf\xe9")):
        (tmp_path / name).mkdir()
        paths.append(made_up_log().write(tmp_path / name / "mlperf_ds2.log"))
    labels = [each.label for each in read_series(paths)]
    folders = "before", "after", r"caf\xe9"
    assert labels == [f"librispeech, {folder}/mlperf_ds2" for folder in folders]
    assert labels[2] in written(tmp_path, *paths)
    with pytest.raises(RunError, match="named 2 times"):
        read_series([paths[0], tmp_path / "after" / ".." / "before" / "mlperf_ds2.log"])


@pytest.mark.parametrize(
    ("made", "warning"),
    [
        ({"reached": False}, "The target WER of 23 was not reached: crashed, or stopped by Ctrl-C."),
        ({"resumed": 100.0}, "The run was resumed after 100 s"),
        ({"dirty": True}, "Files differed from the commit"),
        ({"cleared": False}, "the page cache was not cleared (audio.npy is still cached)"),
        ({"others": 0.5}, "Other programs took 50% of the CPU time, the hypervisor 2%"),
        ({"synthetic": True}, "Not a LibriSpeech result: the speech is synthetic"),
        ({"official": False}, "Not a LibriSpeech result: the archives were not the official ones"),
        ({"config": {"target_wer": 50.0}}, "Not a LibriSpeech result: the target is 50.0, not 23.0"),
        ({"config": {"hidden_size": 400}}, "Not a LibriSpeech result: hidden_size is 400, not 800"),
    ],
)
def test_the_page_warns_of_what_is_no_plain_result(made: dict, warning: str, tmp_path: Path) -> None:
    html = written(tmp_path, made_up_log(**made).write(tmp_path / "run.log"))
    assert warning in html
    assert "Before you quote these figures" in html


def test_many_runs_are_warned_of_in_one_line(tmp_path: Path) -> None:
    made = [
        made_up_log(seed=seed, dirty=True, cleared=seed > 8).write(tmp_path / f"{seed}.log") for seed in range(1, 11)
    ]
    html = written(tmp_path, *made)
    section = html[html.index("Before you quote") :].partition("</ul>")[0]
    assert [re.sub("<.*?>", "", item)[:30] for item in re.findall("<li>(.*?)</li>", section)] == [
        "Files differed from the commit",
        "8 of 10 runs: The data set may",
    ]


def cut(
    log: Forged, last: str, *, saved: bool = False, status: str | None = "aborted", exception: str | None = None
) -> Forged:
    """End a run after the last event of a kind, perhaps with a checkpoint."""
    del log.events[log.positions(last)[-1] + 1 :]
    if saved:
        add(log, last, "checkpoint", 0.5, number=-1, step_num=120)
    if status is not None:
        raised: dict[str, Any] = {} if exception is None else {"exception": exception}
        add(log, log.events[-1]["key"], "run_stop", None, number=-1, status=status, **raised)
    log.result = None
    return log


def ended(kind: str) -> Forged:
    log = made_up_log(reached=False)
    if kind == "max_epochs":
        log.edit("configuration", max_epochs=3)
    elif kind == "max_steps":
        log.edit("configuration", max_steps=120)
    elif kind == "diverged":
        add(log, "train_loss", "skipped_step", 120, number=-1, reason="not finite", utterances=[])
        cut(log, "skipped_step")
    elif kind == "interrupted":
        cut(log, "train_loss", saved=True)
    elif kind == "crashed, or stopped by Ctrl-C":  # in older logs
        cut(log, "train_loss")
    elif kind == "crashed: OSError":
        cut(log, "train_loss", saved=True, exception="OSError")
    elif kind == "stopped by Ctrl-C":
        cut(log, "train_loss", exception="KeyboardInterrupt")
    elif kind == "the log ends":
        cut(log, "train_loss", status=None)
    else:
        log = made_up_log()
    return log


@pytest.mark.parametrize(
    "kind",
    [
        "target reached",
        "max_epochs",
        "max_steps",
        "diverged",
        "interrupted",
        "crashed: OSError",
        "stopped by Ctrl-C",
        "crashed, or stopped by Ctrl-C",
        "the log ends",
    ],
)
def test_the_page_says_why_a_run_ended(kind: str, tmp_path: Path) -> None:
    log = ended(kind)
    assert run_of(log, tmp_path).outcome.startswith(kind)
    html = written(tmp_path, tmp_path / "run.log")
    warned = re.search("The target WER of 23 was not reached: (.*?)[.]", html)
    assert (warned[1] if warned else "target reached").startswith(kind)


def test_an_epoch_that_broke_off_is_none_and_nothing_empty_is_shown(tmp_path: Path) -> None:
    log = cut(made_up_log(epochs=1, said=[]), "epoch_start")
    html = written(tmp_path, log.write(tmp_path / "run.log"))
    assert headline(html) == ["0.0 s crashed, or stopped by Ctrl-C", "0 steps"]
    assert re.findall("<h2.*?>(.*?)</h2>", html) == [
        "Before you quote these figures",
        "Result",
        "Where the time went",
        "What was run",
    ]


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_was_set_is_said_and_the_time_is_that_of_the_result_line(hours: int, tmp_path: Path) -> None:
    log = made_up_log()
    log.shift("train_loss", 3600 * hours, number=50)
    html = written(tmp_path, log.write(tmp_path / "run.log"))
    assert "refuses the log: " in html
    assert "clock was set during the run" in html
    assert headline(html)[1] == "92.0 s to the target"
    assert "wer-time" not in [chart["id"] for chart in figures(html)["charts"]]
    assert "Where the time went" not in html
    assert not re.search("[>-]3[56][0-9][0-9]", html.partition("<script")[0])


def test_a_resumed_runs_time_adds_up(tmp_path: Path) -> None:
    run = run_of(made_up_log(resumed=100.0), tmp_path)
    assert run.seconds_to_target == 100 + 3 * 30 + 3 * 0.5
    assert lines(written(tmp_path, tmp_path / "run.log"), "wer-time")["WER (%)"][0][0] == 100 + 30.5


def test_the_parts_of_a_runs_time_add_up_to_all_of_it(tmp_path: Path) -> None:
    run = run_of(made_up_log(), tmp_path)
    spent = parts([run])
    # The last save is off the clock.
    assert list(spent.values()) == pytest.approx([60, 3 * 20, 3 * 10, 3 * 0.5, 0])
    assert sum(spent.values()) - 60 == pytest.approx(run.log.seconds)


def test_checkpoints_within_an_epoch_are_no_training(tmp_path: Path) -> None:
    log = made_up_log(epochs=1)
    add(log, "train_loss", "checkpoint", 0.25, number=20, step_num=20)
    assert list(parts([run_of(log, tmp_path)]).values()) == pytest.approx([60, 20 - 0.25, 10, 0.5 + 0.25, 0])


def test_of_a_run_whose_processes_were_started_again_the_last_start_is_shown(tmp_path: Path) -> None:
    log, again = made_up_log(reached=False), made_up_log(resumed=50.0)
    alone = run_of(again, tmp_path)
    log.events += again.events
    assert run_of(log, tmp_path).seconds_to_target == alone.seconds_to_target == 50 + 91.5


def test_a_log_without_some_of_the_events_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    log = made_up_log()
    log.events = [event for event in log.events if event["key"] not in ("environment", "git_commit")]
    html = written(tmp_path, log.write(tmp_path / "run.log"))
    assert "Not in the log: environment, commit" in html
    assert "target reached" in html
    assert {"wer-time", "loss"} <= {chart["id"] for chart in figures(html)["charts"]}


def test_a_log_that_ends_anywhere_is_shown_or_refused_with_its_line(tmp_path: Path) -> None:
    text = made_up_log(epochs=2, steps=3).text().rstrip("\n")
    path = tmp_path / "run.log"
    refused = 0
    for end in [*range(1, len(text), 97), len(text)]:
        path.write_text(text[:end])
        try:
            read_series([path])
        except RunError as error:
            refused += 1
            assert str(error).startswith(str(path)), error
        else:
            html = written(tmp_path, path)
            assert "</html>" in html
            assert ("the log ends before the run did" in html) is ("run_stop" not in text[:end])
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
                        render.render(read_series([path]))
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
    assert main([str(good), "-o", str(good / "report.html")]) == 1
    assert existing.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["garbage.log", "report.html", "run.log"]


def test_a_log_is_never_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [made_up_log(seed=seed).write(tmp_path / f"{seed}.log") for seed in (1, 2)]
    (tmp_path / "link").symlink_to(logs[1])
    before = [log.read_text() for log in logs]
    for output in (*logs, tmp_path / "link"):
        assert main([str(logs[0]), "-o", str(output)]) == 1
        assert "this is the log of a run, which is not replaced" in capsys.readouterr().err
    assert [log.read_text() for log in logs] == before


def test_a_link_is_followed_and_a_pipe_is_written_to(tmp_path: Path) -> None:
    log = made_up_log().write(tmp_path / "run.log")
    (tmp_path / "page.html").write_text("an older page")
    (tmp_path / "link").symlink_to("page.html")
    assert main([str(log), "-o", str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    assert "</html>" in (tmp_path / "page.html").read_text()
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_output(tmp_path / "pipe", "through")
    reader.join(timeout=10)
    assert (read, (tmp_path / "pipe").is_fifo()) == (["through"], True)


def test_a_long_runs_page_stays_small(tmp_path: Path) -> None:
    long, short = made_up_log(epochs=1, steps=34_000), made_up_log(seed=2, epochs=1, steps=1000)
    html = written(tmp_path, long.write(tmp_path / "long.log"), short.write(tmp_path / "short.log"))
    assert len(html) < 1_500_000
    for chart in figures(html)["charts"]:
        assert sum(len(line["points"]) for line in chart["lines"] if line["faint"]) <= POINTS


def test_downsampling_keeps_the_peaks() -> None:
    points = [(float(step), math.sin(step)) for step in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[8765] = (8765.0, -99.0)
    kept = downsample(points, 200)
    assert len(kept) <= 200
    assert {points[4321], points[8765]} <= set(kept)
    assert kept == sorted(kept)
    assert downsample(points[:200], 200) == points[:200]


def test_the_median_of_runs_goes_as_far_as_half_of_them() -> None:
    curves: list[Any] = [{number: (number, 10.0 * run) for number in range(1, 2 + run)} for run in range(4)]
    assert median_curve(curves) == [(1, 15), (2, 20), (3, 25)]
    assert means([(float(step), 7.0) for step in range(100)])[-1][1] == 7


def test_waiting_ranks_of_older_logs_are_read_and_not_shown(tmp_path: Path) -> None:
    log = made_up_log(epochs=2)
    log.edit("epoch_stop", rank_wait_fractions=[0.0, 0.125], communication_fraction=0.1)
    html = written(tmp_path, log.write(tmp_path / "run.log"))
    assert "for other processes" not in html


def test_all_files_of_the_page_are_part_of_the_installed_package() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for top in ("data", "pytorch", "tools") for path in (ROOT / top).rglob("__init__.py")}
    assert set(known["packages"]) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    for package, patterns in known["package-data"].items():
        folder = ROOT.joinpath(*package.split("."))
        others = {path for path in folder.iterdir() if path.suffix not in (".py", ".sh") and path.is_file()}
        assert others <= {path for pattern in patterns for path in folder.glob(pattern)}


def test_steps_without_a_loss_are_left_out_of_the_curve(tmp_path: Path) -> None:
    log = made_up_log(epochs=1, steps=3)
    add(log, "train_loss", "skipped_step", 4, number=2, reason="not finite", utterances=[])
    add(log, "skipped_step", "train_loss", math.nan, step_num=5)
    read = read_series([log.write(tmp_path / "run.log")])
    (loss,) = (chart for chart in charts(read) if chart.id == "loss")
    assert [x for x, _ in loss.lines[0].points] == [1, 2, 3]
    assert "1 steps were skipped" in render.render(read)


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
    ("seconds", "said"), [(3.25, "3.2 s"), (126.4, "126.4 s"), (1601, "26 min 41 s"), (344_806, "95 h 46 min")]
)
def test_durations_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_the_library_is_the_published_one() -> None:
    """dist/chart.umd.min.js of npm's chart.js 4.6.1."""
    digest = hashlib.sha256((render.FOLDER / render.CHART_JS).read_bytes()).hexdigest()
    assert digest == "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"
