"""One copy of the weights for two blocks that do much the same, each with biases of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site, name_matches
from sparsecc.passes.prune.gram import damped, quadratic_error
from sparsecc.passes.recover.base import output_error
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.passes.recover.outputs import walk_tensors
from sparsecc.passes.structure.blocks import Block, count_before, find_blocks, runs
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import CalibrationSource, MomentsLike, Pass, PassContext, PassReport
from sparsecc.pm.sites import refuse_unmatched

__all__ = ["ShareWeights", "Tied", "joint_weight"]

#: Key of the metadata under which the number of pairs is kept for a later run.
_SHARED = "sparsecc.pairs_shared"

Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tied:
    """What one weight for two layers is, and what each loses by it.

    Attributes:
        weight: ``[N, K]``.
        errors: of either layer, lost variance of its outputs / their variance.
    """

    weight: Matrix
    errors: tuple[float, float]


def joint_weight(weights: Sequence[Matrix], grams: Sequence[Matrix], damping: float) -> Tied:
    """Return the weight that serves two layers best, by least squares over the inputs of both.

    Each layer counts by the variance of its own outputs: ``W = (sum a_i W_i G_i) (sum a_i G_i)^-1`` with
    ``a_i = 1 / tr(W_i G_i W_i^T)``. With biases that stay their own, ``grams`` are centred.

    Args:
        weights: two of ``[N, K]``.
        grams: second moments of the inputs of each, ``[K, K]``.
        damping: ridge that pulls towards the mean of both, relative to the mean of the diagonal.
    """
    ridged = [damped(gram, damping)[0] for gram in grams]
    energies = [quadratic_error(weight, gram) for weight, gram in zip(weights, ridged, strict=True)]
    shares = [1 / energy if energy > 0 else 0.0 for energy in energies]
    if not any(shares):
        return Tied(np.zeros_like(weights[0]), (0.0, 0.0))
    scaled = [share * gram for share, gram in zip(shares, ridged, strict=True)]
    wanted = weights[0] @ scaled[0] + weights[1] @ scaled[1]
    found = np.asarray(np.linalg.solve(scaled[0] + scaled[1], wanted.T).T, np.float64)
    first, second = (
        share * quadratic_error(found - weight, gram)
        for share, weight, gram in zip(shares, weights, ridged, strict=True)
    )
    return Tied(found, (first, second))


@dataclass(frozen=True, eq=False)
class _Pair:
    """Two blocks of the same form, and their layers side by side."""

    first: Block
    second: Block
    layers: tuple[tuple[Site, Site], ...]

    @property
    def name(self) -> str:
        return f"{self.second.name} with {self.first.name}"

    @property
    def sites(self) -> list[Site]:
        """All layers of both."""
        return [site for layer in self.layers for site in layer]


@dataclass(frozen=True)
class ShareWeights(Pass):
    """Let residual blocks of the same form share one copy of their weights; the file becomes smaller, not faster.

    A block and the next one of its form are tied where one set of weights serves both best (neighbouring blocks do
    much the same: Liu et al., "FoldGPT", 2024). Each shared weight is the joint least-squares solution over the inputs
    of both layers; biases and normalisations stay with their blocks, and biases are then set, front to back, so that
    the means of all outputs of these layers are the dense ones. A pair that puts the outputs of the model further off
    than ``max-error`` is taken back.

    Changes: weights of two layers become one initializer of several nodes; biases (a MatMul without one gets an Add).
    Skips with the reason: blocks without another of their form, layers that are quantised, grouped, shared already or
    not measured, pairs that cost more than others or too much.

    Sample: ``share-weights{pairs=2 span=2}``

    Attributes:
        pairs: most pairs to tie, those of earlier runs included.
        span: so many neighbouring blocks count as one (2: a whole transformer layer).
        match: which blocks may take weights of others: a glob on the name of the Add, or ``re:`` and an expression.
        max_error: most relative squared error of the outputs of the model, against the model before the pass.
        compensation: ``least-squares``: as above; ``none``: the second takes the weights of the first as they are.
        damping: ridge of the least squares, relative to the mean of the diagonal.
    """

    name: ClassVar[str] = "share-weights"
    requires_calibration: ClassVar[bool] = True

    pairs: int = 1
    span: int = 1
    match: str = "*"
    max_error: float = 0.1
    compensation: Literal["least-squares", "none"] = "least-squares"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs < 1 or self.span < 1:
            raise SpecError("share-weights: pairs and span must be 1 or more")
        for option, value in (("max-error", self.max_error), ("damping", self.damping)):
            if not 0 < value < 10:
                raise SpecError(f"share-weights: {option} must be in (0, 10), got {value:g}")

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Measure all pairs, tie the best, one after the other.

        Raises:
            UsageError: there is no calibration source, or ``match`` matches nothing.
        """
        calibration = ctx.calibration_for(self.name)
        report = PassReport(self.name)
        refuse_unmatched(self.match, [block.name for block in _blocks(model, self.span)], "match")
        dense, refused = model.copy(), dict[str, str]()
        tied = start = count_before(model, _SHARED)
        while tied < self.pairs:
            found, reasons = _pairs(model, self.span, self.match)
            free = [pair for pair in found if pair.name not in refused]
            scores = _scores(model, free, calibration, self.damping)
            ranked = sorted((score, at) for at, score in enumerate(scores) if not isinstance(score, str))
            if not ranked:
                break
            ctx.progress(self.name, tied - start, self.pairs - start)
            reason = self._tie(model, dense, free[ranked[0][1]], calibration, ctx.threads, report)
            if reason is None:
                tied += 1
            else:
                refused[free[ranked[0][1]].name] = reason
        if tied > start:
            model.metadata[_SHARED] = str(tied)
        found, reasons = _pairs(model, self.span, self.match)
        for name, reason in [*reasons, *((pair.name, "others are more alike") for pair in found)]:
            report.skip(name, refused.get(name, reason))
        self._tell_sites(model, report)
        return report

    def _tie(
        self,
        model: Model,
        dense: Model,
        pair: _Pair,
        calibration: CalibrationSource,
        threads: int,
        report: PassReport,
    ) -> str | None:
        """Let the two blocks share their weights; return the reason where that was taken back."""
        kept, name = model.copy(), pair.name
        moments = _moments(model, pair.sites, calibration)
        biases, beside = _with_biases(model, dense, pair.sites, self.compensation)
        errors = []
        for first, second in pair.layers:
            tied = _joint(first, second, moments, self.damping)
            errors.append(max(tied.errors))
            if self.compensation != "none":
                first.replace(tied.weight.astype(first.dtype))
            for index, value in enumerate(second.node.inputs):
                if value is second.weight:
                    second.node.replace_input_with(index, first.weight)
        remove_dead(model.onnx)
        order = {node: at for at, node in enumerate(model.onnx.graph)}
        biases.sort(key=lambda bias: order[bias.node])
        taps = [bias.tap for bias in biases]
        for bias, (_, seen) in zip(
            biases, walk_tensors(model, beside, taps, calibration, threads), strict=True
        ):
            if not isinstance(seen, str):
                bias.replace(seen.dense_mean - (seen.mean - bias.numpy()))
        error = output_error(model, dense, calibration, threads)
        if not error <= self.max_error:
            model.onnx = kept.onnx
            return f"the outputs would be {error:.3g} off (relative squared error), more than max-error"
        report.change(
            name,
            f"{len(pair.layers)} weights of {pair.first.name!r} serve both; relative error of the worst layer "
            f"{max(errors):.3g}",
            density_before=1.0,
            density_after=1.0,
            relative_error=float(np.sqrt(error)),
            worst_layer_error=max(errors),
            output_error=error,
            weights_saved=sum(int(np.prod(first.shape)) for first, _ in pair.layers),
        )
        return None

    def _tell_sites(self, model: Model, report: PassReport) -> None:
        blocks = find_blocks(model)[0]
        inside = frozenset[onnx_ir.Node]().union(*(block.nodes for block in blocks))
        for site in model.sites():
            if len(site.nodes) == 1:
                whole = all(node in inside for node in site.nodes)
                report.skip(site.name, "its block shares nothing" if whole else "it is in no residual block")
        for name, reason in [*find_blocks(model)[1], *model.unsupported_sites()]:
            report.skip(name, reason)


