"""What must agree between the lines of a sound log, and no single line shows: counts, rates, times, learning rates.

A log that keeps the open rules (rules/open.yaml) is assumed: keys, types and order are right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mlperf_logging.mllog import constants

from data.corpora import CORPORA
from pytorch.metrics import ErrorCounts, count_errors
from tools.mlperf.configuration import read_configuration
from tools.mlperf.events import Event
from tools.mlperf.logs import RunLog

Found = tuple[int | None, str]  # line, reason
SLACK = 1.0  # seconds that two measurements of one time may differ by, besides SLACK_FRACTION of it
SLACK_FRACTION = 0.02


def inconsistencies(log: RunLog) -> list[Found]:
    """What does not agree, each with its line if there is one."""
    parts = (_order_of_time, _result, _evaluations, _steps, _durations, _catalogue, _transcripts)
    return [found for part in parts for found in part(log)]


def _order_of_time(log: RunLog) -> Iterator[Found]:
    latest = log.events[0]
    for event in log.events:
        if event.time_ms < latest.time_ms - 1000 * SLACK:  # the time of day may be set right while a run goes on
            yield event.line, f"{event.key}: its time is before that of line {latest.line}"
        latest = max(latest, event, key=lambda each: each.time_ms)


def _result(log: RunLog) -> Iterator[Found]:
    """The RESULT line says again what the events say; a log without it was cut off."""
    if log.result is None:
        if log.reached:
            yield None, "the log is cut off: a success ends with a RESULT line"
        return
    if not log.reached:
        yield log.result.line, "RESULT: the run did not reach its target"
    if log.result.seed != log.seed:
        yield log.result.line, f"RESULT: the seed {log.result.seed} is not that of the event, {log.seed}"
    seconds = log.seconds or 0
    if abs(log.result.seconds - seconds) > SLACK:
        yield log.result.line, f"RESULT: {log.result.seconds} s, but run_start to run_stop took {seconds:.1f} s"
    if any(event.key != "checkpoint" for event in log.events if event.line > log.result.line):
        yield log.result.line, "RESULT: events of the run follow"


def _evaluations(log: RunLog) -> Iterator[Found]:
    """WER is errors over words; all is the sum of the subsets; every evaluation is of the same utterances."""
    first = log.epochs[0].errors
    for epoch, accuracy in zip(log.epochs, log.all(constants.EVAL_ACCURACY), strict=False):
        line, name = accuracy.line, f"epoch {epoch.number}"
        details = [event for event in log.all("validation_errors") if event.metadata["epoch_num"] == epoch.number]
        for event in details:
            yield from _rates(event, epoch.errors[event.value])
        total = epoch.errors.get("all")
        if total is None or set(epoch.errors) != set(first) or len(first) < 2 or len(details) != len(first):
            yield line, f"{name}: there is not one validation_errors of all and one of each subset"
            continue
        if not _close(accuracy.value, total.wer):
            wrong = f"{total.word_errors} errors in {total.words} words are {total.wer:.4f} %"
            yield line, f"{name}: the WER is {accuracy.value}, but {wrong}"
        if (total.utterances, total.words) != (log.value(constants.EVAL_SAMPLES), accuracy.metadata.get("words")):
            yield (
                line,
                f"{name}: validation_errors counts other utterances or words than eval_accuracy and eval_samples",
            )
        parts = sum((counts for subset, counts in epoch.errors.items() if subset != "all"), ErrorCounts())
        if not all(_close(getattr(parts, field), value) for field, value in vars(total).items()):
            yield line, f"{name}: the subsets' errors do not add up to those of all"
        if any(_size(counts) != _size(first[subset]) for subset, counts in epoch.errors.items()):
            yield line, f"{name}: the validation set is not that of epoch 1"


def _rates(event: Event, counts: ErrorCounts) -> Iterator[Found]:
    for rate in ("wer", "cer", "mean_utterance_wer"):
        logged, right = event.metadata[rate], getattr(counts, rate)
        if not _close(logged, right):
            yield (
                event.line,
                f"validation_errors of {event.value}: {rate} is {logged}, but its counts make it {right:.4f}",
            )


def _size(counts: ErrorCounts) -> tuple[int, int, int]:
    return counts.utterances, counts.words, counts.characters


def _steps(log: RunLog) -> Iterator[Found]:
    """Every epoch goes through every utterance once, at the schedule's learning rate."""
    from pytorch.optimizer import learning_rate  # imports PyTorch, which takes longer than the rest of a check

    config = read_configuration(log.configuration)
    in_epoch = math.ceil(log.value(constants.TRAIN_SAMPLES) / config.batch_size)
    for event in log.all("train_loss"):
        known = event.metadata
        right = learning_rate(config, known["step_num"] - 1, in_epoch)
        if not _close(known["learning_rate"], right):
            logged = known["learning_rate"]
            yield (
                event.line,
                f"train_loss: learning rate {logged} in step {known['step_num']}; the schedule says {right}",
            )
            break
    done = 0
    for epoch, event in zip(log.epochs, log.all(constants.EPOCH_STOP), strict=False):
        steps = [step for step in log.steps if done < step.number <= (epoch.step or 0)]
        done += len(steps)
        name = f"epoch_stop {epoch.number}"
        if epoch.step != done or (epoch.finished and done != epoch.number * in_epoch):
            yield event.line, f"{name}: {epoch.step} steps are done; the log has {done}, and an epoch {in_epoch}"
        if not epoch.finished and (done != config.max_steps or epoch is not log.epochs[-1]):
            yield event.line, f"{name}: the epoch was left unfinished, and not because of max_steps"
        losses = [step.loss for step in steps if step.loss is not None]
        if losses and not _close(epoch.loss or math.nan, sum(losses) / len(losses)):
            yield event.line, f"{name}: the loss {epoch.loss} is not the mean of its steps' losses"
        skipped = sum(step.loss is None for step in log.steps if step.number <= done)
        if event.metadata.get("skipped_steps") != skipped:
            yield event.line, f"{name}: skipped_steps is not {skipped}, the number of such events"


