"""The page itself: one HTML file that holds everything it needs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from tools.report import caveats, tables, transcripts
from tools.report.charts import ALL, charts, duration, subsets
from tools.report.runs import Run

FOLDER = Path(__file__).parent
CHART_JS = "chart.umd.min.js"  # npm's chart.js, dist/; its licence is beside it
COLOURS = 8  # of runs, in page.css
# Lines and bars of the parts of a run's time, in page.css too.
PARTS = {
    "init": "init, off the clock",
    "train": "training",
    "evaluate": "evaluation",
    "checkpoint": "checkpoints",
    "other": "other",
}


def render(runs: Sequence[Run], score: Sequence[str] = ()) -> str:
    """The page of some runs.

    Args:
        runs: at least one.
        score: what to say about their score, the score itself first.
    """
    drawn = charts(runs)
    scripts = [_script(CHART_JS), _script("page.js")]
    header, scores = tables.scores(runs)
    return _template().render(
        runs=runs,
        numbers={run.label: run.number for run in runs},
        title=_title(runs),
        headline=tables.headline(runs),
        caveats=_by_run(runs, caveats.caveats) + [("", text) for text in caveats.not_comparable(runs)],
        missing=_by_run(runs, caveats.missing),
        subsets=subsets(runs),
        charts=drawn,
        figures={
            "runs": [{"number": run.number, "label": run.label} for run in runs],
            "charts": [chart.drawn() for chart in drawn],
        },
        score_header=header,
        scores=scores,
        score=score,
        parts=[(run, tables.parts(run)) for run in runs],
        settings=tables.settings(runs),
        environment=tables.environment(runs),
        transcripts=[(run, transcripts.groups(run)) for run in runs],
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        # Should anything ever slip through the escaping, no browser runs it, nor sends anything anywhere.
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
        + " ".join(map(_hash, scripts)),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,  # whatever a log holds is text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"ALL": ALL, "PARTS": PARTS, "COLOURS": COLOURS}
    environment.filters["duration"] = duration
    return environment.get_template("page.html")


def _title(runs: Sequence[Run]) -> str:
    names = " and ".join(dict.fromkeys(str(run.log.config_name or "unknown configuration") for run in runs))
    return f"{names}, seed {runs[0].log.seed}" if len(runs) == 1 else f"{names}, {len(runs)} runs"


def _by_run(runs: Sequence[Run], of: Callable[[Run], list[str]]) -> list[tuple[str, str]]:
    """Each text once, and of which runs it is said; "" for all."""
    said: dict[str, list[str]] = {}
    for run in runs:
        for text in of(run):
            said.setdefault(text, []).append(run.label)
    return [("" if len(labels) == len(runs) else ", ".join(labels), text) for text, labels in said.items()]


@cache
def _script(name: str) -> str:
    """A script without the line that would let a browser look for its source map."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL="))


@cache
def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
