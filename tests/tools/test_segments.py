"""Where long recordings are cut, and how what both neighbors hear is joined again; captions."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tools.speaking import RATE
from tools.recognizer import Word
from tools.segments import CONTEXT_S, LONGEST_S, SHORTEST_S, join, read_until_interrupt, segments
from tools.transcribe import as_caption, captions


def blocks_of(waveform: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (waveform[start : start + size] for start in range(0, len(waveform), size))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 70 * RATE), st.integers(1000, 40 * RATE), st.integers(0, 99))
def test_segments_cover_a_recording_once_between_their_cuts(samples: int, block: int, seed: int) -> None:
    waveform = np.random.default_rng(seed).integers(-9, 9, samples).astype(np.int16)
    position = 0
    parts = list(segments(blocks_of(waveform, block)))
    for piece in parts:
        begin, end = round(piece.start * RATE), round(piece.end * RATE)
        assert np.array_equal(piece.waveform, waveform[begin:end])
        assert begin == max(0, position - CONTEXT_S * RATE)
        cut_at = samples if piece.cut is None else round(piece.cut * RATE)
        assert end == min(samples, cut_at + CONTEXT_S * RATE)
        if piece.cut is not None:
            assert SHORTEST_S * RATE <= cut_at - position <= LONGEST_S * RATE
        position = cut_at
    assert position == samples
    assert [part.cut is None for part in parts] == [False] * (len(parts) - 1) + [True] * bool(parts)


def test_a_cut_is_made_in_the_pause() -> None:
    waveform = np.random.default_rng(0).integers(-999, 999, 30 * RATE).astype(np.int16)
    waveform[int(8.1 * RATE) : int(8.5 * RATE)] //= 100
    first = next(segments([waveform]))
    assert first.cut == pytest.approx(8.3, abs=0.06)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 0.6), st.floats(0.02, 0.5)), max_size=12), st.integers(0, 99))
def test_words_that_both_segments_hear_come_once_though_their_times_differ_a_little(
    spans: list[tuple[float, float]], seed: int
) -> None:
    random = np.random.default_rng(seed)
    at, words = 0.0, []
    for gap, length in spans:
        words.append((at + gap, at + gap + length))
        at += gap + length
    middle = at / 2

    def heard(low: float, high: float) -> list[Word]:
        return [
            Word(str(number), start + random.uniform(-0.02, 0.02), end + random.uniform(-0.02, 0.02), 1.0)
            for number, (start, end) in enumerate(words)
            if end > low and start < high
        ]

    before, after = heard(-1, middle + CONTEXT_S), heard(middle - CONTEXT_S, at + 1)
    kept = [word.text for side in join(middle, before, after) for word in side]
    assert kept == [str(number) for number in range(len(words))]


TIMES = st.lists(st.floats(0.01, 1.5), max_size=12)


@settings(max_examples=300, deadline=None)
@given(TIMES, TIMES)
def test_whatever_two_segments_hear_no_word_begins_before_the_last_one_has_ended(
    before: list[float], after: list[float]
) -> None:
    def words(start: float, steps: list[float]) -> list[Word]:
        times = np.cumsum([start, *steps]).tolist()
        return [Word("X", *span, 1.0) for span in list(pairwise(times))[::2]]

    end = 5.0 + CONTEXT_S
    heard = [replace(word, end=min(word.end, end)) for word in words(0.0, before) if word.start < end]
    sides = join(5.0, heard, words(5.0 - CONTEXT_S, after))
    joined = [word for side in sides for word in side]
    assert all(word.start < word.end for word in joined)
    assert all(one.end <= other.start for one, other in pairwise(joined))


@pytest.mark.parametrize(
    ("before", "after", "cut", "expected"),
    [
        (("HAMMEPET", 4.08, 5.19), ("MEPED", 4.27, 5.25), 4.69, "HAMMEPET"),
        (("CHOCOLATST", 9.29, 10.51), ("KLATED", 9.53, 10.53), 10.02, "CHOCOLATST"),
        (("BREA", 4.6, 5.1), ("BREAD", 4.61, 5.7), 4.6, "BREAD"),
    ],
)
def test_a_sound_that_two_segments_hear_as_different_words_comes_once(
    before: tuple[str, float, float], after: tuple[str, float, float], cut: float, expected: str
) -> None:
    kept = join(cut, [Word(*before, 1.0)], [Word(*after, 1.0)])
    assert [word.text for side in kept for word in side] == [expected]


def test_captions_end_at_pauses_and_are_short() -> None:
    starts = [0.3 * number + (5 if number >= 50 else 0) for number in range(100)]
    words = [Word("WORD", start, start + 0.2, 1.0) for start in starts]
    groups = captions(words)
    assert [word for group in groups for word in group] == words
    assert all(group[-1].end - group[0].start <= 7 for group in groups)
    shown = [as_caption("srt", 1, group).splitlines()[2:-1] for group in groups]
    assert max(map(len, shown)) == 2
    assert all(len(line) <= 42 for lines in shown for line in lines)
    assert any(group[0] is words[50] for group in groups)


def test_the_first_interrupt_ends_the_reading_and_the_second_one_everything() -> None:
    output, input = os.pipe()
    with open(output, "rb") as stream, open(input, "wb", buffering=0) as recorder:  # noqa: PTH123
        recorder.write(b"before")
        arriving = read_until_interrupt(stream)
        assert next(arriving) == b"before"
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        recorder.write(b"in the pipe")
        assert list(arriving) == [b"in the pipe"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
