"""Lending a model to ONNX GraphSurgeon and taking it back without loss.

GraphSurgeon reads well for surgery by hand, but it drops metadata, node doc strings and quantisation
annotations, and would load every weight. Here large weights stay behind (their place is held by a token that
GraphSurgeon hands through), and what it drops is put back by name.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir

from sparsecc.errors import ModelError, PassError, UnsupportedModelError
from sparsecc.ir.densify import node_protos
from sparsecc.ir.external import ExternalFiles
from sparsecc.ir.model import Model
from sparsecc.ir.read import adopt_proto, one_line, tensor_protos
from sparsecc.ir.slots import Slot, Tensor, swapped

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

__all__ = ["graphsurgeon", "graphsurgeon_pass"]

_log = logging.getLogger(__name__)

_LENT_FROM = 1024
_ATTRIBUTES = ("FLOAT", "INT", "STRING", "TENSOR", "GRAPH", "FLOATS", "INTS", "STRINGS")
_MODEL_FIELDS = ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string")
_NODE_LISTS = ("metadata_props", "device_configurations")


@contextlib.contextmanager
def graphsurgeon(model: Model, *, weights: Collection[str] = ()) -> Iterator[gs.Graph]:
    """Give a ``gs.Graph`` of ``model``; at the end of the block ``model.onnx`` becomes what it was made into.

    Initializers of 1 KiB or more keep name, type and shape but cannot be read (``Constant.values``) unless
    their name is in ``weights``. New constants may hold anything. An exception leaves the model as it was.
    Sites found before are stale afterwards.

    Raises:
        UnsupportedModelError: the model has an attribute type or function overload GraphSurgeon would drop.
        PassError: the graph is invalid after the surgery.
    """
    import onnx_graphsurgeon as gs

    lender = _Lender(weights)
    with swapped(model.onnx, lender.place):
        before = onnx_ir.serde.serialize_model(model.onnx)
    _refuse_lossy(before)
    # GraphSurgeon renames tensors inside the protobuf it was given.
    lent = onnx.ModelProto()
    lent.CopyFrom(before)
    graph = gs.import_onnx(lent)
    yield graph
    after = gs.export_onnx(graph)
    _restore(before, after)
    _clear_false_locations(after)
    try:
        model.onnx = adopt_proto(after, lender)
    except ModelError as error:
        raise PassError(f"graph surgery left an invalid model: {one_line(error)}") from error


def graphsurgeon_pass(
    function: Callable[..., Any] | None = None, *, weights: Collection[str] = ()
) -> Callable[..., Any]:
    """Turn ``function(graph, ...)`` into ``function(model, ...)``, which changes the model in place.

    The function may return another graph to take the place of the one it was given; anything else it returns
    is passed on. Use it bare, or as ``@graphsurgeon_pass(weights=("w",))``.
    """
    if function is None:
        return functools.partial(graphsurgeon_pass, weights=weights)

    @functools.wraps(function)
    def wrapper(model: Model, *args: Any, **kwargs: Any) -> Any:
        with graphsurgeon(model, weights=weights) as graph:
            result = function(graph, *args, **kwargs)
            if type(result) is type(graph):
                graph.__dict__.update(result.__dict__)
                return None
        return result

    return wrapper


class _Lender(ExternalFiles):
    """Holds the weights that stay behind, under locations that exist nowhere."""

    def __init__(self, wanted: Collection[str]) -> None:
        super().__init__(None)
        self._wanted = frozenset(wanted)
        self._held: dict[str, Tensor] = {}

    def place(self, slot: Slot, tensor: Tensor) -> Tensor:
        """Return a token for ``tensor``, or the tensor itself if it goes along."""
        small = tensor.dtype == onnx_ir.DataType.STRING or tensor.nbytes < _LENT_FROM
        if small or not slot.is_initializer or tensor.name in self._wanted:
            return tensor
        location = f"not-lent-ask-for-it-by-name-{len(self._held)}"
        self._held[location] = tensor
        return onnx_ir.ExternalTensor(
            location,
            0,
            int(tensor.nbytes),
            tensor.dtype,
            shape=onnx_ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
        )

    def map(self, tensor: onnx_ir.ExternalTensor) -> Tensor:
        """Return the weight behind a token, under the token's present name."""
        held = self._held.get(str(tensor.location))
        if held is None:
            raise ModelError(f"weight {tensor.name!r} has external data of its own: give it values instead")
        if held.name == tensor.name:
            return held
        return onnx_ir.Tensor(held.numpy(), dtype=held.dtype, name=tensor.name)


