"""Several runs, one after another, with one seed each, into the folders that MLCommons' package checker expects.

    python -m tools.mlperf series --runs 10
    python -m tools.mlperf series --runs 5 --system my-laptop --series an4-batch-12 -- --config an4 --batch-size 12

    <tree>/systems/<system>.json                         the machine
    <tree>/results/<system>/<series>/result_<i>.txt      logs of runs, from 0, also of one that missed its target
    <tree>/results/<system>/<series>/failed_<i>_<n>.txt  logs of runs that broke off, are refused, or are under way

Results that exist are kept, so the same command continues after an interruption, and can add runs.
"""

import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import tyro
from mlperf_logging.mllog import constants

from data.cli import INTERRUPTED
from data.files import locked
from data.packed import open_dataset
from pytorch.config import CONFIGS, ROOT, Config, parse_config
from pytorch.errors import PREEMPTED, Preempted, RunError
from pytorch.machine import git_revision
from pytorch.mllog import BENCHMARK, submission
from tools.mlperf.check import check, load_valid, reference_problem
from tools.mlperf.runlog import RunLog
from tools.mlperf.score import MIN_RUNS, comparability_key, differences, report, score
from tools.output_files import write_output

COMMAND = [sys.executable, "-m", "pytorch.run_and_time"]
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1  # passed on to the run under way
SYSTEM = Path(__file__).with_name("system.json")  # the form of a machine's description
DETECTED = "host_processor_model_name", "host_processor_vcpu_count", "accelerator_model_name"
STATUSES = {  # of the log, as the description calls them
    constants.ONPREM: "Available on-premise",
    constants.CLOUD: "Available cloud",
    "preview": "Preview",
    constants.RESEARCH: "Research, Development, or Internal (RDI)",
}


def run_series(
    runs: int,
    options: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="-- OPTION...")]] = (),
    system: str = "my-machine",
    series: str | None = None,
    tree: Path = ROOT / "submission",
) -> bool:
    """Do several runs, one after another, with the seeds SEED, SEED + 1, ..., and score them.

    Exit status 0 if there are as many runs as asked for, and a score; one or two runs need to reach the target only.

    Args:
        runs: how many; the rules ask for 10
        options: after --, those of a single run, such as --config an4 --seed 1 (sh pytorch/run_and_time.sh --help)
        system: name of this machine in the tree
        series: name of the series; None: deepspeech2 for librispeech and librispeech-2018, else the configuration's
        tree: folder in which systems/ and results/ are
    """
    for option, name in (("--system", system), ("--series", series)):
        if not re.fullmatch(r"[\w-][\w.-]*", name or "-"):
            raise RunError(f"{option} is {name!r}; it must be of letters, digits, '-', '_' and '.'")
    if runs < 1 or os.environ.get("NNODES", "1") not in ("", "1"):
        raise RunError("a series is of one run or more (--runs), on one node (NNODES)")
    config = parse_config(options, program="python -m tools.mlperf series --runs N --", description="")
    if config.resume:
        raise RunError("--resume: a resumed run is not a result; runs that are already there are kept anyway")
    dataclasses.replace(config, seed=config.seed + runs - 1)  # RunError where the last one is too large
    if config.output_dir == CONFIGS[config.config].output_dir:  # leaves alone a model that was trained there
        config = dataclasses.replace(config, output_dir=config.output_dir / "series")
    _require_acceptable(config)
    dataset = open_dataset(config.dataset_dir)
    default = BENCHMARK if config.config in ("librispeech", "librispeech-2018") else config.config
    folder = tree / "results" / system / (series or default)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, "series of runs") as lock:
        kept = {number: path for number in range(runs) if (path := folder / f"result_{number}.txt").exists()}
        logs = load_valid(list(kept.values()))
        for number, log in zip(kept, logs, strict=True):
            now = {**config.to_dict(), "seed": config.seed + number, "data set": dataset.digest}
            then = {**comparability_key(log), "seed": log.seed}
            if other := [key for key in then if now.get(key, then[key]) not in ("auto", then[key])]:
                what = ", ".join(f"{key}: log {then[key]}, now {now[key]}" for key in other)
                raise RunError(f"{log.path} is of another series ({what}); use another --series")
        for number in range(runs):
            outcome = "already complete"
            if number not in kept:
                outcome = _run(folder, number, [*options, "--seed", str(config.seed + number)], config, logs, lock)
            print(f"Run {number + 1} of {runs} (seed {config.seed + number}): {outcome}", file=sys.stderr, flush=True)
    if not logs:
        return False
    found = score(logs, fewest=1)
    print(report(found), f"A page about these runs: python -m tools.report {folder}", sep="\n")
    return len(logs) == runs and (found.seconds is not None or (runs < MIN_RUNS and not found.missed))


