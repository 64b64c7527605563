"""The report as a person meets it: in headless Chromium, light and dark, wide and narrow, by keyboard, on paper."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.tools.mlperf.made_up_logs import made_up_log
from tools.report.render import render
from tools.report.runs import read_series

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: test)")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed (extra: test)")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium (Debian: apt-get install chromium; or set CHROMIUM)"
)
MEASURED = sorted((ROOT / "results").glob("2-cores-zen5*/**/result_[01].txt"))  # two runs of each configuration
SHOWN = {
    "one run": [made_up_log()],
    "three configurations": [made_up_log(reached=each != 2, dirty=True, config={"b": each}) for each in (1, 2, 3)],
    "thirty runs": [made_up_log(seed=seed, epochs=2 + seed % 3, synthetic=True) for seed in range(30)],
    "a run of one step": [made_up_log(epochs=1, steps=1, said=[], reached=False)],
}


class Watched:
    """A page, and all that must not happen on it."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page, self.address, self.wrong = page, path.as_uri(), list[str]()
        page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        page.on("request", self._asked)
        page.on("dialog", self._asked_back)
        page.goto(path.as_uri())

    def _asked(self, request: Any) -> None:
        if request.url != self.address:
            self.wrong.append(f"asks for {request.url}")

    def _asked_back(self, dialog: Any) -> None:
        self.wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def charts(self) -> list[str]:
        """Ids of the canvases on which something is drawn in more than one color."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll("canvas")].filter((canvas) => {
                 const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                 const colors = new Set();
                 for (let i = 0; i < data.length; i += 4) {
                   if (data[i + 3] > 200) colors.add(`${data[i]} ${data[i + 1]} ${data[i + 2]}`);
                 }
                 return colors.size > 3;
               }).map((canvas) => canvas.id)"""
        )

    def lines(self, chart: str) -> list[str]:
        """Labels of a chart's lines that are shown, the faint ones apart."""
        return self.page.evaluate(
            """(id) => {
                 const chart = Chart.getChart(id);
                 const shown = (line, index) => !line.faint && chart.isDatasetVisible(index);
                 return chart.data.datasets.filter(shown).map((line) => line.label);
               }""",
            chart,
        )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for what follows an event; wait_for_function evaluates text in the page, which its policy forbids."""
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            self.page.wait_for_timeout(50)

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


Opener = Callable[..., Watched]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox cannot start as root, nor in most containers.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by what they show."""
    folder = tmp_path_factory.mktemp("reports")
    logs = {
        title: [log.write(folder / f"{title} {number}.log") for number, log in enumerate(made)]
        for title, made in SHOWN.items()
    }
    logs["measured runs"], logs["a measured run"] = MEASURED, MEASURED[:1]
    for title, paths in logs.items():
        (folder / f"{title}.html").write_text(render(read_series(paths)))
    return {title: folder / f"{title}.html" for title in logs}


@pytest.fixture
def open_page(browser: Any) -> Iterator[Opener]:
    """Opens a file in a window of its own, so wide, with Playwright's other options; closed after the test."""
    contexts = []

    def opened(path: Path, width: int = 1280, **options: Any) -> Watched:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options))
        return Watched(contexts[-1].new_page(), path)

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("title", [*SHOWN, "measured runs"])
def test_every_chart_is_drawn_and_nothing_goes_wrong(title: str, open_page: Opener, reports: dict[str, Path]) -> None:
    shown = open_page(reports[title])
    canvases = shown.page.locator("canvas")
    assert len(shown.charts()) == canvases.count() >= 5
    for number in range(canvases.count()):
        assert canvases.nth(number).get_attribute("aria-label")
    assert shown.wrong == []


@pytest.mark.parametrize(
    ("title", "scheme"),
    [*itertools.product(["one run", "measured runs"], ["light", "dark"]), ("thirty runs", "light")],
)
def test_the_page_is_accessible(title: str, scheme: str, open_page: Opener, reports: dict[str, Path]) -> None:
    """By axe's rules: contrast, names, order of headings, language, tables, keyboard."""
    shown = open_page(reports[title], color_scheme=scheme)
    shown.page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
    found = axe.Axe().run(shown.page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(rule["id"], [node["html"] for node in rule["nodes"]][:3]) for rule in found] == []


def test_a_series_is_hidden_with_its_runs_by_its_name_in_the_legend(
    open_page: Opener, reports: dict[str, Path]
) -> None:
    shown = open_page(reports["measured runs"])
    names = shown.lines("wer-time")
    assert len(names) == 6 == len(set(names))
    all_lines = "Chart.getChart('wer-time').getSortedVisibleDatasetMetas().length"
    assert shown.page.evaluate(all_lines) == 6 + 12
    item = shown.page.evaluate("Chart.getChart('wer-time').legend.legendHitBoxes[0]")
    shown.page.locator("#wer-time").click(position={"x": item["left"] + 5, "y": item["top"] + 5})
    shown.wait_until(lambda: shown.page.evaluate(all_lines) == 5 + 10)
    assert shown.lines("wer-time") == names[1:]
    assert shown.wrong == []


