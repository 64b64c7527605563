"""What is said: sentences of grammar.txt without repetition, or words of words.txt by their frequency in English.

A slot in braces is filled from its list. Every list is drawn like a deck of cards, all of it before any of it again, so
that each word occurs about equally often. Only `random.Random.random` is used: of the generator's methods, it alone
is guaranteed to return the same numbers in every version of Python.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

_LINES = Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8").splitlines()
TEMPLATES = [line for line in _LINES if line and not line.startswith(("#", "+"))]
SLOTS = {line.split()[1]: line.split(maxsplit=2)[2].split("|") for line in _LINES if line.startswith("+")}

WORDS = Path(__file__).with_name("words.txt")
FREQUENT_WORDS = 2000


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


@cache
def word_table(held_out: bool) -> tuple[list[str], list[int]]:
    """Return the words that may be spoken and the running sums of their counts; every tenth rare one if `held_out`."""
    lines = [line.split() for line in WORDS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    ranked = [(word, int(count)) for count, *words in lines for word in words]
    spoken = [each for rank, each in enumerate(ranked) if held_out or rank < FREQUENT_WORDS or rank % 10]
    return [word for word, _ in spoken], list(accumulate(count for _, count in spoken))


def draw_words(seed: int, characters: int, held_out: bool) -> str:
    """Return words, drawn by their frequency until the next would make it more than so many characters."""
    words, sums = word_table(held_out)
    source, text = random.Random(seed), ""
    while True:
        word = words[bisect(sums, source.random() * sums[-1])]
        if len(text) + len(word) <= characters:
            text += word + " "
        elif text:
            return text.rstrip()
