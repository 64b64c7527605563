"""Two runs side by side: where their losses first differ and by how much, what else differs, WER, times to target."""

from __future__ import annotations

import math

from pytorch.errors import RunError
from tools.mlperf.runlog import Epoch, RunLog
from tools.mlperf.score import differences


def compare(left: RunLog, right: RunLog) -> tuple[bool, str]:
    """Compare two runs step by step; RunError where no step is in both logs.

    Return whether all steps that both have done have equal losses, and the comparison as text.
    """
    same, losses = _losses(left, right)
    left, right = left.last_start(), right.last_start()  # which have the outcomes
    lines = [f"A: {left.path}", f"B: {right.path}", *losses, *_surroundings(left, right), *_epochs(left, right)]
    lines += [f"{name}: {_outcome(log)}" for name, log in (("A", left), ("B", right))]
    resumed = left.resumed or right.resumed  # then there is no time of the whole run
    if left.reached and right.reached and left.seconds and right.seconds and not resumed:
        lines.append(f"time to target: B takes {right.seconds / left.seconds - 1:+.1%} compared with A")
    return same, "\n".join(lines)


def _losses(left: RunLog, right: RunLog) -> tuple[bool, list[str]]:
    a, b = ({step.number: step.loss for step in log.steps} for log in (left, right))
    common = [number for number in a if number in b]
    if not common:
        raise RunError(f"{left.path} and {right.path} have no training step in common")
    gaps = {number: _gap(a[number], b[number]) for number in common if a[number] != b[number]}
    only = len(a) + len(b) - 2 * len(common)
    rest = f"; {only} more steps are in one log only" if only else ""
    if not gaps:
        return True, [f"losses: the same in all {len(common)} steps of both{rest}"]

    def described(number: int) -> str:
        x, y = a[number], b[number]
        if x is None or y is None:
            return f"step {number}, which one of them skipped"
        return (
            f"step {number}: {x:.9g} and {y:.9g} ({y - x:+.3g}{f', relative {gaps[number] / abs(x):.2g}' if x else ''})"
        )

    return False, [
        f"losses: first differ in {described(next(iter(gaps)))}",
        f"losses: differ in {len(gaps)} of {len(common)} steps of both{rest}, "
        f"most in {described(max(gaps, key=gaps.__getitem__))}",
    ]


def _gap(x: float | None, y: float | None) -> float:
    return math.inf if x is None or y is None else abs(y - x)


def _surroundings(left: RunLog, right: RunLog) -> list[str]:
    found = {"seed": [left.seed, right.seed], **differences([left, right])}
    found["commit"] = [log.commit and log.commit[:12] + (" with changes" if log.dirty else "") for log in (left, right)]
    lines = [f"{name}: {a} and {b}" for name, (a, b) in found.items() if a != b]
    return lines or ["seed, configuration, data set, platform and commit: the same"]


def _epochs(left: RunLog, right: RunLog) -> list[str]:
    def cells(epoch: Epoch | None) -> str:
        if epoch is None or epoch.wer is None:
            return f"{'-':>8}  {'-':>8}"
        return f"{epoch.wer:8.2f}  {epoch.evaluated or math.nan:8.1f}"

    a, b = ({epoch.number: epoch for epoch in log.epochs} for log in (left, right))
    lines = [f"{'epoch':>5}  {'WER A':>8}  {'s A':>8}  {'WER B':>8}  {'s B':>8}"]
    for number in sorted({*a, *b}):
        lines.append(f"{number:>5}  {cells(a.get(number))}  {cells(b.get(number))}")
    return lines


def _outcome(log: RunLog) -> str:
    if log.reached:
        resumed = ", resumed: not an uninterrupted result" if log.resumed else ""
        took = f"{(log.seconds or 0) + log.seconds_before:.1f} s, {log.epochs_to_target} epochs"
        return f"target WER {log.target_wer} reached in {took}{resumed}"
    return f"target WER {log.target_wer} not reached" if log.status else "not finished"
