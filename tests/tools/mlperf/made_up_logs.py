"""Logs of runs that never were, with all that the report shows."""

import dataclasses
from pathlib import Path
from typing import Any

from pytorch.config import CONFIGS
from pytorch.metrics import count_errors
from tests.tools.mlperf.forged import Forged, made_up
from tools.report.runs import Series, read_series

TRAINING = 281241  # utterances of LibriSpeech
SUBSETS = {"dev-clean": 2703, "dev-other": 2864}
SAID = [
    ("THE CAT SAT ON THE MAT", "A DOG"),
    ("HE CAME HOME", "HE COME HOME"),
    ("IT WAS LATE", "IT WAS VERY LATE"),
    ("SHE DID NOT ANSWER", "SHE DID ANSWER"),
    ("GOOD NIGHT", "GOOD NIGHT"),
    ("SO THEY SAY", "SO THEY SAY"),
]


def series_of(folder: Path, *logs: Forged) -> list[Series]:
    """The series of these logs."""
    return read_series({log.write(folder / f"{number}.log"): "" for number, log in enumerate(logs)})


def add(log: Forged, after: str, key: str, value: Any, number: int = 0, seconds: float = 0.0, **metadata: Any) -> None:
    """Put an event after one of a log's events, and move what follows by this many seconds."""
    position = log.positions(after)[number]
    before = log.events[position]
    for event in log.events[position + 1 :]:
        event["time_ms"] += round(1000 * seconds)
    added = {"key": key, "value": value, "metadata": metadata, "time_ms": before["time_ms"] + round(1000 * seconds)}
    log.events.insert(position + 1, {**before, **added})


def made_up_log(
    *,
    seed: int = 1,
    epochs: int = 3,
    steps: int = 40,
    reached: bool = True,
    said: list[tuple[str, str]] = SAID,
    config: dict[str, Any] | None = None,
    dirty: bool = False,
    cleared: bool = True,
    resumed: float | None = None,
    synthetic: bool = False,
    others: float = 0.01,
) -> Forged:
    """A run of about this many steps in each epoch: 20 s of training, 10 s of evaluation, 0.5 s for a checkpoint."""
    wers = [(15 if reached else 30) + 60 * (1 - epoch / epochs) for epoch in range(1, epochs + 1)]
    log = made_up(
        dataclasses.replace(CONFIGS["librispeech"], seed=seed, batch_size=-(-TRAINING // steps), precision="bf16"),
        wers=wers,
        train_samples=TRAINING,
        validation=SUBSETS,
        seconds_of_epoch=20.0,
    )
    log.edit("configuration", **(config or {}))
    log.edit("dataset", synthetic=synthetic)
    log.edit("git_commit", ("0123456789abcdef" * 3)[:40], uncommitted_changes=dirty)
    if not cleared:
        log.edit("cache_clear", False, reason="audio.npy is still cached")
    if resumed is not None:
        add(log, "git_commit", "resumed", True, elapsed_seconds=resumed)
    add(log, "git_commit", "checkpoint", 0.5, step_num=0)  # before the clock starts
    add(log, "run_stop", "cpu_taken", others, stolen=0.02, involuntary_context_switches=7)
    for number in range(epochs):
        add(log, "epoch_stop", "checkpoint", 0.5, number, 0.5, step_num=steps * (number + 1))
    for number, (reference, hypothesis) in reversed(list(enumerate(said))):
        wer = count_errors(reference, hypothesis).wer
        words: dict[str, Any] = {"reference": reference, "hypothesis": hypothesis, "wer": wer}
        add(log, "run_stop", "transcript", f"84-{number:04d}", subset=[*SUBSETS][number % 2], **words)
    if log.result is not None:
        stop, start = (log.events[log.positions(key)[0]]["time_ms"] for key in ("run_stop", "run_start"))
        log.result = f"RESULT,DEEPSPEECH2,{seed},{(stop - start) / 1000:.0f},user,2026-11-23 07:59:05 AM"
    return log
