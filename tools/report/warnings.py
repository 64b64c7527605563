"""What a reader must know before believing the figures, and what logs do not say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tools.mlperf.check import MISSED_TARGET, clock_problem, notes
from tools.mlperf.score import RUNS
from tools.report.runs import Run, Series

MOST_NAMED = 3  # runs of which something is said; of more it says how many
Said = list[tuple[str, str]]  # of whom, "" for all runs; and what


def warnings(series: Sequence[Series]) -> Said:
    """Return why runs are no uninterrupted, reproducible results on LibriSpeech, and why figures do not compare."""
    found = _each_once(series, _warnings)
    runs = [run for each in series for run in each.runs]
    if len({run.log.dataset.digest for run in runs if run.log.dataset is not None}) > 1:
        found.append(("", "The runs use different data sets: their times and error rates are not comparable."))
    if len({run.log.target_wer for run in runs}) > 1:
        found.append(("", "The runs have different targets: their times are not comparable."))
    return found


def missing_events(series: Sequence[Series]) -> Said:
    """Return what logs do not hold: they are older than the event, or were cut off before it."""
    return _each_once(series, _missing)


def _warnings(series: Series, run: Run) -> list[str]:
    """Return the warnings, most serious first."""
    log = run.log
    found = []
    if run.refusals:
        why = f": {run.refusals[0]}" if len(series.runs) == 1 else ""  # of many runs one line for all
        found.append(f"The checker (python -m tools.mlperf check) refuses the log{why}.")
    if clock_problem(log) is not None:
        found.append("The machine's clock was set during the run: only the time of the RESULT line is shown.")
    if not log.reached:
        target = "" if log.target_wer is None else f" of {log.target_wer:g}"
        found.append(f"The target WER{target} was not reached: {run.outcome}.")
    if log.resumed:
        after = f"The run was resumed after {log.seconds_before:.0f} s"
        found.append(f"{after}: not an uninterrupted result. Charts and times show only what followed.")
    found += [f"{note[0].upper()}{note[1:]}." for note in notes(log) if not note.endswith(MISSED_TARGET)]
    if skipped := sum(1 for _ in log.all("skipped_step")):
        found.append(f"{skipped} steps were skipped because their loss or gradient was not finite.")
    if series.no_score:
        found.append(series.no_score)
    if series.score is not None and len(series.runs) != RUNS:
        found.append(f"The rules ask for {RUNS} runs for a score; this one is of {len(series.runs)}.")
    if len(commits := dict.fromkeys(str(each.log.commit)[:12] for each in series.runs)) > 1:
        found.append(f"The runs are of several commits: {', '.join(commits)}.")
    return found


def _missing(series: Series, run: Run) -> list[str]:
    log = run.log
    present = {
        "configuration": log.configuration,
        "data set": log.dataset,
        "environment": log.environment,
        "commit": log.commit not in (None, "unknown"),
        "whether the page cache was cleared": log.cache_cleared is not None,
        "training steps": log.steps,
        "evaluations": run.wer is not None,
        "transcripts": log.transcripts,
    }
    absent = [name for name, there in present.items() if not there]
    return [", ".join(absent)] if absent else []


def _each_once(series: Sequence[Series], texts: Callable[[Series, Run], list[str]]) -> Said:
    labels: dict[str, list[str]] = {}
    for each in series:
        for run in each.runs:
            for text in texts(each, run):
                labels.setdefault(text, []).append(run.label)
    total = sum(len(each.runs) for each in series)
    return [(_whom(runs, total), text) for text, runs in labels.items()]


def _whom(labels: list[str], total: int) -> str:
    if len(labels) == total:
        return ""
    return "; ".join(labels) if len(labels) <= MOST_NAMED else f"{len(labels)} of {total} runs"
