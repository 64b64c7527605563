"""Several runs, one after another, with one seed each, into a submission's folders (submission.py).

    python -m tools.mlperf series --runs 10
    python -m tools.mlperf series --runs 5 --system my-laptop --series an4-batch-12 -- --config an4 --batch-size 12

Runs that are there already are kept, so the same command continues after an interruption, and more runs can be added.
A run that missed its target is a result too, and counts in the score. One that broke off, or whose log is refused, is
kept under another name and done again. What can be known to be wrong is said before the first run.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import tyro
from mlperf_logging.mllog import constants

from data.cli import INTERRUPTED
from data.packed import PackedDataset, open_dataset
from pytorch.config import CONFIGS, ROOT, Config, parse_config
from pytorch.errors import PREEMPTED, Preempted, RunError
from pytorch.machine import clear_cache, describe_machine, git_revision
from pytorch.mllog import BENCHMARK, REPORT, submission_division, submission_platform
from tools.mlperf.check import LIBRISPEECH, check, load_valid, published_utterances
from tools.mlperf.configuration import reference_problem
from tools.mlperf.runlog import RunLog
from tools.mlperf.score import ENVIRONMENT, FREE, MIN_RUNS, report, require_same_setup, score, setup
from tools.mlperf.submission import SubmissionDir, describe_system, system_name

SCRIPT = ROOT / "pytorch" / "run_and_time.sh"
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1  # passed on to the run under way


def run_series(
    runs: int,
    options: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="-- OPTION...")]] = (),
    system: str | None = None,
    series: str | None = None,
    tree: Path = ROOT / "submission",
) -> bool:
    """Do several runs, one after another, with the seeds SEED, SEED + 1, ..., and score them.

    Exit status 0 if there are as many runs as asked for, and a score; one or two runs need to reach the target only.

    Args:
        runs: how many; the rules ask for 10
        options: after --, those of a single run, such as --config an4 --seed 1 (sh pytorch/run_and_time.sh --help)
        system: name of this machine in the tree; None: made of its processor or accelerators
        series: name of the series; None: deepspeech2 for librispeech and librispeech-2018, else the configuration's
        tree: folder in which systems/ and results/ are
    """
    if runs < 1:
        raise RunError(f"--runs is {runs}; it must be a positive integer")
    if os.environ.get("NNODES", "") not in ("", "1"):
        raise RunError("a series is for one machine; on several, start each run on all of them")
    for option, name in (("--system", system), ("--series", series)):
        if name is not None and not re.fullmatch(r"[\w-][\w.-]*", name):
            raise RunError(f"{option} is {name!r}; it must be of letters, digits, '-', '_' and '.'")
    config = parse_config(options, program="python -m tools.mlperf series --runs N --", description="")
    if config.resume:
        raise RunError("--resume: a resumed run is not a result; runs that are already there are kept anyway")
    dataclasses.replace(config, seed=config.seed + runs - 1)  # RunError where the last one is too large
    if config.output_dir == CONFIGS[config.config].output_dir:  # runs here leave alone a model that was trained there
        config = dataclasses.replace(config, output_dir=config.output_dir / "series")
        options = (*options, "--output-dir", str(config.output_dir))
    description, expected = inspect_environment(config)
    default = BENCHMARK if config.config in ("librispeech", "librispeech-2018") else config.config
    folder = SubmissionDir(tree, system or system_name(description), series or default)
    with folder.locked() as lock:
        _require_kept_runs_match(folder, runs, {**expected, "seed": config.seed})
        folder.describe(description)
        for number in range(runs):
            seed, path = config.seed + number, folder.result(number)
            done_before = path.exists()
            if not done_before:
                path = _run(folder, number, [*options, "--seed", str(seed)], lock)
            outcome = "done before" if done_before else describe_outcome(path)
            _tell(f"Run {number + 1} of {runs}, seed {seed}: {outcome}; its log is {path}")
    results = [folder.result(number) for number in range(runs) if folder.result(number).exists()]
    return summarize(results, config.output_dir / REPORT) and len(results) == runs


def inspect_environment(config: Config) -> tuple[dict[str, str], dict[str, Any]]:
    """Look at the machine and the data set before the first run.

    Returns:
        The machine's description, but for its name; and what logs will say, by the names of `score.setup`.

    Raises:
        RunError: no log of a run that is started here would be accepted.
        DataError: there is no data set.
    """
    division = submission_division()
    dataset = open_dataset(config.dataset_dir)
    if refusals := list(_refusals(config, dataset, division)):
        raise RunError(f"no log would be accepted in the {division} division: {'; '.join(refusals)}")
    from pytorch.device import select_device  # slow to import: wrong options are refused before
    from pytorch.run_and_time import nproc_per_node

    device, ranks = select_device(config.device), nproc_per_node(config)
    machine = describe_machine(device)
    return describe_system(machine, ranks), {
        **{name: value for name, value in config.to_dict().items() if name not in FREE and value != "auto"},
        "data set": dataset.digest,
        constants.SUBMISSION_DIVISION: division,
        constants.SUBMISSION_PLATFORM: submission_platform(machine, ranks),
        "number_of_ranks": ranks,
        # Of several processes each has as many threads as its launcher gives it.
        **{name: machine.get(name) for name in ENVIRONMENT if ranks == 1 or name != "threads"},
    }


def _refusals(config: Config, dataset: PackedDataset, division: str) -> Iterator[str]:
    commit, changed = git_revision()
    if commit == "unknown":
        yield "the commit is not known: git, or its folder, is not there"
    if division != constants.CLOSED:
        return
    if changed:
        yield "files differ from the commit"
    if problem := reference_problem(config.to_dict()):
        yield f"{problem}: the closed recipe is --config librispeech-2018"
    if dataset.corpus != LIBRISPEECH.name or not dataset.official:
        yield f"{config.dataset_dir} is not made of the official archives of LibriSpeech"
    for split in ("train", "validation"):
        there = sum(dataset.summary[name].utterances for name in dataset.splits[split])
        if there != published_utterances(split):
            yield f"{there:,} utterances for {split}, not all {published_utterances(split):,}"
    if reason := clear_cache(dataset):
        yield f"the cache cannot be cleared: {reason}"


def _require_kept_runs_match(folder: SubmissionDir, runs: int, expected: dict[str, Any]) -> None:
    """RunError where a run that is there would be refused, or is not one of this series."""
    kept = [number for number in range(runs) if folder.result(number).exists()]
    for number, log in zip(kept, load_valid([folder.result(number) for number in kept]), strict=True):
        there = {**setup(log), "seed": (log.seed or 0) - number}
        for name, value in expected.items():
            if there.get(name) != value:
                said = f"{name} is {there.get(name)} there, {value} now"
                raise RunError(f"{log.path} is of another series: {said}; use another --series")


def _run(folder: SubmissionDir, number: int, arguments: list[str], lock: int) -> Path:
    """Do a run. Return its log, which is a result or set aside.

    Raises:
        RunError: it failed before its clock started, or its log is refused for what was so then: so would be the next.
        Preempted, KeyboardInterrupt: it was told to stop, and did.
    """
    if folder.partial(number).exists():  # of a series that was killed
        folder.set_aside(number)
    with folder.partial(number).open("wb") as file:
        # In a session of its own: else a terminal's Ctrl-C would reach it twice.
        command = ["sh", str(SCRIPT), *arguments]
        process = subprocess.Popen(command, stdout=file, pass_fds=[lock], start_new_session=True)
        status, signals = _wait(process)
    told = status in (PREEMPTED, INTERRUPTED) or bool(signals)
    if status in (0, 1) and _ended(folder.partial(number)):
        path = _accept(folder, number)
    else:
        started = constants.RUN_START in folder.partial(number).read_text(errors="replace")
        path = folder.set_aside(number)
        if not started and not told:
            raise RunError(f"the run failed before it started, with exit status {status}; its log is {path}")
    if told:
        _tell(f"The run was interrupted; its log is {path}. The same command continues the series.")
        raise KeyboardInterrupt if status == INTERRUPTED or signal.SIGINT in signals else Preempted
    return path


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, list[int]]:
    """Wait for a process, and pass signals on to it. Return its exit status, and the signals."""
    signals: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        signals.append(number)
        process.send_signal(number)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    handlers = {number: signal.signal(number, pass_on) for number in heard}
    try:
        return process.wait(), signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ended(path: Path) -> bool:
    """Return whether a run came to its own end: after an evaluation, or because its losses were no longer finite."""
    try:
        keys = [event.key for event in RunLog.read(path).events]
    except RunError:
        return False
    ends = {before for before, key in pairwise(keys) if key == constants.RUN_STOP}
    return bool(ends & {constants.EVAL_STOP, "skipped_step"})


def _accept(folder: SubmissionDir, number: int) -> Path:
    """Rename the log of a run that has ended: to that of a result if the score will take it for one. Return its path.

    RunError where it will not for what was so before the clock started, or the run is not one of this series.
    """
    log, found = check(folder.partial(number))
    if wrong := [each for each in found if not each.missed_target]:
        path, start = folder.set_aside(number), log.all(constants.RUN_START)[0].line
        for each in wrong:
            if each.line is not None and each.line < start:
                raise RunError(f"{path}: {each.reason} (every run would be refused for that)")
        _tell(f"{path}: {wrong[0].reason}")
        return path
    others = [folder.result(other) for other in range(number) if folder.result(other).exists()]
    try:
        require_same_setup([*map(RunLog.read, others), log])
    except RunError:
        folder.set_aside(number)
        raise
    return folder.partial(number).rename(folder.result(number))


def describe_outcome(path: Path) -> str:
    """Return how the run of a log ended."""
    if not path.name.startswith("result_"):
        return "failed; the same command repeats it"
    log = RunLog.read(path)
    return f"target reached in {log.seconds:.1f} s, epoch {log.epochs_to_target}" if log.reached else "target missed"


def summarize(results: list[Path], page: Path) -> bool:
    """Write a page about all runs, and print the score.

    Return whether there is a score; of runs too few for one, whether all reached the target.
    """
    if not results:
        return False
    found = score(results, fewest=1)
    _write_page(results, page)
    print(report(found))
    return found.seconds is not None or (len(results) < MIN_RUNS and not found.missed)


def _write_page(results: list[Path], page: Path) -> None:
    command = [sys.executable, "-m", "tools.report", *map(str, results), "--output", str(page)]
    subprocess.run(command, stdout=sys.stderr)  # if it fails, the runs have not


def _tell(message: str) -> None:
    with suppress(OSError):  # a closed terminal does not end a series
        print(message, file=sys.stderr, flush=True)
