"""The sentences of the synthetic corpus: those of grammar.txt, drawn evenly and without repetition.

A slot in braces is filled from its list. Every list is drawn like a deck of cards, all of it before any of it again, so
that each word occurs about equally often. Only `random.Random.random` is used: of the generator's methods, it alone
is guaranteed to return the same numbers in every version of Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

_LINES = Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8").splitlines()
TEMPLATES = [line for line in _LINES if line and not line.startswith(("#", "+"))]
SLOTS = {line.split()[1]: line.split(maxsplit=2)[2].split("|") for line in _LINES if line.startswith("+")}


class Decks:
    """Draws the entries of each list in random order, every entry once before any comes again."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._cards: dict[str, list[str]] = {}

    def draw(self, name: str, entries: Sequence[str]) -> str:
        cards = self._cards.setdefault(name, [])
        if not cards:
            cards.extend(entries)
        return cards.pop(int(self._random.random() * len(cards)))

    def sentence(self) -> str:
        template = self.draw("template", TEMPLATES)
        return re.sub(r"{(\w+)}", lambda slot: self.draw(slot[1], SLOTS[slot[1]]), template)


def make_sentences(count: int, seed: int, taken: set[str]) -> list[str]:
    """Return `count` different sentences, none of them in `taken`, to which they are added."""
    decks = Decks(seed)
    sentences: list[str] = []
    while len(sentences) < count:
        sentence = decks.sentence()
        if sentence not in taken:
            taken.add(sentence)
            sentences.append(sentence)
    return sentences
