"""Transcripts beside what was recognised, word by word."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import Levenshtein

from tools.mlperf.runlog import Transcript
from tools.report.runs import Run

EQUAL, SUBSTITUTED, DELETED, INSERTED = "equal", "substituted", "deleted", "inserted"
_KINDS = {"equal": EQUAL, "replace": SUBSTITUTED, "delete": DELETED, "insert": INSERTED}


class Word(NamedTuple):
    """A word said, and what was recognised in its place; empty where there is none."""

    kind: str
    reference: str
    hypothesis: str


class Aligned(NamedTuple):
    """An utterance whose errors are marked."""

    transcript: Transcript
    words: list[Word]

    @property
    def errors(self) -> str:
        """The errors in words, for those who hear the page."""
        said = {
            SUBSTITUTED: "{0.hypothesis} for {0.reference}",
            DELETED: "{0.reference} is missing",
            INSERTED: "{0.hypothesis} is too many",
        }
        return "; ".join(said[word.kind].format(word) for word in self.words if word.kind != EQUAL) or "no errors"

    @property
    def counts(self) -> str:
        """How many errors of each kind."""
        kinds = [word.kind for word in self.words]
        return ", ".join(f"{kinds.count(kind)} {kind}" for kind in (SUBSTITUTED, DELETED, INSERTED) if kind in kinds)


class Group(NamedTuple):
    """Utterances of about the same rank."""

    title: str
    utterances: list[Aligned]


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> Iterator[Word]:
    """Words of a shortest edit from reference to hypothesis, in order."""
    for kind, start, end, recognised_start, recognised_end in Levenshtein.opcodes(reference, hypothesis):
        for offset in range(max(end - start, recognised_end - recognised_start)):
            said = reference[start + offset] if start + offset < end else ""
            recognised = hypothesis[recognised_start + offset] if recognised_start + offset < recognised_end else ""
            yield Word(_KINDS[kind], said, recognised)


def groups(run: Run) -> list[Group]:
    """A run's transcripts as the three worst, four in the middle and the three best; the log has them in this order.

    Of fewer than ten, a third each.
    """
    utterances = [
        Aligned(each, list(align(each.reference.split(), each.hypothesis.split()))) for each in run.log.transcripts
    ]
    ends = min(3, len(utterances) // 3)
    if ends == 0:
        return [Group("From the worst to the best", utterances)] if utterances else []
    middle = utterances[ends:-ends]
    start = max(0, (len(middle) - 4) // 2)
    return [
        Group("Worst", utterances[:ends]),
        Group("Typical", middle[start : start + 4]),
        Group("Best", utterances[-ends:]),
    ]
