"""CTC (Graves et al., ICML 2006): labels, loss, greedy decoding, and the frames that a transcript needs."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLANK = 0
LABELS = "_'ABCDEFGHIJKLMNOPQRSTUVWXYZ "  # index 0 is CTC's blank; the others are the alphabet of transcripts

_INDEX = {character: index for index, character in enumerate(LABELS) if index != BLANK}


def encode(transcript: str) -> list[int]:
    """Return the label indices of a transcript.

    Raises:
        ValueError: a character that has no label.
    """
    try:
        return [_INDEX[character] for character in transcript]
    except KeyError as error:
        raise ValueError(f"character {error.args[0]!r} in transcript {transcript!r} has no label") from None


def min_ctc_frames(transcripts: Sequence[str]) -> np.ndarray:
    """Return int64 [N], the fewest frames CTC needs for each: one per label plus one blank between repeated labels."""
    lengths = np.array([len(transcript) for transcript in transcripts], dtype=np.int64)
    ends = lengths.cumsum()
    # One pass over all letters: a corpus has hundreds of thousands of transcripts, and this is on the clock.
    letters = np.frombuffer("".join(transcripts).encode("ascii", "replace"), dtype=np.uint8)
    repeated = np.append(letters[1:] == letters[:-1], False)
    repeated[ends - 1] = False  # the letter after it is another transcript's
    return lengths + np.bincount(np.searchsorted(ends, np.flatnonzero(repeated), side="right"), minlength=len(lengths))


def collapse(best_TB: Tensor, frames_B: Tensor) -> list[str]:
    """Return transcripts by best-path decoding: repeats merged, blanks removed.

    Args:
        best_TB: most probable label of each frame.
        frames_B: valid frames of each utterance; what lies beyond is not looked at.
    """
    transcripts = []
    for best_T, frames in zip(best_TB.T, frames_B.tolist(), strict=True):
        merged = torch.unique_consecutive(best_T[:frames])
        transcripts.append("".join(LABELS[index] for index in merged.tolist() if index != BLANK))
    return transcripts


def ctc_loss(logits_TBV: Tensor, frames_B: Tensor, targets: Tensor, target_lengths_B: Tensor) -> Tensor:
    """Return the CTC loss in float32: mean over utterances of the negative log-likelihood (nats) of the transcript."""
    log_probabilities = logits_TBV.float().log_softmax(2)
    lengths = frames_B.tolist(), target_lengths_B.tolist()
    # Same computation as F.ctc_loss, without its two device-to-host copies of the targets.
    losses_B, _ = torch._ctc_loss(log_probabilities, targets, *lengths, blank=BLANK)
    return losses_B.sum() / len(frames_B)
