"""The weights of a language model: the alpha and beta that give the lowest word error rate on a data set.

    python -m tools.language_model.tune results/an4/checkpoint_best.pt --dataset-dir AN4_dataset --lm an4.arpa

The network runs once; then every utterance is decoded with every pair of the grid, and again with a finer grid around
the best pair. Prints word error rates, and last the options to give to tools.evaluate and tools.transcribe.

A rate that is tuned and measured on the same utterances is optimistic. The one for comparisons is the leave-one-out
rate: each speaker is scored with the pair that is best for all other speakers. (Where there is only one speaker, or
they are not known, each utterance.)
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from torch import Tensor

from data.cli import progress_bar
from data.packed import open_dataset
from pytorch.config import Device
from pytorch.loader import Utterances
from pytorch.metrics import count_errors
from tools.cli import command, require_positive
from tools.language_model.beam_search import LanguageModel, beam_search, decode_each
from tools.recognizer import Recognizer, greedy, select_subsets

ALPHAS, BETAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0), (0.0, 1.0, 2.0, 4.0)
FINE_ALPHAS, FINE_BETAS = (-0.1, 0.0, 0.1), (-0.5, 0.0, 0.5)  # added to the best pair

Pair = tuple[float, float]  # alpha, beta


@dataclass(frozen=True)
class Options:
    """Find the weights of a language model."""

    checkpoint: tyro.conf.Positional[Path]
    """checkpoint of a training run, such as results/an4/checkpoint_best.pt"""
    dataset_dir: Path
    """packed data set, as download_dataset.sh makes it"""
    lm: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """n-gram language model: an ARPA file, plain or gzip"""
    split: str = "validation"
    """validation, or comma-separated names of subsets; never the one whose word error rate you want to report"""
    beam: int = 100
    """transcripts kept at each output frame"""
    batch_size: int = 16
    """utterances recognized together"""
    device: Device = "auto"
    """where to compute; auto: the GPU if there is one"""


def tune(options: Options) -> None:
    """Print the rates and the best pair."""
    require_positive(batch_size=options.batch_size, beam=options.beam)
    utterances = Utterances(select_subsets(open_dataset(options.dataset_dir), options.split))
    recognizer = Recognizer.load(options.checkpoint, options.device)
    language_model = LanguageModel(options.lm)
    emissions: list[Tensor] = []  # of each utterance: one process decodes them in order

    def decode_and_keep(emission_TV: Tensor) -> str:
        emissions.append(emission_TV)
        return greedy(emission_TV)

    evaluation = recognizer.evaluate(utterances, options.batch_size, decode_each(decode_and_keep))
    references = [hypothesis.reference for hypothesis in evaluation.hypotheses]
    errors_by_pair: dict[Pair, np.ndarray] = {}

    def search(alphas: Sequence[float], betas: Sequence[float]) -> Pair:
        """Decode with every new pair; return the best one of all."""
        pairs = [pair for pair in product(alphas, betas) if pair[0] >= 0 and pair not in errors_by_pair]
        with progress_bar("decoding", len(pairs), unit="pair") as bar:
            for alpha, beta in pairs:
                decode = beam_search(language_model, alpha, beta, options.beam)
                errors = [
                    count_errors(reference, decode(emission_TV)).word_errors
                    for reference, emission_TV in zip(references, emissions, strict=True)
                ]
                errors_by_pair[alpha, beta] = np.array(errors)
                bar.write(f"alpha {alpha:.2f}  beta {beta:5.2f}  WER {rate(sum(errors)):6.2f}")
                bar.update()
        return min(errors_by_pair, key=lambda pair: int(errors_by_pair[pair].sum()))

    def rate(errors: int) -> float:
        return 100 * errors / evaluation.total.words

    alpha, beta = search(ALPHAS, BETAS)
    alpha, beta = search([alpha + step for step in FINE_ALPHAS], [beta + step for step in FINE_BETAS])
    speakers = [utterances.speaker(index) or f"utterance {index}" for index in range(len(utterances))]
    if len(set(speakers)) == 1:
        speakers = [str(index) for index in range(len(utterances))]
    print(f"greedy decoding:  WER {evaluation.total.wer:.2f}")
    print(f"best pair:        WER {rate(errors_by_pair[alpha, beta].sum()):.2f}")
    print(f"leave-one-out:    WER {rate(leave_one_out(np.stack(list(errors_by_pair.values())), speakers)):.2f}")
    print(f"--lm {options.lm} --alpha {alpha:g} --beta {beta:g} --beam {options.beam}")


def leave_one_out(errors_PN: np.ndarray, groups: Sequence[str]) -> int:
    """Return the errors of all groups, each decoded with the pair that makes the fewest in all other groups.

    `errors_PN` has the word errors of each utterance with each pair, `groups` the group of each utterance.
    """
    total = 0
    for group in sorted(set(groups)):
        inside_N = np.array([other == group for other in groups])
        total += int(errors_PN[errors_PN[:, ~inside_N].sum(1).argmin(), inside_N].sum())
    return total


main = command("tools.language_model.tune", __doc__, Options, tune)

if __name__ == "__main__":
    sys.exit(main())
