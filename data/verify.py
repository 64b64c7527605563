"""Checks a prepared data set: is every sample and transcript the one that was prepared, and is nothing missing?

    python -m data.verify                                  ./LibriSpeech_dataset
    python -m data.verify --dataset-dir AN4_dataset

Prints `Dataset Checksum Passed.` and exits 0, or `WARNING: Dataset Checksum Failed.`, what is wrong and where, and
exits 1. The checksum is that of packed.py, computed from the files and compared with dataset.json, and with the
catalogue's where that knows one. If it differs, the digests of single utterances tell which are damaged.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from data.corpora import CORPORA, Corpus, find_corpus
from data.packed import (
    AUDIO_FILE,
    AUDIO_HEADER_BYTES,
    DATASET_FILE,
    INDEX_FILE,
    TRANSCRIPT_CHARACTERS,
    DataError,
    PackedDataset,
    SubsetSummary,
    UtteranceRow,
    audio_header,
    content_digest,
    content_files,
    file_digest,
    open_dataset,
    read_index,
    utterance_digest,
)
from data.prepare import progress_bar

SHOWN_PROBLEMS = 20
HOURS_TOLERANCE = 0.05  # published hours are rounded, some of them roughly


@dataclass(frozen=True)
class Options:
    """Check a prepared data set against its checksum."""

    dataset_dir: Path = CORPORA["librispeech"].default_dataset_dir
    """the data set"""


def main() -> None:
    options = tyro.cli(Options, prog="verify_dataset.sh", description=Options.__doc__)
    try:
        dataset = open_dataset(options.dataset_dir)
        problems = find_problems(dataset)
    except (DataError, OSError) as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was checked to the end")
    if problems:
        print("WARNING: Dataset Checksum Failed.")
        print("\n".join(problems[:SHOWN_PROBLEMS]))
        if len(problems) > SHOWN_PROBLEMS:
            print(f"... and {len(problems) - SHOWN_PROBLEMS} more")
        sys.exit(1)
    print("Dataset Checksum Passed.")
    for subset in dataset.summary.values():
        note = "" if subset.official or dataset.synthetic else "; not from the published archive"
        print(f"{subset.name}: {subset.utterances} utterances, {subset.hours:.2f} h, {subset.speakers} speakers{note}")
    print(f"sha256 {dataset.digest}")


def find_problems(dataset: PackedDataset) -> list[str]:
    """All that is wrong with a data set, one line each that says where; empty if nothing is."""
    corpus = find_corpus(dataset.corpus)
    problems = list(_catalogue_problems(dataset, corpus))
    missing = [name for name in content_files(dataset.subsets) if not (dataset.path / name).is_file()]
    if missing:
        return problems + [f"{dataset.path / name} is missing" for name in missing]
    rows: dict[str, list[UtteranceRow]] = {}
    for name, summary in dataset.summary.items():
        try:
            rows[name] = list(read_index(dataset.path / name / INDEX_FILE))
        except DataError as error:
            problems.append(str(error))
            continue
        problems += _index_problems(rows[name], summary)
    total = sum((dataset.path / name).stat().st_size for name in content_files(dataset.subsets))
    with progress_bar("checksum", total, "B") as bar:
        digest = content_digest(dataset.path, dataset.subsets, bar.update)
    if digest != dataset.digest:
        for name, subset_rows in rows.items():
            problems += _content_problems(dataset.path / name, subset_rows, dataset.summary[name])
        problems.append(f"the checksum of {dataset.path} is {digest}, {DATASET_FILE} has {dataset.digest}")
    if corpus.reference_digest and len(dataset.subsets) == len(corpus.subsets) and digest != corpus.reference_digest:
        problems.append(f"the checksum of {dataset.path} is {digest}, the reference is {corpus.reference_digest}")
    return problems


def _catalogue_problems(dataset: PackedDataset, corpus: Corpus) -> Iterator[str]:
    """Compares the counts in dataset.json with the published ones, for subsets from the published archives."""
    known = {subset.name: subset for subset in corpus.subsets}
    for name, summary in dataset.summary.items():
        if name not in known:
            yield f"{name} is no subset of {corpus.name}"
            continue
        published = known[name]
        if not (summary.official or dataset.synthetic):
            continue
        if published.utterances not in (None, summary.utterances):
            yield f"{name} has {summary.utterances} utterances, {published.utterances} were published"
        if published.speakers not in (None, summary.speakers):
            yield f"{name} has {summary.speakers} speakers, {published.speakers} were published"
        if published.hours and abs(summary.hours / published.hours - 1) > HOURS_TOLERANCE:
            yield f"{name} has {summary.hours:.2f} h, {published.hours} h were published"


def _index_problems(rows: list[UtteranceRow], summary: SubsetSummary) -> Iterator[str]:
    """Whether utterances.csv covers audio.npy without gaps, in order, with transcripts of known characters."""
    name = summary.name
    if len(rows) != summary.utterances:
        yield f"{name}/{INDEX_FILE} has {len(rows)} utterances, {DATASET_FILE} has {summary.utterances}"
    end = 0
    before = UtteranceRow("the start", "", 0, 0, "", "")
    seen = set()
    for row in [*rows, UtteranceRow("the end", "", summary.samples, sys.maxsize, "A", "")]:
        if row.offset > end:
            yield (
                f"{name}: an utterance is missing between {before.id} and {row.id}: "
                f"samples {end} to {row.offset} of {AUDIO_FILE} belong to none"
            )
        elif row.offset < end:
            yield f"{name}: utterance {row.id} begins at sample {row.offset}, within or before {before.id}"
        if (row.samples, row.id) < (before.samples, before.id) and before.samples:
            yield f"{name}: utterance {row.id} is out of order: {row.samples} samples after {before.samples}"
        if row.samples < 1:
            yield f"{name}: utterance {row.id} has {row.samples} samples"
        if row.id in seen:
            yield f"{name}: utterance {row.id} occurs twice"
        if not row.transcript:
            yield f"{name}: the transcript of utterance {row.id} is empty"
        for character in sorted(set(row.transcript) - set(TRANSCRIPT_CHARACTERS)):
            yield f"{name}: the transcript of utterance {row.id} has the unknown character {character!r}"
        seen.add(row.id)
        end = row.offset + row.samples
        before = row


def _content_problems(folder: Path, rows: list[UtteranceRow], summary: SubsetSummary) -> Iterator[str]:
    """Which utterances of a subset do not have the digest that utterances.csv states."""
    if file_digest(folder / INDEX_FILE, "sha256") != summary.index_sha256:
        yield f"{summary.name}/{INDEX_FILE} is not the file that was prepared"
    file = folder / AUDIO_FILE
    size = AUDIO_HEADER_BYTES + 2 * summary.samples
    if file.stat().st_size != size:
        yield f"{summary.name}/{AUDIO_FILE} has {file.stat().st_size} bytes, not {size}"
    with file.open("rb") as stream:
        if stream.read(AUDIO_HEADER_BYTES) != audio_header(summary.samples):
            yield f"{summary.name}/{AUDIO_FILE}: the header, its first {AUDIO_HEADER_BYTES} bytes, is damaged"
        for row in rows:
            start = AUDIO_HEADER_BYTES + 2 * row.offset
            if row.offset < 0 or row.samples < 0 or start + 2 * row.samples > size:
                continue  # _index_problems has named it
            stream.seek(start)
            content = stream.read(2 * row.samples)
            if len(content) < 2 * row.samples:
                yield f"{summary.name}: utterance {row.id} is cut short: {AUDIO_FILE} ends before it does"
            elif utterance_digest(np.frombuffer(content, dtype="<i2"), row.transcript) != row.sha256:
                yield (
                    f"{summary.name}: utterance {row.id} has changed: its transcript or "
                    f"bytes {start} to {start + 2 * row.samples} of {AUDIO_FILE}"
                )


if __name__ == "__main__":
    main()
