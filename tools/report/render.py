"""The page itself: one HTML file that holds everything it needs."""

import secrets
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import jinja2
import Levenshtein
from markupsafe import Markup

from tools.mlperf.runlog import RunLog
from tools.report.charts import charts, epoch_rows
from tools.report.runs import Series, file_names
from tools.report.warnings import warnings

FOLDER = Path(__file__).parent
KINDS = {"equal": "equal", "replace": "substituted", "delete": "deleted", "insert": "inserted"}  # Levenshtein's
ENVIRONMENT = jinja2.Environment(  # which escapes whatever a log holds
    loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
)


def render(series: Sequence[Series]) -> str:
    """Return the page of one or more series."""
    runs = [run for each in series for run in each.runs]
    epochs = {run: list(epoch_rows(run).values()) for run in runs}
    page = ENVIRONMENT.get_template("page.html").render(
        series=series,
        runs=runs,
        files=dict(zip(runs, file_names([run.log for run in runs]), strict=True)),
        epochs=epochs,
        columns=list(dict.fromkeys(name for rows in epochs.values() for row in rows for name in row)),
        warnings=warnings(series),
        charts=charts(series),
        duration=duration,
        align=align,
        facts=facts(series),
        source=lambda name: Markup((FOLDER / name).read_text(encoding="utf-8")),
        nonce=secrets.token_hex(16),  # should a log's script ever slip through the escaping, no browser runs it
    )
    return page.encode(errors="backslashreplace").decode()  # a path need not be Unicode


def duration(seconds: float) -> str:
    """Return a time as a person reads it: 12.6 s, 0:26:41, 3 days, 23:46:46."""
    return f"{seconds:.1f} s" if seconds < 600 else str(timedelta(seconds=round(seconds)))


def align(reference: str, hypothesis: str) -> Iterator[tuple[str, str, str]]:
    """Yield the words of a shortest edit: its kind, what was said, and what was recognized; either may be ''."""
    said, recognized = reference.split(), hypothesis.split()
    for kind, start, end, other_start, other_end in Levenshtein.opcodes(said, recognized):
        for pair in zip_longest(said[start:end], recognized[other_start:other_end], fillvalue=""):
            yield KINDS[kind], *pair


def facts(series: Sequence[Series]) -> dict[str, list[str]]:
    """Return what was run, of each series: configuration, data, hardware, software and code. What differs is first."""
    known = [[_facts(run.log) for run in each.runs] for each in series]
    names = dict.fromkeys(name for runs in known for each in runs for name in each)
    found = {name: [", ".join({each.get(name, ""): None for each in runs}) for runs in known] for name in names}
    return dict(sorted(found.items(), key=lambda item: len(set(item[1])) == 1))


def _facts(log: RunLog) -> dict[str, str]:
    events = "submission_platform", "gru_implementation", "number_of_ranks", "container_image"
    known = {
        "commit": log.commit and log.commit[:12] + (" with uncommitted changes" if log.dirty else ""),
        **{name: log.value(name) for name in events},
        **log.environment,
        "data set's digest": log.dataset and log.dataset.digest[:16],
        **log.configuration,
    }
    return {name.replace("_", " "): str(value) for name, value in known.items() if value is not None}
