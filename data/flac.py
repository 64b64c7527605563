"""What libsndfile does not check of a FLAC file: that its samples have the rate, depth and MD5 of its header."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cli import DataError

# What the codes in the header of a FLAC frame stand for; 0: what the header of the file says.
RATES = (0, 88200, 176400, 192000, 8000, 16000, 22050, 24000, 32000, 44100, 48000, 96000)
BITS = (0, 8, 12, 0, 16, 20, 24, 32)


@dataclass(frozen=True)
class FlacHeader:
    """What the header of a FLAC file says. `md5` is zeros where the encoder left it out."""

    rate: int
    bits: int
    longest_frame: int  # in samples
    md5: bytes


def read_flac_header(file: Path) -> FlacHeader | None:
    """Return what the header of a FLAC file says; None for other files."""
    with file.open("rb") as stream:
        tag = stream.read(10)  # ID3v2, perhaps: its size has 7 bits a byte
        skipped = 10 + sum(byte << 7 * (3 - place) for place, byte in enumerate(tag[6:10])) if tag[:3] == b"ID3" else 0
        stream.seek(skipped)
        head = stream.read(42)
    if head[:4] != b"fLaC":
        return None
    fields = int.from_bytes(head[18:22], "big")
    return FlacHeader(fields >> 12, (fields >> 4 & 31) + 1, int.from_bytes(head[10:12], "big"), head[26:])


def md5_bytes(block: np.ndarray, bits: int) -> bytes:
    """Return what the MD5 of a FLAC file is of: interleaved, little-endian samples, each in the fewest whole bytes."""
    if block.dtype == np.int16:
        return block.astype("<i2").tobytes()
    samples = (block * 2.0 ** (bits - 1)).astype("<i4")  # exact, as float32 has 24 bits and libsndfile reads no more
    return samples.view(np.uint8).reshape(-1, 4)[:, : (bits + 7) // 8].tobytes()


def check_flac(file: Path, header: FlacHeader, md5: bytes, samples: int) -> None:
    """Raise DataError if a decoded FLAC file has another MD5, or frames of another rate or depth than its header.

    libsndfile decodes the others as if they had. What looks like a frame's header by chance, once in some megabytes,
    only adds to their number.
    """
    if any(header.md5) and md5 != header.md5:
        raise DataError(f"{file}: the decoded samples do not have the MD5 of its header")
    rates = {0, RATES.index(header.rate)} if header.rate in RATES else {0, 12, 13, 14}
    depths = {0, BITS.index(header.bits)} if header.bits in BITS else {0}
    third = re.escape(bytes(byte for byte in range(16, 256) if byte & 15 in rates))
    fourth = re.escape(bytes(byte for byte in range(0, 176, 2) if byte >> 1 & 7 in depths))
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        frames = len(re.findall(rb"\xff[\xf8\xf9][%b][%b]" % (third, fourth), content))
    if frames * header.longest_frame < samples:
        raise DataError(f"{file}: not all of it has the {header.rate} Hz and {header.bits} bits of its header")
