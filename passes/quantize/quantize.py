"""The pass ``quantize``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model, Site
from sparsecc.passes.quantize.dynamic import DynamicWriter, dynamic_refusal
from sparsecc.passes.quantize.ranges import ActivationScale, Method, activation_scale, choose_range
from sparsecc.passes.quantize.static import StaticWriter, quantized_tensors, static_refusal
from sparsecc.passes.quantize.weights import Int8Weights, WeightCache
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import Pass, PassContext, PassReport, Range, select_sites
from sparsecc.sparse import ScaleMethod, density

__all__ = ["Quantization", "Quantize"]


class Quantization:
    """What ``quantize`` decided, so that later passes can quantise fewer sites of the same model.

    Attributes:
        base: the model before it, its own copy; not to be changed.
        fingerprint: of the model after it.
    """

    def __init__(
        self, base: Model, weights: WeightCache, scales: Mapping[str, ActivationScale] | None
    ) -> None:
        """Keep ``base``; ``scales`` by tensor name makes the activations static, None dynamic."""
        self.base = base
        self.fingerprint = ""
        self._weights = weights
        self._scales = scales

    def apply(self, model: Model, sites: Collection[str]) -> dict[str, Int8Weights]:
        """Quantise the named sites of ``model``, a copy of ``base`` whose weights may differ, in place.

        Names of sites stay what they are. Names that are no sites are ignored.

        Returns:
            The weights written, by site.
        """
        chosen = [site for site in model.sites() if site.name in sites]
        weights = {site.name: self._weights(site.numpy()) for site in chosen}
        if self._scales is None:
            writer = DynamicWriter(model.onnx)
            for site in chosen:
                writer.write(site, weights[site.name])
        else:
            if chosen:
                model.infer_shapes()  # the rank of products decides their form
            static = StaticWriter(model.onnx, self._scales)
            static.write_tensors(quantized_tensors(model.onnx, chosen))
            weights = {site.name: static.write_site(site, weights[site.name]) for site in chosen}
        remove_dead(model.onnx)
        return weights


@dataclass(frozen=True)
class Quantize(Pass):
    """Give sites int8 weights, one scale per output, and uint8 activations.

    Changes: with ``activations=dynamic`` MatMul and Gemm become DynamicQuantizeLinear, MatMulInteger and the
    scales, which onnxruntime fuses; sites that read the same tensor share its quantisation. With
    ``activations=static`` MatMul, Gemm and Conv get DequantizeLinear in front of weight and bias, and the tensors
    they read, those that convolutions make, and what lies between (Add, pooling, Concat, reshaping) are held in
    uint8 by QuantizeLinear and DequantizeLinear with ranges from the calibration data; a Relu or Clip at zero in
    front of one becomes its saturation.
    Keeps: zeros, so pruned patterns survive; names of sites.
    Skips with the reason: operators without an integer form, weights that are no finite float32.

    Sample: ``quantize{method=absmax match=re:.*mlp.*}``

    Attributes:
        weights: type of the weights.
        activations: ``dynamic``: the range of every tensor is measured at run time; ``static``: on the calibration
            data.
        method: how ranges are chosen: ``absmax`` (all values), ``mse`` (least squared error), or ``percentile`` of
            static activations (weights then as ``mse``). Default: ``absmax`` for static activations, which was never
            worse on the models of ``bench/accuracy.py``, else ``mse``.
        percentile: with ``percentile``, of the values that lie below the end of the range.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
    """

    name: ClassVar[str] = "quantize"
    search: ClassVar[tuple[Range, ...]] = (
        Range.of(),
        Range.of(activations="static"),
    )
    narrows: ClassVar[bool] = True
    by_outputs: ClassVar[bool] = True
    lossless: ClassVar[bool] = False

    weights: Literal["int8"] = "int8"
    activations: Literal["dynamic", "static"] = "dynamic"
    method: Method | None = None
    percentile: float = 99.99
    match: str = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 < self.percentile <= 100:
            raise SpecError(
                f"{self.name}: percentile must be above 50 and at most 100, got {self.percentile:g}"
            )

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Rewrite the matching sites in place and leave the means to undo it in ``ctx.quantization``."""
        report = PassReport(self.name)
        sites = {}
        for site in select_sites(model, self.match, report):
            skipped = ctx.settings_for(site, self).skip
            reason = "left alone by an override" if skipped else self._refusal(model, site)
            if reason is None and site.name in ctx.protected:
                reason = "holds weights that must stay exact (protect)"
            if reason is None:
                sites[site.name] = site
            else:
                report.skip(site.name, reason)
        if not sites:
            return report
        scales = self._scales(model, list(sites.values()), ctx) if self.activations == "static" else None
        before = {name: site.numpy() for name, site in sites.items()}
        weight_method: ScaleMethod = "absmax" if self._method == "absmax" else "mse"
        plan = Quantization(model.copy(), WeightCache(weight_method), scales)
        for name, weights in plan.apply(model, sites.keys()).items():
            report.change(
                name,
                f"int8 weights ({weight_method}), {self.activations} uint8 activations",
                density_before=density(before[name]),
                density_after=density(weights.codes),
                relative_error=weights.relative_error,
                nbytes_before=before[name].nbytes,
                nbytes_after=weights.codes.nbytes + weights.scales.nbytes,
            )
        plan.fingerprint = model.fingerprint()
        ctx.quantization = plan
        return report

    @property
    def _method(self) -> Method:
        return self.method or ("absmax" if self.activations == "static" else "mse")

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
        refusal = static_refusal if self.activations == "static" else dynamic_refusal
        return refusal(model, site)

    def _scales(self, model: Model, sites: list[Site], ctx: PassContext) -> dict[str, ActivationScale]:
        """The scale of every tensor that any of ``sites`` may need in uint8, by name."""
        if ctx.calibration is None:
            raise UsageError(
                "quantize{activations=static} needs calibration inputs; give --calibration-data PATH "
                "(or activations=dynamic)"
            )
        names = [str(tensor.value.name) for tensor in quantized_tensors(model.onnx, sites)]
        found = ctx.calibration.histograms(model, names)
        return {
            name: activation_scale(*choose_range(histogram, self._method, self.percentile))
            for name, histogram in found.items()
        }
