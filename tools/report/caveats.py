"""What a reader must know before believing a run's figures, and what its log does not say."""

from __future__ import annotations

from collections.abc import Sequence

from tools.mlperf.check import MISSED_TARGET, ineligibility
from tools.report.runs import Run


def caveats(run: Run) -> list[str]:
    """Why a run is no uninterrupted, reproducible result on LibriSpeech, the gravest first."""
    log = run.log
    found = []
    if log.status is None:
        found.append("The log ends before the run did: it goes on, or it was cut off.")
    elif not log.reached:
        best = min((epoch.wer for epoch in log.epochs if epoch.wer is not None), default=None)
        target = "" if run.target is None else f" of {run.target:g}"
        found.append(
            f"The target WER{target} was not reached" + ("." if best is None else f"; the best was {best:.2f}.")
        )
    why = ineligibility(log)
    if log.dataset is not None and why not in ("", MISSED_TARGET):
        found.append(f"No LibriSpeech result: {why}.")
    if log.resumed:
        found.append(
            f"The run was resumed after {run.seconds_before:.0f} s: no uninterrupted result. "
            "Charts and parts show what followed."
        )
    if log.dirty:
        found.append("The repository had uncommitted changes: the commit alone does not give this run again.")
    if log.cache_cleared is False:
        reason = log.metadata("cache_clear").get("reason")
        found.append("The data set may have been in memory already: the page cache was not cleared" + _because(reason))
    if skipped := sum(1 for _ in log.all("skipped_step")):
        found.append(f"{skipped} steps were skipped because their loss or gradient was not finite.")
    return found


def _because(reason: object) -> str:
    return f" ({reason})." if reason else "."


def missing(run: Run) -> list[str]:
    """What the log does not hold, if anything: it is older than the event, or was cut off before it."""
    log = run.log
    present = {
        "configuration": log.configuration,
        "data set": log.dataset,
        "environment": log.environment,
        "commit": log.commit not in (None, "unknown"),
        "whether the page cache was cleared": log.cache_cleared is not None,
        "training steps": log.steps,
        "gradient norms": any(step.gradient_norm is not None for step in log.steps),
        "evaluations": run.final_wer is not None,
        "WER of each subset": any(epoch.errors for epoch in log.epochs),
        "throughput": any("utterances_per_second" in epoch.throughput for epoch in log.epochs),
        "time of checkpoints": log.first("checkpoint"),
        "transcripts": log.transcripts,
    }
    absent = [name for name, there in present.items() if not there]
    return [", ".join(absent)] if absent else []


def not_comparable(runs: Sequence[Run]) -> list[str]:
    """Why the times of runs do not compare."""
    found = []
    datasets = {run.log.dataset.digest for run in runs if run.log.dataset is not None}
    if len(datasets) > 1:
        found.append("The runs are of different data sets: their times and error rates do not compare.")
    if len({run.target for run in runs}) > 1:
        found.append("The runs have different targets: their times do not compare.")
    return found
