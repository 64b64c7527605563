"""The command, as a user and the parent of a run type it."""

import os
from pathlib import Path

import pytest

from tests.tools.mlperf.made_up_logs import made_up_log
from tools.report.__main__ import main


def test_the_page_is_one_file_whatever_text_is_in_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, folder = made_up_log(), tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    log.edit("submission_platform", os.fsdecode(b"caf\xe9 box"))
    log.edit("configuration", os.fsdecode(b"\xff"), note=os.fsdecode(b"\xfe"))
    paths = [str(log.write(folder / f"{number}.log")) for number in (1, 2)]
    assert main([*paths, "--output", str(tmp_path / "report.html")]) == 0
    assert "report.html" in capsys.readouterr().out
    html = (tmp_path / "report.html").read_text()
    assert " box" in html and "</html>" in html and len(html) < 400_000
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_stands_for_its_logs_and_a_name_for_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(("lr=0.1,bs=4", "after/deeper")):
        (tmp_path / folder).mkdir(parents=True)
        for seed in (1, 2):
            made_up_log(seed=seed, epochs=1, steps=2).write(tmp_path / folder / f"result_{seed + number}.txt")
        (tmp_path / folder / "notes.txt").write_text("no log")
    page = tmp_path / "report.html"
    assert main(["old=lr=0.1,bs=4", f"a=b={tmp_path / 'after'}", "-o", str(page)]) == 0
    html = page.read_text()
    for label in ("old, seed 1", "old, seed 2", "a=b, seed 1", "a=b, seed 2"):
        assert label in html
    assert "4 of 4" in html


def test_what_is_no_log_is_an_error_of_one_line_and_leaves_the_page_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    existing = tmp_path / "report.html"
    existing.write_text("earlier")
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage.log").write_text(":::MLLOG [1]\n")
    for name in ("garbage.log", "empty", "none.log"):
        for argument in (f"{tmp_path / name}", f"name={tmp_path / name}"):
            assert main([argument, "-o", str(existing)]) == 1
            error = capsys.readouterr().err
            assert error.startswith(f"error: {tmp_path / name}") and error.count("\n") == 1
    assert main(["-o", str(existing)]) == 1
    assert existing.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "garbage.log", "report.html"]


def test_a_log_is_never_replaced_and_a_link_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`-o *.log`, the name forgotten, would be the loss of a log."""
    log = made_up_log().write(tmp_path / "run.log")
    link, page, folder = tmp_path / "link", tmp_path / "page.html", tmp_path / "folder"
    link.symlink_to(log)
    folder.mkdir()
    before = log.read_text()
    for output in (log, link, log / "report.html", folder):
        assert main([str(log), "-o", str(output)]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert log.read_text() == before
    link.unlink()
    link.symlink_to(page)
    for _ in range(2):  # a page may be made anew
        assert main([str(log), "-o", str(link)]) == 0
    assert link.is_symlink() and page.read_text().endswith("</html>")
