import platform
from pathlib import Path

import numpy as np
import pytest

from data.cli import UserError
from data.corpora import find_corpus, rehearsal
from data.download import Options, download
from data.packed import SAMPLE_RATE, TRANSCRIPT_CHARACTERS, PackedDataset
from data.synthetic.rehearsal import draw_words, list_utterances, speak_utterances, word_table
from data.verify import validate


def test_960_hours_have_librispeechs_subsets_counts_speakers_and_hours() -> None:
    for made, published in zip(rehearsal(960).subsets, find_corpus("librispeech").subsets, strict=True):
        assert (made.name, made.split, made.speakers) == (published.name, published.split, published.speakers)
        assert made.utterances == pytest.approx(published.utterances, rel=2e-3)
        assert made.hours == pytest.approx(published.hours, rel=0.06)


@pytest.mark.parametrize("hours", [0.1, 1, 10, 100])
def test_training_has_the_hours_that_are_asked_for(hours: float) -> None:
    corpus = rehearsal(hours)
    spoken = [list_utterances(corpus, subset) for subset in corpus.subsets if subset.split == "train"]
    seconds = sum(utterance.num_samples for part in spoken for utterance in part) / SAMPLE_RATE
    assert seconds / 3600 == pytest.approx(hours, rel=0.2 if hours < 1 else 0.02)


@pytest.mark.parametrize("hours", [0.0, -1.0, 0.09, 961.0, 1e9, float("nan")])
def test_hours_that_cannot_be_are_an_error(hours: float) -> None:
    with pytest.raises(UserError, match=r"^--hours is .*0\.1 to 960$"):
        rehearsal(hours)


def test_speakers_are_disjoint_and_utterances_have_names_of_their_own() -> None:
    corpus = rehearsal(2)
    by_subset = [list_utterances(corpus, subset) for subset in corpus.subsets]
    speakers = [{utterance.speaker for utterance in utterances} for utterances in by_subset]
    assert [len(each) for each in speakers] == [subset.speakers for subset in corpus.subsets]
    assert len(set.union(*speakers)) == sum(map(len, speakers))
    ids = [utterance.id for utterances in by_subset for utterance in utterances]
    assert len(set(ids)) == len(ids)


def test_a_speaker_sounds_the_same_every_time_and_fills_the_planned_duration() -> None:
    corpus = rehearsal(1)
    spoken = [each for each in list_utterances(corpus, corpus.subsets[2]) if each.speaker == "30000"][:6]
    for utterance, once, again in zip(spoken, speak_utterances(spoken), speak_utterances(spoken), strict=True):
        np.testing.assert_array_equal(once, again)
        assert once.dtype == np.int16 and len(once) == utterance.num_samples
        assert 500 < np.abs(once.astype(int)).max() < 32767


def test_the_data_set_is_the_same_for_any_number_of_jobs_and_no_other_hours_may_follow(tmp_path: Path) -> None:
    def made(folder: str, jobs: int, hours: float) -> PackedDataset:
        subsets = "train-clean-360,dev-clean"
        return download(Options("rehearsal", subsets, hours=hours, dataset_dir=tmp_path / folder, jobs=jobs))

    one, three = made("one", 1, 0.1), made("three", 3, 0.1)
    assert one.digest == three.digest and one.synthetic and validate(one) == []
    if platform.machine() == "x86_64":  # eSpeak NG is compiled per platform
        assert one.digest == "b4e6b145767feee32c1c40934404b56c7d0451485c0401548d009db3ae227b61"
    with pytest.raises(UserError, match=r"holds the corpus rehearsal-0\.1h, not rehearsal-0\.2h"):
        made("one", 1, 0.2)
    assert download(Options("rehearsal", "dev-clean", hours=0.1, dataset_dir=tmp_path / "one")).digest == one.digest


def test_a_disk_that_is_too_small_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1\d\d,\d+\.\d MB of free disk space"):
        download(Options("rehearsal", hours=960, dataset_dir=tmp_path / "large"))
    assert not [file for file in (tmp_path / "large").rglob("*") if file.name != ".lock"]


def test_hours_are_for_the_rehearsal_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--hours"):
        download(Options("synthetic", hours=1, dataset_dir=tmp_path))
    for hours in 3.0, 0.123456, 959.999:
        assert find_corpus(rehearsal(hours).name) == rehearsal(hours)
    with pytest.raises(UserError, match=r"unknown corpus 'rehearsal-1\.2\.3h'"):
        find_corpus("rehearsal-1.2.3h")


def test_every_word_of_the_list_can_be_in_a_transcript_and_occurs_once() -> None:
    words, _ = word_table(True)
    assert len(set(words)) == len(words) > 20_000
    assert set("".join(words)) <= set(TRANSCRIPT_CHARACTERS) - {" "}


def test_words_are_drawn_as_often_as_they_occur_in_english_and_some_rare_ones_never_in_training() -> None:
    drawn = draw_words(1, 500_000, True).split()
    for word, count in ("THE", 90279), ("AND", 74212), ("LORD", 7909):
        assert 0.9 < drawn.count(word) / len(drawn) / (count / word_table(True)[1][-1]) < 1.1, word
    training, every = set(word_table(False)[0]), word_table(True)[0]
    assert training < set(every) and set(every[:2000]) <= training
    assert 0.005 < sum(word not in training for word in drawn) / len(drawn) < 0.02
