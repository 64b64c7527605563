"""Word and character error rates of a trained model on a data set, with confidence intervals.

    python -m tools.evaluate results/an4/checkpoint_best.pt --dataset-dir AN4_dataset
    python -m tools.evaluate results/librispeech/checkpoint_best.pt --dataset-dir LibriSpeech_dataset --split test
    python -m tools.evaluate CHECKPOINT --dataset-dir DIR --split dev-clean --output results/dev-clean --lm lm.arpa.gz
    torchrun --nproc-per-node 2 -m tools.evaluate CHECKPOINT --dataset-dir DIR

Prints a table. `--output` names a folder for

    summary.json            the table's figures
    utterances.jsonl        subset, id, speaker, reference and hypothesis of every utterance
    <subset>.ref.trn        references and hypotheses for NIST's sclite: sclite -r ... trn -h ... trn -i rm
    <subset>.hyp.trn        (ids are <speaker>-<utterance>; what sclite could misread in them is percent-encoded)

Exit status: 0, or 1 if something went wrong. With torchrun each utterance is recognized by one of the processes, and
the first one reports. The evaluation is the timed run's own (pytorch/evaluation.py), in its precision.

The intervals are those of the bootstrap (M. Bisani and H. Ney, "Bootstrap estimates for confidence intervals in ASR
performance evaluation", ICASSP 2004): utterances, or whole speakers, are drawn with replacement 10,000 times with a
fixed seed, and the interval runs from the 2.5th to the 97.5th percentile of the rates of the drawn sets. Utterances of
one speaker succeed and fail together, so for other speakers the interval over speakers is the one that counts.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import Levenshtein
import numpy as np
import tyro

from data.packed import open_dataset
from pytorch.config import Device
from pytorch.distributed import World, report_lost_ranks, shutdown, torchrun_env
from pytorch.evaluation import Hypothesis, greedy_decoder
from pytorch.features import SAMPLE_RATE
from pytorch.loader import Utterances
from pytorch.metrics import ErrorCounts
from tools.cli import command, require_positive
from tools.language_model.beam_search import Decoding, decode_each
from tools.output_files import output_file, prepare_outputs
from tools.recognizer import Recognizer, greedy, select_subsets, speed

BOOTSTRAP_SETS = 10_000
BOOTSTRAP_SEED = 0
_TIMEOUT_S = 3600.0  # for the other processes, which may have more to search
SUMMARY, UTTERANCES = "summary.json", "utterances.jsonl"
SIDES = {"ref": "reference", "hyp": "hypothesis"}

Interval = tuple[float, float]
Spoken = tuple[str, Hypothesis]  # speaker, empty where not known, and what was made of an utterance


@dataclass(frozen=True)
class Options:
    """Word and character error rates of a trained model."""

    checkpoint: tyro.conf.Positional[Path]
    """checkpoint of a training run, such as results/an4/checkpoint_best.pt"""
    dataset_dir: Path
    """packed data set, as download_dataset.sh makes it"""
    split: str = "validation"
    """validation, test or train, or comma-separated names of subsets, such as dev-clean,dev-other"""
    output: Path | None = None
    """folder for the figures and all pairs of reference and hypothesis"""
    overwrite: bool = False
    """replace files that are already there"""
    batch_size: int = 16
    """utterances recognized together; affects figures only by rounding"""
    device: Device = "auto"
    """where to compute; auto: the GPU if there is one"""
    precision: Literal["fp32", "bf16"] | None = None
    """None: that of the checkpoint's run, if the device has arithmetic for it, else fp32"""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()


def evaluate(options: Options) -> None:
    """Recognize, score and report."""
    require_positive(batch_size=options.batch_size)
    dataset = open_dataset(options.dataset_dir)
    utterances = Utterances(select_subsets(dataset, options.split))
    names = [subset.name for subset in utterances.subsets]
    if options.output is not None:
        files = [f"{name}.{side}.trn" for name in names for side in SIDES]
        prepare_outputs([options.output / file for file in (*files, SUMMARY, UTTERANCES)], options.overwrite)
    decode = options.decoding.make()
    local_rank = torchrun_env("LOCAL_RANK", 0)
    recognizer = Recognizer.load(options.checkpoint, options.device, options.precision, local_rank)
    world = World.init(recognizer.device.type, _TIMEOUT_S)
    try:
        started = time.monotonic()
        with report_lost_ranks():
            decoder = greedy_decoder if decode is greedy else decode_each(decode)
            evaluation = recognizer.evaluate(utterances, options.batch_size, decoder, world)
        seconds = time.monotonic() - started
    finally:
        shutdown()
    if not world.is_main:
        return

    everything = [(utterances.speaker(index), found) for index, found in enumerate(evaluation.hypotheses)]
    everything.sort(key=lambda spoken: (names.index(spoken[1].subset), spoken[1].id))
    by_subset = {name: [spoken for spoken in everything if spoken[1].subset == name] for name in names}
    scores = {name: score(spoken) for name, spoken in {**by_subset, "all": everything}.items()}
    audio_seconds = int(utterances.num_samples.sum()) / SAMPLE_RATE
    summary = {
        "checkpoint": str(options.checkpoint),
        "dataset_digest": dataset.digest,
        "device": recognizer.device.type,
        "precision": recognizer.precision,
        "decoding": {key: str(value) for key, value in asdict(options.decoding).items() if options.decoding.lm},
        "real_time_factor": seconds / audio_seconds,
        "scores": scores,
    }
    if options.output is not None:  # first, since whoever reads the table may have left
        write_files(options.output, summary, everything, by_subset)
    print(table(scores))
    told = f"{speed(audio_seconds, seconds)}; {recognizer.precision}"
    print(f"{audio_seconds:.0f} s of speech in {seconds:.1f} s: {told}")


