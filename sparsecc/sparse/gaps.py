"""The 4-bit gap stream of the packed weight format: strictly increasing positions in about half a byte each.

A cursor starts at -1. Token 15 moves it by 15 and stores nothing; a token t < 15 moves it by t and places
the next position there; t = 0 is legal only directly after a 15. Low half of each byte first; an odd number
of tokens is completed with one token 15.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError

__all__ = ["pack_gaps", "unpack_gaps"]

_SKIP = 15


def pack_gaps(positions: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the stream of ``positions`` (1-D, >= 0, strictly increasing).

    Raises:
        ValueError: the positions are negative or do not increase (a mistake of the caller, not of a file).
    """
    gaps = np.diff(np.asarray(positions, np.int64), prepend=-1)
    if gaps.size and gaps.min() < 1:
        raise ValueError("positions must be >= 0 and strictly increase")
    skips, moves = np.divmod(gaps, _SKIP)
    ends = np.cumsum(skips + 1)
    total = int(ends[-1]) if ends.size else 0
    tokens = np.full(total + total % 2, _SKIP, np.uint8)
    tokens[ends - 1] = moves
    stream: NDArray[np.uint8] = np.bitwise_or(tokens[0::2], tokens[1::2] << 4, dtype=np.uint8)
    return stream


def unpack_gaps(stream: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the positions (int64, strictly increasing) held in ``stream`` (uint8, 1-D).

    Raises:
        ModelError: the bytes are no such stream. Whether positions fit a matrix is the caller's check.
    """
    if stream.dtype != np.uint8 or stream.ndim != 1:
        raise ModelError(f"packed weight: indices must be 1-D uint8, got {stream.ndim}-D {stream.dtype}")
    tokens = np.empty(2 * stream.size, np.uint8)
    tokens[0::2] = stream & 15
    tokens[1::2] = stream >> 4
    placed = tokens < _SKIP
    _check_tokens(tokens, placed)
    positions: NDArray[np.int64] = np.cumsum(tokens, dtype=np.int64)[placed] - 1
    return positions


def _check_tokens(tokens: NDArray[np.uint8], placed: NDArray[np.bool_]) -> None:
    after_skip = np.zeros(tokens.size, bool)
    after_skip[1:] = ~placed[:-1]
    if ((tokens == 0) & ~after_skip).any():
        at = int(np.argmax((tokens == 0) & ~after_skip))
        raise ModelError(
            f"packed weight: token {at} of indices moves nowhere; the file is damaged, pack it again"
        )
    if tokens.size >= 2 and not placed[-2:].any():
        raise ModelError("packed weight: indices end in idle tokens; the file is damaged, pack it again")
