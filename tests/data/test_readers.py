from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cli import UserError
from data.corpora import find_corpus
from data.packed import TRANSCRIPT_CHARACTERS
from data.readers import check_transcript, decode, read_utterances
from tests.data.made_up import an4_files, flac, librispeech_files, sound

DEV_CLEAN = find_corpus("librispeech").select(["dev-clean"])[0]
AN4_TRAIN = find_corpus("an4").select(["train"])[0]
CHAPTER, OTHER = "LibriSpeech/dev-clean/84/1", "LibriSpeech/dev-clean/9/9"


def lay_out(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_librispeech_utterances_have_id_speaker_transcript_and_length(tmp_path: Path) -> None:
    found = read_utterances(lay_out(tmp_path, librispeech_files("dev-clean")), "librispeech", DEV_CLEAN)
    assert [(entry.id, entry.speaker, entry.num_samples) for entry in found] == [
        ("7-3-0000", "7", 2000),
        ("84-1-0000", "84", 3000),
        ("84-1-0001", "84", 1000),
        ("84-2-0000", "84", 2000),
    ]
    assert found[3].transcript == "IT'S BETWEEN"


def test_an4_audio_is_big_endian_and_its_transcripts_become_upper_case(tmp_path: Path) -> None:
    found = read_utterances(lay_out(tmp_path, an4_files()), "an4", AN4_TRAIN)
    assert [(entry.id, entry.speaker, entry.transcript) for entry in found] == [
        ("an1-aaaa-b", "aaaa", "GO TO A"),
        ("an2-aaaa-b", "aaaa", "GO TO B"),
    ]
    np.testing.assert_array_equal(decode(found[0])[0], sound(1000)[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{CHAPTER}/._84-1.trans.txt": b"\0\5\x16\7\xff"}, r"84/1/\._84-1.trans.txt cannot be read as UTF-8"),
        ({f"{CHAPTER}/84-1.trans.txt": b"84-1-0000 A\n"}, "utterance 84-1-0001 has no transcript"),
        ({f"{CHAPTER}/84-1.trans.txt": b"84-1-0000 A\n84-1-0001 B\n84-1-0002 C\n"}, "84-1-0002 has no audio file"),
        ({f"{CHAPTER}/84-1.trans.txt": b"84-1-0000 A\n84-1-0000 A\n"}, "84-1-0000 .* occurs twice"),
        ({f"{CHAPTER}/84-1.trans.txt": b"84-1-0000 \n84-1-0001 B\n"}, "84-1-0000 is empty"),
        ({f"{CHAPTER}/84-1.trans.txt": b"84-1-0000 A\n84-1-0001 B 2\n"}, "84-1-0001 has the character '2'"),
        ({f"{CHAPTER}/84-1.trans.txt": "84-1-0000 NAÏVE\n".encode()}, r"84-1-0000 has the character 'Ï' \(U\+00CF\)"),
        ({f"{CHAPTER}/84-1.trans.txt": b"84-1-0000 \xff\n"}, "84-1.trans.txt cannot be read as UTF-8"),
        ({f"{OTHER}/84-1-0001.flac": flac(sound(50))}, "84-1-0001 has no transcript"),
        (
            {f"{OTHER}/84-1-0000.flac": flac(sound(50)), f"{OTHER}/9-9.trans.txt": b"84-1-0000 A\n"},
            "84-1-0000 occurs twice in dev-clean",
        ),
        ({f"{CHAPTER}/84-1-0002.wav": b""}, "84-1-0002 has no transcript"),
        ({f"{CHAPTER}/84-1-0001.flac": b""}, "84-1-0001.flac is empty"),
        ({f"{CHAPTER}/84-1-0001.flac": b"fLaC" + bytes(100)}, "84-1-0001.flac cannot be decoded"),
        ({f"{CHAPTER}/84-1-0001.flac": flac(sound(9), 8000)}, "84-1-0001.flac has a rate of 8000 Hz"),
    ],
)
def test_what_is_wrong_with_an_utterance_is_named(tmp_path: Path, change: dict[str, bytes], message: str) -> None:
    lay_out(tmp_path, {**librispeech_files("dev-clean"), **change})
    with pytest.raises(UserError, match=message):
        read_utterances(tmp_path, "librispeech", DEV_CLEAN)


def test_byte_order_mark_indentation_and_upper_case_suffixes_are_nothing_special(tmp_path: Path) -> None:
    files = librispeech_files("dev-clean")
    files[f"{CHAPTER}/84-1.trans.txt"] = b"\xef\xbb\xbf84-1-0000 A\r\n 84-1-0001 B\r\n"
    files[f"{CHAPTER}/84-1-0001.FLAC"] = files.pop(f"{CHAPTER}/84-1-0001.flac")
    found = read_utterances(lay_out(tmp_path, files), "librispeech", DEV_CLEAN)
    assert [(entry.id, entry.transcript) for entry in found[1:3]] == [("84-1-0000", "A"), ("84-1-0001", "B")]


def test_an_archive_of_another_subset_is_an_error(tmp_path: Path) -> None:
    lay_out(tmp_path, librispeech_files("dev-other"))
    with pytest.raises(UserError, match=r"dev-clean.tar.gz holds no utterance of dev-clean"):
        read_utterances(tmp_path, "librispeech", DEV_CLEAN)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("an4/etc/an4_train.fileids", b"an4_clstk/aaaa/an1-aaaa-b\n", "has 2 transcripts for 1 audio files"),
        ("an4/etc/an4_train.fileids", b"../../x/an1-aaaa-b\nan4_clstk/aaaa/an2-aaaa-b\n", "an1-aaaa-b is missing"),
        ("an4/etc/an4_train.transcription", b"A (an9-aaaa-b)\nB (an2-aaaa-b)\n", "does not belong to utterance an1"),
        ("an4/wav/an4_clstk/aaaa/an1-aaaa-b.raw", b"abc", "an1-aaaa-b .* 3 bytes"),
        ("an4/wav/an4_clstk/aaaa/an1-aaaa-b.raw", b"", "an1-aaaa-b .* 0 bytes"),
        ("an4/wav/an4_clstk/aaaa/an9-aaaa-b.raw", b"ab", r"an9-aaaa-b.raw is not listed in"),
    ],
)
def test_what_is_wrong_with_an_an4_archive_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    lay_out(tmp_path, {**an4_files(), name: content})
    with pytest.raises(UserError, match=message):
        read_utterances(tmp_path, "an4", AN4_TRAIN)


@given(st.text())
def test_a_transcript_either_has_known_characters_only_or_is_refused(text: str) -> None:
    try:
        transcript = check_transcript(text, "84-1-0000", Path("84-1.trans.txt"))
    except UserError as error:
        assert "84-1-0000" in str(error) and "84-1.trans.txt" in str(error)
    else:
        assert set(transcript) <= set(TRANSCRIPT_CHARACTERS)
        assert transcript == " ".join(text.upper().split()) != ""
