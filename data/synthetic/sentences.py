"""The sentences of the synthetic corpus: templates over a small vocabulary, drawn evenly and without repetition.

A slot in braces is filled from its list. Every list is drawn like a deck of cards, all of it before any of it again, so
that each word occurs about equally often. Only `random.Random.random` is used: of the generator's methods, it alone
is guaranteed to return the same numbers in every version of Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

SLOTS = {
    "person": (
        "THE BAKER|THE TEACHER|THE DOCTOR|THE FARMER|THE CAPTAIN|THE PAINTER|THE SINGER|THE DRIVER|THE STUDENT|"
        "THE SHEPHERD|MY MOTHER|MY FATHER|HER SISTER|HIS BROTHER|MY UNCLE|HIS COUSIN|HER GRANDMOTHER|MY NEIGHBOR|"
        "THE YOUNG MAN|THE OLD WOMAN"
    ),
    "did": "CARRIED|FOUND|REPAIRED|WASHED|DROPPED|BORROWED|FORGOT|CLEANED|LIFTED|WANTED|COVERED|SOLD",
    "do": "CARRY|FIND|REPAIR|WASH|BORROW|CLEAN|LIFT|MOVE",
    "adjective": "SMALL|HEAVY|YELLOW|BROKEN|WOODEN|SILVER|FROZEN|BEAUTIFUL|PURPLE|GREEN|BROWN|LITTLE",
    "thing": (
        "BASKET|LANTERN|HAMMER|MIRROR|BLANKET|TICKET|GUITAR|CAMERA|LADDER|TABLE|WINDOW|PICTURE|CANDLE|BUCKET|"
        "JACKET|WAGON"
    ),
    "place": (
        "IN THE KITCHEN|UNDER THE BRIDGE|NEAR THE RIVER|BEHIND THE SCHOOL|BESIDE THE GARDEN|ACROSS THE VALLEY|"
        "ON THE MOUNTAIN|AT THE STATION|INSIDE THE CASTLE|AROUND THE LAKE|IN THE CITY|BELOW THE TOWER|AT THE MARKET|"
        "ABOVE THE FOREST"
    ),
    "time": (
        "YESTERDAY|LAST WINTER|IN THE MORNING|BEFORE BREAKFAST|AFTER DINNER|ON FRIDAY|EVERY SUMMER|AT MIDNIGHT|"
        "IN SEPTEMBER|ON SATURDAY|THIS EVENING|ALL AFTERNOON"
    ),
    "future": "TOMORROW|NEXT WEEK|AFTER BREAKFAST|BEFORE DINNER|ON MONDAY",
    "food": "BREAD|HONEY|SOUP|CHEESE|BUTTER|COFFEE|APPLES|POTATOES|CHOCOLATE",
    "number": "THREE|FIVE|SIX|SEVEN|NINE|ELEVEN|TWELVE|TWENTY",
    "many": "HORSES|CHICKENS|LETTERS|STONES|BOTTLES|CHILDREN|RABBITS|SOLDIERS|BOXES",
    "living": "HORSES|CHICKENS|CHILDREN|RABBITS|SOLDIERS",
    "animal": "DOG|RABBIT|EAGLE|SPIDER|TIGER|MONKEY|HORSE",
    "moved": "SLEPT|JUMPED|WAITED|DANCED|WALKED|LISTENED",
    "manner": "SLOWLY|QUIETLY|QUICKLY|ALONE|AGAIN",
    "weather": "RAIN|SNOW|WIND|THUNDER",
    "changed": "BEGAN|STOPPED|RETURNED",
    "feeling": "HAPPY|ANGRY|TIRED|HUNGRY|LUCKY|PROUD|READY",
    "pronoun": "HE|SHE|WE|THEY",
    "modal": "WILL|CAN|MUST|SHOULD",
    "whose": "MY|HIS|HER|THE",
    "often": "NEVER|ALWAYS",
}
TEMPLATES = (
    "{person} {did} A {adjective} {thing} {place}",
    "{person} {did} THE {thing} {place}",
    "{time} {person} {did} {whose} {thing}",
    "{pronoun} {did} THE {adjective} {thing} {time}",
    "{pronoun} {often} {did} {whose} {adjective} {thing}",
    "THE {animal} {moved} {manner} {place}",
    "{time} THE {animal} {moved} {place}",
    "{number} {living} {moved} {manner} {place}",
    "{pronoun} BOUGHT {food} AND {food} {time}",
    "{person} LIKES {food} WITH {food}",
    "PLEASE BRING ME {number} {many}",
    "PLEASE GIVE {person} SOME {food}",
    "WHERE IS {whose} {adjective} {thing}",
    "{person} WAS {feeling} {time}",
    "{pronoun} {moved} BECAUSE THE {animal} WAS {feeling}",
    "THE {weather} {changed} {time}",
    "THE {weather} {changed} WHEN {pronoun} {moved}",
    "{pronoun} {modal} {do} {whose} {thing} {future}",
    "{person} {modal} {do} THE {adjective} {thing}",
    "{future} {pronoun} {modal} {do} THE {thing}",
    "I REMEMBER {number} {many} {place}",
    "{person} GAVE {number} {many} TO {person}",
    "IS {person} {feeling} TODAY",
)


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
        return re.sub(r"{(\w+)}", lambda slot: self.draw(slot[1], SLOTS[slot[1]].split("|")), template)


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
