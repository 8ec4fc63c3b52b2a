"""Finds the few weights that a model cannot do without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.pm import Pass, PassContext, PassReport, select_sites

__all__ = ["Protect", "outlier_inputs", "super_weights"]

#: A super weight also carries so many times what the average weight of its layer does: small layers have no choice
#: but to put a larger share on each.
_TIMES_AVERAGE = 100


def super_weights(weight: NDArray[Any], mean_square: NDArray[np.float64], share: float) -> NDArray[np.bool_]:
    """Return the mask ``[N, K]`` of weights that alone carry ``share`` of what the layer puts out.

    "The Super Weight in Large Language Models" (Yu et al. 2024) finds them by the spike that they make in the output
    from a spike in the input; here that is ``w_ij**2 mean(x_j**2)`` over the sum of all of these.

    Args:
        weight: ``[N, K]``; with a ``mean_square`` of several rows its rows are equally many per group.
        mean_square: ``[K]`` or ``[groups, K]``, of the inputs.
        share: of the whole layer, in (0, 1).
    """
    energy = mean_square.reshape(-1, weight.shape[1])
    per_row = energy.repeat(len(weight) // len(energy), axis=0)
    carried = np.square(weight.astype(np.float64)) * per_row
    return np.asarray(carried > max(share, _TIMES_AVERAGE / carried.size) * carried.sum())


def outlier_inputs(mean_square: NDArray[np.float64], times: float) -> NDArray[np.bool_]:
    """Return the mask of inputs whose root mean square is more than ``times`` the median one, in each group.

    AWQ (Lin et al. 2024) keeps what such salient channels meet exact. Inputs that are always zero do not count.
    """
    size = np.sqrt(np.atleast_2d(mean_square))
    median = np.array([np.median(row[row > 0]) if (row > 0).any() else np.inf for row in size])
    return np.asarray(size > times * median[:, None]).reshape(mean_square.shape)


@dataclass(frozen=True)
class Protect(Pass):
    """Find the few weights that the model cannot do without, for the prune and quantize passes that follow.

    Prune passes keep them as long as the pattern has room; their number counts towards the density. ``quantize`` leaves
    sites that hold any as they are: beside a weight or an input so large, 256 steps say little about the others. Run
    it behind passes that reorder or remove channels.

    Changes: nothing.
    Skips with the reason: sites that calibration does not reach.

    Sample: ``protect{channels=20.0}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        weights: share of all a layer puts out that a single weight must carry to count as a super weight, in (0, 1].
        channels: how many times the median size an input must have for all its weights to be kept; none for no
            such inputs.
    """

    name: ClassVar[str] = "protect"
    requires_calibration: ClassVar[bool] = True
    lossless: ClassVar[bool] = True

    match: str = "*"
    weights: float = 0.01
    channels: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.weights <= 1:
            raise SpecError(f"{self.name}: weights must be in (0, 1], got {self.weights:g}")
        if self.channels is not None and not self.channels > 1:
            raise SpecError(f"{self.name}: channels must be above 1, got {self.channels:g}")

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Put masks into ``ctx.protected`` and say what they hold.

        Raises:
            UsageError: there is no calibration source.
        """
        report = PassReport(self.name)
        calibration = ctx.calibration_for(self.name)
        sites = select_sites(model, self.match, report)
        measured = calibration.mean_square(model, sites) if sites else {}
        for site in sites:
            found = measured.get(site.name)
            weight = site.numpy()
            if found is None or not (np.isfinite(found).all() and np.isfinite(weight).all()):
                reason = calibration.unavailable.get(site.name, "no finite values")
                report.skip(site.name, f"not measured: {reason}")
                continue
            mask = super_weights(weight, found, self.weights)
            single, inputs = int(mask.sum()), 0
            if self.channels is not None:
                columns = np.atleast_2d(outlier_inputs(found, self.channels))
                inputs = int(columns.sum())
                mask |= columns.repeat(len(weight) // len(columns), axis=0)
            if mask.any():
                ctx.protected = {**ctx.protected, site.name: mask}
                report.note(f"{site.name}: {single} super weights, {inputs} outlier inputs")
        return report
