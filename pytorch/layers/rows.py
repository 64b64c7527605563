"""Few shapes for the matrix products of a CPU in bfloat16: their rows are padded with zeros, which change no result.

oneDNN computes these products, and makes a primitive for every shape it meets. That takes longer than a small product,
and oneDNN and torch both keep the last 1024 of them: 0.3 to 1 MB each, scattered over the heap, which therefore grows
beyond them. Every batch has another number of frames, so hardly a shape would come twice.
"""

import torch
from torch import Tensor

ROWS_PER_OCTAVE = 8  # numbers of rows between n and 2 n, so that 5 % of the rows are padding in the mean


def pads_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether products of such operands get padded rows."""
    return device.type == "cpu" and dtype == torch.bfloat16


def padded_rows(rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """Return to how many rows the operands of a product are padded."""
    if not pads_rows(device, dtype):
        return rows
    multiple = max(1, (1 << rows.bit_length() - 1) // ROWS_PER_OCTAVE)
    return -(-rows // multiple) * multiple


def pad_rows(x: Tensor, dtype: torch.dtype, dim: int = 0) -> Tensor:
    """Return x in a data type, padded along dimension `dim`; x itself where nothing changes."""
    rows = x.shape[dim]
    count = padded_rows(rows, x.device, dtype)
    if count == rows:
        return x.to(dtype)
    padded = x.new_empty(*x.shape[:dim], count, *x.shape[dim + 1 :], dtype=dtype)
    padded.narrow(dim, 0, rows).copy_(x)
    padded.narrow(dim, rows, count - rows).zero_()
    return padded
