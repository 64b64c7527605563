"""Mistakes that are made in good faith, each with the reason for which the checker refuses the log.

The log is one of a real run of several epochs that reached its target.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.tools.mlperf.forged import Forged


def fewer_errors_in_all(log: Forged) -> None:
    first = log.events[log.positions("validation_errors")[0]]["metadata"]
    errors = first["word_errors"] - 1
    log.edit("validation_errors", number=0, word_errors=errors, wer=100 * errors / first["words"])
    log.edit("eval_accuracy", 100 * errors / first["words"], number=0)


def end_after_the_first_epoch(log: Forged) -> None:
    del log.events[log.positions("epoch_start")[1] : log.positions("run_stop")[0]]


def leave_out(log: Forged, keys: str, number: int = 0) -> None:
    for key in keys.split():
        log.remove(key, number)


def resume(log: Forged) -> None:
    log.events.insert(log.positions("init_stop")[0], {**log.events[0], "key": "resumed", "value": True})


MUTATIONS: list[tuple[Callable[[Forged], object], str]] = [
    (lambda log: log.edit("eval_accuracy", 0.25, number=-1), "the WER is 0.25, but"),
    (fewer_errors_in_all, "the subsets' errors do not add up to those of all"),
    (lambda log: log.edit("eval_accuracy", number=0, utterances=5), "validation utterances were counted"),
    (lambda log: log.edit("configuration", target_wer=99.0), "training went on although epoch"),
    (end_after_the_first_epoch, "it claims success, but the last evaluation missed the target"),
    (lambda log: leave_out(log, "epoch_start epoch_stop eval_start eval_accuracy eval_stop", 1), "without gaps"),
    (lambda log: leave_out(log, "eval_start eval_accuracy eval_stop"), "epoch 1 has no complete evaluation"),
    (lambda log: log.edit("configuration", max_epochs=1), "more epochs than max_epochs"),
    (lambda log: log.remove("seed"), "'seed' but found 0"),
    (lambda log: log.edit("seed", 77), "seed is not that of the event seed"),
    (lambda log: log.edit("configuration", tempo_max=9.0), "--tempo-max is 9.0"),
    (lambda log: log.edit("configuration", weight_decay=None), "it lacks weight_decay"),
    (lambda log: log.edit("configuration", luck=1), "'luck'"),
    (lambda log: log.remove("train_loss", 5), "steps must count from 1 without gaps"),
    (lambda log: log.remove("train_loss", -1), "its step is not the last one, "),
    (lambda log: log.edit("train_loss", float("nan"), number=4), "is not a finite number"),
    (lambda log: log.shift("epoch_stop", -9.0), "the clock was set back by 9.0 s"),
    (lambda log: log.shift("run_stop", 60.0), "run_start to run_stop took"),
    (lambda log: setattr(log, "result", str(log.result).replace(",1,", ",9,", 1)), "RESULT: the seed 9 is not"),
    (lambda log: setattr(log, "result", None), "the log is cut off"),
    (resume, "the run was resumed"),
    (lambda log: log.swap("init_stop", "run_start"), "run_start: not after init_stop"),
    (lambda log: log.shift("init_stop", 5 * 3600), "initialization took more than 240 minutes"),
    (lambda log: log.edit("git_commit", "unknown"), "the commit is not known"),
    (lambda log: log.edit("submission_benchmark", "rnnt"), "the benchmark is not deepspeech2"),
    (lambda log: log.edit("train_samples_left_out", 9), "not as many utterances as are named"),
]
