"""Fuse what lies between the sparse products of a transformer, where the whole model is measured faster."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import numpy as np
import onnx_ir as ir

from sparsecc.errors import MeasurementError, UsageError
from sparsecc.ir import Model
from sparsecc.ir.names import value_names
from sparsecc.ir.ops_transformer import ATTENTIONS, GATES, attention_node, gate_node, norm_node
from sparsecc.ir.packed import is_linear, packed_weight
from sparsecc.ir.sparse_ops import DOMAIN, FAMILIES, MEMBERS_KEY, sparse_op_node
from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.attention_patterns import match_attention
from sparsecc.passes.lower.fuse_prepare import prepare, replace, take_over
from sparsecc.passes.lower.head_patterns import Rotary
from sparsecc.passes.lower.linear_form import Refusal
from sparsecc.passes.lower.transformer_patterns import NormMatch, dims, match_norm
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import Pass, PassContext, PassReport
from sparsecc.sparse import stack_outputs

__all__ = ["STEPS", "FuseTransformer", "Outcome"]

#: The function bodies need Constant with value_int and Softmax over one axis.
_MIN_OPSET = 13
_APART = {variant.name: variant for variant in ATTENTIONS if not variant.packed}


@dataclass
class Outcome:
    """What one step did: (node, detail) of every rewrite, (node, reason) of every refusal."""

    changed: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


def _main_nodes(model: Model) -> list[ir.Node]:
    return list(model.onnx.graph)


# ---- normalisation ----------------------------------------------------------------------------------


def fuse_norms(model: Model) -> Outcome:
    """Replace every normalisation, with the sum before it where its shape is known, by one node."""
    outcome = Outcome()
    for node in _main_nodes(model):
        if node.graph is None or not any(
            output.uses() or output.is_graph_output() for output in node.outputs
        ):
            continue
        try:
            match = match_norm(node)
        except Refusal as refusal:
            outcome.refused.append((str(node.name), str(refusal)))
            continue
        if match is not None:
            outcome.changed.append((str(node.name), _fuse_norm(match, str(node.name))))
    return outcome


def _summands(source: ir.Value) -> tuple[ir.Node, ir.Value, ir.Value] | None:
    """The Add that makes ``source``: the node, an input of the full shape, the other one."""
    node = source.producer()
    whole = dims(source)
    if node is None or node.op_type != "Add" or node.domain not in ("", "ai.onnx") or not whole:
        return None
    for x, residual in (node.inputs, reversed(node.inputs)):
        if x is None or residual is None or dims(x) != whole or None in whole:
            continue
        if residual.dtype == ir.DataType.FLOAT and _trails(dims(residual), whole):
            return node, x, residual
    return None


def _trails(shape: list[int | str | None] | None, whole: list[int | str | None]) -> bool:
    """Whether ``shape`` is ``whole`` but for leading dimensions that are missing or 1."""
    if not shape or len(shape) > len(whole):
        return False
    core = shape
    while len(core) > 1 and core[0] == 1:
        core = core[1:]
    return None not in core and core == whole[len(whole) - len(core) :]


def _fuse_norm(match: NormMatch, name: str) -> str:
    last = match.output.producer()
    assert last is not None, "a match ends at a node"
    added = _summands(match.source)
    if added is None:
        node = norm_node(
            match.source, None, match.gain, match.shift, epsilon=match.epsilon, with_sum=False, name=name
        )
        replace(match.output, node, node.outputs[0], last)
        return f"{node.op_type} instead of onnxruntime's"
    add, x, residual = added
    _before(add, match.gain, match.shift)
    used = not set(match.source.consumers()) <= match.readers or match.source.is_graph_output()
    node = norm_node(x, residual, match.gain, match.shift, epsilon=match.epsilon, with_sum=used, name=name)
    replace(match.output, node, node.outputs[0], add)
    if used:
        take_over(match.source, node.outputs[1])
    return f"{node.op_type}: the sum before it fused"


def _before(node: ir.Node, *constants: ir.Value | None) -> None:
    """Move the Constant nodes of ``constants`` in front of ``node``."""
    graph = node.graph
    assert graph is not None, "the nodes of a model belong to a graph"
    for value in constants:
        producer = None if value is None else value.producer()
        if producer is not None:
            graph.remove(producer)
            graph.insert_before(node, producer)


# ---- attention --------------------------------------------------------------------------------------


def fuse_attention(model: Model) -> Outcome:
    """Replace the core of every attention, from the rows of q, k and v to rows again, by one node."""
    outcome = Outcome()
    for node in _main_nodes(model):
        try:
            match = match_attention(node)
        except Refusal as refusal:
            outcome.refused.append((str(node.name), str(refusal)))
            continue
        if match is None:
            continue
        fused = attention_node(
            match.inputs, match.mask, heads=match.heads, kv_heads=match.kv_heads, scale=match.scale,
            rotary=match.rotary, name=str(node.name),
        )  # fmt: skip
        last = match.output.producer()
        assert last is not None, "a match ends at a node"
        replace(match.output, fused, fused.outputs[0], last)
        outcome.changed.append((str(node.name), f"{fused.op_type} of {match.heads} heads"))
    return outcome


# ---- products that read the same -------------------------------------------------------------------


def _alone(node: ir.Node) -> bool:
    """Whether the node is a sparse product whose result only one node reads, all its inputs constants but x."""
    constants = (value is not None and constant_array(value) is not None for value in node.inputs[1:])
    return (
        is_linear(node)
        and "Conv" not in node.op_type
        and len(node.outputs[0].uses()) == 1
        and not node.outputs[0].is_graph_output()
        and all(constants)
    )


def _equal(values: Sequence[ir.Value | None], others: Sequence[ir.Value | None]) -> bool:
    """Whether these constants are those constants."""
    pairs = zip(map(constant_array, values), map(constant_array, others), strict=True)
    return all(a is not None and b is not None and np.array_equal(a, b) for a, b in pairs)


def _stack(model: Model, nodes: list[ir.Node]) -> ir.Node:
    """One product, in front of the first of ``nodes``, with the outputs of all of them one after the other.

    Raises:
        Refusal: they do not fit together.
    """
    first = nodes[0]
    if any(node.inputs[0] is not first.inputs[0] or node.graph is not first.graph for node in nodes):
        raise Refusal("its products read different values")
    if len({node.op_type for node in nodes}) > 1 or first.op_type not in FAMILIES:
        raise Refusal("its products are of different kinds, or have an activation")
    if len({str(node.attributes["layout"].value) for node in nodes}) > 1:
        raise Refusal("its products have different layouts")
    weights = [packed_weight(node) for node in nodes]
    if len({weight.values.dtype for weight in weights}) > 1:
        raise Refusal("its products store values of different types")
    rows = weights[0].pattern.rows if weights[0].pattern.kind == "block" else 1
    if any(weight.shape[0] % rows for weight in weights):
        raise Refusal("the outputs of its products do not fill their blocks")
    at = 5 if "Int8" in first.op_type else 4  # x and the packed weight come first
    given = first.inputs[at + 1 :]  # scale and zero point of x, where they are constants
    if any(not _equal(given, node.inputs[at + 1 :]) for node in nodes):
        raise Refusal("its products quantise what they read differently")
    biases = [constant_array(node.inputs[at]) for node in nodes]
    bias = np.concatenate([array for array in biases if array is not None])
    graph = first.graph
    assert isinstance(graph, ir.Graph), "the nodes of a model belong to a graph"
    stacked = sparse_op_node(
        graph,
        first.inputs[0],
        stack_outputs(weights),  # type: ignore[arg-type]  # all of one kind: the operator's name says which
        name=f"{first.name}+{len(nodes) - 1}",
        bias=bias,
        taken=value_names(model.onnx),
        x_scale=given[0] if given else None,
        x_zero_point=given[1] if given else None,
    )
    members = [str(node.name) for node in nodes]
    stacked.metadata_props[MEMBERS_KEY] = json.dumps(members)
    output = stacked.outputs[0]
    output.type = first.outputs[0].type
    shape = dims(first.outputs[0])
    if shape is not None:
        output.shape = ir.Shape([*shape[:-1], len(bias)])
    graph.insert_before(min(nodes, key=list(graph).index), stacked)
    return stacked


def stack_attention_inputs(model: Model) -> Outcome:
    """Compute q, k and v of an attention by one product, so that x is packed and quantised once."""
    outcome = Outcome()
    for node in _main_nodes(model):
        if node.op_type not in _APART or node.domain != DOMAIN:
            continue
        name = str(node.name)
        sources = [value.producer() for value in node.inputs[:3] if value is not None]
        products = [source for source in sources if source is not None and _alone(source)]
        if len(set(products)) != 3:
            outcome.refused.append((name, "q, k and v are not made by three sparse products of its own"))
            continue
        heads = node.attributes["heads"].as_int()
        kv_heads = node.attributes["kv_heads"].as_int() if "kv_heads" in node.attributes else heads
        widths = [packed_weight(product).shape[0] for product in products]
        if widths[1] != widths[2] or widths[0] * kv_heads != widths[1] * heads:
            outcome.refused.append((name, "q, k and v are not as wide as their heads"))
            continue
        try:
            stacked = _stack(model, products)
        except Refusal as refusal:
            outcome.refused.append((name, str(refusal)))
            continue
        variant = _APART[node.op_type]
        rotary = cast(Rotary, tuple(node.inputs[3:5])) if variant.kind == "Rotary" else None
        fused = attention_node(
            (stacked.outputs[0],), node.inputs[-1] if variant.mask else None, heads=heads, kv_heads=kv_heads,
            scale=node.attributes["scale"].as_float(), rotary=rotary, name=name,
        )  # fmt: skip
        replace(node.outputs[0], fused, fused.outputs[0], node)
        outcome.changed.append((name, "q, k and v by one product"))
    return outcome


def _gates(model: Model) -> Iterator[tuple[ir.Node, ir.Node, ir.Node, str]]:
    """(Mul, product of the gate, product it is multiplied with, name of the gated unit)."""
    units = {activation: name for name, activation in GATES.items()}
    for node in _main_nodes(model):
        if node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
            continue
        products = [value.producer() if value is not None else None for value in node.inputs]
        for gate, up in (products, reversed(products)):
            if gate is None or up is None or gate is up or not (_alone(gate) and _alone(up)):
                continue
            activation = gate.op_type.removeprefix(up.op_type)
            if up.op_type in FAMILIES and gate.op_type == up.op_type + activation and activation in units:
                yield node, gate, up, units[activation]
                break


def fuse_gates(model: Model) -> Outcome:
    """Compute both halves of a gated unit by one product, and the unit by one node."""
    outcome = Outcome()
    for node, gate, up, operator in list(_gates(model)):
        if packed_weight(gate).shape[0] != packed_weight(up).shape[0]:
            outcome.refused.append((str(node.name), "its halves are not equally wide"))
            continue
        bare = _without_activation(gate, up.op_type)
        try:
            stacked = _stack(model, [bare, up])
        except Refusal as refusal:
            outcome.refused.append((str(node.name), str(refusal)))
            continue
        fused = gate_node(stacked.outputs[0], operator, name=str(node.name))
        replace(node.outputs[0], fused, fused.outputs[0], node)
        outcome.changed.append((str(node.name), f"{operator}: both halves by one product"))
    return outcome


def _without_activation(node: ir.Node, op_type: str) -> ir.Node:
    """The product itself, put in place of ``node`` with an activation that takes no parameters."""
    bare = ir.Node(
        DOMAIN, op_type, node.inputs, list(node.attributes.values()), name=node.name, version=node.version
    )
    graph = node.graph
    assert graph is not None, "the nodes of a model belong to a graph"
    bare.outputs[0].type, bare.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
    graph.insert_before(node, bare)
    return bare


#: The rewrites in the order in which they are tried; each builds on those before it.
STEPS: dict[str, Callable[[Model], Outcome]] = {
    "norms": fuse_norms,
    "attention": fuse_attention,
    "attention-inputs": stack_attention_inputs,
    "gates": fuse_gates,
}


@dataclass(frozen=True)
class FuseTransformer(Pass):
    """Fuse residual and normalisation, attention, q/k/v and gated units around sparse products.

    onnxruntime's own fusions of a transformer do not see sparse operators, and several of its kernels between
    the products are slow; these rewrites take their place. Each kind is kept only if the whole model is measured
    faster with it.

    Changes: Add with LayerNormalization (or its decomposed form, or RMS norm), the core of attention between the
    rows of q, k, v and its result (heads may share keys and values and be turned by rotary positions), three
    products that read the same, and gated units become ``ai.sparsecc`` nodes. Runs after ``lower-sparse``.
    Skips: models without a sparse operator, attention with a cache of keys and values, and whatever does not match,
    with the reason.

    Sample: ``fuse-transformer{min-gain=1.05}``

    Attributes:
        min_gain: time before / time after that each kind of rewrite must reach on the whole model; 0 keeps all
            without measuring.
    """

    name: ClassVar[str] = "fuse-transformer"
    lossless: ClassVar[bool] = True

    min_gain: float = 1.01

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Try the rewrites one kind after the other and keep those that pay."""
        report = PassReport(self.name)
        if not any(is_linear(node) for node in model.onnx.graph):
            report.note("no sparse operator in the graph: nothing is fused")
            return report
        if model.opset < _MIN_OPSET:
            report.note(f"opset {model.opset} is below {_MIN_OPSET}: nothing is fused")
            return report
        if self.min_gain > 0 and ctx.costs is None:
            raise UsageError(
                "fuse-transformer needs a source of measured costs; run it through sparsecc.optimize, "
                "or with min-gain=0"
            )
        refused: dict[str, list[str]] = defaultdict(list)
        for number, (kind, step) in enumerate(STEPS.items()):
            ctx.progress("timing fused regions", number, len(STEPS))
            self._try(kind, step, model, ctx, report, refused)
        ctx.progress("timing fused regions", len(STEPS), len(STEPS))
        for name, reasons in refused.items():
            report.skip(name, "; ".join(reasons))
        return report

    def _try(
        self,
        kind: str,
        step: Callable[[Model], Outcome],
        model: Model,
        ctx: PassContext,
        report: PassReport,
        refused: dict[str, list[str]],
    ) -> None:
        candidate = model.copy()
        outcome = _apply(step, candidate)
        for name, reason in outcome.refused:
            refused[name].append(reason)
        if not outcome.changed:
            return
        gain = 1.0
        if self.min_gain > 0:
            assert ctx.costs is not None, "checked before"
            try:
                gain = 1 / ctx.costs.relative_time_of(model, candidate)
            except MeasurementError as error:
                report.note(f"{kind}: {error}")
                return
            if gain < self.min_gain:
                report.note(
                    f"{kind}: {len(outcome.changed)} places would make the model {gain:.3f}x as fast: undone"
                )
                return
            report.note(f"{kind}: {len(outcome.changed)} places, the whole model {gain:.3f}x as fast")
        _apply(step, model)
        for name, detail in outcome.changed:
            report.change(name, detail)


def _apply(step: Callable[[Model], Outcome], model: Model) -> Outcome:
    prepare(model.onnx)
    outcome = step(model)
    if outcome.changed:
        remove_dead(model.onnx)
    return outcome
