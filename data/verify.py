"""Checks a prepared data set: is every sample and transcript the one that was prepared, and is nothing missing?

    python -m data.verify                                  ./LibriSpeech_dataset
    python -m data.verify --dataset-dir AN4_dataset
    python -m data.verify --quick                          sizes, counts and index alone, in seconds

The checksum is that of packed.py, compared with dataset.json's, and with the catalog's where that has one. Only if it
is wrong is the audio read a second time, to find the utterances that do not have the digest of the index. Exits 1 if
anything is wrong.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from data import packed
from data.cli import UserError, exit_status, first_of, progress_bar
from data.corpora import CORPORA, REPOSITORY, Corpus, find_corpus
from data.files import locked

HOURS_TOLERANCE = 0.05  # published hours are rounded, some of them roughly


@dataclass(frozen=True)
class Options:
    """Check a prepared data set against its checksum."""

    dataset_dir: Path = REPOSITORY / CORPORA["librispeech"].folder
    """the data set"""
    quick: bool = False
    """check sizes, counts and index only; samples are not read"""


def main() -> int:
    return exit_status(lambda: verify(tyro.cli(Options, prog="verify_dataset.sh")), None)


def verify(options: Options) -> bool:
    """Check a data set, print what is wrong with it, and return whether nothing is."""
    try:
        dataset = packed.open_dataset(options.dataset_dir)
        with locked(dataset.path, "download", shared=True):
            problems = validate(dataset, quick=options.quick)
    except (UserError, OSError) as error:
        if not (options.dataset_dir / packed.DATASET_FILE).exists():
            raise
        problems = [str(error)]
    if problems:
        print(f"WARNING: Dataset Checksum Failed.\n{first_of(problems)}")
        return False
    quick = "Quick check passed: sizes, counts and index. The samples were not read: this is not the full check."
    print(quick if options.quick else "Dataset Checksum Passed.")
    for name, subset in dataset.summary.items():
        note = "; not from the published archive" if find_corpus(dataset.corpus).mirrors and not subset.official else ""
        print(f"{name}: {subset.utterances} utterances, {subset.hours:.2f} h, {subset.speakers} speakers{note}")
    if not options.quick:
        print(f"sha256 {dataset.digest}")
    return True


def validate(dataset: packed.PackedDataset, *, quick: bool = False) -> list[str]:
    """Return all that is wrong with a data set, one line each that says where; if `quick`, without reading samples."""
    corpus = find_corpus(dataset.corpus)
    problems = list(_check_against_catalog(dataset, corpus))
    for name in dataset.summary:
        try:
            dataset.subset(name)
        except UserError as error:
            problems.append(str(error).removesuffix("; run verify_dataset.sh"))
    if quick or not all((dataset.path / name).is_file() for name in packed.content_files(dataset.summary)):
        return problems
    digest = packed.dataset_digest(dataset.path, dataset.summary)
    if digest != dataset.digest:
        for name, summary in dataset.summary.items():
            with suppress(UserError, OSError):  # said above
                problems += _changed_utterances(dataset.path / name, summary)
        problems.append(f"the checksum of {dataset.path} is {digest}, {packed.DATASET_FILE} has {dataset.digest}")
    if corpus.reference_digest and len(dataset.summary) == len(corpus.subsets) and digest != corpus.reference_digest:
        why = "eSpeak NG of another platform or version speaks slightly differently"
        problems.append(f"the checksum is {digest}, not the reference {corpus.reference_digest}: {why}")
    return problems


def _changed_utterances(folder: Path, summary: packed.SubsetSummary) -> Iterator[str]:
    """Name the utterances that do not have the digest that utterances.csv states."""
    name, audio = folder.name, folder / packed.AUDIO_FILE
    with progress_bar(f"looking for damage in {name}", summary.utterances, " utterances") as bar:
        for row in packed.read_index(folder / packed.INDEX_FILE):
            bar.update(1)
            end = row.offset + row.num_samples
            first, last = (packed.AUDIO_HEADER_BYTES + 2 * sample for sample in (row.offset, end))
            waveform = np.zeros(0, dtype="<i2")
            if 0 <= row.offset < end <= summary.samples:
                waveform = np.fromfile(audio, dtype="<i2", count=row.num_samples, offset=first)
            if packed.utterance_digest(waveform, row.transcript) != row.sha256:
                place = f"its line in {packed.INDEX_FILE}, or bytes {first} to {last} of {audio.name}"
                yield f"{name}: utterance {row.id} has changed: {place}"


def _check_against_catalog(dataset: packed.PackedDataset, corpus: Corpus) -> Iterator[str]:
    """Compare the counts in dataset.json with the published ones, for subsets from the published archives."""
    if dataset.splits != corpus.splits(dataset.summary):
        yield f"{packed.DATASET_FILE} says {dataset.splits}; of {corpus.name} it is {corpus.splits(dataset.summary)}"
    for published in corpus.subsets:
        prepared = dataset.summary.get(published.name)
        if prepared is None or not (prepared.official or dataset.synthetic):
            continue
        for unit, tolerance in ("utterances", 0.0), ("speakers", 0.0), ("hours", HOURS_TOLERANCE):
            found, expected = getattr(prepared, unit), getattr(published, unit)
            if expected and abs(found / expected - 1) > tolerance:
                yield f"{published.name} has {round(found, 2)} {unit}, {expected} were published"


if __name__ == "__main__":
    sys.exit(main())
