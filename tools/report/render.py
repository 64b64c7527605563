"""The page itself: one HTML file that holds everything it needs."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jinja2
from markupsafe import Markup

from tools.report import tables
from tools.report.charts import charts
from tools.report.runs import Series
from tools.report.transcripts import transcripts
from tools.report.warnings import missing_events, warnings

FOLDER = Path(__file__).parent
CHART_JS = "chart.umd.min.js"  # npm's chart.js, dist/; its license is beside it
GOLDEN_ANGLE = 137.508  # degrees from a series' hue to the next one's: no two are the same, and neighbors differ most
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=True,  # whatever a log holds is text
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["duration"] = tables.duration


def render(series: Sequence[Series]) -> str:
    """Return the page of one or more series."""
    drawn = charts(series)
    scripts = [_script(CHART_JS), _script("page.js")]
    hues = [round((215 + number * GOLDEN_ANGLE) % 360, 1) for number in range(len(series))]
    runs = [run for each in series for run in each.runs]
    names = " and ".join(dict.fromkeys(str(run.log.config_name or "unknown configuration") for run in runs))
    facts = tables.facts(series)
    return ENVIRONMENT.get_template("page.html").render(
        title=f"{names}, seed {runs[0].log.seed}" if len(runs) == 1 else f"{names}, {len(runs)} runs",
        series=series,
        runs=runs,
        hues=hues,
        tables=tables,
        warnings=warnings(series),
        missing=missing_events(series),
        charts=drawn,
        figures={
            "series": [{"label": each.label, "hue": hue} for each, hue in zip(series, hues, strict=True)],
            "charts": list(map(asdict, drawn)),
        },
        parts=[(each.label, spent) for each in series if (spent := tables.parts(each.runs))],
        transcripts=[(run, shown) for run in runs if (shown := transcripts(run))],
        differing={name: values for name, values in facts.items() if len(set(values)) > 1},
        common={name: values for name, values in facts.items() if len(set(values)) == 1},
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        scripts=[Markup(script) for script in scripts],
        # Should anything ever slip through the escaping, no browser runs it, nor sends anything anywhere.
        policy="default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
        + " ".join(map(_hash, scripts)),
    )


def _script(name: str) -> str:
    """Return a script without the line that would let a browser look for its source map."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("//# sourceMappingURL="))


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
