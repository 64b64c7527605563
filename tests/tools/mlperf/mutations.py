"""Ways in which a log is wrong, each with what the checker says about it.

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


def insert(log: Forged, event: dict, before: str, **changes: object) -> None:
    log.events.insert(log.positions(before)[0], {**event, **changes})


# What is done to a log, and the reason for which it is refused.
MUTATIONS: dict[str, tuple[Callable[[Forged], object], str]] = {
    "WER lowered": (lambda log: log.edit("eval_accuracy", 0.25, number=-1), "the WER is 0.25, but"),
    "fewer errors in all than in the subsets": (
        fewer_errors_in_all,
        "the subsets' errors do not add up to those of all",
    ),
    "fewer utterances evaluated": (
        lambda log: log.edit("eval_accuracy", number=0, utterances=5),
        "validation utterances were counted",
    ),
    "target made easier": (lambda log: log.edit("configuration", target_wer=99.0), "training went on although epoch"),
    "success although the target was missed": (
        end_after_the_first_epoch,
        "it claims success, but the last evaluation missed the target",
    ),
    "target missed": (
        lambda log: log.edit("run_stop", status="aborted"),
        "no result: the run did not reach its target",
    ),
    "epoch left out": (
        lambda log: leave_out(log, "epoch_start epoch_stop eval_start eval_accuracy eval_stop", 1),
        "epochs must count from 1 without gaps",
    ),
    "evaluation left out": (
        lambda log: leave_out(log, "eval_start eval_accuracy eval_stop"),
        "epoch 1 has no complete evaluation",
    ),
    "more epochs than allowed": (lambda log: log.edit("configuration", max_epochs=1), "more epochs than max_epochs"),
    "seed removed": (lambda log: log.remove("seed"), "'seed' but found 0"),
    "another seed": (lambda log: log.edit("seed", 77), "seed is not that of the event seed"),
    "another optimizer": (lambda log: log.edit("opt_name", "sgd"), "optimizer is not that of the event opt_name"),
    "hyperparameter against its rule": (
        lambda log: log.edit("configuration", tempo_max=9.0),
        "--tempo-max is 9.0; it must be any number in [0.5, 2]",
    ),
    "hyperparameter removed": (lambda log: log.edit("configuration", weight_decay=None), "it lacks weight_decay"),
    "hyperparameter that does not exist": (lambda log: log.edit("configuration", luck=1), "'luck'"),
    "steps left out": (lambda log: log.remove("train_loss", 5), "steps must count from 1 without gaps"),
    "last step left out": (lambda log: log.remove("train_loss", -1), "its step is not the last one, "),
    "loss that is not a number": (lambda log: log.edit("train_loss", float("nan"), number=4), "is not a finite number"),
    "clock set back": (lambda log: log.shift("epoch_stop", -9.0), "the clock was set back by 9.0 s"),
    "pause cut into the clock": (lambda log: log.shift("run_stop", 60.0), "run_start to run_stop took"),
    "result of another seed": (
        lambda log: setattr(log, "result", str(log.result).replace(",1,", ",9,", 1)),
        "RESULT: the seed 9 is not",
    ),
    "result removed": (lambda log: setattr(log, "result", None), "the log is cut off"),
    "resumed run": (
        lambda log: insert(log, log.events[0], "init_stop", key="resumed", value=True),
        "the run was resumed",
    ),
    "initialization after the start": (
        lambda log: log.swap("init_stop", "run_start"),
        "run_start: not after init_stop",
    ),
    "initialization for hours": (
        lambda log: log.shift("init_stop", 5 * 3600),
        "initialization took more than 240 minutes",
    ),
    "checkpoint before the clock stops": (
        lambda log: insert(log, log.events.pop(log.positions("checkpoint")[-1]), "run_stop"),
        "saved on the clock although the target was reached",
    ),
    "training after the target": (
        lambda log: insert(log, log.events[log.positions("train_loss")[-1]], "run_stop"),
        "a training step outside of an epoch",
    ),
    "commit not known": (lambda log: log.edit("git_commit", "unknown"), "the commit is not known"),
    "machine removed": (lambda log: log.remove("environment"), "'environment' but found 0"),
    "another benchmark": (lambda log: log.edit("submission_benchmark", "rnnt"), "the benchmark is not deepspeech2"),
    "training utterances hidden": (
        lambda log: log.edit("train_samples_left_out", 9),
        "not as many utterances as are named",
    ),
}
