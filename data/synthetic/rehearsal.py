"""The corpus `rehearsal`: LibriSpeech's shape and an open vocabulary in synthetic speech, in any number of hours.

    python -m data.download --corpus rehearsal --hours 10

data/README.md says what it is like. Subsets that are not of training are larger than their share, or WER would mean
little. There are no archives: who says what for how long is known beforehand, and is spoken straight into place.
"""

import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import espeakng_loader
import numpy as np
import soxr

from data.corpora import Corpus, CorpusSubset, utterance_seconds
from data.packed import SAMPLE_RATE
from data.readers import Utterance
from data.synthetic.voices import Line, add_noise, speak

ACCENTS = ("en-US", "en-US-nyc", "en", "en-GB-x-rp", "en-GB-scotland")  # eSpeak NG's files of languages
CHARACTERS_PER_SECOND = 0.116  # at a rate of one word a minute; measured on three accents, to some 5 %
WORDS, FREQUENT_WORDS = Path(__file__).with_name("words.txt"), 2000
FILLED, PAUSE_SECONDS = 0.93, 0.3  # how much of an utterance is planned to be speech, and what is never speech


@dataclass(frozen=True)
class Voice:
    """How a speaker sounds. `echoes` are delays in samples and gains; `definition` is for eSpeak NG."""

    definition: str
    rate: int
    gain: float
    noise: int
    echoes: tuple[tuple[int, float], ...]


def list_utterances(corpus: Corpus, subset: CorpusSubset) -> list[Utterance]:
    """Return the utterances of a subset, to be spoken by speak_utterances; each `file` is the subset's name."""
    utterances = []
    for place, seconds in enumerate(utterance_seconds(subset.name, subset.utterances or 0).tolist()):
        position, index = divmod(place, subset.speakers or 1)
        speaker, samples = 10000 * (corpus.subsets.index(subset) + 1) + index, round(seconds * SAMPLE_RATE)
        speed = CHARACTERS_PER_SECOND * draw_voice(speaker, subset.name).rate
        characters = int((seconds - PAUSE_SECONDS) * FILLED * speed)
        text = draw_words(10000 * speaker + position, characters, subset.split != "train")
        name = f"{speaker}-1-{position:04d}"
        utterances.append(Utterance(name, str(speaker), text, subset.name, samples, corpus.layout))
    return utterances


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


@cache
def draw_voice(speaker: int, subset: str) -> Voice:
    """Return the voice of a speaker by number: a function of this number and the kind of subset."""
    source, other = random.Random(speaker), "other" in subset

    def between(low: float, high: float) -> float:
        return low + (high - low) * source.random()

    accent = ACCENTS[max(0, int(between(0 if other else -len(ACCENTS), len(ACCENTS))))]  # half of `clean`: the first
    size = source.random()  # from a long vocal tract and low pitch to a short and high one
    pitch, tract = 85 + 105 * size + between(-10, 10), 94 + 18 * size + between(-3, 3)
    definition = [
        (Path(espeakng_loader.get_data_path()) / "lang" / "gmw" / accent).read_text(encoding="utf-8"),
        f"pitch {pitch:.0f} {pitch * between(1.2, 1.5):.0f}",
        f"roughness {between(0, 4 if other else 2):.0f}\nflutter {between(0, 4):.0f}",
    ]
    for formant in range(1, 6):
        frequency, strength, width = tract * between(0.97, 1.03), between(85, 115), between(90, 115)
        definition.append(f"formant {formant} {frequency:.0f} {strength:.0f} {width:.0f}")
    return Voice(
        definition="\n".join(definition),
        rate=int(between(115, 150)),
        gain=between(0.2, 0.6),
        noise=int(between(10, 200 if other else 60)),
        echoes=tuple((int(between(40, 600)), between(0, 0.4 if other else 0.2)) for _ in range(3)),
    )


def speak_utterances(utterances: Sequence[Utterance]) -> list[np.ndarray]:
    """Return what one speaker says: int16 [num_samples] at 16 kHz for each utterance. UserError if a voice fails."""
    speaker = utterances[0].speaker
    voice = draw_voice(int(speaker), utterances[0].file)
    lines = [
        Line(each.id, each.transcript, voice.rate, 50, voice.noise, int(each.id.replace("-1-", "")))
        for each in utterances
    ]
    rate, spoken = speak(f"of speaker {speaker}", lines, voice.definition)
    return [
        _record(speech, rate, line, voice, each.num_samples)
        for speech, line, each in zip(spoken, lines, utterances, strict=True)
    ]


def _record(speech: np.ndarray, rate: int, line: Line, voice: Voice, num_samples: int) -> np.ndarray:
    """Return speech, int16 [samples] at `rate`, as recorded in the voice's room: int16 [num_samples] at 16 kHz."""
    available = num_samples - int(PAUSE_SECONDS * SAMPLE_RATE)
    target = min(SAMPLE_RATE, rate * available / len(speech))  # what is too long is played faster
    dry = soxr.resample(speech.astype(np.float64) * voice.gain, rate, target, quality="VHQ")[:available]
    recorded, start = np.zeros(num_samples), (num_samples - len(dry)) // 2
    for delay, gain in ((0, 1.0), *voice.echoes):
        recorded[start + delay :][: len(dry)] += gain * dry[: num_samples - start - delay]
    return add_noise(recorded, line)
