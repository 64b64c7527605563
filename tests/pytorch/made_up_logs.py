"""Logs of runs that never were, for tests of what reads logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

SUBSETS = ("dev-clean", "dev-other")
SAID = [
    ("THE CAT SAT ON THE MAT", "A DOG"),
    ("HE CAME HOME", "HE COME HOME"),
    ("IT WAS LATE", "IT WAS VERY LATE"),
    ("SHE DID NOT ANSWER", "SHE DID ANSWER"),
    ("GOOD NIGHT", "GOOD NIGHT"),
    ("SO THEY SAY", "SO THEY SAY"),
]


class Log:
    """Lines of a log, one second after the other."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.milliseconds = 1_700_000_000_000

    def event(self, key: str, value: Any = None, seconds: float = 0.0, **metadata: Any) -> None:
        """Add an event, some seconds after the one before."""
        self.milliseconds += round(1000 * seconds)
        kind = {"t": "INTERVAL_START", "p": "INTERVAL_END"}.get(key[-1], "POINT_IN_TIME")
        metadata = {"file": "pytorch/train.py", "lineno": 1, **metadata}
        known = {"namespace": "", "time_ms": self.milliseconds, "event_type": kind, "key": key, "value": value}
        self.lines.append(":::MLLOG " + json.dumps({**known, "metadata": metadata}))

    def write(self, path: Path) -> Path:
        """The file."""
        path.write_text("\n".join(self.lines) + "\n")
        return path


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
    official: bool = True,
    synthetic: bool = False,
) -> Log:
    """A run of so many epochs of so many steps each, on two validation subsets."""
    log = Log()
    log.event("init_start")
    why: dict[str, Any] = {} if cleared else {"reason": "audio.npy is still cached"}
    log.event("cache_clear", cleared, **why)
    for key, value in {
        "benchmark": "deepspeech2",
        "org": "reference",
        "division": "open",
        "status": "research",
    }.items():
        log.event(f"submission_{key}", value)
    log.event("submission_platform", "2 cores of a processor")
    log.event("seed", seed)
    log.event("global_batch_size", 8)
    configuration = {"seed": seed, "target_wer": 23.0, "learning_rate": 0.001, "max_steps": None, **(config or {})}
    log.event("configuration", "librispeech", config="librispeech", **configuration)
    log.event("dataset", "f" * 64, corpus="librispeech", official_archives=official, synthetic=synthetic)
    log.event("environment", "a processor", processor="a processor", cores=2, torch="2.14.1")
    log.event("git_commit", "0123456789abcdef", uncommitted_changes=dirty)
    if resumed is not None:
        log.event("resumed", True, elapsed_seconds=resumed)
    log.event("checkpoint", 0.5, 0.5, step_num=0)
    log.event("init_stop", seconds=1.5)
    log.event("run_start")
    step = 0
    for epoch in range(1, epochs + 1):
        log.event("epoch_start", epoch_num=epoch)
        for _ in range(steps):
            step += 1
            rate, norm = 0.001 / step, 100 + 50 * math.sin(step)
            log.event("train_loss", 200 / step, 0.5, step_num=step, learning_rate=rate, gradient_norm=norm)
        speed = {"utterances_per_second": 16.0 + epoch, "audio_seconds_per_second": 100.0, "data_wait_fraction": 0.01}
        log.event("epoch_stop", epoch_num=epoch, step=step, finished=True, loss=150 / epoch, seconds=0.0, **speed)
        log.event("eval_start", epoch_num=epoch)
        wer = (15.0 if reached else 30.0) + 60 * (1 - epoch / epochs)
        log.event("eval_accuracy", wer, 4, epoch_num=epoch, utterances=20, words=200)
        for number, name in enumerate(("all", *SUBSETS)):
            errors: dict[str, Any] = {
                "utterances": 10,
                "word_errors": round(wer) + number,
                "words": 100,
                "character_errors": 20,
            }
            errors |= {"characters": 500, "sum_of_utterance_wers": 3.0}
            log.event("validation_errors", name, epoch_num=epoch, **errors)
        log.event("eval_stop", epoch_num=epoch)
        if epoch < epochs:
            log.event("checkpoint", 0.5, 0.5, step_num=step)
    log.event("run_stop", status="success" if reached else "aborted")
    for number, (reference, hypothesis) in enumerate(said):
        words: dict[str, Any] = {"reference": reference, "hypothesis": hypothesis}
        log.event("transcript", f"84-{number:04d}", subset=SUBSETS[number % 2], **words, wer=50.0)
    log.event("checkpoint", 0.5, 0.5, step_num=step)
    return log
