"""Reference convergence points: how many epochs the reference takes to the target, by batch size.

They are files that the package's rcp_checker reads, and it is the one that checks runs against them: runs that take
significantly fewer epochs than the reference of their batch size do not train the same thing.
"""

import json
import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mlperf_logging.rcp_checker.rcp_checker import RCP_Checker, check_directory, submission_runs

from pytorch.config import HYPERPARAMETERS
from pytorch.errors import RunError
from pytorch.mllog import BENCHMARK
from tools.mlperf.check import NEWEST, load_valid
from tools.mlperf.runlog import RunLog
from tools.mlperf.score import RUNS, differing, in_words, one_series

RUNS_OF_A_POINT = 2 * RUNS  # that the rules ask for
EPOCHS = "Epochs to converge"
_REGISTERED = patch.dict(submission_runs["training"], {BENCHMARK: RUNS})  # the package knows its benchmarks by name
Points = dict[str, dict[str, Any]]


def make_points(paths: list[Path]) -> Points:
    """Return reference convergence points of these runs, one for each batch size among them.

    RunError if a log breaks the open rules; a run missed the target; runs of one batch size differ in more than the
    seed, share a seed, or are too few; or runs are of several data sets or targets.
    """
    by_batch_size: dict[int, list[RunLog]] = {}
    for log in load_valid(paths):
        by_batch_size.setdefault(log.batch_size or 0, []).append(log)
    series = [one_series(logs) for _, logs in sorted(by_batch_size.items())]
    for run in (run for runs in series for run in runs):
        if not run.reached:
            raise RunError(f"{run.path}: the run did not reach its target; every seed of a reference must")
    if different := in_words(differing([_subject(runs[0]) for runs in series])):
        raise RunError(f"points in one file must be of one data set and target; these differ in {different}")
    return {f"{BENCHMARK}_ref_{runs[0].batch_size}": _point(runs) for runs in series}


def _subject(run: RunLog) -> dict[str, Any]:
    """Return what two runs must share for their epochs to be comparable."""
    assert run.dataset is not None  # the rules have seen to that
    return {"corpus": run.dataset.corpus, "dataset": run.dataset.digest, "target": run.target_wer}


def _point(runs: list[RunLog]) -> dict[str, Any]:
    first = runs[0]
    days = sorted(f"{datetime.fromtimestamp(run.events[0].time_ms / 1000, UTC):%Y-%m-%d}" for run in runs)
    plain = first.configuration
    return {
        "Benchmark": BENCHMARK,
        "Creator": first.value("submission_org"),
        "When": days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}",
        "Platform": first.value("submission_platform"),
        "Precision": plain["precision"],
        "BS": first.batch_size,
        "Hyperparams": {name: plain[name] for name in HYPERPARAMETERS if name not in ("seed", "max_steps")},
        EPOCHS: [run.epochs_to_target for run in runs],
        "Seeds": [run.seed for run in runs],
        "Commits": sorted({str(run.commit) for run in runs}),
        "Subject": _subject(first),
    }


def describe(points: Points) -> str:
    """Return the points as text, with what the package's rcp_checker makes of them."""
    with _REGISTERED, tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        json.dump(points, file)
        file.seek(0)
        records = RCP_Checker("training", NEWEST, BENCHMARK, False, file).rcp_data
    lines = [f"{'batch':>6}  {'runs':>4}  {'mean':>6}  {'std':>5}  {'fewest accepted':>15}  epochs to target"]
    for name, record in records.items():
        epochs = points[name][EPOCHS]  # by seed; the package sorts its own
        lines.append(
            f"{record['BS']:>6}  {len(epochs):>4}  {record['RCP Mean']:6.2f}  {record['RCP Stdev']:5.2f}  "
            f"{record['Min Epochs']:15.2f}  {' '.join(map(str, epochs))}"
        )
    fewest = min(len(point[EPOCHS]) for point in points.values())
    if fewest < RUNS_OF_A_POINT or len(points) < 3:
        rules = f"the rules ask for {RUNS_OF_A_POINT} runs at each of three batch sizes"
        lines.append(f"Note: {rules}; here it is {len(points)}, and at least {fewest} runs.")
    return "\n".join(lines)


def read_points(path: Path) -> Points:
    """Read a file of points; RunError where it is none, or says that nobody has made them yet."""
    try:
        points: Points = json.loads(path.read_text(encoding="utf-8"))
        for point in points.values():
            if not point[EPOCHS]:
                raise RunError(f"{path}: {point['Note']}")
            dict(point["Subject"])
        describe(points)  # as the package reads it
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: no file of reference convergence points: {error!r}") from error
    return points


def check_convergence(paths: list[Path], reference: Path) -> tuple[bool, str]:
    """Check runs of one series against the points of a file. Return whether they pass, and why.

    RunError if a log breaks the open rules, the runs are no series, or the points are of something else.
    """
    points, runs = read_points(reference), one_series(load_valid(paths))
    if different := in_words(differing([*(point["Subject"] for point in points.values()), _subject(runs[0])])):
        raise RunError(f"{reference}: its points are not comparable with these runs; they differ in {different}")
    with tempfile.TemporaryDirectory() as folder, _REGISTERED, reference.open(encoding="utf-8") as file:
        for number, run in enumerate(runs):  # it checks a folder
            (Path(folder) / f"result_{number}.txt").symlink_to(run.path.resolve())
        passed, message, factor = check_directory(
            folder, "training", NEWEST, False, False, rcp_file=file, rcp_pass="pruned_rcps"
        )
    epochs = " ".join(str(run.epochs_to_target or "none") for run in runs)
    verdict = f"{'passed' if passed else 'FAILED'}: {message}; batch size {runs[0].batch_size}"
    verdict += f", epochs to target {epochs}"
    if passed and factor > 1 and math.isfinite(factor):
        verdict += f"\nFaster than the reference, within what chance explains: multiply the score by {factor:.4f}."
    return bool(passed), verdict
