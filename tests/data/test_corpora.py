from data.corpora import CORPORA, find_corpus


def test_librispeech_is_the_seven_published_archives() -> None:
    subsets = find_corpus("librispeech").subsets
    assert sum(subset.archive.bytes for subset in subsets) == 61_357_943_031
    assert sum(subset.utterances or 0 for subset in subsets if subset.split == "train") == 281_241
    assert sum(subset.utterances or 0 for subset in subsets if subset.split == "validation") == 5567
    assert round(sum(subset.hours or 0 for subset in subsets if subset.split == "train"), 1) == 960.9


def test_every_corpus_has_training_and_validation_data_and_a_folder_of_its_own() -> None:
    for corpus in CORPORA.values():
        assert {"train", "validation"} <= {subset.split for subset in corpus.subsets}
        assert all(len(subset.archive.md5) == 32 or not corpus.mirrors for subset in corpus.subsets)
        assert corpus.folder.endswith("_dataset")
    assert len({corpus.folder for corpus in CORPORA.values()}) == len(CORPORA)
