"""Making up for blocks that left: the layer in front of the hole is fitted to what came out behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.calib.collect import Readings, Tapped, UnavailableError
from sparsecc.calib.views import Patches, Rows
from sparsecc.ir import Model, Site
from sparsecc.ir.names import graph_names
from sparsecc.passes.prune.gram import damped
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.passes.tidy.graph import add_constant, float_attribute, float_constant, only_consumer
from sparsecc.pm import CalibrationSource

__all__ = ["Fit", "Hole", "fit_front", "fit_norm"]

Matrix = NDArray[np.float64]

#: Takes back what a fit changed.
Undo = Callable[[], None]

#: Name of what was fitted and what takes that back, or the reason why there is nothing to fit.
Fit: TypeAlias = tuple[str, Undo] | str

#: A norm channel that is all but switched off says nothing about what to put into it.
_LEAST_GAIN = 1e-3


@dataclass(frozen=True)
class Hole:
    """Where a block left.

    Attributes:
        model: without the block.
        name: of the tensor that stands for its outputs now.
        dense: the model it came from.
        target: name of those outputs in ``dense``.
        axis: of the channels in both.
        calibration: the inputs.
        threads: of the sessions.
    """

    model: Model
    name: str
    dense: Model
    target: str
    axis: int
    calibration: CalibrationSource
    threads: int

    def last(self) -> onnx_ir.Node | None:
        """Return the node in front, which makes that tensor."""
        named = (node for node in self.model.onnx.graph if self.name in [item.name for item in node.outputs])
        return next(named, None)

    def pairs(self, names: list[str]) -> Iterator[tuple[dict[str, NDArray[np.float64]], Matrix]]:
        """Yield per batch the named tensors of the model, and rows ``[n, C]`` of the target."""
        ours = Tapped(self.model, names, self.threads)
        theirs = Tapped(self.dense, [self.target], self.threads)
        for batch in self.calibration:
            inputs = dict(batch)
            yield ours.run(inputs), self.rows(theirs.run(inputs)[self.target])

    def rows(self, array: NDArray[np.float64]) -> Matrix:
        """Return ``array`` as one row of channels per position."""
        wide: Matrix = np.moveaxis(array, self.axis, -1).astype(np.float64)
        return wide.reshape(-1, wide.shape[-1])


def fit_front(hole: Hole, damping: float) -> Fit:
    """Fit weights and bias of the last linear layer before the hole, by least squares with a ridge on the change.

    Its outputs may go into the stream through an Add, and through a Relu or LayerNormalization behind that: the
    target is then the state before it that gives the outputs, at the mean and deviation there are now.

    Returns:
        The name of the layer and what takes the change back, or the reason why there is no such layer.
    """
    last = hole.last()
    if last is None:
        return "it follows an input of the model"
    wraps = last.op_type in ("Relu", "LayerNormalization")
    state = last.inputs[0] if wraps else last.outputs[0]
    if state is None or (wraps and only_consumer(state) is not last):
        return "what stands in front is read elsewhere too"
    name = str(state.name)
    found = _front(hole.model, state)
    if isinstance(found, str):
        return found
    site, bias = found
    try:
        ((source, view),) = Readings(hole.model, hole.model.copy()).of(site)
    except UnavailableError as reason:
        return f"{site.name!r} in front cannot be measured: {reason}"
    if isinstance(view, Patches):
        view = Patches(view.kernel, view.strides, view.dilations, view.pads, 1, view.odd_first, 1 << 62)
    elif not isinstance(view, Rows):
        return f"{site.name!r} in front is in a body"
    width = site.shape[1] + 1
    gram, cross = np.zeros((width, width)), np.zeros((site.shape[0], width))
    for ours, target in hole.pairs([source, name]):
        now = hole.rows(ours[name])
        lacking = _before(last if wraps else None, now, target) - now
        at = 0
        for block in view.rows(ours[source], np.random.default_rng(0)):
            x = np.hstack([block[0], np.ones((block.shape[1], 1))])
            gram += x.T @ x
            cross += lacking[at : at + len(x)].T @ x
            at += len(x)
    change = np.linalg.solve(damped(gram, damping)[0], cross.T).T
    weight, shift = site.numpy().copy(), bias.numpy()
    if not np.isfinite(change).all():
        return f"the least squares of {site.name!r} in front are NaN or infinite"
    site.replace(weight + change[:, :-1])
    bias.replace(shift + change[:, -1])

    def undo() -> None:
        site.replace(weight)
        bias.replace(shift)

    return site.name, undo


def fit_norm(hole: Hole) -> Fit:
    """Fit scale and bias of a LayerNormalization that ends right before the hole, channel by channel.

    Returns:
        As ``fit_front``.
    """
    norm = hole.last()
    if norm is None or norm.op_type != "LayerNormalization" or hole.axis != -1:
        return "no LayerNormalization stands in front"
    if len(norm.inputs) < 3 or any(float_constant(value) is None for value in norm.inputs[1:3]):
        return "scale and bias of the LayerNormalization in front are no constants"
    parts: list[Matrix] = []
    count = 0
    for ours, target in hole.pairs([hole.name]):
        now = hole.rows(ours[hole.name])
        sums = [now.sum(0), target.sum(0), (now * now).sum(0), (now * target).sum(0)]
        parts = [old + new for old, new in zip(parts, sums, strict=True)] if parts else sums
        count += len(now)
    mean, wanted, square, product = (part / count for part in parts)
    variance = square - mean**2
    factor = np.where(variance > 0, (product - mean * wanted) / np.where(variance > 0, variance, 1), 1.0)
    scale, bias = (float_constant(value) for value in norm.inputs[1:3])
    if scale is None or bias is None or scale.ndim != 1 or len(scale) != len(factor):
        return "the LayerNormalization in front is over several axes"
    before = [norm.inputs[1], norm.inputs[2]]
    graph = norm.graph
    assert isinstance(graph, onnx_ir.Graph), "in the main graph"
    for at, array in ((1, factor * scale), (2, factor * bias + wanted - factor * mean)):
        old = before[at - 1]
        assert old is not None, "float_constant looked"
        assert old.const_value is not None, "float_constant looked"
        own = array.astype(old.const_value.dtype.numpy())
        norm.replace_input_with(at, add_constant(graph, f"{old.name}_own", own, graph_names(graph)))

    def undo() -> None:
        for at, value in enumerate(before, 1):
            own = norm.inputs[at]
            norm.replace_input_with(at, value)
            assert own is not None, "replaced above"
            del graph.initializers[str(own.name)]

    return str(norm.name or norm.outputs[0].name), undo


def _front(model: Model, state: onnx_ir.Value) -> tuple[Site, SiteBias] | str:
    """The linear layer whose outputs, with its bias, are ``state`` or go into its sum, and nowhere else."""
    producer = state.producer()
    sites = {node: site for site in model.sites() if site.in_main_graph for node in site.nodes}
    candidates = [state]
    if producer is not None and producer.op_type == "Add":
        candidates += [value for value in producer.inputs if value is not None]
    reasons = []
    for value in candidates:
        site = _site_behind(value, sites)
        if site is None:
            continue
        own = value is state or only_consumer(value) is producer
        reason = _refusal(site, own)
        if reason is None:
            bias = site_bias(model, site, add=True)
            if isinstance(bias, SiteBias):
                return site, bias
            reason = bias
        reasons.append(f"{site.name!r} in front: {reason}")
    return "; ".join(reasons) or "no linear layer stands right in front"


def _site_behind(value: onnx_ir.Value, sites: dict[onnx_ir.Node, Site]) -> Site | None:
    node = value.producer()
    if node is not None and node.op_type == "Add":
        made = [item.producer() for item in node.inputs if item is not None and float_constant(item) is None]
        node = made[0] if len(made) == 1 and len(made) < len(node.inputs) else None
    return None if node is None else sites.get(node)


def _refusal(site: Site, own: bool) -> str | None:
    if not own:
        return "others read its outputs too"
    if len(site.nodes) > 1:
        return "its weight is shared by several nodes"
    if site.quantization is not None or site.op not in ("MatMul", "Gemm", "Conv") or site.groups > 1:
        return "it is quantised, grouped or recurrent"
    if site.op == "Gemm" and float_attribute(site.node, "alpha", 1.0) != 1.0:
        return "it has an alpha: fold it first (pass tidy)"
    return None if np.isfinite(site.numpy()).all() else "its weight is NaN or infinite"


def _before(last: onnx_ir.Node | None, now: Matrix, target: Matrix) -> Matrix:
    """The state before ``last`` that comes closest to giving ``target``, where it is ``now``."""
    if last is None:
        return target
    if last.op_type == "Relu":
        return np.where(target > 0, target, np.minimum(now, 0))
    scale = float_constant(last.inputs[1])
    bias = float_constant(last.inputs[2]) if len(last.inputs) > 2 else None
    if scale is None or scale.shape != now.shape[1:]:
        return now
    mean = now.mean(1, keepdims=True)
    deviation = np.sqrt(now.var(1, keepdims=True) + float_attribute(last, "epsilon", 1e-5))
    usable = np.abs(scale) > _LEAST_GAIN * np.abs(scale).max()
    shifted = target - (0.0 if bias is None else bias)
    return np.where(usable, mean + deviation * shifted / np.where(usable, scale, 1.0), now)
