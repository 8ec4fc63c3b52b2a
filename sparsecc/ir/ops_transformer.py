"""The names of the dense operators of transformers, and the making of their nodes.

They hold no weights: what they read is computed or belongs to the node that stood there before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir

from sparsecc.ir.sparse_ops import DOMAIN, DOMAIN_VERSION

__all__ = [
    "GATES",
    "AttentionKind",
    "AttentionVariant",
    "NormVariant",
    "attention_node",
    "gate_node",
    "norm_node",
    "transformer_names",
]

GATES: Mapping[str, str] = {"GatedSilu": "Silu", "GatedGelu": "Gelu", "GatedGeluTanh": "GeluTanh"}
"""Gated units by name, with the activation of the gate."""


AttentionKind = Literal["", "Grouped", "Rotary"]
"""How heads are made: each of q has its own of k and v; several share one; that, and q and k turned by positions."""


@dataclass(frozen=True)
class AttentionVariant:
    """Which attention: every input of an operator is always there, so what may be missing is in the name.

    Attributes:
        kind: see there.
        packed: q, k and v side by side in one input; otherwise three inputs.
        mask: whether a mask is added to the scores.
    """

    kind: AttentionKind
    packed: bool
    mask: bool

    @property
    def name(self) -> str:
        """The operator's type, for instance ``PackedRotaryAttentionMask``."""
        return "Packed" * self.packed + self.kind + "Attention" + "Mask" * self.mask


@dataclass(frozen=True)
class NormVariant:
    """Which normalisation.

    Attributes:
        residual: whether a second input is added first.
        centred: layer norm, with a shift; otherwise root-mean-square norm, without.
        sum: whether what is normalised is a second output.
    """

    residual: bool
    centred: bool
    sum: bool

    @property
    def name(self) -> str:
        """The operator's type, for instance ``AddLayerNormSum``."""
        return "Add" * self.residual + ("LayerNorm" if self.centred else "RmsNorm") + "Sum" * self.sum


ATTENTIONS = tuple(
    AttentionVariant(kind, packed, mask)
    for kind in get_args(AttentionKind)
    for packed in (False, True)
    for mask in (False, True)
)
NORMS = tuple(
    NormVariant(residual, centred, sum_)
    for centred in (True, False)
    for residual, sum_ in ((False, False), (True, False), (True, True))
)


def transformer_names() -> frozenset[str]:
    """Return the types of all operators of this module."""
    return frozenset({*(v.name for v in ATTENTIONS), *(v.name for v in NORMS), *GATES})


def attention_node(
    inputs: tuple[ir.Value, ...],
    mask: ir.Value | None,
    *,
    heads: int,
    scale: float,
    name: str,
    kv_heads: int | None = None,
    rotary: tuple[ir.Value, ir.Value] | None = None,
) -> ir.Node:
    """Return a node of attention, not yet in a graph.

    Args:
        inputs: q, k and v, float32 ``[B, S, heads * size]``, ``[B, T, kv_heads * size]`` twice, or one value
            ``[B, S, ...]`` that holds them side by side.
        mask: float32, to be broadcast to ``[B, heads, queries, keys]``, or ``None``.
        heads: into how many parts q is cut.
        kv_heads: into how many parts k and v are cut; ``None`` is as many.
        rotary: cosines and sines ``[1 or B, 1, S, size]``, or without leading dimensions.
        scale: factor of the scores.
        name: of the node.

    Raises:
        ValueError: neither one nor three inputs (a mistake of the calling pass).
    """
    if len(inputs) not in (1, 3):
        raise ValueError(f"attention of {len(inputs)} inputs")
    kv_heads = heads if kv_heads is None else kv_heads
    kind: AttentionKind = "Rotary" if rotary else "Grouped" if kv_heads != heads else ""
    shared = [ir.AttrInt64("kv_heads", kv_heads)] if kind else []
    return ir.Node(
        DOMAIN,
        AttentionVariant(kind, len(inputs) == 1, mask is not None).name,
        [*inputs, *(rotary or ()), *(() if mask is None else (mask,))],
        [ir.AttrInt64("heads", heads), *shared, ir.AttrFloat32("scale", scale)],
        name=name,
        version=DOMAIN_VERSION,
    )


def norm_node(
    x: ir.Value,
    residual: ir.Value | None,
    gain: ir.Value,
    shift: ir.Value | None,
    *,
    epsilon: float,
    with_sum: bool,
    name: str,
) -> ir.Node:
    """Return a node of layer norm (of root-mean-square norm without ``shift``), not yet in a graph.

    Args:
        x: float32 ``[..., N]``.
        residual: added first; the shape of x but for leading dimensions that are missing or 1. Or ``None``.
        gain: ``[N]``.
        shift: ``[N]`` or ``None``.
        epsilon: added to the variance.
        with_sum: whether ``x + residual`` is a second output.
        name: of the node.

    Raises:
        ValueError: a sum without a residual (a mistake of the calling pass).
    """
    if with_sum and residual is None:
        raise ValueError("there is no sum without a residual")
    variant = NormVariant(residual is not None, shift is not None, with_sum)
    inputs = [value for value in (x, residual, gain, shift) if value is not None]
    return ir.Node(
        DOMAIN,
        variant.name,
        inputs,
        [ir.AttrFloat32("epsilon", epsilon)],
        num_outputs=2 if with_sum else 1,
        name=name,
        version=DOMAIN_VERSION,
    )


def gate_node(x: ir.Value, operator: str, *, name: str) -> ir.Node:
    """Return a node of a gated unit, not yet in a graph.

    Args:
        x: float32 ``[..., 2 N]``: gates, then what they are multiplied with.
        operator: a key of ``GATES``.
        name: of the node.
    """
    if operator not in GATES:
        raise ValueError(f"no gated unit {operator}")
    return ir.Node(DOMAIN, operator, [x], [], name=name, version=DOMAIN_VERSION)
