"""LSTM and GRU: their two weights are lowered together, to one operator."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site
from sparsecc.ir.ops_recurrent import GATES, recurrent_op_node
from sparsecc.passes.lower.activations import constant_array
from sparsecc.passes.lower.linear_form import MIN_OPSET, Refusal
from sparsecc.sparse import Floats, Layout, Pattern, SparseTensor, density, detect, holds, matches

__all__ = [
    "LayoutPair",
    "RecurrentForm",
    "candidate_pairs",
    "is_recurrent",
    "kept_whole",
    "leads",
    "lower_recurrent",
    "pack_floats",
    "pair_text",
    "parse_pair",
    "recurrent_form",
    "weight_pair",
]

#: Above this density a weight is kept whole, in blocks of 16 outputs: as fast as a dense product.
_WHOLE_DENSITY = 0.85
_WHOLE = Pattern.parse("16x1")
#: Sites (of pruned weights) whose zeros allow many shapes of blocks: so many are timed.
_MAX_BLOCKS = 2

#: Of W and R.
LayoutPair: TypeAlias = tuple[Layout, Layout]

_DEFAULT_ACTIVATIONS = {"LSTM": ("sigmoid", "tanh", "tanh"), "GRU": ("sigmoid", "tanh")}


@dataclass(frozen=True)
class RecurrentForm:
    """One LSTM or GRU whose meaning a sparse operator has.

    Attributes:
        node: the node.
        cell: ``LSTM`` or ``GRU``.
        hidden: units of the hidden state, H.
        direction: ``forward``, ``reverse`` or ``bidirectional``.
        before_reset: of a GRU: its ``linear_before_reset``.
        input_weight: W, float32 ``[D * gates * H, I]``.
        state_weight: R, float32 ``[D * gates * H, H]``.
        bias: float32 ``[D, 2 * gates * H]``.
        lengths: the value with the length of each sequence, if there is one.
        initial: the initial states: h and (LSTM) c, or none.
    """

    node: onnx_ir.Node
    cell: Literal["LSTM", "GRU"]
    hidden: int
    direction: str
    before_reset: bool
    input_weight: npt.NDArray[np.float32]
    state_weight: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]
    lengths: onnx_ir.Value | None
    initial: tuple[onnx_ir.Value, ...]

    @property
    def density(self) -> float:
        """Kept weights / all, of both weights together."""
        both = (self.input_weight, self.state_weight)
        return sum(density(weight) * weight.size for weight in both) / sum(weight.size for weight in both)


def is_recurrent(site: Site) -> bool:
    """Whether ``site`` is a weight of LSTM or GRU."""
    return site.op in GATES


def leads(site: Site) -> bool:
    """Whether ``site`` decides for itself: of the two weights of LSTM and GRU that is W."""
    return not is_recurrent(site) or site.input is not None


def weight_pair(model: Model, site: Site) -> tuple[Site, Site]:
    """Return the W and the R that go together, one of which is ``site``.

    Raises:
        Refusal: the nodes that share one of them do not share the other.
    """
    partners = [
        other
        for other in model.sites()
        if other.op == site.op and other.nodes == site.nodes and leads(other) != leads(site)
    ]
    if len(partners) != 1:
        raise Refusal(
            "the nodes that share this weight do not share the other one, or the other is no constant"
        )
    return (site, partners[0]) if leads(site) else (partners[0], site)


def recurrent_form(model: Model, pair: tuple[Site, Site], node: onnx_ir.Node) -> RecurrentForm:
    """Return the form of ``node``, a reader of both weights.

    Raises:
        Refusal: there is no sparse operator for what the node does.
    """
    w, r = pair
    cell = cast(Literal["LSTM", "GRU"], w.op)
    if model.opset < MIN_OPSET:
        raise Refusal(f"opset {model.opset} is below {MIN_OPSET}; convert the model to a newer opset first")
    if w.scope == "function":
        raise Refusal("inside a local function: packed weights cannot be stored there; inline it first")
    if w.dtype != np.float32 or r.dtype != np.float32:
        raise Refusal(f"{w.dtype.name} weights: the CPU kernels compute in float32 only")
    hidden = r.shape[1]
    directions = w.weight_shape[0]
    direction = node.attributes.get_string("direction", "forward") or "forward"
    _check_attributes(node, cell, hidden, directions)
    inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
    if inputs[7] is not None:
        raise Refusal("peepholes: the sparse operator has none")
    shape = (directions, 2 * GATES[cell] * hidden)
    bias = np.zeros(shape, np.float32) if inputs[3] is None else constant_array(inputs[3])
    if bias is None or bias.shape != shape:
        raise Refusal("its bias is no constant")
    states = inputs[5:7] if cell == "LSTM" else inputs[5:6]
    initial = tuple(value for value in states if value is not None)
    if len(initial) not in (0, len(states)):
        raise Refusal("only one of its two initial states is given")
    return RecurrentForm(
        node, cell, hidden, direction, bool(node.attributes.get_int("linear_before_reset", 0)),
        w.numpy(), r.numpy(), bias.astype(np.float32), inputs[4], initial,
    )  # fmt: skip


def _check_attributes(node: onnx_ir.Node, cell: str, hidden: int, directions: int) -> None:
    attributes = node.attributes
    if "clip" in attributes:
        raise Refusal("clip: the sparse operator has none")
    if attributes.get_int("input_forget", 0):
        raise Refusal("input_forget: the sparse operator has separate gates only")
    if attributes.get_int("layout", 0):
        raise Refusal("layout=1: the sparse operator takes the sequence axis first")
    if attributes.get_int("hidden_size", hidden) != hidden:
        raise Refusal("hidden_size contradicts its weights")
    names = attributes["activations"].as_strings() if "activations" in attributes else ()
    if names and [name.lower() for name in names] != [*_DEFAULT_ACTIVATIONS[cell]] * directions:
        raise Refusal("activations other than sigmoid and tanh: the sparse operator has no others")


def kept_whole(form: RecurrentForm) -> bool:
    """Whether the sparse operator takes weights without zeros: where the gates are of whole blocks."""
    return form.hidden % _WHOLE.rows == 0


def candidate_pairs(form: RecurrentForm, floats: Floats = "fp32") -> tuple[LayoutPair, ...]:
    """The layouts of (W, R) worth timing for their zeros, most structured first.

    With values of type ``floats``, where a weight can be stored in that without loss, and then with float32.
    """
    weights = (form.input_weight, form.state_weight)
    pairs: list[LayoutPair] = []
    for patterns in itertools.product(*(_candidates(weight, form.hidden) for weight in weights)):
        for wanted in dict.fromkeys((floats, "fp32")):
            w, r = (
                Layout(pattern, wanted if holds(weight, wanted) else "fp32")
                for weight, pattern in zip(weights, patterns, strict=True)
            )
            pairs.append((w, r))
    return tuple(dict.fromkeys(pairs))


def _candidates(weight: npt.NDArray[np.float32], hidden: int) -> tuple[Pattern, ...]:
    if density(weight) > _WHOLE_DENSITY and hidden % _WHOLE.rows == 0:
        return (_WHOLE,)
    found = [p for p in detect(weight) if p.kind != "block" or hidden % p.rows == 0]
    blocks = [pattern for pattern in found if pattern.kind == "block"][:_MAX_BLOCKS]
    groups = [pattern for pattern in found if pattern.kind == "nm"][:1]
    return (*blocks, *groups, Pattern("unstructured"))


def pair_text(pair: LayoutPair) -> str:
    """The layouts of W and R as a mark: one where they are the same."""
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}+{pair[1]}"


def parse_pair(text: str) -> LayoutPair:
    """What ``pair_text`` wrote."""
    first, _, second = text.partition("+")
    return Layout.parse(first), Layout.parse(second or first)


def lower_recurrent(
    model: Model, site: Site, layouts: LayoutPair, taken: set[str]
) -> tuple[list[onnx_ir.Node], int, int]:
    """Replace all nodes of the pair of ``site`` by sparse operators.

    Returns:
        The new nodes, and the bytes of the two weights before and after.

    Raises:
        Refusal: there is no sparse operator for one of them, or not with these layouts; nothing is changed then.
    """
    pair = weight_pair(model, site)
    forms = [recurrent_form(model, pair, node) for node in pair[0].nodes]
    weights = (forms[0].input_weight, forms[0].state_weight)
    for weight, layout in zip(weights, layouts, strict=True):
        check_pair_layout(weight, layout.pattern, forms[0].hidden)
    packed = [pack_floats(weight, layout) for weight, layout in zip(weights, layouts, strict=True)]
    name = pair[0].name.removesuffix(".W")
    lowered = [_replace(form, packed[0], packed[1], form.node.name or name, taken) for form in forms]
    return lowered, sum(weight.nbytes for weight in weights), sum(weight.nbytes for weight in packed)


def pack_floats(weight: npt.NDArray[np.float32], layout: Layout) -> SparseTensor:
    """Return ``weight`` in ``layout``, whose values are not int8.

    Raises:
        Refusal: its numbers are none of the type of the values.
    """
    if layout.values == "int8":
        raise Refusal(f"it is not quantised, so there is no {layout} of it")
    try:
        return SparseTensor.encode(weight, layout.pattern).stored_as(layout.values)
    except SpecError as error:
        raise Refusal(str(error)) from error


def check_pair_layout(weight: npt.NDArray[np.float32], pattern: Pattern, hidden: int) -> None:
    """Raise ``Refusal`` where the operators cannot hold ``pattern`` for one weight of ``hidden`` units."""
    if pattern.kind == "dense":
        raise Refusal("dense was chosen")
    if pattern.kind == "block" and hidden % pattern.rows:
        raise Refusal(f"blocks of {pattern.rows} outputs cross its gates of {hidden} units")
    if not matches(weight, pattern):
        raise Refusal(f"its zeros do not obey {pattern}")


def _replace(
    form: RecurrentForm, w: SparseTensor, r: SparseTensor, name: str, taken: set[str]
) -> onnx_ir.Node:
    node, graph = form.node, form.node.graph
    assert isinstance(graph, onnx_ir.Graph)
    sparse = recurrent_op_node(
        graph, node.inputs[0], w, r, cell=form.cell, hidden=form.hidden, name=name, bias=form.bias,
        direction=form.direction, linear_before_reset=form.before_reset, lengths=form.lengths,
        initial=form.initial, taken=taken,
    )  # fmt: skip
    count = len(node.outputs)
    onnx_ir.convenience.replace_nodes_and_values(
        graph, node, [node], [sparse], list(node.outputs), list(sparse.outputs[:count])
    )
    return sparse
