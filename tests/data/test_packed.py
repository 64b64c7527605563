import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data import packed
from data.cli import UserError
from data.corpora import CORPORA
from data.packed import (
    AUDIO_FILE,
    INDEX_FILE,
    PackedDataset,
    UtteranceRow,
    dataset_digest,
    open_dataset,
    read_index,
    write_dataset,
    write_index,
)
from tests.data.made_up import SPOKEN, sound


def test_utterances_are_sorted_by_length_then_id_and_are_those_of_their_archive(dataset: PackedDataset) -> None:
    subset = dataset.subset("train-clean-100")
    assert subset.ids == ["84-1-0001", "7-3-0000", "84-2-0000", "84-1-0000"]
    assert subset.num_samples.tolist() == [1000, 2000, 2000, 3000]
    assert subset.offsets.tolist() == [0, 1000, 3000, 5000]
    assert subset.speakers == ["84", "7", "84", "84"]
    assert isinstance(subset.audio, np.memmap)
    for index, name in enumerate(subset.ids):
        samples, transcript = SPOKEN[name]
        assert subset.transcripts[index] == transcript
        np.testing.assert_array_equal(subset.waveform(index), sound(samples)[:, 0])
        assert np.shares_memory(subset.waveform(index), subset.audio)


def test_opening_reads_nothing_but_dataset_json(dataset: PackedDataset) -> None:
    for subset in dataset.summary:
        (dataset.path / subset / AUDIO_FILE).unlink()
        (dataset.path / subset / INDEX_FILE).unlink()
    opened = open_dataset(dataset.path)
    assert opened == dataset
    assert opened.summary["train-clean-100"].utterances == 4
    assert opened.summary["train-clean-100"].longest_samples == 3000
    assert opened.summary["train-clean-100"].hours == 8000 / 16000 / 3600
    assert not opened.official


def test_the_digest_is_the_sha256_of_one_tarball(dataset: PackedDataset) -> None:
    lines = [line for line in (packed.__doc__ or "").splitlines() if line.startswith(("    export", "    tar"))]
    run = subprocess.run("\n".join(lines), shell=True, cwd=dataset.path, capture_output=True, text=True, check=True)
    assert dataset_digest(dataset.path, dataset.summary) == run.stdout.split()[0] == dataset.digest


def test_the_index_is_csv_that_survives_commas_quotes_and_line_ends(tmp_path: Path) -> None:
    rows = [UtteranceRow("a,b", 'c"d', 0, 5, "E\nF", "0" * 64), UtteranceRow("g", "", 5, 6, "H", "1" * 64)]
    write_index(tmp_path / INDEX_FILE, rows)
    assert list(read_index(tmp_path / INDEX_FILE)) == rows


def test_an_absent_data_set_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    for corpus in (corpus for corpus in CORPORA.values() if corpus.folder):
        with pytest.raises(UserError, match=f"no data set in .*: .*--corpus {corpus.name} "):
            open_dataset(tmp_path / corpus.folder)


def test_an_unfinished_data_set_does_not_open(dataset: PackedDataset) -> None:
    write_dataset(replace(dataset, digest=""))
    with pytest.raises(UserError, match="unfinished: repeat 'sh download"):
        open_dataset(dataset.path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"name": "other"}', '{"format_version": 1}', '{"format_version": 1, "subsets": 5}']
)
def test_a_dataset_json_that_is_damaged_or_of_another_program_is_said_to_be_that(tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/dataset.json is damaged, or not of this") as error:
        open_dataset(tmp_path)
    assert "\n" not in str(error.value) and "remove" not in str(error.value)


@pytest.mark.parametrize(
    "change", [('"format_version": 1', '"format_version": 99'), ('"samples": ', '"samples": 0.'), ("[", '["other", ')]
)
def test_a_field_that_is_another_or_cannot_be_right_is_refused(dataset: PackedDataset, change: tuple[str, str]) -> None:
    file = dataset.path / "dataset.json"
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(UserError, match=r"has format version 99|dataset\.json is damaged"):
        open_dataset(dataset.path)


@pytest.mark.parametrize(("old", "new"), [(",0,1000,", ",x,1000,"), (",0,1000,", f",{2**70},1000,"), ("SHORT", "A,B")])
def test_a_damaged_index_does_not_open_and_its_line_is_named(dataset: PackedDataset, old: str, new: str) -> None:
    file = dataset.path / "dev-clean" / INDEX_FILE
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"utterances.csv, line 2: not an utterance"):
        dataset.subset("dev-clean")
