from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpora import find_corpus
from data.packed import (
    AUDIO_FILE,
    AUDIO_HEADER_BYTES,
    INDEX_FILE,
    PackedDataset,
    content_files,
    open_dataset,
    write_dataset,
)
from data.verify import Options, validate, verify
from tests.data.made_up import command


def edit_audio(dataset: PackedDataset, position: int) -> None:
    file = dataset.path / "dev-clean" / AUDIO_FILE
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_one_changed_bit_is_found_and_its_utterance_named(dataset: PackedDataset) -> None:
    subset = dataset.subset("dev-clean")
    for index, name in enumerate(subset.ids):
        position = AUDIO_HEADER_BYTES + 2 * int(subset.offsets[index]) + 501
        edit_audio(dataset, position)
        changed, checksum = validate(dataset)
        assert f"dev-clean: utterance {name} has changed" in changed and "the checksum of" in checksum
        edit_audio(dataset, position)
    assert validate(dataset) == []


def test_the_command_tells_what_has_changed_and_exits_with_1(dataset: PackedDataset) -> None:
    run = command("verify_dataset.sh", "--dataset-dir", dataset.path)
    assert run.returncode == 0 and run.stdout.startswith("Dataset Checksum Passed.\n")
    assert "dev-clean: 4 utterances, 0.00 h, 2 speakers; not from the published archive" in run.stdout
    edit_audio(dataset, AUDIO_HEADER_BYTES)
    run = command("verify_dataset.sh", "--dataset-dir", dataset.path)
    assert run.returncode == 1 and run.stdout.startswith("WARNING: Dataset Checksum Failed.\n")
    assert "dev-clean: utterance 85-1-0001 has changed" in run.stdout and run.stderr == ""
    quick = command("verify_dataset.sh", "--dataset-dir", dataset.path, "--quick")
    assert quick.returncode == 0 and quick.stdout.startswith("Quick check passed: ")
    assert "this is not the full check" in quick.stdout and "Dataset Checksum Passed" not in quick.stdout


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("IT'S BETWEEN", "IT'S BETWÉEN", "utterance 85-2-0000 has changed"),
        ("IT'S BETWEEN", "", "utterance 85-2-0000 has changed"),
        ("85-1-0001", "85-1-0000", "dev-clean is not what was prepared"),
        (",1000,2000,", ",999,2000,", "utterance 7-3-0000 has changed"),
        (",0,1000,", ",0,-1,", "utterance 85-1-0001 has changed"),
        (",0,1000,", ",-1,1000,", "utterance 85-1-0001 has changed"),
        (",0,1000,", ",0,x,", "line 2: not an utterance"),
        ("id,speaker", "name,speaker", "dev-clean is not what was prepared"),
        ("85-1-0001,85,", "85-1-0001,86,", "dev-clean is not what was prepared"),
    ],
)
def test_a_changed_index_is_found_and_the_utterance_named(
    dataset: PackedDataset, old: str, new: str, message: str
) -> None:
    file = dataset.path / "dev-clean" / INDEX_FILE
    content = file.read_bytes().decode()
    assert old in content
    file.write_bytes(content.replace(old, new, 1).encode())
    assert message in "\n".join(validate(dataset))


@pytest.mark.parametrize(
    ("file", "change", "problems"),
    [
        (INDEX_FILE, lambda content: content + b"\r\n", ["utterances.csv, line 6: not an utterance"]),
        (INDEX_FILE, lambda content: content[: content.rindex(b"85-")], ["dev-clean is not what was prepared"]),
        (AUDIO_FILE, lambda content: content + b"\r\n", ["dev-clean is not what was prepared"]),
        (AUDIO_FILE, lambda content: content[:100] + b"x" + content[101:], ["dev-clean/audio.npy"]),
        (AUDIO_FILE, lambda content: content[:-10], ["audio.npy", "dev-clean: utterance 85-1-0000 has changed"]),
        (AUDIO_FILE, None, ["dev-clean/audio.npy: [Errno 2] No such file"]),
        (INDEX_FILE, None, ["dev-clean/utterances.csv: [Errno 2] No such file"]),
    ],
)
def test_a_file_that_is_missing_or_does_not_fit_is_found_by_the_quick_check_too(
    dataset: PackedDataset, file: str, change: Callable[[bytes], bytes] | None, problems: list[str]
) -> None:
    path = dataset.path / "dev-clean" / file
    content = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(content))
    assert problems[0] in "\n".join(validate(dataset, quick=True))
    found = "\n".join(validate(dataset))
    assert all(problem in found for problem in problems) and "run verify" not in found, found


@settings(deadline=None)
@given(st.data())
def test_damage_anywhere_is_found(tones: Path, data: st.DataObject) -> None:
    dataset = replace(open_dataset(tones), corpus="librispeech")  # in the catalog, though not that one
    known = validate(dataset)
    file = tones / data.draw(st.sampled_from(content_files(dataset.summary)))
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = content[position] ^ 1 << data.draw(st.integers(0, 7))
    try:
        file.write_bytes(content[:position] + bytes([flipped]) + content[position + 1 :])
        assert len(validate(dataset)) > len(known)
    finally:
        file.write_bytes(content)


def test_subsets_in_other_splits_and_a_false_length_are_found(dataset: PackedDataset) -> None:
    assert validate(dataset, quick=True) == []
    swapped = replace(dataset, splits={**dataset.splits, "validation": dataset.splits["train"]})
    assert "dataset.json says {'train': ['train-clean-100'], " in validate(swapped, quick=True)[0]
    summary = {name: replace(subset, longest_samples=1) for name, subset in dataset.summary.items()}
    assert "is not what was prepared" in validate(replace(dataset, summary=summary), quick=True)[0]


def test_counts_other_than_the_published_ones_fail_for_a_published_archive(dataset: PackedDataset) -> None:
    summary = {name: replace(subset, official=True) for name, subset in dataset.summary.items()}
    write_dataset(replace(dataset, summary=summary))
    problems = "\n".join(validate(replace(dataset, summary=summary)))
    assert "dev-clean has 4 utterances, 2703 were published" in problems
    assert "train-clean-100 has 2 speakers, 251 were published" in problems
    assert "hours, 5.4 were published" in problems


def test_a_checksum_other_than_the_reference_fails(dataset: PackedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = find_corpus(dataset.corpus)
    corpus = replace(corpus, subsets=tuple(corpus.select(dataset.summary)), reference_digest="0" * 64)
    monkeypatch.setattr("data.verify.find_corpus", lambda name: corpus)
    assert f"the checksum is {dataset.digest}, not the reference 0000" in validate(dataset)[-1]


@pytest.mark.parametrize("quick", [False, True])
def test_a_file_that_cannot_be_read_is_named(
    dataset: PackedDataset, quick: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = dataset.path / "dev-clean" / AUDIO_FILE
    audio.unlink()
    audio.symlink_to("/proc/self/mem")  # reading its first byte is an error, as that of a bad sector is
    assert not verify(Options(dataset.path, quick=quick))
    assert f"{audio}: [Errno 5] Input/output error" in capsys.readouterr().out
