"""Magnitude pruning: the smallest weights become zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.passes.prune.base import ScorePass, Scorer
from sparsecc.passes.prune.scores import magnitude_score
from sparsecc.pm import PassContext

__all__ = ["PruneMagnitude"]


@dataclass(frozen=True)
class PruneMagnitude(ScorePass):
    """Set the weights of smallest magnitude to zero, an exact number per layer.

    Needs no data. Of all masks of the pattern this one has the smallest ``||W - pruned||_F``.

    Changes: values of weights, never the graph; kept weights stay as they are.
    Skips with the reason: depthwise and tiny sites, NaN or infinite weights, sites already as sparse.

    Sample: ``prune-magnitude{pattern=16x1 sparsity=0.8 match=re:.*mlp.*}``

    Attributes:
        pattern: ``unstructured``, ``N:M`` (N kept of every M inputs) or blocks ``RxC``.
        sparsity: fraction of weights or blocks to remove, in [0, 1); none means 0.5, or what N:M implies.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scope: compare weights over the whole ``layer`` or within each output ``row``.
        caps: with an unstructured pattern, nested limits ``n:m`` beside the count: at most n of every m inputs.
        min_elements: smaller weights stay dense.
        min_reduction: weights with fewer inputs per output stay dense.
        by_channel: group channels at the same place of a convolution's kernel instead of neighbouring entries of
            (cin, kh, kw): what int8 convolutions (``lower-conv-int8``) want of blocks wider than one input.
    """

    name: ClassVar[str] = "prune-magnitude"

    def scorer(self, model: Model, sites: Sequence[Site], ctx: PassContext) -> Scorer:
        """Return ``|W|``."""

        def score(site: Site, weight: NDArray[Any]) -> NDArray[Any]:
            return magnitude_score(weight)

        return score
