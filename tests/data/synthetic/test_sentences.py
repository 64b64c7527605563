from __future__ import annotations

from data.packed import TRANSCRIPT_CHARACTERS
from data.synthetic.sentences import draw_words, make_sentences, word_table


def test_sentences_are_short_and_different() -> None:
    sentences = make_sentences(500, seed=1, taken=set())
    assert len(set(sentences)) == 500
    assert all(4 <= len(sentence.split()) <= 10 for sentence in sentences)


def test_every_word_of_the_list_can_be_in_a_transcript_and_occurs_once() -> None:
    words, _ = word_table(True)
    assert len(set(words)) == len(words) > 20_000
    assert set("".join(words)) <= set(TRANSCRIPT_CHARACTERS) - {" "}


def test_words_are_drawn_as_often_as_they_occur_in_english() -> None:
    drawn = draw_words(1, 500_000, True).split()
    for word, count in ("THE", 90279), ("AND", 74212), ("LORD", 7909):
        assert 0.9 < drawn.count(word) / len(drawn) / (count / word_table(True)[1][-1]) < 1.1, word


def test_some_rare_words_are_never_spoken_in_training() -> None:
    training, every = set(word_table(False)[0]), word_table(True)[0]
    assert training < set(every) and set(every[:2000]) <= training
    drawn = draw_words(1, 500_000, True).split()
    assert 0.005 < sum(word not in training for word in drawn) / len(drawn) < 0.02


def test_a_text_has_words_but_no_more_characters_than_it_may() -> None:
    texts = [draw_words(seed, characters, False) for seed in range(50) for characters in (4, 20, 200)]
    assert all(0 < len(text) <= characters for text, characters in zip(texts, 50 * [4, 20, 200], strict=True))
    assert sum(map(len, texts[2::3])) > 50 * 190