def test_a_runs_subsets_have_lines_of_their_own(open_page: Opener, reports: dict[str, Path]) -> None:
    shown = open_page(reports["one run"])
    assert shown.lines("wer-epoch") == ["WER (%)", "WER (%) dev-clean", "WER (%) dev-other"]


def test_a_single_point_has_a_marker(open_page: Opener, reports: dict[str, Path]) -> None:
    shown = open_page(reports["a run of one step"])
    radius = "Chart.getChart('loss').data.datasets.find((line) => !line.faint).pointRadius"
    assert shown.page.evaluate(radius) > 0


def test_errors_differ_in_more_than_color(open_page: Opener, reports: dict[str, Path]) -> None:
    shown = open_page(reports["one run"])
    drawn = {
        kind: shown.page.locator(f".transcripts .{kind}").first.evaluate(
            """(word) => [...word.children].map((part) => getComputedStyle(part)).map(
                 (style) => `${style.textDecorationLine} ${style.textDecorationStyle}`)"""
        )
        for kind in ("substituted", "deleted", "inserted")
    }
    assert drawn["substituted"][1] == "underline wavy"
    assert drawn["deleted"][0] == "line-through solid"
    assert drawn["inserted"][1] == "underline solid"
    heard = shown.page.locator(".transcripts li .unseen").all_inner_texts()
    assert "Said: HE CAME HOME. Recognized: HE COME HOME." in heard


def test_the_charts_follow_the_screen_and_paper_is_light(
    open_page: Opener, reports: dict[str, Path], tmp_path: Path
) -> None:
    ink = "Chart.getChart('loss').options.scales.x.title.color"
    back = "getComputedStyle(document.body).backgroundColor"
    shown = open_page(reports["three configurations"])
    light = shown.page.evaluate(f"[{ink}, {back}]")
    shown.page.emulate_media(color_scheme="dark")
    shown.wait_until(lambda: shown.page.evaluate(ink) != light[0])
    dark = shown.page.evaluate(f"[{ink}, {back}]")
    assert dark[1] != light[1]
    # What is printed is drawn between these two events.
    shown.page.evaluate("window.inks = []; addEventListener('beforeprint', () => inks.push(" + ink + "))")
    assert shown.page.pdf(path=tmp_path / "report.pdf", format="A4").startswith(b"%PDF")
    assert shown.page.evaluate("inks") == [light[0]]
    assert shown.page.evaluate(f"[{ink}, {back}]") == dark
    assert shown.wrong == []


@pytest.mark.parametrize("title", ["one run", "a measured run", "a run of one step"])
def test_a_run_is_two_pages_on_paper(title: str, open_page: Opener, reports: dict[str, Path], tmp_path: Path) -> None:
    pdf = open_page(reports[title]).page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 2


@pytest.mark.parametrize("title", ["one run", "measured runs"])
def test_the_result_is_whole_on_a_phone(title: str, open_page: Opener, reports: dict[str, Path]) -> None:
    shown = open_page(reports[title], 390)
    table = shown.page.locator(".result .scroll").first
    assert table.evaluate("(element) => element.scrollWidth - element.clientWidth") == 0
    header = table.locator("th[scope=col]:visible").all_inner_texts()
    assert header[1:] == ["Result", "WER (%)", "Time to target (s)"]


@pytest.mark.parametrize("title", [*SHOWN, "measured runs"])
def test_a_narrow_screen_needs_no_scrolling_sideways(title: str, open_page: Opener, reports: dict[str, Path]) -> None:
    shown = open_page(reports[title], 320)
    shown.page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")

    def all_fit(width: int) -> bool:
        return all(canvas.bounding_box()["width"] <= width for canvas in shown.page.locator("canvas").all())

    for width in (320, 390, 768):
        shown.page.set_viewport_size({"width": width, "height": 900})
        assert shown.overflow() == 0
        shown.wait_until(partial(all_fit, width))


def test_what_a_log_says_is_never_run(open_page: Opener, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    log = made_up_log(said=[(evil, f"\"'{evil}")] * 3, config={evil: evil}).write(
        tmp_path / "<img src=x onerror=alert(3)>.log"
    )
    (tmp_path / "report.html").write_text(render(read_series([log])))
    shown = open_page(tmp_path / "report.html")
    assert evil in shown.page.locator("body").inner_text()
    assert shown.wrong == []


def test_without_scripts_the_figures_are_in_tables(open_page: Opener, reports: dict[str, Path]) -> None:
    shown = open_page(reports["three configurations"], java_script_enabled=False)
    assert "The charts need JavaScript" in shown.page.locator("main").inner_text()
    shown.page.get_by_text("Figures of each epoch").click()
    assert shown.page.get_by_role("region", name="Figures of each epoch").locator("tbody tr:visible").count() == 9