def _blocks(model: Model, span: int) -> list[Block]:
    return runs(model, find_blocks(model)[0], span)


def _pairs(model: Model, span: int, match: str) -> tuple[list[_Pair], list[tuple[str, str]]]:
    """Each block with the next one of its form, and name and reason of those that have none."""
    order = {node: at for at, node in enumerate(model.onnx.graph)}
    sites = {node: site for site in model.sites() for node in site.nodes}
    found: list[_Pair] = []
    reasons: list[tuple[str, str]] = []
    open_forms: dict[object, tuple[Block, list[Site]]] = {}
    for block in _blocks(model, span):
        nodes = sorted(block.nodes, key=order.__getitem__)
        inside = [sites[node] for node in nodes if node in sites]
        reason = next((text for site in inside if (text := _refusal(site)) is not None), None)
        if reason is not None:
            reasons.append((block.name, reason))
            continue
        key = (
            tuple((node.op_type, node.domain) for node in nodes),
            tuple(
                (site.op, site.shape, site.transposed, str(site.dtype), site.weight_shape) for site in inside
            ),
        )
        before = open_forms.get(key)
        open_forms[key] = (block, inside)
        if before is None or before[0].nodes & block.nodes:
            if before is not None:
                open_forms[key] = before  # overlapping runs: the next one that is apart may do
            reasons.append((block.name, "no block of its form stands before it"))
        elif name_matches(match, block.name):
            found.append(_Pair(before[0], block, tuple(zip(before[1], inside, strict=True))))
    return found, reasons


