"""Attention over a constant pattern in three steps: scores of stored pairs, softmax of rows, product with values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sparsecc.algebra import Compressed, Tensor
from sparsecc.errors import SparseccError
from sparsecc.ir.constant_patterns import constant_pattern
from sparsecc.ir.sparse_ops import DOMAIN
from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.constant_masks import MaskedAttention, Seen, attention_shapes
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.lower.transformer_patterns import same

__all__ = ["match_steps"]


def match_steps(node: ir.Node) -> MaskedAttention | None:
    """Attention in sparse operators, found at its ``SparseSoftmax``; ``None`` for other nodes.

    Args:
        node: any.

    Raises:
        Refusal: it is attention, but not what the one operator computes.
    """
    if not _is(node, "SparseSoftmax") or node.inputs[1] is None:
        return None
    scores, readers = node.inputs[1].producer(), node.outputs[0].consumers()
    if not _is(scores, "SparseEinsumSampled") or len(readers) != 1:
        return None
    weigh = readers[0]
    if not _is(weigh, "SparseEinsum") or weigh.inputs[2] is not node.outputs[0]:
        return None
    assert scores is not None, "looked at"
    for value in (node.inputs[1], node.outputs[0]):
        if len(value.consumers()) != 1 or value.is_graph_output():
            raise Refusal("its scores or weights are read elsewhere, too")
    seen = _seen(scores, node, weigh)
    factors = constant_array(scores.inputs[2])
    if factors is None or factors.ndim != 1 or len(np.unique(factors)) > 1 or not np.isfinite(factors).all():
        raise Refusal("the entries of its pattern are factors of their own")
    q, k, v = scores.inputs[4], scores.inputs[5], weigh.inputs[4]
    if q is None or k is None or v is None:
        return None
    shape, k_shape, v_shape = attention_shapes(q, k, v)
    wanted = [*shape[:2], seen.shape[1], shape[3]]
    if not same(shape[2], seen.shape[0]) or not all(
        same(*sizes) for found in (k_shape, v_shape) for sizes in zip(wanted, found, strict=True)
    ):
        raise Refusal("queries, keys and values are not known to have the same heads and to fit the pattern")
    scale = float(factors[0]) if len(factors) else 1.0
    nbytes = seen.nbytes + factors.nbytes
    return MaskedAttention(q, k, None, v, scale, seen, nbytes, weigh.outputs[0])


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == op_type


def _seen(scores: ir.Node, softmax: ir.Node, weigh: ir.Node) -> Seen:
    """The pattern that all three walk."""
    try:
        patterns = [constant_pattern((*step.inputs[:2], step.inputs[3])) for step in (scores, weigh)]
        first, other = patterns
        if first is None or other is None or softmax.inputs[0] is None:
            raise Refusal("its pattern is computed when the model runs")
        rows, others = _rows(first), _rows(other)
        positions = constant_array(softmax.inputs[0])
    except SparseccError as error:
        raise Refusal(f"its pattern is malformed: {error}") from error
    if positions is None:
        raise Refusal("its pattern is computed when the model runs")
    alike = first.shape == other.shape and np.array_equal(rows.crd, others.crd)
    if not alike or not all(np.array_equal(rows.pos, found) for found in (others.pos, positions)):
        raise Refusal("its steps walk different patterns")
    kind = np.int32 if len(rows.crd) <= np.iinfo(np.int32).max else np.int64
    return Seen(rows.pos.astype(kind), rows.crd.astype(kind), (first.shape[0], first.shape[1]))


def _rows(pattern: Tensor) -> Compressed:
    level = pattern.levels[1]
    assert isinstance(level, Compressed), "that is what CSR has"
    return level
