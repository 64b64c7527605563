"""N-gram language models: estimated from the training transcripts of a data set, or downloaded.

    python -m tools.language_model estimate --dataset-dir AN4_dataset --output an4.arpa
    python -m tools.language_model download --name 3-gram.pruned.3e-7

The estimate is interpolated Witten-Bell smoothing (S. F. Chen and J. Goodman, "An empirical study of smoothing
techniques for language modeling", 1999, section 2.6): after a history h that was seen c(h) times with N(h) different
words,

    p(w | h) = (c(h w) + N(h) p(w | h')) / (c(h) + N(h))

where h' is h without its first word; below the single words lies the uniform distribution over all words, the end of
the sentence and the unknown word. In contrast to Kneser-Ney it asks nothing of the counts of counts, which in small
corpora such as AN4 are not there. It is written in the ARPA format, whose back-off weight is N(h) / (c(h) + N(h)).
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.cli import DataError, exit_status, progress_bar
from data.corpora import REPOSITORY, Archive, openslr_mirrors
from data.fetch import fetch
from data.files import DOWNLOADS, atomic_replace, file_digest, locked, work_folder
from data.packed import open_dataset
from pytorch.errors import RunError
from tools.output_files import output_file, prepare_outputs

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
# Of openslr.org/11: n-grams of the books that LibriSpeech's readers did not read, gzipped ARPA files. None was ever
# downloaded with this: other projects check these MD5 sums.
LIBRISPEECH_MODELS = {
    "3-gram.pruned.3e-7": "8f67ec741827742eee05799ab7605b50",
    "3-gram.pruned.1e-7": "9a0f1325bcaf3a0f7b7be4be10823c2a",
    "3-gram": "74cbb837e582378c26c602e1c8cbcb9c",
    "4-gram": "6abdcd5b055bd482e4f9defe91d40408",
}

Ngram = tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """Estimate an n-gram language model from the training transcripts of a packed data set."""

    dataset_dir: Path
    """packed data set, as download_dataset.sh makes it; only its training subsets are read"""
    output: Path
    """where the ARPA file goes; compressed by gzip if its name ends in .gz"""
    order: int = 3
    """words in the longest n-grams, from 2 to 6"""
    overwrite: bool = False
    """replace the file if it exists"""


@dataclass(frozen=True)
class Download:
    """Download one of the language models of LibriSpeech (openslr.org/11)."""

    name: Annotated[str, tyro.conf.arg(help=f"which one: {', '.join(LIBRISPEECH_MODELS)}")]
    mirror: str = ""
    """comma-separated addresses, tried in this order; empty: those of OpenSLR"""
    md5: str = ""
    """MD5 that the file must have, instead of the published file's"""
    output_dir: Path = REPOSITORY / "language_models"
    """folder for the file"""


def main() -> int:
    """Run the command line; return the exit status."""
    options = tyro.cli(Estimate | Download, prog="python -m tools.language_model", description=__doc__)  # type: ignore[arg-type]
    return exit_status(lambda: estimate(options) if isinstance(options, Estimate) else download(options), None)


def estimate(options: Estimate) -> None:
    """Write the ARPA file, whole or not at all.

    Raises:
        RunError: the order is not valid, the file exists or cannot be written, or there are no training transcripts.
        DataError: the data set is absent or damaged.
    """
    if not 2 <= options.order <= 6:
        raise RunError(f"--order is {options.order}; it must be from 2 to 6, as KenLM reads no others")
    prepare_outputs([options.output], options.overwrite)
    subsets = open_dataset(options.dataset_dir).split("train")
    if not subsets:
        raise RunError(f"{options.dataset_dir} has no training subset to estimate a language model from")
    transcripts = [transcript for subset in subsets for transcript in subset.transcripts]
    model = estimate_ngrams(transcripts, options.order)
    with output_file(options.output) as stream:
        stream.writelines(f"{line}\n" for line in arpa_lines(model))
    counts = ", ".join(f"{len(grams)} {size}-grams" for size, grams in enumerate(model, 1))
    print(f"{options.output}: {counts}, from {len(transcripts)} transcripts", file=sys.stderr)


