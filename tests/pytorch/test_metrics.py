import jiwer
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytorch.metrics import ErrorCounts, count_errors

WORDS = st.lists(st.sampled_from(["A", "AN", "ANT", "CAN", "IT'S", "THE"]), max_size=8).map(" ".join)


@given(st.lists(st.tuples(WORDS.filter(bool), WORDS), min_size=1, max_size=6))
def test_wer_and_cer_equal_those_of_jiwer(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = (list(side) for side in zip(*pairs, strict=True))
    errors = sum((count_errors(*pair) for pair in pairs), ErrorCounts())
    assert errors.wer == pytest.approx(100 * jiwer.wer(references, hypotheses))
    assert errors.cer == pytest.approx(100 * jiwer.cer(references, hypotheses))


def test_corpus_wer_is_over_all_words_and_not_the_mean_over_utterances() -> None:
    errors = count_errors("A B C D E F G H", "A B C D E F G H") + count_errors("A", "X")
    assert errors.wer == pytest.approx(100 / 9)
    assert errors.mean_utterance_wer == pytest.approx(50)


def test_an_empty_reference_is_refused_rather_than_left_out() -> None:
    with pytest.raises(ValueError, match="reference transcript is empty"):
        count_errors("  ", "A")
