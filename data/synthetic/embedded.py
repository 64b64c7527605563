"""The embedded corpus: short sentences spoken by eSpeak NG, to run the whole benchmark in minutes anywhere.

    python -m data.download --corpus synthetic

Every speaker is a voice with an accent. Voices and sentences of the validation and test sets never occur in training;
accents do. A sentence is a template of grammar.txt, its slots filled from lists, each of which is drawn like a deck of
cards, all of it before any of it again: each word occurs about equally often. Every run gives the same bytes, by

- One process per speaker (speaking.py).
- Of `random`, only `Random.random`: it alone is guaranteed to return the same numbers in every version of Python.
- Resampling in double precision: last bits, which may differ between processors, hardly ever reach the 16-bit sample.
- A fixed version of espeakng-loader. Its library is compiled per platform; the reference checksum was made on x86-64.
"""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import soxr

from data.cli import progress_bar
from data.corpora import CORPORA, Corpus, CorpusSubset
from data.packed import SAMPLE_RATE
from data.readers import Utterance
from data.synthetic.voices import Line, add_noise, speak

ACCENTS = ("en-us", "en", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc")
# Chosen for being clear: nothing whispering, creaking, robotic or clipped. Voices defined much alike are in one subset.
# None uses eSpeak NG's `breath`, the noise of which is not the same from run to run.
VOICES = {
    "synthetic-train": (
        "m1 m3 m4 m6 m7 m8 f1 Andy Annie Denis Diogo Gene Henrique Hugo Mario Michael Nguyen adam anika antonio "
        "aunty belinda benjamin david ed edward gustave iven4 john linda max michel miguel mike2 norbert pedro robert "
        "steph"
    ),
    "synthetic-validation": "m5 f4 Lee grandma marcelo paul rob travis",
    "synthetic-test": "m2 Alex Andrea boris kaukovalta pablo quincy shelby",
}
ACCENTS_PER_VOICE = 2
EDGE_SAMPLES = 800  # of noise alone before and after the speech
GAIN = 0.7  # leaves room for what resampling and noise add
_spoken: dict[str, np.ndarray] = {}  # by id: an utterance is spoken to know its length, and packed later
_LINES = Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8").splitlines()
TEMPLATES = [line for line in _LINES if line and not line.startswith(("#", "+"))]
SLOTS = {line.split()[1]: line.split(maxsplit=2)[2].split("|") for line in _LINES if line.startswith("+")}


@dataclass(frozen=True)
class Speaker:
    """A voice with an accent, and what it says."""

    voice: str
    accent: str
    lines: tuple[Line, ...]


def make_sentences(count: int, seed: int, taken: set[str]) -> list[str]:
    """Return `count` different sentences, none of them in `taken`, to which they are added."""
    source, decks = random.Random(seed), defaultdict[str, list[str]](list)

    def draw(name: str, entries: Sequence[str]) -> str:
        deck = decks[name]
        if not deck:
            deck.extend(entries)
        return deck.pop(int(source.random() * len(deck)))

    sentences: list[str] = []
    while len(sentences) < count:
        template = draw("template", TEMPLATES)
        sentence = re.sub(r"{(\w+)}", lambda slot: draw(slot[1], SLOTS[slot[1]]), template)
        if sentence not in taken:
            taken.add(sentence)
            sentences.append(sentence)
    return sentences


@cache
def build_speakers() -> dict[str, list[Speaker]]:
    """Return who says what in each subset: a pure function of this module's constants."""
    taken: set[str] = set()
    speakers: dict[str, list[Speaker]] = {}
    for index, (subset, voices) in enumerate(VOICES.items()):
        count = CORPORA["synthetic"].subsets[index].utterances or 0
        sentences = make_sentences(count, seed=index + 1, taken=taken)
        pairs = [
            (voice, ACCENTS[(position + ACCENTS_PER_VOICE * turn) % len(ACCENTS)])
            for turn in range(ACCENTS_PER_VOICE)
            for position, voice in enumerate(voices.split())
        ]
        speakers[subset] = []
        for place, (voice, accent) in enumerate(pairs):
            number, spoken = 1000 * (index + 1) + place, sentences[place :: len(pairs)]
            lines = tuple(_line(number, position, text) for position, text in enumerate(spoken))
            speakers[subset].append(Speaker(voice, accent, lines))
    return speakers


def list_utterances(corpus: Corpus, subset: CorpusSubset) -> list[Utterance]:
    """Return the utterances of a subset, for speak_utterances; they are spoken here, for their lengths."""
    speakers, utterances = build_speakers()[subset.name], []
    with ThreadPool() as pool, progress_bar(f"speaking {subset.name}", len(speakers), " speakers") as bar:
        for speaker, waveforms in zip(speakers, pool.imap(synthesize, speakers), strict=True):
            for line, waveform in zip(speaker.lines, waveforms, strict=True):
                number, _, _ = line.id.partition("-")
                utterances.append(Utterance(line.id, number, line.text, subset.name, len(waveform), corpus.layout))
                _spoken[line.id] = waveform
            bar.update(1)
    return utterances


def speak_utterances(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """Return what list_utterances has kept, once: int16 [num_samples] at 16 kHz for each utterance."""
    return [_spoken.pop(utterance.id) for utterance in utterances]


def synthesize(speaker: Speaker) -> list[np.ndarray]:
    """Return what a speaker says, by line: int16 [samples] at 16 kHz. UserError names a voice or a line that fails."""
    rate, spoken = speak(f"{speaker.accent}+{speaker.voice}", speaker.lines)
    waveforms = []
    for speech, line in zip(spoken, speaker.lines, strict=True):
        resampled = soxr.resample(speech.astype(np.float64) * GAIN, rate, SAMPLE_RATE, quality="VHQ")
        waveforms.append(add_noise(np.pad(resampled, EDGE_SAMPLES), line))
    return waveforms


def _line(number: int, position: int, text: str) -> Line:
    # Numbers that vary from line to line without a random generator, by multiplication with odd constants.
    mixed = (number * 7919 + position * 104729) % 65521
    return Line(
        id=f"{number}-1-{position:04d}",
        text=text,
        rate=150 + mixed % 36,
        pitch=38 + mixed // 36 % 25,
        noise=10 + mixed // 900 % 50,
        seed=number * 10000 + position,
    )
