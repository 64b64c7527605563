"""Word and character error rates.

The benchmark's figure is the **corpus WER**: word errors (insertions, deletions and substitutions) of all utterances
over all reference words, in percent. The mean of the utterances' own rates is another number, kept beside it under its
own name.
"""

import operator
from dataclasses import astuple, dataclass

import Levenshtein


@dataclass(frozen=True)
class ErrorCounts:
    """Errors of a set of utterances; sets add up with `+`."""

    utterances: int = 0
    word_errors: int = 0
    words: int = 0
    character_errors: int = 0
    characters: int = 0
    sum_of_utterance_wers: float = 0.0

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(*map(operator.add, astuple(self), astuple(other)))

    @property
    def wer(self) -> float:
        """Corpus word error rate in percent."""
        return 100 * self.word_errors / self.words

    @property
    def cer(self) -> float:
        """Corpus character error rate in percent; spaces count as characters."""
        return 100 * self.character_errors / self.characters

    @property
    def mean_utterance_wer(self) -> float:
        """Mean over utterances of each one's word error rate, in percent (what the 2018 reference reported)."""
        return 100 * self.sum_of_utterance_wers / self.utterances


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Count the errors of one utterance.

    Raises:
        ValueError: the reference has no word (its rate has no meaning).
    """
    words = reference.split()
    if not words:
        raise ValueError("a reference transcript is empty")
    errors = Levenshtein.distance(words, hypothesis.split())
    characters = Levenshtein.distance(reference, hypothesis)
    return ErrorCounts(1, errors, len(words), characters, len(reference), errors / len(words))
