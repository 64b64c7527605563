"""What a reader must know before believing the figures."""

import re
from collections.abc import Sequence

from tools.mlperf.check import MISSED_TARGET, notes
from tools.mlperf.score import RUNS, differences
from tools.report.runs import Run, Series

MOST_NAMED = 3  # runs that a warning names; of more it gives the number
NUMBER = re.compile(r"(?<![\w.-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w-])")  # not in a digest or a file's name


def warnings(series: Sequence[Series]) -> list[tuple[str, str]]:
    """Return runs, "" for all of them, and why they are no results on LibriSpeech, or why figures do not compare.

    Texts that differ only in numbers are one, with ranges.
    """
    merged: dict[str, dict[Run, str]] = {}
    for each in series:
        for run in each.runs:
            for text in _warnings(each, run):
                merged.setdefault(NUMBER.sub("#", text), {})[run] = text
    found = [(_labels(set(texts), series), _with_ranges([*texts.values()])) for texts in merged.values()]
    differing = differences([run.log for each in series for run in each.runs])
    for name in {"data set", "target_wer"} & differing.keys():
        found.append(("", f"The runs differ in their {name.replace('_', ' ')}: their times are not comparable."))
    return found


def _warnings(series: Series, run: Run) -> list[str]:
    """Return the warnings, most serious first."""
    log = run.log
    found = []
    if run.refusals:
        found.append(f"The checker (python -m tools.mlperf check) refuses the log: {run.refusals[0].reason}.")
    if not log.reached:
        target = "" if log.target_wer is None else f" of {log.target_wer:g}"
        found.append(f"The target WER{target} was not reached: {run.outcome}.")
    if log.resumed:
        found.append(f"Resumed after {log.seconds_before:.0f} s, not uninterrupted. Curves show only what followed.")
    found += [f"{note[0].upper()}{note[1:]}." for note in notes(log) if not note.endswith(MISSED_TARGET)]
    if skipped := len(log.all("skipped_step")):
        found.append(f"Steps skipped because their loss or gradient was not finite: {skipped}.")
    found += [series.no_score] if series.no_score else []
    if series.score is not None and len(series.runs) < RUNS:
        found.append(f"The rules ask for {RUNS} runs for a score; this one is of {len(series.runs)}.")
    return found


def _with_ranges(texts: Sequence[str]) -> str:
    """Return the text with the lowest and the highest of each number: '49 to 77'."""
    columns = zip(*map(NUMBER.findall, texts), strict=True)
    ordered = [sorted(column, key=lambda number: float(number.replace(",", ""))) for column in columns]
    ranges = iter([low if low == high else f"{low} to {high}" for low, *_, high in ((*c, c[-1]) for c in ordered)])
    return NUMBER.sub(lambda _: next(ranges), texts[0])


def _labels(runs: set[Run], series: Sequence[Series]) -> str:
    """Return which runs these are: "" for all, the names of a few, else how many."""
    everyone = [run for each in series for run in each.runs]
    if len(runs) == len(everyone):
        return ""
    names = [run.label for run in everyone if run in runs]
    return "; ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} of {len(everyone)} runs"
