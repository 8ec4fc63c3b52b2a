"""The pass ``quantize``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sparsecc.ir import Model, Site
from sparsecc.passes.quantize.dynamic import DynamicWriter, dynamic_refusal
from sparsecc.passes.quantize.weights import Int8Weights, WeightCache
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import Pass, PassContext, PassReport, select_sites
from sparsecc.sparse import density

__all__ = ["Quantization", "Quantize"]


class Quantization:
    """What ``quantize`` decided, so that later passes can quantise fewer sites of the same model.

    Attributes:
        base: the model before it, its own copy; not to be changed.
        fingerprint: of the model after it.
    """

    def __init__(self, base: Model, weights: WeightCache) -> None:
        self.base = base
        self.fingerprint = ""
        self._weights = weights

    def apply(self, model: Model, sites: Collection[str]) -> dict[str, Int8Weights]:
        """Quantise the named sites of ``model``, a copy of ``base`` whose weights may differ, in place.

        Names of sites stay what they are. Names that are no sites are ignored.

        Returns:
            The weights written, by site.
        """
        writer = DynamicWriter(model.onnx)
        written: dict[str, Int8Weights] = {}
        for site in model.sites():
            if site.name in sites:
                written[site.name] = self._weights(site.numpy())
                writer.write(site, written[site.name])
        remove_dead(model.onnx)
        return written


@dataclass(frozen=True)
class Quantize(Pass):
    """Give sites int8 weights, one scale per output, and uint8 activations.

    Changes: with ``activations=dynamic`` MatMul and Gemm become DynamicQuantizeLinear, MatMulInteger and the
    scales, which onnxruntime fuses; sites that read the same tensor share its quantisation.
    Keeps: zeros, so pruned patterns survive; names of sites.
    Skips with the reason: operators without an integer form, weights that are no finite float32.

    Sample: ``quantize{method=absmax match=re:.*mlp.*}``

    Attributes:
        weights: type of the weights.
        activations: ``dynamic``: the range of every tensor is measured at run time.
        method: how weights get their scale: ``absmax``, or ``mse`` for the least squared error.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
    """

    name: ClassVar[str] = "quantize"
    lossless: ClassVar[bool] = False

    weights: Literal["int8"] = "int8"
    activations: Literal["dynamic"] = "dynamic"
    method: Literal["absmax", "mse"] = "mse"
    match: str = "*"

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Rewrite the matching sites in place and leave the means to undo it in ``ctx.quantization``."""
        report = PassReport(self.name)
        sites = {}
        for site in select_sites(model, self.match, report):
            skipped = ctx.settings_for(site, self).skip
            reason = "left alone by an override" if skipped else self._refusal(model, site)
            if reason is None:
                sites[site.name] = site
            else:
                report.skip(site.name, reason)
        if not sites:
            return report
        before = {name: site.numpy() for name, site in sites.items()}
        plan = Quantization(model.copy(), WeightCache(self.method))
        for name, weights in plan.apply(model, sites.keys()).items():
            report.change(
                name,
                f"int8 weights ({self.method}), {self.activations} uint8 activations",
                density_before=density(before[name]),
                density_after=density(weights.codes),
                relative_error=weights.relative_error,
                nbytes_before=before[name].nbytes,
                nbytes_after=weights.codes.nbytes + weights.scales.nbytes,
            )
        plan.fingerprint = model.fingerprint()
        ctx.quantization = plan
        return report

    def _refusal(self, model: Model, site: Site) -> str | None:
        if site.quantization is not None:
            return "it is quantised already"
        if site.op not in ("MatMul", "Gemm", "Conv"):
            return f"no int8 form of {site.op}: its recurrent state would need one scale per step"
        if site.dtype != np.float32:
            return f"{site.dtype.name} weights: only float32 is quantised"
        if site.scope == "function":
            return "inside a local function: inline it first"
        if not np.isfinite(site.numpy()).all():
            return "a weight is NaN or infinite"
        return dynamic_refusal(model, site)
