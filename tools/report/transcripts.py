"""Transcripts beside what was recognized, word by word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

import Levenshtein

from tools.mlperf.runlog import Transcript
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


def transcripts(run: Run) -> list[Aligned]:
    """Return the utterances that a run's log shows, from the worst to the best."""
    return [Aligned(each, list(align(each.reference.split(), each.hypothesis.split()))) for each in run.log.transcripts]
