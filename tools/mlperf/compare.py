"""Two runs side by side: where their losses first differ and by how much, what else differs, WER, times to target."""

import math

from pytorch.errors import RunError
from tools.mlperf.runlog import Epoch, RunLog
from tools.mlperf.score import differences


def compare(left: RunLog, right: RunLog) -> tuple[bool, str]:
    """Compare two runs step by step; RunError where no step is in both logs.

    Return whether all steps that both have done have equal losses, and the comparison as text.
    """
    a, b = ({step.number: step.loss for step in log.steps} for log in (left, right))
    common = [number for number in a if number in b]
    if not common:
        raise RunError(f"{left.path} and {right.path} have no training step in common")
    gaps = {number: _relative_gap(a[number], b[number]) for number in common if a[number] != b[number]}
    lines = [f"A: {left.path}", f"B: {right.path}"]
    if gaps:
        for what, step in (("first differ", next(iter(gaps))), ("differ most", max(gaps, key=gaps.__getitem__))):
            lines.append(
                f"losses: {what} in step {step}: {a[step]} and {b[step]}, relative difference {gaps[step]:.2g}"
            )
    lines.append(f"losses: {f'differ in {len(gaps)} of' if gaps else 'the same in all'} {len(common)} steps of both")
    if only := len(a) + len(b) - 2 * len(common):
        lines.append(f"losses: {only} more steps are in one log only")

    left, right = left.last_start(), right.last_start()  # which have the outcomes
    found = {"seed": [left.seed, right.seed], **differences([left, right])}
    found["commit"] = [log.commit and log.commit[:12] + (" with changes" if log.dirty else "") for log in (left, right)]
    differing = [f"{name}: {x} and {y}" for name, (x, y) in found.items() if x != y]
    lines += differing or ["seed, configuration, data set, platform and commit: the same"]

    epochs_a, epochs_b = ({epoch.number: epoch for epoch in log.epochs} for log in (left, right))
    lines.append(f"{'epoch':>5}  {'WER A':>8}  {'s A':>8}  {'WER B':>8}  {'s B':>8}")
    for number in sorted({*epochs_a, *epochs_b}):
        lines.append(f"{number:>5}  {_cells(epochs_a.get(number))}  {_cells(epochs_b.get(number))}")
    lines += [f"A: {_outcome(left)}", f"B: {_outcome(right)}"]
    if left.reached and right.reached and left.seconds and right.seconds and not (left.resumed or right.resumed):
        lines.append(f"time to target: B takes {right.seconds / left.seconds - 1:+.1%} compared with A")
    return not gaps, "\n".join(lines)


def _relative_gap(x: float | None, y: float | None) -> float:
    return math.inf if not x or y is None else abs((y - x) / x)  # None: a step that was skipped


def _cells(epoch: Epoch | None) -> str:
    if epoch is None or epoch.wer is None:
        return f"{'-':>8}  {'-':>8}"
    return f"{epoch.wer:8.2f}  {epoch.evaluated or math.nan:8.1f}"


def _outcome(log: RunLog) -> str:
    if not log.reached:
        return f"target WER {log.target_wer} not reached" if log.status else "not finished"
    took = f"{(log.seconds or 0) + log.seconds_before:.1f} s, {log.epochs_to_target} epochs"
    return f"target WER {log.target_wer} reached in {took}{', resumed: no uninterrupted result' if log.resumed else ''}"