def _refusal(site: Site) -> str | None:
    if site.op not in ("MatMul", "Gemm", "Conv") or site.groups > 1 or not site.in_main_graph:
        return f"{site.name!r} in it is grouped, recurrent or in a body"
    if len(site.nodes) > 1:
        return f"{site.name!r} in it shares its weight already"
    if site.quantization is not None:
        return f"{site.name!r} in it is quantised: share before quantize"
    if not any(value is site.weight for value in site.node.inputs) or site.weight.is_graph_output():
        return f"the weight of {site.name!r} in it is computed from its constant, or an output"
    return None if np.isfinite(site.numpy()).all() else f"{site.name!r} in it holds NaN or infinity"


def _scores(
    model: Model, pairs: Sequence[_Pair], calibration: CalibrationSource, damping: float
) -> list[float | str]:
    """Mean error of the layers of each pair, or why it is not known; moments go when no pair needs them."""
    wanted = list({site.name: site for pair in pairs for site in pair.sites}.values())
    waiting = {at: [*pair.layers] for at, pair in enumerate(pairs)}
    errors: dict[int, list[float]] = {at: [] for at in waiting}
    held: dict[str, MomentsLike] = {}
    for step in calibration.walk(model, wanted):
        held.update(step)
        for at, layers in waiting.items():
            ready = [layer for layer in layers if all(site.name in held for site in layer)]
            for layer in ready:
                layers.remove(layer)
                if all(np.isfinite(held[site.name].gram).all() for site in layer):
                    errors[at] += _joint(*layer, held, damping).errors
        needed = {site.name for layers in waiting.values() for layer in layers for site in layer}
        held = {name: moments for name, moments in held.items() if name in needed}
    return [
        float(np.mean(errors[at])) if len(errors[at]) == 2 * len(pair.layers) else "not measured"
        for at, pair in enumerate(pairs)
    ]


def _moments(model: Model, sites: Sequence[Site], calibration: CalibrationSource) -> dict[str, MomentsLike]:
    return {name: moments for step in calibration.walk(model, sites) for name, moments in step.items()}


def _joint(first: Site, second: Site, moments: Mapping[str, MomentsLike], damping: float) -> Tied:
    both = [moments[site.name] for site in (first, second)]
    grams = [item.gram - np.outer(item.mean, item.mean) for item in both]
    return joint_weight([site.numpy().astype(np.float64) for site in (first, second)], grams, damping)


def _with_biases(
    model: Model, dense: Model, sites: Sequence[Site], compensation: str
) -> tuple[list[SiteBias], Model]:
    """Biases to set, and the dense model with the same zeros where there were none."""
    beside = dense.copy()
    if compensation == "none":
        return [], beside
    twins = {site.name: site for site in beside.sites()}

    def found() -> Iterator[SiteBias]:
        for site in sites:
            bias = site_bias(model, site, add=True)
            site_bias(beside, twins[site.name], add=True)
            if isinstance(bias, SiteBias):
                yield bias

    return list(found()), beside
