from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from data.corpora import find_corpus
from data.synthetic.embedded import build_speakers, synthesize

TRAIN, VALIDATION, TEST = "synthetic-train", "synthetic-validation", "synthetic-test"


def sentences(subset: str) -> list[str]:
    return [line.text for speaker in build_speakers()[subset] for line in speaker.lines]


def test_the_plan_has_the_counts_of_the_catalog_and_no_sentence_or_name_twice() -> None:
    for subset in find_corpus("synthetic").subsets:
        assert len(sentences(subset.name)) == subset.utterances
        assert len(build_speakers()[subset.name]) == subset.speakers
    speakers = [speaker for group in build_speakers().values() for speaker in group]
    assert len({(speaker.voice, speaker.accent) for speaker in speakers}) == len(speakers)
    lines = [line for speaker in speakers for line in speaker.lines]
    assert len({line.id for line in lines}) == len({line.seed for line in lines}) == len(lines)
    assert len({line.text for line in lines}) == len(lines)
    assert all(4 <= len(line.text.split()) <= 10 for line in lines)


def test_no_voice_of_validation_or_test_is_heard_in_training_but_every_accent_is() -> None:
    voices = {subset: {speaker.voice for speaker in speakers} for subset, speakers in build_speakers().items()}
    accents = {subset: {speaker.accent for speaker in speakers} for subset, speakers in build_speakers().items()}
    assert voices[TRAIN].isdisjoint(voices[VALIDATION] | voices[TEST])
    assert voices[VALIDATION].isdisjoint(voices[TEST])
    assert accents[TRAIN] == accents[VALIDATION] == accents[TEST]


def test_every_word_is_frequent_in_training_and_none_is_new_in_validation() -> None:
    counts = Counter(word for text in sentences(TRAIN) for word in text.split())
    assert 200 <= len(counts) <= 300
    assert min(counts.values()) >= 20
    assert {word for subset in (VALIDATION, TEST) for text in sentences(subset) for word in text.split()} <= set(counts)


@pytest.mark.parametrize("index", [0, 30])
def test_a_speaker_sounds_the_same_every_time(index: int) -> None:
    speaker = build_speakers()[TRAIN][index]
    speaker = replace(speaker, lines=speaker.lines[:5])
    once, again = synthesize(speaker), synthesize(speaker)
    assert len(once) == 5
    for first, second in zip(once, again, strict=True):
        np.testing.assert_array_equal(first, second)
        assert first.dtype == np.int16 and 16000 < len(first) < 64000
        assert 0 < np.abs(first.astype(int)).max() < 32767
