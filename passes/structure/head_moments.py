"""Second moments of what the heads of an attention hold, from those of what its layers read."""

from __future__ import annotations

import numpy as np

from sparsecc.passes.prune.gram import Matrix, centred
from sparsecc.passes.structure.head_math import moments_of
from sparsecc.passes.structure.heads import Attention
from sparsecc.pm import MomentsLike

__all__ = ["score_moments", "value_moments"]


def score_moments(attention: Attention, q: MomentsLike, k: MomentsLike) -> list[tuple[Matrix, Matrix]]:
    """Return by head of k the second moments of the queries that read it, added up, and of the keys.

    What all keys have in common moves all scores of a query alike, which softmax does not see: without rotary
    positions the moments of the keys are those about their mean.

    Args:
        attention: its layers as they are.
        q: moments of what makes its queries.
        k: moments of what makes its keys.
    """
    match, plain = attention.match, attention.partners is None
    keys = centred(k.gram, k.mean, k.mean) if plain else k.gram
    mean = np.zeros_like(k.mean) if plain else k.mean
    queries = _by_head(attention.q.weight(), attention.q.own_bias(), match.heads)
    found = []
    for head, (weight, bias) in enumerate(
        _by_head(attention.k.weight(), attention.k.own_bias(), match.kv_heads)
    ):
        group = match.heads // match.kv_heads
        left = [moments_of(*item, q.gram, q.mean) for item in queries[head * group : (head + 1) * group]]
        right = moments_of(weight, np.zeros_like(bias) if plain else bias, keys, mean)
        found.append((np.sum(left, axis=0), right))
    return found


def value_moments(attention: Attention, weight: Matrix, context: Matrix) -> list[tuple[Matrix, Matrix]]:
    """Return by head of v what reads it, ``O^T O``, and the moments of what attention gives, added up over its queries.

    Args:
        attention: with the heads.
        weight: ``[N, heads * size]`` of the layer that reads the result.
        context: second moments of what that reads.
    """
    size = attention.match.sizes[1]
    group = attention.match.heads // attention.match.kv_heads
    blocks = [slice(at * size, (at + 1) * size) for at in range(attention.match.heads)]
    read = [weight[:, block].T @ weight[:, block] for block in blocks]
    given = [context[block, block] for block in blocks]
    return [
        (np.sum(read[at : at + group], axis=0), np.sum(given[at : at + group], axis=0))
        for at in range(0, len(blocks), group)
    ]


def _by_head(weight: Matrix, bias: Matrix, heads: int) -> list[tuple[Matrix, Matrix]]:
    return list(zip(np.split(weight, heads), np.split(bias, heads), strict=True))
