"""Recordings of all kinds: the same samples from each, read to its end or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.audio import decode_audio
from data.cli import DataError
from tests.data.made_up import flac, sound


def flac_of(*parts: bytes, samples: int, known: bool = True) -> bytes:
    """The frames of FLAC files behind the header of the first one, which tells so many samples and no MD5."""
    first = bytearray(parts[0])
    length = int.from_bytes(first[18:26], "big") >> 36 << 36 | (samples if known else 0)
    starts = [part.index(b"\xff\xf8") for part in parts]
    header = first[:18] + length.to_bytes(8, "big") + bytes(16) + first[42 : starts[0]]
    return bytes(header) + b"".join(part[start:] for part, start in zip(parts, starts, strict=True))


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("rate", "subtype"), [(8000, "PCM_16"), (16000, "PCM_24"), (12345, "PCM_16")])
def test_a_flac_file_that_changes_its_rate_or_depth_inside_is_refused(
    tmp_path: Path, rate: int, subtype: str, known: bool
) -> None:
    one, other = flac(sound(9000)), flac(sound(9000) if subtype == "PCM_16" else sound(9000) / 40000, rate, subtype)
    (tmp_path / "same.flac").write_bytes(flac_of(one, one, samples=18000, known=known))
    assert len(decode_audio(tmp_path / "same.flac")[0]) == 18000
    (tmp_path / "changes.flac").write_bytes(flac_of(one, other, samples=18000, known=known))
    with pytest.raises(DataError, match=r"changes.flac"):
        decode_audio(tmp_path / "changes.flac")
