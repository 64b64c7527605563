"""The run's log, MLPerf events through `mlperf-logging`, one `:::MLLOG` line each; and the benchmark's clock.

The log goes to standard output, once the clock has started also to last_run.log in the output folder, and to
TensorBoard if a folder is asked for:

    sh pytorch/run_and_time.sh --config an4 --tensorboard runs/an4
    tensorboard --logdir runs                                       # needs the extra `tensorboard`

A destination that fails is named once on standard error, and the run goes on.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

from data.packed import PackedDataset
from pytorch.config import EVENTS, ROOT, Config
from pytorch.errors import RunError
from pytorch.machine import git_revision

BENCHMARK = "deepspeech2"
SUBMISSION = {  # what the rules know; the first is the default
    constants.SUBMISSION_DIVISION: (constants.OPEN, constants.CLOSED),
    constants.SUBMISSION_STATUS: (constants.RESEARCH, constants.ONPREM, constants.CLOUD, "preview"),
}
LOG, REPORT = "last_run.log", "report.html"  # in the output folder


class Clock:
    """The benchmark's clock: elapsed seconds, with those before the run was resumed."""

    def __init__(self) -> None:
        self._before, self._started = 0.0, math.nan

    def start(self, before: float) -> int:
        """Start from `before` seconds. Return that instant as a log has it: milliseconds since 1970."""
        self._before, self._started = before, time.monotonic()
        return round(time.time() * 1000)

    def stop(self) -> int:
        """Stop. Return that instant as a log has it: milliseconds since 1970."""
        self._before, self._started = self.seconds(), math.nan
        return round(time.time() * 1000)

    def seconds(self) -> float:
        """Return the elapsed seconds."""
        return self._before + (0.0 if math.isnan(self._started) else time.monotonic() - self._started)


class Sink(logging.Handler):
    """A destination of the log. One that fails is named once; the run continues.

    Args:
        name: of the destination.
        write: writes a line; OSError if that fails.
    """

    def __init__(self, name: str, write: Callable[[str], None]) -> None:
        super().__init__()
        self.name, self._write = name, write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._write(record.getMessage())
        except OSError as error:
            self._write = lambda line: None
            print(f"warning: {self.name} cannot be written: {error.strerror or error}", file=sys.stderr)


def write_to_stdout(line: str) -> None:
    """Write a line of the log to standard output."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still to be written
        raise


class LogFile:
    """A file, appended to from the clock's start on: a run that cannot start leaves the log of the run before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[str] = []  # lines that are still to be written
        self._file: IO[str] | None = None

    def write(self, line: str) -> None:
        """Write a line, or keep it until the clock starts."""
        self._held.append(line)
        if f'"{constants.RUN_START}"' in line:
            self._file = self._path.open("a", encoding="utf-8")
        if self._file is not None:
            print(*self._held, sep="\n", file=self._file, flush=True)
            self._held.clear()


class TensorBoard:
    """Curves over steps, in a folder in which earlier runs may have written.

    Args:
        folder: where to write.
        step: of the run that a resumed run starts from; what was written after it is dropped.

    Raises:
        RunError: the package tensorboard is missing.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._step = step
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra
        except ImportError as error:
            raise RunError("--tensorboard needs a package: python -m pip install -e '.[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, line: str) -> None:
        """Add what a line of the log has to the curves."""
        if not line.startswith(":::MLLOG "):
            return
        event = json.loads(line.removeprefix(":::MLLOG "))
        key, value, metadata = event["key"], event["value"], event["metadata"]
        curves: dict[str, float] = {}
        if key == "train_loss":
            self._step = metadata["step_num"]
            curves = {"loss": value, **{name: metadata[name] for name in ("learning_rate", "gradient_norm")}}
        elif key == constants.EPOCH_STOP:
            rates = "utterances_per_second", "data_wait_fraction"  # a resumed epoch may have no step left
            curves = {name: metadata[name] for name in rates if name in metadata}
        elif key == "validation_errors":
            self._writer.add_scalar(f"validation/wer/{value}", metadata["wer"], self._step)
        elif key in (constants.EVAL_STOP, constants.RUN_STOP):
            self._writer.flush()
        for name, height in curves.items():
            self._writer.add_scalar(f"train/{name}", height, self._step)


def make_logger(folder: Path | None) -> MLLogger:
    """Return a logger to standard output and to last_run.log in a folder; without one, a logger to nowhere."""
    logger = logging.Logger("mlperf", logging.INFO)
    if folder is not None:
        logger.addHandler(Sink("standard output", write_to_stdout))
        logger.addHandler(Sink(str(folder / LOG), LogFile(folder / LOG).write))
    return MLLogger(logger, root_dir=str(ROOT))


def log_submission(
    log: MLLogger, config: Config, dataset: PackedDataset, machine: dict[str, Any], world_size: int
) -> None:
    """Log who runs what on which machine (`describe_machine`), and every hyperparameter, before the clock starts.

    Raises:
        RunError: SUBMISSION_DIVISION or SUBMISSION_STATUS is set to what the rules do not know.
    """
    log.event(constants.SUBMISSION_BENCHMARK, BENCHMARK)
    log.event(constants.SUBMISSION_ORG, os.environ.get("SUBMISSION_ORG") or "reference")
    for key in SUBMISSION:
        log.event(key, submission(key))
    used = f"{machine['cores']} cores of {machine['processor']}"
    if machine["accelerators"]:
        used = f"{world_size} x {machine['accelerator']}"  # one for each rank
    log.event(constants.SUBMISSION_PLATFORM, os.environ.get("SUBMISSION_PLATFORM") or used)
    for name, event in EVENTS.items():
        log.event(event, getattr(config, name))
    fp32 = "tf32" if machine["accelerators"] else "fp32"  # see select_precision
    lowest = "bfloat16" if config.precision == "bf16" else fp32
    no_attention = {"note": "the model has no attention; this is the precision of its matrix products"}
    log.event("lowest_numerical_precision_in_linear", lowest)  # from here on, what rulesets since 6.1.0 ask for
    log.event("lowest_numerical_precision_in_attn", lowest, metadata=no_attention)
    log.event("lowest_numerical_precision_in_comm", "fp32")
    for kind in ("tensor", "pipeline", "context", "expert"):
        log.event(f"{kind}_parallelism", 1)
    log.event("micro_batch_size", config.max_microbatch_size(world_size))
    log.event("config_filename", "pytorch/config.py")
    log.event("configuration", config.config, metadata=config.to_dict())
    source = {"corpus": dataset.corpus, "official_archives": dataset.official, "synthetic": dataset.synthetic}
    log.event("dataset", dataset.digest, metadata=source)
    log.event("number_of_ranks", world_size)
    log.event("environment", machine["processor"], metadata=machine)
    commit, changed = git_revision()
    log.event("git_commit", commit, metadata={"uncommitted_changes": changed})
    if image := os.environ.get("DEEPSPEECH2_IMAGE_ID"):  # set by docker/run-dev.sh
        log.event("container_image", image)


def submission(key: str) -> str:
    """Return the division or the status of runs that start now, from the environment variable of the key's name.

    Raises:
        RunError: the rules do not know it.
    """
    variable, known = key.upper(), SUBMISSION[key]
    value = os.environ.get(variable) or known[0]  # set but empty is not set
    if value not in known:
        raise RunError(f"{variable} is {value!r}; it must be one of {', '.join(known)}")
    return value
