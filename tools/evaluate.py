"""How good a trained model is: word and character error rates on a data set, with confidence intervals.

    python -m tools.evaluate results/an4/checkpoint_best.pt --dataset-dir AN4_dataset
    python -m tools.evaluate results/librispeech/checkpoint_best.pt --dataset-dir LibriSpeech_dataset --split test
    python -m tools.evaluate CHECKPOINT --dataset-dir DIR --split dev-clean --output results/dev-clean --lm lm.arpa.gz
    torchrun --nproc-per-node 2 -m tools.evaluate CHECKPOINT --dataset-dir DIR

Prints a table. `--output` names a folder for

    summary.json            the table's figures
    utterances.jsonl        subset, id, speaker, reference and hypothesis of every utterance
    <subset>.ref.trn        references and hypotheses for NIST's sclite: sclite -r ... trn -h ... trn -i rm
    <subset>.hyp.trn

Exit status: 0, or 1 if something went wrong. With torchrun each utterance is recognised by one of the processes, and
the first one reports.

The intervals are those of the bootstrap (M. Bisani and H. Ney, "Bootstrap estimates for confidence intervals in ASR
performance evaluation", ICASSP 2004): utterances, or whole speakers, are drawn with replacement 10,000 times from a
generator of a fixed seed, and between the 2.5th and the 97.5th percentile of the drawn sets' rates lies the interval.
Utterances of one speaker succeed and fail together, so the interval over speakers is the one that speaks about others.

A hypothesis is its words with single spaces between them. The log of a training run counts spaces as they were decoded,
so its character error rate differs by some tenths; word error rates are the same.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import Levenshtein
import numpy as np
import torch.distributed
import tyro

from data.packed import Subset, open_dataset
from pytorch.cli import RunError, exit_status
from pytorch.features import SAMPLE_RATE
from pytorch.loader import Utterances
from pytorch.metrics import ErrorCounts, count_errors
from tools.language_model.beam_search import Decoding
from tools.recognizer import Recognizer, emissions, select_subsets, speed

BOOTSTRAP_SETS = 10_000
BOOTSTRAP_SEED = 0
_SETS_AT_ONCE = 500


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
    batch_size: int = 16
    """utterances recognised together; changes no figure"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto: the GPU if there is one"""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()


@dataclass(frozen=True)
class Recognised:
    """An utterance and what was recognised."""

    subset: str
    id: str
    speaker: str
    reference: str
    hypothesis: str


@dataclass(frozen=True)
class Edits:
    """What turns references into hypotheses."""

    insertions: int = 0
    deletions: int = 0
    substitutions: int = 0


@dataclass(frozen=True)
class Score:
    """Rates of a set of utterances, in percent; intervals of 95 %, over speakers None where there is only one."""

    utterances: int
    speakers: int
    words: int
    wer: float
    wer_interval: tuple[float, float]
    wer_interval_over_speakers: tuple[float, float] | None
    word_edits: Edits
    mean_utterance_wer: float
    characters: int
    cer: float
    cer_interval: tuple[float, float]
    cer_interval_over_speakers: tuple[float, float] | None
    character_edits: Edits


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, prog="python -m tools.evaluate", description=__doc__)
    return exit_status(lambda: evaluate(options))


def evaluate(options: Options) -> dict[str, Score] | None:
    """Recognise and score; returns the scores by subset, and of all as "all" (None in torchrun's other processes).

    Raises:
        RunError: checkpoint, options or output folder will not do.
        DataError: the data set is absent or damaged, or has no such subset.
    """
    if options.batch_size < 1:
        raise RunError(f"--batch-size is {options.batch_size}; it must be a positive integer")
    dataset = open_dataset(options.dataset_dir)
    utterances = Utterances(select_subsets(dataset, options.split))
    if options.output is not None:
        try:
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"--output {options.output}: cannot be made: {error.strerror}") from error
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    recognizer = Recognizer.load(options.checkpoint, options.device)
    decode = options.decoding.make()
    if processes > 1:
        torch.distributed.init_process_group("gloo")
    try:
        started = time.monotonic()
        hypotheses = {
            index: " ".join(decode(emission_TV).split())
            for index, emission_TV in emissions(recognizer, utterances, options.batch_size, rank, processes)
        }
        if processes > 1:
            gathered: list[dict[int, str]] | None = [{} for _ in range(processes)] if rank == 0 else None
            torch.distributed.gather_object(hypotheses, gathered)
            if gathered is None:
                return None
            hypotheses = {index: text for part in gathered for index, text in part.items()}
        seconds = time.monotonic() - started
    finally:
        if processes > 1:
            torch.distributed.destroy_process_group()
    if len(hypotheses) != len(utterances):
        raise RunError(f"evaluation counted {len(hypotheses)} of {len(utterances)} utterances")

    recognised = _in_order(utterances.subsets, utterances, hypotheses)
    scores = {
        subset.name: score([pair for pair in recognised if pair.subset == subset.name]) for subset in utterances.subsets
    }
    scores["all"] = score(recognised)
    audio_seconds = int(utterances.num_samples.sum()) / SAMPLE_RATE
    print(table(scores))
    print(f"{audio_seconds:.0f} s of speech in {seconds:.1f} s: {speed(audio_seconds, seconds)}")
    if options.output is not None:
        summary = {
            "checkpoint": str(options.checkpoint),
            "dataset_digest": dataset.digest,
            "decoding": {key: str(value) for key, value in asdict(options.decoding).items() if options.decoding.lm},
            "real_time_factor": seconds / audio_seconds,
            "scores": {name: asdict(figures) for name, figures in scores.items()},
        }
        write_pairs(options.output, recognised, summary)
    return scores


