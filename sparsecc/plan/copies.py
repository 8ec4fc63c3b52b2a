"""How often a part of a model is loaded to be timed alone, so that its weights lie where they lie in the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sparsecc.ir import Site
from sparsecc.target import Target

__all__ = ["copies_of", "rows_of", "weight_bytes"]

#: Bytes of weights that leave no cache of a single core untouched, and most copies of a part that are made.
_CROWD = 8 << 20
_MOST_COPIES = 16

#: A product with more rows has its weights fetched from memory while it multiplies: where they lie does not matter.
_FEW_ROWS = 32
#: What leaves nothing in the last-level cache, as a share of its size, and most bytes taken for that.
_BEYOND = 1.25
_MOST_BYTES = 48 << 20


def weight_bytes(sites: Iterable[Site]) -> int:
    """Bytes of the weights of ``sites`` as float32."""
    return 4 * sum(math.prod(site.shape) for site in sites)


def rows_of(op: str, shape: Sequence[int]) -> int:
    """How many vectors a site multiplies whose input has this shape; of a Conv, as many as its input has places."""
    return math.prod((shape[0], *shape[2:]) if op == "Conv" else shape[:-1])


def copies_of(own: int, rows: int, *, whole: int) -> int:
    """Return how many copies of a part must take turns for it to find its weights where it finds them in its model.

    Together they are as large as the weights of the model, as far as that matters: beyond the caches of one core, and,
    with few rows, beyond the cache that all cores share.

    Args:
        own: bytes of its weights, more than 0.
        rows: vectors that it multiplies.
        whole: bytes of the weights of the model.
    """
    crowd = _CROWD
    shared = Target.host().l3_bytes or 0
    if rows <= _FEW_ROWS and whole > shared:
        crowd = max(crowd, min(int(_BEYOND * shared), _MOST_BYTES))
    return max(1, min(_MOST_COPIES, -(-min(whole, crowd) // own)))
