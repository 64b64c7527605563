"""The page as a person meets it: in headless Chromium, light and dark, wide and narrow, by keyboard."""

import hashlib
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.tools.mlperf.made_up_logs import made_up_log
from tools.report.render import FOLDER, align, render
from tools.report.runs import find_logs, read_series

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SHOWN = {
    "hostile text": [made_up_log(said=[(EVIL, f"\"'{EVIL}")] * 3, config={EVIL: EVIL})],
    "a run of one step": [made_up_log(epochs=1, steps=1, said=[], reached=False)],
    "three series": [made_up_log(reached=each < 3, dirty=True, config={"b": each}) for each in (1, 2, 3)],
    "thirty runs": [made_up_log(seed=seed, epochs=2 + seed % 3, steps=3, others=0.5) for seed in range(30)],
}
Opener = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra: test)")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium (Debian: apt-get install chromium; or set CHROMIUM)")
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox cannot start as root, nor in most containers.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages by what they show."""
    folder = tmp_path_factory.mktemp("pages")
    logs = {"measured runs": find_logs(ROOT / "results" / "2-cores-zen5" / "an4")[:2]}
    for title, made in SHOWN.items():
        logs[title] = [log.write(folder / f"{title} {number}.log") for number, log in enumerate(made)]
    for title, paths in logs.items():
        (folder / f"{title}.html").write_text(render(read_series(dict.fromkeys(paths, ""))))
    return {title: folder / f"{title}.html" for title in logs}


@pytest.fixture
def open_page(browser: Any, pages: dict[str, Path]) -> Iterator[Opener]:
    """Opens a page in a window of its own. After the test, nothing may have gone wrong in it."""
    contexts, wrong = [], list[str]()

    def opened(title: str, width: int = 1280, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options))
        page, address = contexts[-1].new_page(), pages[title].as_uri()
        for event in ("console", "pageerror", "dialog"):
            page.on(event, lambda what: wrong.append(str(what)))
        page.on("request", lambda request: wrong.extend({request.url} - {address}))
        page.goto(address)
        page.evaluate("document.querySelectorAll('details').forEach((details) => (details.open = true))")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def datasets(page: Any) -> list[int]:
    """Return how many lines, bands and rows of marks each chart shows."""
    return page.evaluate(
        """[...document.querySelectorAll("canvas")].map(
             (canvas) => Chart.getChart(canvas).getSortedVisibleDatasetMetas().length)"""
    )


@pytest.mark.parametrize(
    ("title", "drawn"),
    [
        ("hostile text", [2, 2, 1]),  # a line and the target
        ("a run of one step", [2, 2, 1]),
        ("three series", [4, 4, 3]),
        ("thirty runs", [4, 4, 3, 1, 1]),  # a line, a band's two edges
        ("measured runs", [4, 4, 3, 1, 1]),
    ],
)
def test_charts_and_all_columns_of_the_result_fit_a_phone(title: str, drawn: list[int], open_page: Opener) -> None:
    page = open_page(title, 390)
    assert datasets(page) == drawn
    assert page.evaluate("document.documentElement.scrollWidth - window.innerWidth") == 0
    for table in page.locator(".result .scroll").all():
        assert table.evaluate("(element) => element.scrollWidth - element.clientWidth") == 0


@pytest.mark.parametrize(("title", "scheme"), [("three series", "light"), ("thirty runs", "dark")])
def test_the_page_is_accessible(title: str, scheme: str, open_page: Opener) -> None:
    """By axe's rules: contrast, names, order of headings, language, tables, keyboard."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed (extra: test)")
    page = open_page(title, color_scheme=scheme)
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(rule["id"], [node["html"] for node in rule["nodes"]][:3]) for rule in found] == []


def test_one_legend_hides_a_series_in_all_charts(open_page: Opener) -> None:
    page = open_page("three series")
    button = page.locator(".legend button").first
    button.press("Enter")
    assert (datasets(page), button.get_attribute("aria-pressed")) == ([3, 3, 2], "false")
    button.press("Enter")
    assert datasets(page) == [4, 4, 3]


def test_a_time_that_is_not_valid_does_not_look_valid(open_page: Opener) -> None:
    look = "(element) => getComputedStyle(element).textDecorationLine"
    score, reached = open_page("thirty runs").locator(".headline strong").all()
    assert (score.evaluate(look), reached.evaluate(look)) == ("line-through", "none")
    assert [each.evaluate(look) for each in open_page("measured runs").locator(".headline strong").all()] == ["none"]


def test_without_scripts_the_figures_are_in_tables(open_page: Opener) -> None:
    page = open_page("three series", java_script_enabled=False)
    assert page.get_by_role("region", name="Figures of each epoch").locator("tbody tr:visible").count() == 9


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        ("A B C", "A X C", [("equal", "A", "A"), ("substituted", "B", "X"), ("equal", "C", "C")]),
        ("A B", "A", [("equal", "A", "A"), ("deleted", "B", "")]),
        ("A", "B A", [("inserted", "", "B"), ("equal", "A", "A")]),
    ],
)
def test_words_are_aligned_with_their_errors(reference: str, hypothesis: str, expected: list) -> None:
    assert list(align(reference, hypothesis)) == expected


def test_all_files_of_the_page_are_installed_and_the_library_is_the_published_one() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    installed = {path for pattern in packages["package-data"]["tools.report"] for path in FOLDER.glob(pattern)}
    assert {path for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"} == installed
    digest = hashlib.sha256((FOLDER / "chart.umd.min.js").read_bytes()).hexdigest()  # npm's chart.js 4.6.1
    assert digest == "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2"