def _in_order(subsets: Sequence[Subset], utterances: Utterances, hypotheses: dict[int, str]) -> list[Recognised]:
    """By subset, and in it by id."""
    by_id = {
        (utterances.subsets[utterances.subset_of[index]].name, utterances.id(index)): hypothesis
        for index, hypothesis in hypotheses.items()
    }
    return [
        Recognised(subset.name, name, speaker, reference, by_id[subset.name, name])
        for subset in subsets
        for name, speaker, reference in sorted(zip(subset.ids, subset.speakers, subset.transcripts, strict=True))
    ]


def score(recognised: Sequence[Recognised]) -> Score:
    """Rates of a set of utterances, with their intervals."""
    errors = [count_errors([pair.reference], [pair.hypothesis]) for pair in recognised]
    total = sum(errors, ErrorCounts())
    _, speaker_N = np.unique([pair.speaker for pair in recognised], return_inverse=True)
    counts_N4 = np.array([[e.word_errors, e.words, e.character_errors, e.characters] for e in errors])
    speakers = int(speaker_N.max()) + 1
    by_speaker_K4 = np.zeros((speakers, 4), dtype=np.int64)
    np.add.at(by_speaker_K4, speaker_N, counts_N4)
    over_utterances = bootstrap_intervals(counts_N4)
    over_speakers = bootstrap_intervals(by_speaker_K4) if speakers > 1 else (None, None)
    return Score(
        utterances=total.utterances,
        speakers=speakers,
        words=total.words,
        wer=total.wer,
        wer_interval=over_utterances[0],
        wer_interval_over_speakers=over_speakers[0],
        word_edits=count_edits([(pair.reference.split(), pair.hypothesis.split()) for pair in recognised]),
        mean_utterance_wer=total.mean_utterance_wer,
        characters=total.characters,
        cer=total.cer,
        cer_interval=over_utterances[1],
        cer_interval_over_speakers=over_speakers[1],
        character_edits=count_edits([(pair.reference, pair.hypothesis) for pair in recognised]),
    )


def count_edits(pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]]) -> Edits:
    """Insertions, deletions and substitutions of shortest edits from references to hypotheses."""
    kinds = [kind for reference, hypothesis in pairs for kind, *_ in Levenshtein.editops(reference, hypothesis)]
    return Edits(kinds.count("insert"), kinds.count("delete"), kinds.count("replace"))


def bootstrap_intervals(counts_N4: np.ndarray) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % intervals, in percent, of two rates of a set of N units (utterances or speakers).

    Args:
        counts_N4: word errors, words, character errors and characters of each unit.
    """
    random = np.random.default_rng(BOOTSTRAP_SEED)
    units = len(counts_N4)
    sums = [
        random.multinomial(units, np.full(units, 1 / units), size=_SETS_AT_ONCE) @ counts_N4
        for _ in range(BOOTSTRAP_SETS // _SETS_AT_ONCE)
    ]
    sums_D4 = np.concatenate(sums)
    low, high = np.percentile(100 * sums_D4[:, [0, 2]] / sums_D4[:, [1, 3]], [2.5, 97.5], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def table(scores: dict[str, Score]) -> str:
    """The figures as text, a line for each subset and one for all."""

    def interval(limits: tuple[float, float] | None) -> str:
        return "one speaker" if limits is None else f"{limits[0]:.2f}-{limits[1]:.2f}"

    header = ["", "utterances", "speakers", "words", "WER", "95% utterances", "95% speakers", "ins", "del", "sub"]
    rows = [[*header, "mean WER", "CER", "95% utterances", "95% speakers"]]
    for name, s in scores.items():
        edits = s.word_edits
        row = [name, str(s.utterances), str(s.speakers), str(s.words)]
        row += [f"{s.wer:.2f}", interval(s.wer_interval), interval(s.wer_interval_over_speakers)]
        row += [str(edits.insertions), str(edits.deletions), str(edits.substitutions), f"{s.mean_utterance_wer:.2f}"]
        row += [f"{s.cer:.2f}", interval(s.cer_interval), interval(s.cer_interval_over_speakers)]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def write_pairs(folder: Path, recognised: Sequence[Recognised], summary: dict[str, Any]) -> None:
    """Writes figures and pairs, each file whole or not at all; RunError where that is impossible."""
    files = {
        "summary.json": json.dumps(summary, indent=2) + "\n",
        "utterances.jsonl": "".join(json.dumps(asdict(pair)) + "\n" for pair in recognised),
    }
    for subset in dict.fromkeys(pair.subset for pair in recognised):
        pairs = [pair for pair in recognised if pair.subset == subset]
        files[f"{subset}.ref.trn"] = "".join(f"{pair.reference} ({_trn_id(pair)})\n" for pair in pairs)
        files[f"{subset}.hyp.trn"] = "".join(f"{pair.hypothesis} ({_trn_id(pair)})\n" for pair in pairs)
    try:
        for name, content in files.items():
            partial = folder / f"{name}.partial"
            partial.write_text(content, encoding="utf-8")
            partial.replace(folder / name)
    except OSError as error:
        raise RunError(f"--output {folder}: cannot be written: {error.strerror}") from error


def _trn_id(pair: Recognised) -> str:
    """An id that begins with the speaker, by which sclite sums up."""
    return pair.id if pair.id.startswith(f"{pair.speaker}-") else f"{pair.speaker}-{pair.id}"


if __name__ == "__main__":
    sys.exit(main())