def _durations(log: RunLog) -> Iterator[Found]:
    """Time stamps agree with durations that the run took by another clock."""
    evaluating = 0.0
    samples = log.value(constants.TRAIN_SAMPLES)
    stops = zip(log.all(constants.EPOCH_STOP), log.all(constants.EVAL_STOP), strict=False)
    for epoch, (trained, evaluated) in zip(log.epochs, stops, strict=False):
        assert epoch.trained is not None and epoch.evaluated is not None  # the rules have seen to that
        seconds = epoch.throughput.get("seconds", math.nan)
        stamped = epoch.trained - epoch.started
        if not _close_times(seconds, stamped):
            yield (
                trained.line,
                f"epoch_stop {epoch.number}: trained for {seconds:.1f} s, but its time stamps say {stamped:.1f} s",
            )
        rate = epoch.throughput.get("utterances_per_second", math.nan)
        if epoch.finished and not abs(rate * seconds - samples) < 0.5:
            yield trained.line, f"epoch_stop {epoch.number}: throughput and time do not make {samples} utterances"
        evaluating += epoch.evaluated - epoch.trained
        fraction = evaluated.metadata.get("evaluation_fraction_of_run", math.nan)
        if not _close_times(fraction * epoch.evaluated, evaluating):
            yield evaluated.line, f"eval_stop {epoch.number}: evaluation_fraction_of_run does not fit the time stamps"


def _catalogue(log: RunLog) -> Iterator[Found]:
    """A corpus that is said to be official has the published number of utterances."""
    event, dataset = log.first("dataset"), log.dataset
    assert event is not None and dataset is not None  # the rules have seen to that
    corpus = CORPORA.get(dataset.corpus)
    if corpus is None:
        return
    if dataset.synthetic != corpus.synthetic:
        yield event.line, f"dataset: {corpus.name} is {'' if corpus.synthetic else 'not '}synthetic"
    published = {subset.name: subset.utterances for subset in corpus.subsets if subset.split == "validation"}
    whole = dataset.official or corpus.synthetic
    for name, counts in log.epochs[0].errors.items():
        if name == "all":
            continue
        if name not in published:
            yield event.line, f"dataset: {corpus.name} has no validation subset {name}"
        elif whole and published[name] not in (None, counts.utterances):
            yield (
                event.line,
                f"dataset: {name} has {published[name]} utterances, of which {counts.utterances} were counted",
            )
    training = [subset.utterances for subset in corpus.subsets if subset.split == "train"]
    # Of several subsets a data set may have some, and a log does not say which.
    if whole and len(training) == 1 and training[0] not in (None, log.training_utterances):
        yield event.line, f"dataset: {corpus.name} has {training[0]} training utterances, not {log.training_utterances}"


def _transcripts(log: RunLog) -> Iterator[Found]:
    for event, shown in zip(log.all("transcript"), log.transcripts, strict=True):
        if not shown.reference.split() or not _close(
            shown.wer, count_errors([shown.reference], [shown.hypothesis]).wer
        ):
            yield event.line, f"transcript {shown.id}: its WER is not that of the two texts"


def _close(left: float, right: float) -> bool:
    return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-9)


def _close_times(left: float, right: float) -> bool:
    return abs(left - right) <= SLACK + SLACK_FRACTION * max(left, right)