def estimate_ngrams(transcripts: Iterable[str], order: int) -> list[dict[Ngram, tuple[float, float]]]:
    """Return probability and back-off weight of each n-gram that occurs, for n from 1 to `order`."""
    counts: list[Counter[Ngram]] = [Counter() for _ in range(order)]
    for transcript in transcripts:
        words = [START, *transcript.split(), END]
        for position in range(1, len(words)):
            for size in range(1, min(order, position + 1) + 1):
                counts[size - 1][tuple(words[position + 1 - size : position + 1])] += 1

    seen, followers = Counter[Ngram](), Counter[Ngram]()  # c(h) and N(h)
    for grams in counts:
        for ngram, count in grams.items():
            seen[ngram[:-1]] += count
            followers[ngram[:-1]] += 1

    uniform = 1 / (len(counts[0]) + 1)
    probabilities: dict[Ngram, float] = defaultdict(lambda: uniform)
    for grams in counts:
        for ngram, count in grams.items():
            history = ngram[:-1]
            lower = probabilities[ngram[1:]] if len(ngram) > 1 else uniform
            probabilities[ngram] = (count + followers[history] * lower) / (seen[history] + followers[history])

    def backoff(history: Ngram) -> float:
        return followers[history] / (seen[history] + followers[history]) if history in seen else 1.0

    model = [{ngram: (probabilities[ngram], backoff(ngram)) for ngram in sorted(grams)} for grams in counts]
    model[0][(UNKNOWN,)] = (uniform * backoff(()), 1.0)
    model[0][(START,)] = (0.0, backoff((START,)))  # it is a history, never a word that follows one
    return model


def arpa_lines(model: list[dict[Ngram, tuple[float, float]]]) -> Iterator[str]:
    """Yield the lines of an ARPA file (decimal logarithms; -99 stands for the probability 0)."""
    yield "\\data\\"
    yield from (f"ngram {size}={len(grams)}" for size, grams in enumerate(model, 1))
    for size, grams in enumerate(model, 1):
        yield ""
        yield f"\\{size}-grams:"
        for ngram, (probability, backoff) in grams.items():
            logarithm = math.log10(probability) if probability else -99
            yield f"{logarithm:.7f}\t{' '.join(ngram)}" + (f"\t{math.log10(backoff):.7f}" if size < len(model) else "")
    yield ""
    yield "\\end\\"


def download(options: Download) -> None:
    """Download a language model, whose MD5 says whether it is whole; resume an unfinished download.

    Raises:
        RunError: there is no model of this name, or another file has its place.
        DataError: no mirror delivered it whole, or it cannot be written.
    """
    if options.name not in LIBRISPEECH_MODELS:
        raise RunError(f"--name {options.name}: unknown language model; one of {', '.join(LIBRISPEECH_MODELS)}")
    archive = Archive(f"{options.name}.arpa.gz", md5=options.md5.lower() or LIBRISPEECH_MODELS[options.name])
    mirrors = [part.strip() for part in options.mirror.split(",") if part.strip()] or openslr_mirrors(11)
    target = options.output_dir / archive.file
    if target.exists():
        if (md5 := file_digest(target, "md5")) != archive.md5:
            raise RunError(f"{target} has MD5 {md5}, not {archive.md5}: remove it to download it again")
    else:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        with (
            locked(options.output_dir, "download"),
            work_folder(options.output_dir) as work,
            progress_bar(archive.file, None, unit="B") as bar,
        ):
            downloaded = work / DOWNLOADS / archive.file
            try:
                model = fetch(archive, mirrors, downloaded, bar.update)
            except OSError as error:
                raise DataError(f"cannot write {downloaded}: {error.strerror}") from error
            print(f"{archive.file}: MD5 {model.md5}, SHA-256 {model.sha256}", file=sys.stderr)
            atomic_replace(downloaded, target)
    print(f"{target} is complete", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
