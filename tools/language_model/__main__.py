"""N-gram language models, estimated from the training transcripts of a data set.

    python -m tools.language_model estimate --dataset-dir AN4_dataset --output an4.arpa

The estimate is interpolated Witten-Bell smoothing (S. F. Chen and J. Goodman, "An empirical study of smoothing
techniques for language modeling", 1999, section 2.6): after a history h that was seen c(h) times with N(h) different
words,

    p(w | h) = (c(h w) + N(h) p(w | h')) / (c(h) + N(h))

where h' is h without its first word; below the single words lies the uniform distribution over all words, the end of
the sentence and the unknown word. In contrast to Kneser-Ney it asks nothing of the counts of counts, which in small
corpora such as AN4 are not there. It is written in the ARPA format, whose back-off weight is N(h) / (c(h) + N(h)).
"""

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.packed import open_dataset
from pytorch.errors import RunError
from tools.cli import command
from tools.output_files import output_file, prepare_outputs

START, END, UNKNOWN = "<s>", "</s>", "<unk>"

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


def estimate(options: Estimate) -> None:
    """Write the ARPA file, whole or not at all."""
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


main = command("tools.language_model", __doc__, {"estimate": Estimate}, estimate)

if __name__ == "__main__":
    sys.exit(main())
