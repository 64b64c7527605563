"""Several runs, one after another, with one seed each, into a submission's tree (tree.py).

    sh pytorch/run_and_time.sh --runs 10
    sh pytorch/run_and_time.sh --runs 5 --system my-laptop --config synthetic --batch-size 16

Runs that are there already are kept, so the same command goes on after an interruption, and more runs can be added.
A run that missed its target is a result too, and counts in the score. One that broke off, or whose log is refused, is
kept under another name and done again. What can be known to be wrong is said before the first run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from mlperf_logging.mllog import constants

from data.packed import open_dataset
from pytorch.cli import PREEMPTED, Preempted, RunError, exit_status
from pytorch.config import ROOT, Config, parse_config
from pytorch.machine import clear_cache, describe_machine, git_revision
from pytorch.mllog import REPORT, submission_division, submission_platform
from tools.mlperf.check import check, describe, sound
from tools.mlperf.configuration import ENVIRONMENT, FREE, comparable
from tools.mlperf.logs import RunLog
from tools.mlperf.score import FEWEST_RUNS, report, same_series, score_of
from tools.mlperf.system import describe_system, system_name
from tools.mlperf.tree import Tree

SCRIPT = ROOT / "pytorch" / "run_and_time.sh"
Outcome = Literal["kept", "ended", "failed"]


@dataclass(frozen=True)
class Options:
    """Runs with the seeds SEED, SEED + 1, ..., one after another; all other options are those of a single run."""

    runs: int
    """how many; the rules ask for 10"""
    system: str | None = None
    """name of this machine in the tree; None: made of its processor or accelerators, with -NAME for --config NAME"""
    tree: Path = ROOT
    """folder in which systems/ and results/ are"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status: 0 if there are as many runs as asked for, and a score."""
    given = sys.argv[1:] if arguments is None else arguments
    return exit_status(lambda: series(given), interrupted="interrupted; the same command goes on")


def series(arguments: Sequence[str]) -> bool:
    """Do the runs of a command line; returns whether there are as many as asked for, and a score.

    Raises:
        RunError: options, folder or runs that are there will not do; or what ails one run would ail the next.
        DataError: there is no data set, or another series is under way.
    """
    options, rest = tyro.cli(
        Options,
        args=list(arguments),
        prog="sh run_and_time.sh",
        description=f"{Options.__doc__}\n\nThose: sh run_and_time.sh [--config NAME] --help",
        return_unknown_args=True,
    )
    if options.runs < 1:
        raise RunError(f"--runs is {options.runs}; it must be a positive integer")
    if int(os.environ.get("NNODES") or 1) > 1:
        raise RunError("--runs is for one machine; on several, start each run on all of them")
    if options.system is not None and not options.system.translate(_PUNCTUATION).isalnum():
        raise RunError(f"--system is {options.system!r}; it must be of letters, digits, '-', '_' and '.'")
    config = parse_config(rest, program="sh run_and_time.sh --runs N", description="")
    if config.resume:
        raise RunError("--runs with --resume: a resumed run is no result; the runs that are there already are kept")
    here = _look_around(config)
    suffix = "" if config.config == "librispeech" else f"-{config.config}"
    tree = Tree(options.tree, options.system or system_name(here.description) + suffix)
    failed = []
    with tree.locked() as lock:
        _check_kept(tree, config, here, options.runs)
        tree.describe({**here.description, "system_name": tree.system})
        for number in range(options.runs):
            seed = config.seed + number
            outcome, path = _run(tree, number, [*rest, "--seed", str(seed)], lock)
            print(f"Run {number + 1} of {options.runs}, seed {seed}: {_say(outcome, path)}", file=sys.stderr)
            if outcome == "failed":
                failed.append(path)
    results = [path for number in range(options.runs) if (path := tree.result(number)).exists()]
    for path in failed:
        print(f"This run failed; the same command does it again: {path}")
    return _conclude(results, config.output_dir / REPORT) and not failed


_PUNCTUATION = dict.fromkeys(map(ord, "-_."))


@dataclass(frozen=True)
class Here:
    """What is known before the first run starts."""

    description: dict[str, str]  # of the machine; its name in the tree is still to come
    logged: dict[str, Any]  # what logs will say, by what `differences` calls it


def _look_around(config: Config) -> Here:
    """Where the runs will run.

    Raises:
        RunError: no log of a run that is started here would be accepted.
        DataError: there is no data set.
    """
    division = submission_division()
    dataset = open_dataset(config.dataset_dir)
    commit, changed = git_revision()
    if commit == "unknown":
        raise RunError("the commit is not known, so no log would be accepted: git, or its folder, is not there")
    if division == constants.CLOSED and changed:
        raise RunError("files differ from the commit, so no log would be accepted in the closed division")
    if division == constants.CLOSED and (reason := clear_cache(dataset)):
        raise RunError(f"the cache cannot be cleared, so no log would be accepted in the closed division: {reason}")
    from pytorch.device import select_device  # slow to import: wrong options are refused before
    from pytorch.launch import processes_here

    device, ranks = select_device(config.device), processes_here()
    machine = describe_machine(device)
    logged = {
        "data set": dataset.digest,
        constants.SUBMISSION_DIVISION: division,
        constants.SUBMISSION_PLATFORM: submission_platform(machine, ranks),
        "number_of_ranks": ranks,
        # Of several processes each has as many threads as its launcher gives it.
        **{name: machine.get(name) for name in ENVIRONMENT if ranks == 1 or name != "threads"},
    }
    return Here(describe_system("", device, ranks), logged)


