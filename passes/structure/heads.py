"""Attention of a model with the layers around it: where q, k and v come from, and what reads the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.ir.trace import captured_inputs
from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.attention_patterns import AttentionMatch, find_attention
from sparsecc.passes.lower.head_patterns import Turn
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.lower.transformer_patterns import dims, made_by
from sparsecc.passes.tidy.graph import add_constant, float_attribute, int_attribute, only_consumer

__all__ = ["Attention", "Projection", "find_attentions", "table_rank"]

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Projection:
    """Outputs of a linear layer that are the rows of q, k or v.

    Attributes:
        site: the layer.
        rows: which of its outputs.
        bias: what is added to all outputs of the layer, ``[N]``, zeros where nothing is.
        holder: node and input that hold the bias, or None.
        split: the node that cuts the outputs of the layer into q, k and v, or None.
    """

    site: Site
    rows: slice
    bias: Vector
    holder: tuple[onnx_ir.Node, int] | None
    split: onnx_ir.Node | None

    def weight(self) -> NDArray[np.float64]:
        """Return its part of the weight, ``[rows, K]``."""
        return self.site.numpy()[self.rows].astype(np.float64)

    def own_bias(self) -> Vector:
        """Return its part of the bias, ``[rows]``, as it was when it was found."""
        return self.bias[self.rows]

    def change(self, weight: NDArray[np.float64], bias: Vector, used: set[str]) -> None:
        """Put other values of the same shape in the place of its weight and its part of the bias."""
        whole = self.site.numpy().copy()
        whole[self.rows] = weight
        self.site.replace(whole)
        if self.holder is not None:
            total = self.bias.copy()
            total[self.rows] = bias
            self.store_bias(total, used)

    def store_bias(self, bias: Vector, used: set[str]) -> None:
        """Put another bias ``[N]`` of the whole layer in the place of the one there is."""
        assert self.holder is not None, "only a layer with a bias gets another one"
        node, index = self.holder
        assert isinstance(node.graph, onnx_ir.Graph), "find_attentions looks at the main graph"
        stored = bias.astype(self.site.dtype)
        node.replace_input_with(index, add_constant(node.graph, f"{self.site.name}.bias", stored, used))


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention whose four layers have constant weights of their own.

    Attributes:
        softmax: its Softmax.
        match: its core.
        q: what makes its queries.
        k: what makes its keys.
        v: what makes its values.
        out: the layer that reads its result.
    """

    softmax: onnx_ir.Node
    match: AttentionMatch
    q: Projection
    k: Projection
    v: Projection
    out: Site

    @property
    def name(self) -> str:
        """Name of its Softmax."""
        return _name(self.softmax)

    @property
    def partners(self) -> tuple[int, ...] | None:
        """With rotary positions the dimension of a head that turns together with each one, or None."""
        turn, size = self.match.q.turn, self.match.sizes[0]
        if turn is None:
            return None
        return turn.partners or tuple((i + size // 2) % size for i in range(size))

    @property
    def sites(self) -> list[Site]:
        """Its layers, each once."""
        return list({site.name: site for site in (self.q.site, self.k.site, self.v.site, self.out)}.values())


def find_attentions(model: Model) -> Iterator[tuple[str, Attention | str]]:
    """Yield name and attention for each Softmax of the main graph, or why it is none that can be reduced.

    Args:
        model: with its shapes inferred.
    """
    sites = {site.node: site for site in model.sites()}
    for node in model.onnx.graph:
        try:
            match = find_attention(node)
            if match is not None:
                yield _name(node), _with_layers(node, match, sites)
        except Refusal as refusal:
            yield _name(node), str(refusal)


def table_rank(turn: Turn, size: int) -> int:
    """Return how many axes the tables of cosines and sines have, which are then the same for all heads.

    Raises:
        Refusal: they are not known to be one row of ``size`` for each position.
    """
    for table in turn.tables:
        shape = dims(table)
        heads = shape is not None and len(shape) > 2 and shape[-3] != 1
        if shape is None or not 2 <= len(shape) <= 4 or heads or _last_size(table) != size:
            raise Refusal(
                "its cosines or sines are not known to be one row for each row, the same for all heads"
            )
    ranks = {len(dims(table) or ()) for table in turn.tables}
    if len(ranks) > 1:
        raise Refusal("its cosines and sines have different shapes")
    return ranks.pop()


def _with_layers(node: onnx_ir.Node, match: AttentionMatch, sites: dict[onnx_ir.Node, Site]) -> Attention:
    q, k, v = (_projection(value, sites) for value in match.inputs)
    spans = {(item.site.name, item.rows.start) for item in (q, k, v)}
    if len(spans) < 3 or len({item.split for item in (q, k, v)}) > 1:
        raise Refusal("queries, keys and values come from the same outputs of a layer, or some of them do")
    for view in (match.q, match.k):
        if view.turn is not None:
            table_rank(view.turn, match.sizes[0])
    _check_inside(match)
    reader = only_consumer(match.output)
    out = None if reader is None else sites.get(reader)
    if out is None or reader is None or reader.inputs[0] is not match.output:
        raise Refusal("its result is not read by one linear layer alone")
    _check_site(out)
    return Attention(node, match, q, k, v, out)


def _check_inside(match: AttentionMatch) -> None:
    """Refuse an attention of which something else is read: what is between rows and result is written anew."""
    tables = [table for view in (match.q, match.k) if view.turn is not None for table in view.turn.tables]
    kept = _before([value for value in (match.mask, *tables) if value is not None])
    inside, result = _before([match.output]), match.output.producer()
    waiting = [*match.inputs]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            raise Refusal(f"{value.name!r} inside it is an output of the model")
        for node in {use.node for use in value.uses()}:
            if node not in inside:
                raise Refusal(f"{value.name!r} inside it is read by others too")
            if node in kept:
                raise Refusal(
                    "its mask or its cosines and sines are computed from its queries, keys or values"
                )
            if node is not result:
                waiting += node.outputs


def _before(values: Sequence[onnx_ir.Value]) -> set[onnx_ir.Node]:
    """The nodes that compute ``values``."""
    found: set[onnx_ir.Node] = set()
    waiting = [*values]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and node not in found:
            found.add(node)
            waiting += captured_inputs(node)
    return found


def _projection(rows: onnx_ir.Value, sites: dict[onnx_ir.Node, Site]) -> Projection:
    """The layer that makes ``rows``.

    Raises:
        Refusal: they are made, or read, in another way.
    """
    if only_consumer(rows) is None:
        raise Refusal(f"{rows.name!r} is read by others too")
    split = made_by(rows, "Split")
    whole = rows if split is None else split.inputs[0]
    assert whole is not None, "Split needs it"
    node, bias, holder = whole.producer(), None, None
    add = made_by(whole, "Add")
    if add is not None:
        at = 1 if constant_array(add.inputs[1]) is not None else 0
        bias, holder = constant_array(add.inputs[at]), (add, at)
        product = add.inputs[1 - at]
        node = None if product is None else product.producer()
    site = None if node is None else sites.get(node)
    if node is None or site is None:
        raise Refusal(f"{rows.name!r} is not made by a linear layer with a constant weight")
    _check_site(site)
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None and bias is None:
        bias, holder = constant_array(node.inputs[2]), (node, 2)
    elif node.op_type == "Gemm" and bias is not None:
        raise Refusal(f"{site.name} has a bias and an Add behind it: run tidy first")
    if holder is not None and (bias is None or bias.shape != (site.shape[0],)):
        raise Refusal(f"the bias of {site.name} is not one constant per output")
    if (add is not None or split is not None) and (
        only_consumer(node.outputs[0]) is None or not _alone(whole, split)
    ):
        raise Refusal(f"what {site.name} gives is read by others too")
    zeros = np.zeros(site.shape[0])
    return Projection(
        site, _span(rows, split, site), zeros if bias is None else bias.astype(float), holder, split
    )


def _alone(whole: onnx_ir.Value, split: onnx_ir.Node | None) -> bool:
    return split is None or only_consumer(whole) is split


def _span(rows: onnx_ir.Value, split: onnx_ir.Node | None, site: Site) -> slice:
    """Which outputs of the layer ``rows`` are."""
    if split is None:
        return slice(0, site.shape[0])
    sizes = [(dims(value) or [None])[-1] for value in split.outputs]
    rank = len(dims(split.inputs[0]) or ())
    if int_attribute(split, "axis", 0) not in (-1, rank - 1) or len(sizes) != 3:
        raise Refusal(f"{split.name!r} does not cut the outputs of {site.name} into three")
    if not all(isinstance(size, int) for size in sizes) or sum(map(int, sizes)) != site.shape[0]:  # type: ignore[arg-type]
        raise Refusal(f"{split.name!r} cuts parts of unknown size")
    at = next(number for number, value in enumerate(split.outputs) if value is rows)
    start = sum(int(size or 0) for size in sizes[:at])
    return slice(start, start + int(sizes[at] or 0))


def _check_site(site: Site) -> None:
    """Refuse a layer whose weight cannot become another one of another shape."""
    if site.op not in ("MatMul", "Gemm") or not site.in_main_graph or site.quantization is not None:
        raise Refusal(f"{site.name} is no plain linear layer of the main graph")
    if len(site.nodes) > 1 or len(site.weight.uses()) > 1 or site.node.inputs[1] is not site.weight:
        raise Refusal(f"the weight of {site.name} is shared, or transposed in the graph: run tidy first")
    if site.op == "Gemm":
        plain = all(float_attribute(site.node, name, 1.0) == 1.0 for name in ("alpha", "beta"))
        if not plain or int_attribute(site.node, "transA", 0):
            raise Refusal(f"{site.name} has alpha, beta or transA: run tidy first")
    if not site.weight.is_initializer():
        raise Refusal(f"the weight of {site.name} is no initialiser: run tidy first")
    if not np.isfinite(site.numpy()).all():
        raise Refusal(f"the weight of {site.name} holds NaN or infinity")


def _last_size(value: onnx_ir.Value | None) -> int | None:
    """The size of the last axis, also where a Slice of other axes hides it."""
    shape = dims(value)
    if shape is not None and isinstance(shape[-1], int):
        return shape[-1]
    cut = made_by(value, "Slice")
    axes = None if cut is None or len(cut.inputs) < 4 else constant_array(cut.inputs[3])
    if cut is None or axes is None or shape is None or {-1, len(shape) - 1} & set(axes.ravel().tolist()):
        return None
    return _last_size(cut.inputs[0])


def _name(node: onnx_ir.Node) -> str:
    return str(node.name or node.outputs[0].name)
