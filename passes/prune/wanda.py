"""Wanda pruning: weights that matter little for the inputs seen become zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.passes.prune.base import ScorePass, Scorer
from sparsecc.passes.prune.scores import wanda_score
from sparsecc.pm import PassContext

__all__ = ["PruneWanda"]


@dataclass(frozen=True)
class PruneWanda(ScorePass):
    """Set the weights of smallest ``|W_ij| * ||x_j||`` to zero, an exact number per output row.

    The metric of Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    2023): with the input norms ``||x_j||`` measured on calibration data, the mask minimises the output
    error as if inputs were uncorrelated. For Conv the columns are unfolded patches, for LSTM and GRU the
    input and the hidden state. Statistics are those of the model as it is when the pass starts.

    Changes: values of weights, never the graph; kept weights stay as they are.
    Skips with the reason: depthwise and tiny sites, NaN or infinite weights or statistics, sites that are as
    sparse already, sites that calibration does not reach.

    Sample: ``prune-wanda{pattern=2:4}``

    Attributes:
        pattern: ``unstructured``, ``N:M`` (N kept of every M inputs) or blocks ``RxC``.
        sparsity: fraction of weights or blocks to remove, in [0, 1); none means 0.5, or what N:M implies.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scope: compare weights within each output ``row`` (as the paper does) or over the whole ``layer``.
        caps: with an unstructured pattern, nested limits ``n:m`` beside the count: at most n of every m inputs.
        min_elements: smaller weights stay dense.
        min_reduction: weights with fewer inputs per output stay dense.
        by_channel: group channels at the same place of a convolution's kernel instead of neighbouring entries of
            (cin, kh, kw): what int8 convolutions (``lower-conv-int8``) want of blocks wider than one input.
    """

    name: ClassVar[str] = "prune-wanda"
    requires_calibration: ClassVar[bool] = True

    scope: Literal["layer", "row"] = "row"

    def scorer(self, model: Model, sites: Sequence[Site], ctx: PassContext) -> Scorer:
        """Measure the inputs of all ``sites`` and return the metric.

        Raises:
            UsageError: there is no calibration source.
        """
        calibration = ctx.calibration_for(self.name)
        mean_square = calibration.mean_square(model, sites) if sites else {}
        reasons = dict(calibration.unavailable)

        def score(site: Site, weight: NDArray[Any]) -> NDArray[Any] | str:
            if site.name not in mean_square:
                return f"not measured: {reasons.get(site.name, 'calibration does not reach it')}"
            columns = mean_square[site.name]
            if not np.isfinite(columns).all():
                return "its input is NaN or infinite on the calibration data"
            return wanda_score(weight, columns, site.groups)

        return score