def _check_kept(tree: Tree, config: Config, here: Here, count: int) -> None:
    """RunError where a run that is there would be refused, or is not one of this series."""
    fixed = {name: value for name, value in config.to_dict().items() if name not in FREE and value != "auto"}
    kept = {number: path for number in range(count) if (path := tree.result(number)).exists()}
    for number, log in zip(kept, sound(list(kept.values())), strict=True):
        there = {**log.configuration, **comparable(log), "seed": log.seed}
        for name, value in {**fixed, **here.logged, "seed": config.seed + number}.items():
            if there.get(name) != value:
                said = f"{name} is {there.get(name)} there, {value} now"
                raise RunError(f"{log.path} is of another series: {said}; use another --system")


def _run(tree: Tree, number: int, arguments: list[str], lock: int) -> tuple[Outcome, Path]:
    """Do a run that is not there yet. Returns how it ended, and its log.

    Raises:
        RunError: what ails it was there before its clock started, so it would ail the next one, too.
    """
    if tree.result(number).exists():
        return "kept", tree.result(number)
    if tree.partial(number).exists():  # of a series that was killed
        tree.set_aside(number)
    with tree.partial(number).open("wb") as file:
        process = subprocess.Popen(["sh", str(SCRIPT), *arguments], stdout=file, pass_fds=[lock])
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the run was interrupted, too, and ends by itself
            process.wait()
            tree.set_aside(number)
            raise
    if status in (0, 1) and _ended(tree.partial(number)):
        return _accept(tree, number)
    started = constants.RUN_START in tree.partial(number).read_text(errors="replace")
    path = tree.set_aside(number)
    if status == 130:
        raise KeyboardInterrupt
    if status == PREEMPTED:
        raise Preempted
    if not started:
        raise RunError(f"the run failed before it started, with exit status {status}; its log is {path}")
    return "failed", path


def _ended(path: Path) -> bool:
    """Whether a run came to its own end: after an evaluation, or because its losses were no longer finite."""
    try:
        events = RunLog.read(path).events
    except RunError:
        return False
    keys = [event.key for event in events]
    if constants.RUN_STOP not in keys:
        return False
    before = keys[: keys.index(constants.RUN_STOP)]
    return before[-1:] in ([constants.EVAL_STOP], ["skipped_step"])


def _accept(tree: Tree, number: int) -> tuple[Outcome, Path]:
    """Give the log of a run that has ended the name of a result, if the score will take it for one.

    Raises:
        RunError: it will not, for what was so before the clock started; or the run is not one of this series.
    """
    log, found = check(tree.partial(number))
    if wrong := [each for each in found if not each.unreached]:
        path = tree.set_aside(number)
        start = next(log.all(constants.RUN_START)).line
        for each in wrong:
            if each.line is not None and each.line < start:
                raise RunError(f"{describe(path, each)} (every run would be refused for that)")
        print(f"refused: {describe(path, wrong[0])}", file=sys.stderr)
        return "failed", path
    others = [tree.result(other) for other in range(number) if tree.result(other).exists()]
    try:
        same_series(sound([*others, tree.partial(number)]))
    except RunError:
        tree.set_aside(number)
        raise
    return "ended", tree.partial(number).rename(tree.result(number))


def _say(outcome: Outcome, path: Path) -> str:
    if outcome == "failed":
        return f"failed; its log is {path}"
    log = RunLog.read(path)
    how = "target not reached"
    if log.reached:
        how = f"target reached in {log.seconds:.1f} s, epoch {log.epochs_to_target}"
    return f"{how}{' (done before)' if outcome == 'kept' else ''}; its log is {path}"


def _conclude(results: list[Path], page: Path) -> bool:
    """Print the score, and write a page about all runs.

    Returns:
        Whether there is a score; of runs too few for one, whether all reached the target.
    """
    if not results:
        return False
    found = score_of(same_series(sound(results)))
    print(report(found))
    _write_page(results, page)
    return found.seconds is not None or (len(results) < FEWEST_RUNS and not found.unreached)


def _write_page(results: list[Path], page: Path) -> None:
    subprocess.run(  # if it fails, the runs have not
        [sys.executable, "-m", "tools.report", *map(str, results), "--output", str(page)]
    )


if __name__ == "__main__":
    sys.exit(main())
