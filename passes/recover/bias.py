"""The pass ``recover-bias``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.passes.recover.base import RecoverPass, change_numbers, sites_to_recover
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.passes.recover.lineage import kept_rows
from sparsecc.passes.recover.outputs import Channels, walk_tensors
from sparsecc.pm import PassContext, PassReport

__all__ = ["RecoverBias", "correct_outputs"]

Scale = Literal["none", "least-squares", "variance"]

#: A scale beyond these comes of an output that is almost constant, not of what pruning took.
_LEAST, _MOST = 0.1, 10.0


@dataclass(frozen=True)
class RecoverBias(RecoverPass):
    """Shift the outputs of sites so that their means are those of the dense model, front to back.

    Pruning moves the mean of an output by what the lost weights had made of the mean input; a bias takes that back
    (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019; here on
    calibration inputs, in the model whose front is already corrected). On these inputs each site's squared error
    falls by exactly the square of the mean error. If the outputs of the model get worse all the same, everything is
    taken back.

    Changes: biases of Conv and Gemm, the Add behind a MatMul; with ``scale`` the weights of an output by one factor.
    Skips with the reason: recurrent, quantised and shared sites, outputs of another shape than in the dense model.

    Sample: ``recover-bias{scale=least-squares}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scale: multiply each output as well: by ``least-squares`` (never a larger error of the site, but smaller
            outputs) or to the ``variance`` it had.
        add: give sites without a bias one (a MatMul gets an Add behind it).
    """

    name: ClassVar[str] = "recover-bias"

    scale: Scale = "none"
    add: bool = True

    def recover(self, model: Model, reference: Model, ctx: PassContext, report: PassReport) -> None:
        """Correct every matching site; the sites in front of it are corrected by then."""
        sites = list(sites_to_recover(model, self, ctx, report))
        correct_outputs(model, reference, sites, self.scale, self.add, ctx, report)


def correct_outputs(
    model: Model,
    reference: Model,
    sites: list[Site],
    scale: Scale,
    add: bool,
    ctx: PassContext,
    report: PassReport,
) -> None:
    """Give the outputs of ``sites`` the means, and with ``scale`` the spread, that they have in ``reference``.

    Args:
        model: changed in place.
        reference: the dense model with the same nodes; stays.
        sites: of ``model``.
        scale: as in ``RecoverBias``.
        add: as in ``RecoverBias``.
        ctx: calibration, threads, progress.
        report: gets a change or a skip for each site.
    """
    assert ctx.calibration is not None  # RecoverPass.run
    beside = reference.copy()  # gets the same zeros for biases, so that names agree
    biases = list(_biases(model, beside, sites, add, report))
    order = {node: at for at, node in enumerate(model.onnx.graph)}
    biases.sort(key=lambda bias: order[bias.node])
    taps = [dataclasses.replace(bias.tap, kept=kept_rows(ctx, bias.site)) for bias in biases]
    measured = walk_tensors(model, beside, taps, ctx.calibration, ctx.threads)
    for number, (bias, (_, found)) in enumerate(zip(biases, measured, strict=True)):
        ctx.progress(report.pass_name, number, len(biases))
        if isinstance(found, str):
            report.skip(bias.site.name, found)
        else:
            _correct(bias, found, scale, report)
    ctx.progress(report.pass_name, len(biases), len(biases))


def _biases(
    model: Model, beside: Model, sites: list[Site], add: bool, report: PassReport
) -> Iterator[SiteBias]:
    twins = {site.name: site for site in beside.sites()}
    for site in sites:
        bias = site_bias(model, site, add=add)
        if isinstance(bias, str):
            report.skip(site.name, bias)
        else:
            if site.name in twins:
                site_bias(beside, twins[site.name], add=add)
            yield bias


def _correct(bias: SiteBias, found: Channels, scale: Scale, report: PassReport) -> None:
    before, weight = bias.numpy(), bias.site.numpy()
    factor = scale_factors(found, scale)
    changed = factor != 1
    if changed.any():
        bias.site.replace((weight.astype(np.float64) * factor[:, None]).astype(weight.dtype))
    bias.replace(found.dense_mean - factor * (found.mean - before))
    report.change(
        bias.site.name,
        "mean of the outputs corrected"
        + (f", {int(changed.sum())} outputs scaled" if scale != "none" else ""),
        **change_numbers(weight, bias.site.numpy()),
        mean_error_before=float(np.linalg.norm(found.mean - found.dense_mean)),
        output_error_before=found.error,
        output_error_after=error_after(found, factor),
    )


def scale_factors(found: Channels, scale: Scale) -> NDArray[np.float64]:
    """Return the factor of each output, 1 where it says nothing: no spread, or a factor far from 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if scale == "least-squares":
            factor = found.covariance / found.variance
        elif scale == "variance":
            factor = np.sqrt(found.dense_variance / found.variance)
        else:
            factor = np.ones_like(found.variance)
    usable = np.isfinite(factor) & (factor >= _LEAST) & (factor <= _MOST)
    return np.where(usable, factor, 1.0)


def error_after(found: Channels, factor: NDArray[np.float64]) -> float:
    """Return the relative squared error of the outputs once they are scaled and their means agree."""
    return Channels(
        found.dense_mean,
        factor**2 * found.variance,
        found.dense_mean,
        found.dense_variance,
        factor * found.covariance,
    ).error
