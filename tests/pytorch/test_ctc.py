from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.packed import TRANSCRIPT_CHARACTERS
from pytorch.ctc import BLANK, LABELS, collapse, encode, min_ctc_frames


def logits_for(paths: list[list[int]]) -> torch.Tensor:
    """Logits [T, B, V] whose most probable labels are the given paths, padded with label 5."""
    longest = max(map(len, paths))
    padded = torch.tensor([path + [5] * (longest - len(path)) for path in paths])
    return torch.nn.functional.one_hot(padded, len(LABELS)).float().transpose(0, 1)


def test_labels_are_the_blank_and_the_characters_of_transcripts() -> None:
    assert LABELS[BLANK] == "_"
    assert LABELS[1:] == TRANSCRIPT_CHARACTERS
    assert len(LABELS) == 29


def test_greedy_decoding_merges_repeats_and_then_drops_blanks() -> None:
    path = [LABELS.index(character) for character in "__HHH_EE_LL_LLO__ _"]
    assert collapse(logits_for([path]).argmax(2), torch.tensor([len(path)])) == ["HELLO "]


@given(st.lists(st.text(alphabet="AB", max_size=9), max_size=9))
def test_transcripts_spelled_with_the_fewest_frames_decode_to_themselves(transcripts: list[str]) -> None:
    paths = []
    for labels in map(encode, transcripts):
        paths.append(labels[:1])
        for previous, label in pairwise(labels):
            paths[-1] += [BLANK, label] if previous == label else [label]
    frames = min_ctc_frames(transcripts)
    assert np.array_equal(frames, [len(path) for path in paths])
    assert not any(paths) or collapse(logits_for(paths).argmax(2), torch.from_numpy(frames)) == transcripts


@pytest.mark.parametrize("transcript", ["é", "a", "1", "A-B", "_"])
def test_a_character_without_a_label_is_refused_by_name(transcript: str) -> None:
    with pytest.raises(ValueError, match="has no label"):
        encode(transcript)
