"""Several runs, one after another, with one seed each, into a submission's tree (tree.py).

    sh pytorch/run_and_time.sh --runs 10
    sh pytorch/run_and_time.sh --runs 5 --system my-laptop --config synthetic --batch-size 16

Runs that are there already are kept, so the same command goes on after an interruption, and more runs can be added. A
run that missed its target is a result too, and counts in the score; one that broke off is kept under another name and
done again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from mlperf_logging.mllog import constants

from pytorch.command import PREEMPTED, Preempted
from pytorch.config import ROOT, Config, RunError, parse_config
from pytorch.devices import choose_device
from pytorch.mlperf.check import sound
from pytorch.mlperf.configuration import FREE
from pytorch.mlperf.logs import RunLog
from pytorch.mlperf.score import FEWEST_RUNS, report, same_series, score_of
from pytorch.mlperf.system import describe_system, system_name
from pytorch.mlperf.tree import Tree
from pytorch.run_and_time import REPORT

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


def main(arguments: Sequence[str]) -> bool:
    """Run a command line; returns whether there are as many runs as asked for, and a score.

    Raises:
        RunError: options, folder or runs that are there will not do; or a run failed before it started to train.
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
    config = parse_config(rest, program="sh run_and_time.sh --runs N", description="")
    if config.resume:
        raise RunError("--runs with --resume: a resumed run is no result; the runs that are there already are kept")
    description = describe_system("", choose_device(config.device))
    suffix = "" if config.config == "librispeech" else f"-{config.config}"
    tree = Tree(options.tree, options.system or system_name(description) + suffix)
    if not tree.system.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise RunError(f"--system is {tree.system!r}; it must be of letters, digits, '-', '_' and '.'")
    failed = []
    with tree.locked() as lock:
        _check_kept(tree, config, options.runs)
        tree.describe({**description, "system_name": tree.system})
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


def _check_kept(tree: Tree, config: Config, count: int) -> None:
    """RunError where a run that is there is not one of this series."""
    fixed = {name: value for name, value in config.plain().items() if name not in FREE and value != "auto"}
    for number in range(count):
        path = tree.result(number)
        if not path.exists():
            continue
        log = RunLog.read(path)
        wanted = {**fixed, "seed": config.seed + number}
        for name, value in wanted.items():
            there = log.configuration.get(name)
            if there != value:
                raise RunError(
                    f"{path} is of another series: {name} is {there} there, {value} now; use another --system"
                )


def _run(tree: Tree, number: int, arguments: list[str], lock: int) -> tuple[Outcome, Path]:
    """Do a run that is not there yet. Returns how it ended, and its log.

    Raises:
        RunError: it failed before the clock started, so the next one would, too.
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
        return "ended", tree.partial(number).rename(tree.result(number))
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
    command = [sys.executable, "-m", "pytorch.report", *map(str, results), "--output", str(page)]
    subprocess.run(command)  # if it fails, the runs have not
    return found.seconds is not None or (len(results) < FEWEST_RUNS and not found.unreached)