def _require_acceptable(config: Config) -> None:
    """Raise RunError where no log of a run that is started here would be accepted."""
    commit, changed = git_revision()
    submission(constants.SUBMISSION_STATUS)  # RunError where it is none
    closed = submission(constants.SUBMISSION_DIVISION) == constants.CLOSED
    problem = reference_problem(config.to_dict()) if closed else ""
    if commit == "unknown":
        raise RunError("no log would be accepted: the commit is not known: git, or its folder, is not there")
    if closed and changed:
        raise RunError("no log would be accepted in the closed division: files differ from the commit")
    if problem:
        raise RunError(f"no log would be accepted in the closed division, which is for librispeech-2018: {problem}")


def describe_system(path: Path, log: RunLog) -> None:
    """Write the description of the machine that a log is of, unless there is one, which its owner may have edited.

    RunError where that one is no description, or of another machine.
    """
    ranks, gpus = log.value("number_of_ranks"), log.environment["accelerators"]
    facts = dict.fromkeys(("accelerator", "accelerator_memory_gib", "cuda", "cudnn"), "none") | log.environment
    facts |= {"gpus": ranks if gpus else 0, "of_gpus": "not known" if gpus else "none", "system": path.stem}
    facts |= {name: log.value(f"submission_{name}") for name in ("org", "division")}
    facts["status"] = STATUSES[log.value(constants.SUBMISSION_STATUS)]
    form = json.loads(SYSTEM.read_text(encoding="utf-8"))
    description = {name: text.format(**facts) for name, text in form.items()}
    if not path.exists():
        write_output(path, json.dumps(description, indent=2) + "\n")
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        other = [name for name in DETECTED if kept[name] != description[name]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path}: no description of a machine: {error!r}") from error
    if other:
        what = f"{other[0]}: file {kept[other[0]]}, now {description[other[0]]}"
        raise RunError(f"{path} is of another machine ({what}); use another --system")


def _run(folder: Path, number: int, options: list[str], config: Config, logs: list[RunLog], lock: int) -> str:
    """Do a run. Return how it ended; a result is added to `logs`.

    RunError if what is wrong with it would be wrong with the next run, too; Preempted or KeyboardInterrupt if it was
    told to stop, and did.
    """
    attempt = next(n for n in itertools.count(1) if not (folder / f"failed_{number}_{n}.txt").exists())
    path = folder / f"failed_{number}_{attempt}.txt"  # until it is known to be a result
    # In a folder of its own, no earlier run is put away, or seems worth continuing.
    output_dir = config.output_dir / f"{folder.name}_{number}_{attempt}"
    with path.open("xb") as file:
        # In a session of its own: else a terminal's Ctrl-C would reach it twice.
        command = [*COMMAND, *options, "--output-dir", str(output_dir)]
        process = subprocess.Popen(command, stdout=file, pass_fds=[lock], start_new_session=True)
        status, signals = _wait(process)
    told_to_end = KeyboardInterrupt if status == INTERRUPTED or signal.SIGINT in signals else Preempted
    if status in (PREEMPTED, INTERRUPTED) or -status in SIGNALS:  # the latter in its first seconds
        print(f"The run was interrupted; its log is {path}. The same command continues the series.", file=sys.stderr)
        raise told_to_end
    if constants.RUN_START not in path.read_text(errors="replace"):
        raise RunError(f"the run failed before it started, with exit status {status}; its log is {path}")
    log, found = check(path)
    wrong = [each for each in found if not each.missed_target]
    start = log.all(constants.RUN_START)[0].line
    if before := [each for each in wrong if each.line is not None and each.line < start]:
        raise RunError(f"{before[0]} (every run would be refused for that)")
    if other := differences([*logs, log]):
        raise RunError(f"{path} is of another series than the runs before it; they differ in {', '.join(other)}")
    diverged = bool(log.steps) and log.steps[-1].loss is None
    if wrong or (log.exception is not None and not diverged):
        reason = wrong[0] if wrong else f"{path}: {log.exception}"
        return f"failed, and the same command repeats it: {reason}"
    result = path.rename(folder / f"result_{number}.txt")
    logs.append(dataclasses.replace(log, path=result))
    describe_system(folder.parents[1].with_name("systems") / f"{folder.parent.name}.json", log)
    if signals:
        raise told_to_end
    outcome = f"target reached in {log.seconds:.1f} s, epoch {log.epochs_to_target}" if log.reached else "target missed"
    return f"{outcome}; its log is {result}"


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, list[int]]:
    """Wait for a process, and pass signals on to it. Return its exit status, and the signals."""
    signals: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        signals.append(number)
        process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)

    # but for what nohup, or a shell that starts this in the background, has it ignore
    before = {number: signal.getsignal(number) for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, pass_on)
    try:
        return process.wait(), signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
