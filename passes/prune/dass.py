"""DaSS pruning: gated units keep more of the rows whose results count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site
from sparsecc.passes.prune.base import Scorer
from sparsecc.passes.prune.wanda import PruneWanda
from sparsecc.pm import PassContext
from sparsecc.sparse import Scope

__all__ = ["PruneDass", "gated_product"]

#: What may stand between a product and the gate: one element of the result for each of the input.
_ELEMENTWISE = frozenset(
    {
        "Add",
        "Cast",
        "Clip",
        "Div",
        "Elu",
        "Erf",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Mish",
    }
    | {"Mul", "Neg", "Pow", "QuickGelu", "Relu", "Sigmoid", "Softplus", "Sub", "Tanh"}
)


@dataclass(frozen=True)
class PruneDass(PruneWanda):
    """Set weights of smallest ``|W_ij| * ||x_j||`` to zero, in gated units more in rows that matter less.

    For ``y = W_d (act(W_g x) * (W_u x))``, DaSS ("Dependency-aware Semi-structured Sparsity", Guo et al. 2024)
    weighs rows of ``W_g`` and ``W_u`` by the size of the product ``h_i`` that they feed. Here the score is
    ``|W_ij| ||x_j|| ||h_i||^alpha``, compared over the whole layer for these two, so that rows get numbers of
    weights of their own; patterns N:M, which fix them, and all other sites are pruned as ``prune-wanda`` does.

    Changes: values of weights, never the graph; kept weights stay as they are.
    Skips with the reason: depthwise and tiny sites, NaN or infinite weights or statistics, sites that are as
    sparse already, sites that calibration does not reach.

    Sample: ``prune-dass{sparsity=0.6}``

    Attributes:
        pattern: ``unstructured``, ``N:M`` (N kept of every M inputs) or blocks ``RxC``.
        sparsity: fraction of weights or blocks to remove, in [0, 1); none means 0.5, or what N:M implies.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scope: compare weights of other sites within each output ``row`` or over the whole ``layer``.
        caps: with an unstructured pattern, nested limits ``n:m`` beside the count: at most n of every m inputs.
        min_elements: smaller weights stay dense.
        min_reduction: weights with fewer inputs per output stay dense.
        by_channel: group channels at the same place of a convolution's kernel instead of neighbouring entries of
            (cin, kh, kw): what int8 convolutions (``lower-conv-int8``) want of blocks wider than one input.
        alpha: exponent of the size of the product, 0 or more; 0 compares gated sites over the layer by Wanda's score.
    """

    name: ClassVar[str] = "prune-dass"

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha >= 0:
            raise SpecError(f"{self.name}: alpha must be 0 or more, got {self.alpha:g}")

    def scope_of(self, site: Site) -> Scope:
        """Return ``layer`` for the two factors of a gated unit."""
        return "layer" if gated_product(site) is not None else self.scope

    def scorer(self, model: Model, sites: Sequence[Site], ctx: PassContext) -> Scorer:
        """Measure the inputs of ``sites`` and of what reads gated products, and return the metric."""
        plain = super().scorer(model, sites, ctx)
        products = {site.name: gated_product(site) for site in sites}
        wanted = {value for value in products.values() if value is not None}
        readers = {site.input: site for site in model.sites() if site.input in wanted}
        sizes = ctx.calibration_for(self.name).mean_square(model, list(readers.values())) if readers else {}

        def score(site: Site, weight: NDArray[Any]) -> NDArray[Any] | str:
            found = plain(site, weight)
            product = products[site.name]
            reader = None if product is None else readers.get(product)
            energy = None if reader is None else sizes.get(reader.name)
            if isinstance(found, str) or energy is None or energy.shape != (len(weight),):
                return found
            largest = float(energy.max(initial=0.0)) or 1.0
            return found * np.power(energy / largest, self.alpha / 2)[:, None]

        return score


def gated_product(site: Site) -> onnx_ir.Value | None:
    """Return the product ``act(W_g x) * (W_u x)`` that a MatMul or Gemm is a factor of, or None."""
    if site.op not in ("MatMul", "Gemm") or len(site.nodes) != 1:
        return None
    seen: set[onnx_ir.Node] = set()
    pending = list(site.node.outputs[0].uses())
    while pending:
        node, _ = pending.pop()
        if node in seen or node.domain not in ("", "com.microsoft") or node.op_type not in _ELEMENTWISE:
            continue
        seen.add(node)
        if node.op_type == "Mul":
            sources = [set(_products_behind(value)) for value in node.inputs if value is not None]
            if len(sources) == 2 and all(len(found) == 1 for found in sources) and sources[0] != sources[1]:
                (first,), (second,) = sources
                return node.outputs[0] if first.inputs[0] is second.inputs[0] else None
        pending += node.outputs[0].uses()
    return None


def _products_behind(value: onnx_ir.Value) -> Iterator[onnx_ir.Node]:
    """Yield the products that ``value`` is computed from element by element."""
    pending, seen = [value], set()
    while pending:
        node = pending.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in _ELEMENTWISE:
            pending += [item for item in node.inputs if item is not None]
        elif node.op_type != "Constant":
            yield node
