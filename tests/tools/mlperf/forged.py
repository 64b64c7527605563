"""Logs to be refused, made of real ones; and logs of runs that nobody has done, such as one of all LibriSpeech."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from data.corpora import CORPORA
from pytorch.config import CONFIGS, EVENTS, Config
from pytorch.metrics import ErrorCounts
from pytorch.optimizer import learning_rate

TOKEN = ":::MLLOG "


@dataclasses.dataclass
class Forged:
    """A log, to be changed."""

    events: list[dict[str, Any]]
    result: str | None

    @classmethod
    def of(cls, path: Path) -> Self:
        lines = path.read_text().splitlines()
        events = [json.loads(line.removeprefix(TOKEN)) for line in lines if line.startswith(TOKEN)]
        return cls(events, next((line for line in lines if line.startswith("RESULT")), None))

    def positions(self, key: str) -> list[int]:
        return [position for position, event in enumerate(self.events) if event["key"] == key]

    def edit(self, key: str, value: Any = ..., number: int = 0, **metadata: Any) -> None:
        """Change value or metadata of an event; metadata of None is removed."""
        event = self.events[self.positions(key)[number]]
        if value is not ...:
            event["value"] = value
        for name, content in metadata.items():
            event["metadata"][name] = content
            if content is None:
                del event["metadata"][name]

    def remove(self, key: str, number: int = 0) -> None:
        del self.events[self.positions(key)[number]]

    def shift(self, start: str, seconds: float, number: int = 0) -> None:
        """Move an event and all after it in time."""
        for event in self.events[self.positions(start)[number] :]:
            event["time_ms"] += int(1000 * seconds)

    def text(self) -> str:
        lines = [TOKEN + json.dumps(event) for event in self.events]
        return "\n".join([*lines, *([self.result] if self.result else [])]) + "\n"

    def write(self, path: Path) -> Path:
        path.write_text(self.text())
        return path


def reference(**changes: Any) -> Config:
    """The configuration of 2018 on LibriSpeech, at a batch size with few steps."""
    return dataclasses.replace(CONFIGS["librispeech-2018"], **{"batch_size": 4096, "precision": "bf16", **changes})


def made_up(
    config: Config,
    *,
    wers: Sequence[float] = (40.0, 22.0),
    division: str = "open",
    corpus: str = "librispeech",
    train_samples: int = 281241,
    validation: dict[str, int] | None = None,
    seconds_of_epoch: float = 100.0,
) -> Forged:
    """The log that a run with these word error rates would have. Each utterance has 10 words of 50 characters."""
    validation = validation or {"dev-clean": 2703, "dev-other": 2864}
    clock = 1_800_000_000_000
    events: list[dict[str, Any]] = []

    def log(key: str, value: Any = None, after: float = 0.0, /, **metadata: Any) -> None:
        nonlocal clock
        clock += round(1000 * after)
        known = {"file": "pytorch/train.py", "lineno": 1, **metadata}
        event = {"namespace": "", "time_ms": clock, "event_type": "", "key": key, "value": value, "metadata": known}
        events.append(event)

    log("init_start")
    log("cache_clear", True)
    names = {"benchmark": "deepspeech2", "org": "reference", "division": division, "status": "research"}
    for name, value in {**names, "platform": "made up"}.items():
        log(f"submission_{name}", value)
    for name, event in EVENTS.items():
        log(event, getattr(config, name))
    for name in ("linear", "attn", "comm"):
        log(f"lowest_numerical_precision_in_{name}", "bfloat16")
    for name in ("tensor", "pipeline", "context", "expert"):
        log(f"{name}_parallelism", 1)
    log("micro_batch_size", config.batch_size)
    log("config_filename", "pytorch/config.py")
    log("configuration", config.config, **config.to_dict())
    digest = CORPORA[corpus].reference_digest if corpus in CORPORA else ""
    synthetic = corpus == "synthetic"
    log("dataset", digest or "0" * 64, corpus=corpus, official_archives=not synthetic, synthetic=synthetic)
    log("number_of_ranks", 1)
    log("environment", "made up", processor="made up", cores=1, torch="2.14.1", accelerators=0)
    log("git_commit", "0" * 40, uncommitted_changes=False)
    log("init_stop", None, 60)
    log("run_start")
    started, step, evaluating = clock, 0, 0.0
    log("train_samples", train_samples)
    log("eval_samples", sum(validation.values()))
    log("train_samples_left_out", 0, reason="too short for CTC", ids=[])
    in_epoch = math.ceil(train_samples / config.batch_size)
    for epoch, wer in enumerate(wers, start=1):
        log("epoch_start", epoch_num=epoch)
        for _ in range(in_epoch):
            rate, loss = learning_rate(config, step, in_epoch), 100 / (1 + step + config.seed / 1000)
            step += 1
            log("train_loss", loss, seconds_of_epoch / in_epoch, step_num=step, learning_rate=rate, gradient_norm=1.0)
        trained = {"step": step, "finished": True, "loss": 1.0, "seconds": seconds_of_epoch}
        rates = {"utterances_per_second": train_samples / seconds_of_epoch, "audio_seconds_per_second": 1.0}
        log("epoch_stop", None, 0, epoch_num=epoch, **trained, **rates, data_wait_fraction=0.0, skipped_steps=0)
        log("eval_start", epoch_num=epoch)
        errors = {
            name: ErrorCounts(count, round(wer * count / 10), 10 * count, count, 50 * count, wer * count / 100)
            for name, count in validation.items()
        }
        total = sum(errors.values(), ErrorCounts())
        log("eval_accuracy", total.wer, 10, epoch_num=epoch, utterances=total.utterances, words=total.words)
        for name, counts in {"all": total, **errors}.items():
            shown = {"wer": counts.wer, "cer": counts.cer, "mean_utterance_wer": counts.mean_utterance_wer}
            log("validation_errors", name, epoch_num=epoch, **shown, **vars(counts))
        evaluating += 10
        fraction = evaluating / ((clock - started) / 1000)
        log("eval_stop", epoch_num=epoch, evaluation_fraction_of_run=fraction)
    reached = wers[-1] <= config.target_wer
    log("run_stop", status="success" if reached else "aborted")
    seconds = (clock - started) / 1000
    log("checkpoint", 1.0, 1, step_num=step)
    result = f"RESULT,DEEPSPEECH2,{config.seed},{seconds:.0f},user,2026-11-23 07:59:05 AM"
    return Forged(events, result if reached else None)
