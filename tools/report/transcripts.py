"""Transcripts beside what was recognized, word by word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import Levenshtein

from tools.mlperf.logs import Transcript
from tools.report.runs import Run

KINDS = {"equal": "equal", "replace": "substituted", "delete": "deleted", "insert": "inserted"}


class Word(NamedTuple):
    """A word said, and what was recognized in its place; empty where there is none."""

    kind: str
    reference: str
    hypothesis: str


class Aligned(NamedTuple):
    """An utterance whose errors are marked."""

    transcript: Transcript
    words: list[Word]

    @property
    def errors(self) -> str:
        """How many errors of each kind."""
        kinds = [word.kind for word in self.words]
        return ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS.values() if kind in kinds and kind != "equal")


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> Iterator[Word]:
    """Yield the words of a shortest edit from reference to hypothesis, in order."""
    for kind, start, end, recognized_start, recognized_end in Levenshtein.opcodes(reference, hypothesis):
        said, recognized = reference[start:end], hypothesis[recognized_start:recognized_end]
        for pair in zip_longest(said, recognized, fillvalue=""):
            yield Word(KINDS[kind], *pair)


def groups(run: Run) -> dict[str, list[Aligned]]:
    """Return a run's transcripts by title: the three worst, four in the middle and the three best.

    Of fewer than ten, the worst and the best are a third each. The log has them in this order.
    """
    utterances = [
        Aligned(each, list(align(each.reference.split(), each.hypothesis.split()))) for each in run.log.transcripts
    ]
    ends = min(3, len(utterances) // 3)
    if ends == 0:
        return {"From the worst to the best": utterances} if utterances else {}
    middle = utterances[ends:-ends]
    start = max(0, (len(middle) - 4) // 2)
    return {"Worst": utterances[:ends], "Typical": middle[start : start + 4], "Best": utterances[-ends:]}