def write_files(
    folder: Path, summary: dict[str, Any], everything: list[Spoken], by_subset: dict[str, list[Spoken]]
) -> None:
    """Write the files of `--output`; RunError where one cannot be written."""
    with output_file(folder / UTTERANCES) as stream:
        for speaker, found in everything:
            pair = {"subset": found.subset, "id": found.id, "speaker": speaker}
            stream.write(json.dumps(pair | {"reference": found.reference, "hypothesis": found.hypothesis}) + "\n")
    for subset, spoken in by_subset.items():
        ids = trn_ids(spoken)
        for side, field in SIDES.items():
            with output_file(folder / f"{subset}.{side}.trn") as stream:
                stream.writelines(
                    f"{getattr(found, field)} ({id})\n" for (_, found), id in zip(spoken, ids, strict=True)
                )
    with output_file(folder / SUMMARY) as stream:
        stream.write(json.dumps(summary, indent=2) + "\n")


def score(spoken: Sequence[Spoken]) -> dict[str, Any]:
    """Return the rates of a set of utterances in percent, with their intervals, under the names of summary.json.

    `speakers` is None where not all are known. The intervals over speakers are None then, or where there is but one.
    """
    errors = [found.errors for _, found in spoken]
    total = sum(errors, ErrorCounts())
    counts_N4 = np.array([[e.word_errors, e.words, e.character_errors, e.characters] for e in errors])
    speakers, speaker_N = np.unique([speaker for speaker, _ in spoken], return_inverse=True)
    known = "" not in speakers
    wer_interval, cer_interval = bootstrap_intervals(counts_N4)
    over_speakers: tuple[Interval | None, Interval | None] = (None, None)
    if known and len(speakers) > 1:
        by_speaker_K4 = np.zeros((len(speakers), 4), dtype=np.int64)
        np.add.at(by_speaker_K4, speaker_N, counts_N4)
        over_speakers = bootstrap_intervals(by_speaker_K4)
    return {
        "utterances": total.utterances,
        "speakers": len(speakers) if known else None,
        "words": total.words,
        "wer": total.wer,
        "wer_interval": wer_interval,
        "wer_interval_over_speakers": over_speakers[0],
        "word_edits": count_edits([(found.reference.split(), found.hypothesis.split()) for _, found in spoken]),
        "mean_utterance_wer": total.mean_utterance_wer,
        "characters": total.characters,
        "cer": total.cer,
        "cer_interval": cer_interval,
        "cer_interval_over_speakers": over_speakers[1],
        "character_edits": count_edits([(found.reference, found.hypothesis) for _, found in spoken]),
    }


def count_edits(pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> dict[str, int]:
    """Count the insertions, deletions and substitutions of shortest edits from references to hypotheses."""
    kinds = Counter(kind for pair in pairs for kind, *_ in Levenshtein.editops(*pair))
    return {"insertions": kinds["insert"], "deletions": kinds["delete"], "substitutions": kinds["replace"]}


def bootstrap_intervals(counts_N4: np.ndarray) -> tuple[Interval, Interval]:
    """Return the 95 % intervals, in percent, of WER and CER of a set of N units (utterances or speakers).

    Of each unit, `counts_N4` has the word errors, words, character errors and characters.
    """
    random = np.random.default_rng(BOOTSTRAP_SEED)
    units = len(counts_N4)
    at_once = min(500, 1 + 10**7 // units)  # which memory is for; the numbers drawn are the same
    sums = [
        random.multinomial(units, np.full(units, 1 / units), size=min(at_once, BOOTSTRAP_SETS - start)) @ counts_N4
        for start in range(0, BOOTSTRAP_SETS, at_once)
    ]
    sums_D4 = np.concatenate(sums)
    low, high = np.percentile(100 * sums_D4[:, [0, 2]] / sums_D4[:, [1, 3]], [2.5, 97.5], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def table(scores: dict[str, dict[str, Any]]) -> str:
    """Return the figures as text, a line for each subset and one for all."""
    header = ["", "utterances", "speakers", "words", "WER", "95% utterances", "95% speakers", "ins", "del", "sub"]
    rows = [[*header, "mean WER", "CER", "95% utterances", "95% speakers"]]
    for name, figures in scores.items():
        none = "not known" if figures["speakers"] is None else "one speaker"
        row = [name, figures["utterances"], figures["speakers"] or none, figures["words"]]
        for rate in ("wer", "cer"):
            limits = figures[f"{rate}_interval"], figures[f"{rate}_interval_over_speakers"]
            row += [f"{figures[rate]:.2f}", *(f"{each[0]:.2f}-{each[1]:.2f}" if each else none for each in limits)]
            row += [*figures["word_edits"].values(), f"{figures['mean_utterance_wer']:.2f}"] if rate == "wer" else []
        rows.append(list(map(str, row)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    return "\n".join(lines)


def trn_ids(spoken: Sequence[Spoken]) -> list[str]:
    """Return ids for sclite, which takes what comes before the first hyphen for the speaker. No two are the same.

    Where all ids begin with their speaker already, as in LibriSpeech, they stay.
    """
    prefixed = all(found.id.startswith(f"{speaker}-") for speaker, found in spoken)
    ids = []
    for speaker, found in spoken:
        label = quote(speaker or "unknown", safe="").replace("-", "%2D").replace("_", "%5F")
        ids.append(f"{label}-{quote(found.id.removeprefix(f'{speaker}-') if prefixed else found.id, safe='')}")
    return ids


main = command("tools.evaluate", __doc__, Options, evaluate)

if __name__ == "__main__":
    sys.exit(main())
