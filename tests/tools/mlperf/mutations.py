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


def date_all_to_the_start(log: Forged) -> None:
    start = log.positions("run_start")[0]
    for event in log.events[start:]:
        event["time_ms"] = log.events[start]["time_ms"]


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
    "subset left out": (
        lambda log: log.remove("validation_errors", 1),
        "validation_errors are not of all and each subset",
    ),
    "counts that are text": (
        lambda log: log.edit("validation_errors", number=0, word_errors="3"),
        "damaged event: validation_errors's word_errors is '3', not an integer",
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
    "status removed": (lambda log: log.edit("run_stop", status=None), "no result: the run did not reach its target"),
    "epoch left out": (
        lambda log: leave_out(log, "epoch_start epoch_stop eval_start eval_accuracy eval_stop", 1),
        "epochs must count from 1 without gaps",
    ),
    "evaluation left out": (
        lambda log: leave_out(log, "eval_start eval_accuracy eval_stop"),
        "epoch 1 has no complete evaluation",
    ),
    "evaluation without its figure": (lambda log: log.remove("eval_accuracy"), "the evaluation has no eval_accuracy"),
    "evaluated twice": (lambda log: log.repeat("eval_accuracy"), "not the one figure of an evaluation"),
    "evaluation of another epoch": (lambda log: log.edit("eval_accuracy", epoch_num=7), "not the epoch under way, 1"),
    "more epochs than allowed": (lambda log: log.edit("configuration", max_epochs=1), "more epochs than max_epochs"),
    "seed removed": (lambda log: log.remove("seed"), "'seed' but found 0"),
    "seed twice": (lambda log: log.repeat("seed"), "'seed' but found 2"),
    "another seed": (lambda log: log.edit("seed", 77), "seed is not that of the event seed"),
    "another batch size": (
        lambda log: log.edit("global_batch_size", 77),
        "batch_size is not that of the event global_batch_size",
    ),
    "another optimizer": (lambda log: log.edit("opt_name", "sgd"), "optimizer is not that of the event opt_name"),
    "another learning rate": (
        lambda log: log.edit("opt_base_learning_rate", 1.0),
        "learning_rate is not that of the event opt_base_learning_rate",
    ),
    "hyperparameter against its rule": (
        lambda log: log.edit("configuration", tempo_max=9.0),
        "--tempo-max is 9.0; it must be any number in [0.5, 2]",
    ),
    "hyperparameter of the wrong type": (
        lambda log: log.edit("configuration", hidden_size=40.5),
        "hidden_size has the wrong",
    ),
    "hyperparameter removed": (lambda log: log.edit("configuration", weight_decay=None), "it lacks weight_decay"),
    "hyperparameter that does not exist": (
        lambda log: log.edit("configuration", luck=1),
        "it has unknown fields: luck",
    ),
    "learning rate off the schedule": (
        lambda log: log.edit("train_loss", number=3, learning_rate=0.5),
        "learning rate 0.5 in step 4; the schedule says",
    ),
    "steps left out": (lambda log: log.remove("train_loss", 5), "steps must count from 1 without gaps"),
    "last step left out": (lambda log: log.remove("train_loss", -1), "its step is not the last one, "),
    "loss that is not a number": (lambda log: log.edit("train_loss", float("nan"), number=4), "is not a finite number"),
    "clock set back": (lambda log: log.shift("epoch_stop", -9.0), "the clock was set back by 9.0 s"),
    "run_stop dated back": (
        lambda log: log.events[log.positions("run_stop")[0]].update(time_ms=0),
        "run_stop: the clock was set back by",
    ),
    "training made faster": (date_all_to_the_start, "run_start to run_stop took 0.0 s: the clock was set"),
    "pause cut into the clock": (lambda log: log.shift("run_stop", 60.0), "run_start to run_stop took"),
    "result rounded down": (lambda log: setattr(log, "result", "RESULT,DEEPSPEECH2,1,0,me,now"), "RESULT: 0 s, but"),
    "result of another seed": (
        lambda log: setattr(log, "result", str(log.result).replace(",1,", ",9,", 1)),
        "RESULT: the seed 9 is not",
    ),
    "result removed": (lambda log: setattr(log, "result", None), "the log is cut off"),
    "resumed run": (
        lambda log: insert(log, log.events[0], "init_stop", key="resumed", value=True),
        "the run was resumed",
    ),
    "clock started late": (
        lambda log: log.swap("run_start", "train_samples"),
        "the data were read before the clock started",
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
    "cache cleared perhaps": (lambda log: log.edit("cache_clear", "yes"), "it is not known whether the cache was"),
    "commit not known": (lambda log: log.edit("git_commit", "unknown"), "the commit is not known"),
    "machine removed": (lambda log: log.remove("environment"), "'environment' but found 0"),
    "another benchmark": (lambda log: log.edit("submission_benchmark", "rnnt"), "the benchmark is not deepspeech2"),
    "no division": (lambda log: log.edit("submission_division", "ajar"), "must be closed or open"),
    "no digest": (lambda log: log.edit("dataset", "unknown"), "the digest is not a SHA-256"),
    "training utterances hidden": (
        lambda log: log.edit("train_samples_left_out", 9),
        "not as many utterances as are named",
    ),
}


def cut(text: str) -> bytes:
    return text[: text.index('"time_ms"', len(text) // 2)].encode()


BROKEN: dict[str, tuple[Callable[[str], bytes], str]] = {
    "empty": (lambda text: b"", "it has no ':::MLLOG' line"),
    "no log": (lambda text: b"epoch 1 loss 3\n" * 9, "it has no ':::MLLOG' line"),
    "bytes": (lambda text: bytes(range(256)) * 9, "it is not text"),
    "bytes in the middle": (lambda text: text.encode()[:999] + b"\xff\xfe\x00" + text.encode()[999:], "it is not text"),
    "cut in a line": (cut, "damaged event"),
    "a line that is not JSON": (lambda text: b":::MLLOG {broken}\n" + text.encode(), ":1: damaged event"),
    "a line that is not an object": (lambda text: b":::MLLOG [1]\n" + text.encode(), ":1: damaged event"),
    "a line without a time": (lambda text: text.replace('"time_ms"', '"time"', 1).encode(), ":1: damaged event"),
    "a time that is text": (
        lambda text: text.replace('"time_ms": 1', '"time_ms": "1', 1).encode(),
        ":1: damaged event",
    ),
    "two logs": (lambda text: 2 * text.encode(), "a second RESULT line"),
    "two lines in one": (lambda text: text.replace("\n", "", 1).encode(), ":1: damaged event"),
}