def _refuse_lossy(proto: onnx.ModelProto) -> None:
    for node in node_protos(proto):
        for attr in node.attribute:
            if (kind := onnx.AttributeProto.AttributeType.Name(attr.type)) not in _ATTRIBUTES:
                raise UnsupportedModelError(
                    f"node {node.name!r} ({node.op_type}): GraphSurgeon would drop attribute {attr.name!r} "
                    f"of type {kind}; do this surgery on model.onnx"
                )
    if any(function.overload for function in proto.functions):
        raise UnsupportedModelError(
            "GraphSurgeon would drop function overloads; do this surgery on model.onnx"
        )


def _restore(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Put back what GraphSurgeon does not carry, wherever the name it belongs to still exists."""
    for field in _MODEL_FIELDS:
        if before.HasField(field):
            setattr(after, field, getattr(before, field))
        else:
            after.ClearField(field)
    after.metadata_props.extend(before.metadata_props)
    after.configuration.extend(before.configuration)
    _restore_graph(before.graph, after.graph)
    old_functions = {(function.domain, function.name): function for function in before.functions}
    for function in after.functions:
        if (old := old_functions.get((function.domain, function.name))) is not None:
            function.metadata_props.extend(old.metadata_props)
            _restore_nodes(old, function)


def _restore_graph(old: onnx.GraphProto, new: onnx.GraphProto) -> None:
    new.metadata_props.extend(old.metadata_props)
    names = {name for node in new.node for name in (*node.input, *node.output)}
    names |= {info.name for info in (*new.input, *new.output)}
    kept = [note for note in old.quantization_annotation if note.tensor_name in names]
    new.quantization_annotation.extend(kept)
    for old_list, new_list in (
        (old.input, new.input),
        (old.output, new.output),
        (old.value_info, new.value_info),
    ):
        known = {info.name: info for info in old_list}
        for info in new_list:
            if (found := known.get(info.name)) is not None:
                info.doc_string = found.doc_string
                info.metadata_props.extend(found.metadata_props)
    _restore_nodes(old, new)


def _restore_nodes(
    old: onnx.GraphProto | onnx.FunctionProto, new: onnx.GraphProto | onnx.FunctionProto
) -> None:
    """Match nodes of one graph by name, or by outputs where they have none."""
    known: dict[object, list[onnx.NodeProto]] = {}
    for node in old.node:
        known.setdefault(node.name or tuple(node.output), []).append(node)
    for node in new.node:
        candidates = known.pop(node.name or tuple(node.output), [])
        if len(candidates) > 1:
            candidates = [c for c in candidates if tuple(c.output) == tuple(node.output)]
        if candidates:
            _restore_node(candidates[0], node)
    lost = [node.name for nodes in known.values() for node in nodes if node.metadata_props or node.doc_string]
    if lost:
        _log.info("graph surgery removed or renamed nodes with metadata: %s", ", ".join(lost))


def _restore_node(old: onnx.NodeProto, new: onnx.NodeProto) -> None:
    new.doc_string = old.doc_string
    for field in _NODE_LISTS:
        getattr(new, field).extend(getattr(old, field))
    bodies = {attr.name: attr.g for attr in old.attribute if attr.type == onnx.AttributeProto.GRAPH}
    for attr in new.attribute:
        if attr.type == onnx.AttributeProto.GRAPH and attr.name in bodies:
            _restore_graph(bodies[attr.name], attr.g)


def _clear_false_locations(proto: onnx.ModelProto) -> None:
    """Undo GraphSurgeon's "external" mark on a lent weight that was given new values."""
    for tensor in tensor_protos(proto):
        if tensor.HasField("raw_data"):
            tensor.ClearField("data_location")
