"""Parts with fewer outputs, which show at a fraction of the work by how much the whole part would change."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.passes.tidy.graph import constant_of

__all__ = ["BLOCK", "Thinned", "thinned"]

#: Outputs that stay together: the most that a pattern takes at once.
BLOCK = 16
#: Outputs of a product that are looked at.
_OUTPUTS = 128


@dataclass(frozen=True)
class Thinned:
    """A part with some of its outputs.

    Attributes:
        model: the part by itself.
        share: of the outputs that it has, at least.
    """

    model: Model
    share: float


def thinned(part: Model, seed: int) -> Thinned | None:
    """Return a copy of a part by itself with some of the outputs of its last products; None where that saves little.

    Blocks of outputs are drawn one from each of as many equal stretches, so that every head of an attention has
    its share.

    Args:
        part: by itself.
        seed: of the draw.
    """
    copy = part.copy()
    shares = [share for site in copy.sites() if (share := _cut(copy, site, seed)) < 1]
    if not shares:
        return None
    copy.infer_shapes()
    return Thinned(copy, min(shares))


def _cut(model: Model, site: Site, seed: int) -> float:
    """Leave some of the outputs of a product whose outputs are those of the part; return their share."""
    if site.op not in ("MatMul", "Gemm") or len(site.nodes) > 1 or site.quantization is not None:
        return 1.0
    rows = _rows(site.shape[0], seed)
    found = site_bias(model, site, add=False)
    bias = found if isinstance(found, SiteBias) else None
    last = site.node if bias is None else bias.node
    weight = constant_of(site.weight)
    plain = (
        weight is not None
        and len(weight.shape) == 2
        and weight.shape.numpy() in (site.shape, site.shape[::-1])
    )
    direct = site.weight in site.node.inputs and len(site.weight.uses()) == 1
    if rows is None or not plain or not direct or not last.outputs[0].is_graph_output():
        return 1.0
    if isinstance(found, str) and _has_bias(site):
        return 1.0
    if bias is not None:
        values = bias.node.inputs[bias.position]
        if values is None or len(values.uses()) > 1:
            return 1.0
        held = constant_of(values)
        if held is not None and held.size == site.shape[0]:
            _keep(values, rows, -1)
    _keep(site.weight, rows, 1 if site.transposed else 0)
    for value in (site.node.outputs[0], last.outputs[0]):
        value.shape = None
    return len(rows) / site.shape[0]


def _has_bias(site: Site) -> bool:
    return site.op == "Gemm" and len(site.node.inputs) > 2 and site.node.inputs[2] is not None


def _rows(outputs: int, seed: int) -> NDArray[np.intp] | None:
    """The outputs to look at; None for all."""
    blocks, wanted = outputs // BLOCK, _OUTPUTS // BLOCK
    if outputs % BLOCK or blocks < 2 * wanted:
        return None
    ends = np.linspace(0, blocks, wanted + 1).astype(np.intp)
    draw = np.random.default_rng([seed, outputs])
    chosen = np.array([draw.integers(start, end) for start, end in pairwise(ends)])
    return (chosen[:, None] * BLOCK + np.arange(BLOCK)).ravel()


def _keep(value: onnx_ir.Value, rows: NDArray[np.intp], axis: int) -> None:
    tensor = constant_of(value)
    assert tensor is not None, "_cut looked"
    array = np.take(tensor.numpy(), rows, axis)
    value.const_value = onnx_ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)
    value.shape = onnx_ir.Shape(array.shape)
