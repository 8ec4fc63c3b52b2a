"""The pass ``recover-align``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.passes.prune.gram import Matrix, check_fit, damped, quadratic_error, shifted_target
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.recover.base import RecoverPass, change_numbers, output_error, sites_to_recover
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.passes.recover.outputs import Batch, Step, walk_pairs
from sparsecc.passes.tidy.graph import constant_of, only_consumer
from sparsecc.pm import PassContext, PassReport

__all__ = ["RecoverAlign"]


@dataclass(frozen=True, eq=False)
class _Place:
    """A product to fit: its bias, the stream its outputs are added to, and the same site in the dense model."""

    site: Site
    bias: SiteBias | None
    stream: str
    dense: Matrix

    @property
    def names(self) -> list[str]:
        """What its statistics need."""
        return list(dict.fromkeys(name for name in (self.site.input_name, self.stream) if name))

    @property
    def nodes(self) -> list[onnx_ir.Node]:
        """What fitting it changes."""
        return [self.site.node] if self.bias is None else [self.site.node, self.bias.node]

    def values(self) -> Matrix:
        """Weights as they are ``[N, K]``, the bias as one column more."""
        return _joined(self.site.numpy(), self.bias)


@dataclass(frozen=True)
class RecoverAlign(RecoverPass):
    """Fit products, weights and bias together, so that the states of the model come close to the dense ones.

    As ``recover-ols``, but the target of a product whose outputs are added to a stream (the residual connection) is
    what the stream should be behind it: it also repairs what earlier layers did to the stream. (The states of the
    dense model as targets follow STARFISH, an optimisation by gradients; this is a closed form, one product at a
    time, front to back.) A sweep after which the outputs of the model are no better is taken back.

    Changes: values of weights and biases of MatMul and Gemm, never zeros or the graph.
    Skips with the reason: convolutions and recurrent sites, quantised and shared ones, fits that are no better.

    Sample: ``recover-align{blend=0.5 sweeps=2}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        blend: share of what separates inputs and stream from the dense ones to make up for, in [0, 1].
        sweeps: most sweeps over the model.
    """

    name: ClassVar[str] = "recover-align"

    damping: float = 0.01
    blend: float = 0.75
    sweeps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.name, self.damping, blend=self.blend)
        self.require_at_least(sweeps=1)

    def recover(self, model: Model, reference: Model, ctx: PassContext, report: PassReport) -> None:
        """Sweep over the products; the last sweep that made the outputs better counts."""
        assert ctx.calibration is not None  # RecoverPass.run
        best = output_error(model, reference, ctx.calibration, ctx.threads)
        for number in range(self.sweeps):
            kept, found = model.copy(), PassReport(self.name)
            self._sweep(model, reference, ctx, found)
            error = output_error(model, reference, ctx.calibration, ctx.threads)
            if not number or error < best:
                report.changed, report.skipped = found.changed, found.skipped
            if not error < best:
                if number:
                    model.onnx = kept.onnx
                report.note(f"sweep {number + 1} made the outputs no better")
                return
            best = error

    def _sweep(self, model: Model, reference: Model, ctx: PassContext, report: PassReport) -> None:
        places = list(self._places(model, reference, ctx, report))
        for number, (place, sums) in enumerate(_measured(model, reference, places, ctx)):
            ctx.progress(self.name, number, len(places))
            if sums.finite and sums.gram.any():
                self._fit(place, sums, report)
            elif sums.finite:
                report.skip(place.site.name, "its input is zero on all of the calibration data")
            else:
                report.skip(place.site.name, "its input is NaN or infinite on the calibration data")
        ctx.progress(self.name, len(places), len(places))

    def _places(
        self, model: Model, reference: Model, ctx: PassContext, report: PassReport
    ) -> Iterator[_Place]:
        own = {site.name: site for site in reference.sites()}
        for site in sites_to_recover(model, self, ctx, report):
            dense = own.get(site.name)
            reason = _refusal(site, dense)
            if reason is not None or dense is None:
                report.skip(site.name, reason or "it is not in the dense model")
                continue
            bias, theirs = site_bias(model, site, add=False), site_bias(reference, dense, add=False)
            both = isinstance(bias, SiteBias) and isinstance(theirs, SiteBias)
            ours = bias if both and isinstance(bias, SiteBias) else None
            joined = _joined(dense.numpy(), theirs if both and isinstance(theirs, SiteBias) else None)
            yield _Place(site, ours, _stream(site, ours), joined)

    def _fit(self, place: _Place, sums: _Sums, report: PassReport) -> None:
        gram = damped(sums.gram, self.damping)[0]
        target = shifted_target(place.dense, sums.gram, sums.cross, self.damping, self.blend)
        if sums.lift is not None:
            target = target + np.linalg.solve(gram, self.blend * sums.lift.T).T
        before = place.values()
        mask = before != 0
        if place.bias is not None:
            mask[:, -1] = True
        fitted = refit_rows(target, mask, gram, start=before)
        costs = [quadratic_error(values - target, gram) for values in (before, fitted)]
        if not costs[1] < costs[0]:
            report.skip(place.site.name, "its weights are the best for their zeros already")
            return
        weight = place.site.numpy()
        after = fitted[:, : weight.shape[1]].astype(weight.dtype)
        after[(after == 0) & (weight != 0)] = np.finfo(
            weight.dtype
        ).tiny  # a mask has no more zeros than it had
        place.site.replace(after)
        if place.bias is not None:
            place.bias.replace(fitted[:, -1])
        total = quadratic_error(target, gram)
        report.change(
            place.site.name,
            "fitted to the states of the dense model" + (" behind it" if place.stream else ""),
            **change_numbers(weight, after),
            output_error_before=costs[0] / total if total else 0.0,
            output_error_after=costs[1] / total if total else 0.0,
        )


def _joined(weight: NDArray[Any], bias: SiteBias | None) -> Matrix:
    wide = weight.astype(np.float64)
    return wide if bias is None else np.hstack([wide, bias.numpy()[:, None]])


def _refusal(site: Site, dense: Site | None) -> str | None:
    if site.op not in ("MatMul", "Gemm"):
        return f"{site.op}: only products are aligned (recover-ols fits convolutions)"
    if site.quantization is not None:
        return "it is quantised: recover before quantize"
    if not site.in_main_graph or len(site.nodes) > 1:
        return "in a body, or shared by several nodes"
    if site.op == "Gemm" and site.node.attributes.get_float("alpha", 1.0) != 1.0:
        return "Gemm with alpha: fold it first (pass tidy)"
    if dense is None or dense.shape != site.shape:
        return "it has another shape in the dense model"
    finite = np.isfinite(site.numpy()).all() and np.isfinite(dense.numpy()).all()
    return None if finite else "a weight is NaN or infinite"


def _stream(site: Site, bias: SiteBias | None) -> str:
    """Name of the tensor that the outputs of a site are added to, or empty."""
    output = (site.node if bias is None else bias.node).outputs[0]
    add = only_consumer(output)
    if add is None or add.op_type != "Add":
        return ""
    other = add.inputs[1] if add.inputs[0] is output else add.inputs[0]
    return "" if other is None or constant_of(other) is not None else str(other.name)


class _Sums:
    """Second moments of the inputs in both models, and of the input with what the stream lacks."""

    def __init__(self, affine: bool, outputs: int) -> None:
        self._affine = affine
        self._outputs = outputs
        self.gram: Matrix = np.zeros((0, 0))
        self.cross: Matrix = np.zeros((0, 0))
        self.lift: Matrix | None = None

    @property
    def finite(self) -> bool:
        """Whether all that was seen is finite."""
        parts = [self.gram, self.cross, *([] if self.lift is None else [self.lift])]
        return all(np.isfinite(part).all() for part in parts)

    def add(self, ours: Batch, theirs: Batch, name: str, stream: str) -> None:
        here, there = self._rows(ours[name]), self._rows(theirs[name])
        fresh = not self.gram.size
        self.gram = here.T @ here if fresh else self.gram + here.T @ here
        self.cross = there.T @ here if fresh else self.cross + there.T @ here
        if not stream or ours[stream].size != len(here) * self._outputs:
            return
        lacking = theirs[stream].astype(np.float64) - ours[stream]
        lift = lacking.reshape(-1, self._outputs).T @ here
        self.lift = lift if self.lift is None else self.lift + lift

    def _rows(self, x: NDArray[Any]) -> Matrix:
        rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
        return np.hstack([rows, np.ones((len(rows), 1))]) if self._affine else rows


def _measured(
    model: Model, reference: Model, places: list[_Place], ctx: PassContext
) -> Iterator[tuple[_Place, _Sums]]:
    """Yield the statistics of each place, front to back, in the model as it is by then."""
    assert ctx.calibration is not None  # RecoverPass.run
    order = {node: at for at, node in enumerate(model.onnx.graph)}
    places = sorted(places, key=lambda place: order[place.site.node])
    steps = [Step(place.names, place.nodes) for place in places]
    walk = walk_pairs(model, reference, steps, ctx.calibration, ctx.threads)
    for place, pairs in zip(places, walk, strict=True):
        sums = _Sums(place.bias is not None, place.site.shape[0])
        for ours, theirs in pairs:
            sums.add(ours, theirs, place.site.input_name, place.stream)
        yield place, sums
