"""Carrying out what the graph of coupled axes allows: another order of units, or fewer of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import PassError
from sparsecc.ir.axes.builder import Edit, Field, Part, constant
from sparsecc.ir.axes.graph import AxisGraph
from sparsecc.ir.axes.units import Atoms
from sparsecc.ir.model import Model
from sparsecc.ir.names import free_name, value_names

__all__ = ["permute", "remove"]


def permute(axes: AxisGraph, content: Mapping[int, int]) -> None:
    """Put other units in the place of units, in all constants at once; the model computes the same.

    Args:
        axes: of the model; still good afterwards.
        content: for each unit that changes, the unit whose weights come to its place. One to one, within orbits of
            level ``order`` that have no reason.
    """
    changing = np.array([old for old, new in content.items() if old != new], np.int64)
    for part in axes.parts:
        units = axes.units(part.atoms, "order")
        if not np.isin(units, changing).any():
            continue
        rows = units.reshape(-1, part.atoms.shape[-1])
        sources = [_sources(row, content) for row in rows]
        assert part.value.const_value is not None, "parts are constants"
        stored = part.value.const_value.numpy()
        _store(part.value, _reordered(stored, part, sources))


def _reordered(stored: NDArray[Any], part: Part, sources: list[Atoms]) -> NDArray[Any]:
    if len(sources) == 1:
        return np.take(stored, sources[0], part.axis)
    if part.role != "columns":
        width = len(sources[0])
        return np.take(stored, np.concatenate([s + n * width for n, s in enumerate(sources)]), part.axis)
    blocks = np.split(stored, len(sources))
    return np.concatenate([np.take(b, s, part.axis) for b, s in zip(blocks, sources, strict=True)])


def _sources(units: Atoms, content: Mapping[int, int]) -> Atoms:
    """For each place the place its new content is at now: the k-th of a unit takes the k-th of the other."""
    wanted = np.array([content.get(unit, unit) for unit in units.tolist()], np.int64)
    before = np.argsort(units, kind="stable")
    after = np.argsort(wanted, kind="stable")
    if not np.array_equal(units[before], wanted[after]):
        raise PassError("units were exchanged that do not stand in the same places")
    sources = np.empty(len(units), np.int64)
    sources[after] = before
    return sources


def remove(model: Model, axes: AxisGraph, units: Atoms) -> None:
    """Cut units out of all constants and let the sizes that nodes ask for follow; shapes really shrink.

    Args:
        model: changed in place; look for sites, and coupled axes, again afterwards.
        axes: of this model.
        units: of level ``removal``, from orbits without a reason.

    Raises:
        PassError: the units are not free, or an axis would be left without any position.
    """
    alive = ~np.isin(axes.removal, units)
    for part in axes.parts:
        kept = alive[part.atoms]
        if kept.all():
            continue
        if kept.ndim > 1 and (kept != kept[0]).any():
            raise PassError(f"not the same of each group would be left of {part.value.name!r}")
        kept = kept[0] if part.role == "columns" and kept.ndim > 1 else kept.ravel()
        if not kept.any():
            raise PassError(f"nothing would be left of {part.value.name!r}")
        assert part.value.const_value is not None, "parts are constants"
        _store(part.value, np.compress(kept, part.value.const_value.numpy(), part.axis))
    used = value_names(model.onnx)
    for edit in axes.edits:
        _EDITS[edit.kind](edit, alive, used)
    inputs = set(model.onnx.graph.inputs) | set(model.onnx.graph.outputs)
    for node in model.onnx.graph:
        for value in node.outputs:
            if value not in inputs:
                value.shape = None
    model.infer_shapes()


def _store(value: onnx_ir.Value, array: NDArray[Any]) -> None:
    old = value.const_value
    assert old is not None, "parts are constants"
    stored = np.ascontiguousarray(array)
    value.const_value = onnx_ir.Tensor(stored, dtype=old.dtype, name=value.name, doc_string=old.doc_string)
    value.shape = onnx_ir.Shape(stored.shape)


def _sizes(field: Field, alive: NDArray[np.bool_]) -> tuple[int, ...]:
    """How many positions are left along each axis of a field."""
    kept = alive[field.atoms]
    sizes = tuple(
        int(kept.any(axis=tuple(at for at in range(kept.ndim) if at != axis)).sum())
        for axis in range(kept.ndim)
    )
    if int(np.prod(sizes)) != int(kept.sum()) or not kept.any():
        raise PassError(f"what would be left of {field.name!r} is no grid, or nothing")
    return sizes


def _replace_ints(node: onnx_ir.Node, index: int, numbers: NDArray[np.int64], used: set[str]) -> None:
    """Give a node a constant of its own: the old one may be read by others."""
    old, graph = node.inputs[index], node.graph
    assert old is not None, "edits are recorded for constants"
    assert graph is not None, "the nodes of a model belong to a graph"
    dtype = np.int64 if old.const_value is None else old.const_value.dtype.numpy()
    value = onnx_ir.Value(name=free_name(f"{old.name}.cut", used))
    value.const_value = onnx_ir.Tensor(numbers.astype(dtype), name=value.name)
    value.shape, value.type = onnx_ir.Shape(numbers.shape), onnx_ir.TensorType(value.const_value.dtype)
    graph.register_initializer(value)
    node.replace_input_with(index, value)


def _ints(value: onnx_ir.Value | None) -> NDArray[np.int64]:
    assert value is not None, "edits are recorded for constants"
    assert value.const_value is not None, "edits are recorded for constants"
    return value.const_value.numpy().astype(np.int64).copy()


def _edit_reshape(edit: Edit, alive: NDArray[np.bool_], used: set[str]) -> None:
    (field,) = edit.fields
    axis, size = field.axes[0], _sizes(field, alive)[0]
    if size == field.atoms.shape[0]:
        return
    shape = edit.node.inputs[1]
    if constant(shape) is None:
        concat = None if shape is None else shape.producer()
        assert concat is not None, "editable_size looked"
        _replace_ints(concat, axis, np.array([size], np.int64), used)
        return
    asked = _ints(shape)
    if asked[axis] > 0:
        asked[axis] = size
        _replace_ints(edit.node, 1, asked, used)


def _edit_split(edit: Edit, alive: NDArray[np.bool_], used: set[str]) -> None:
    sizes = np.array([_sizes(field, alive)[0] for field in edit.fields], np.int64)
    if not np.array_equal(sizes, _ints(edit.node.inputs[1])):
        _replace_ints(edit.node, 1, sizes, used)


def _kept_rows(field: Field, alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    _sizes(field, alive)
    return np.asarray(alive[field.atoms].reshape(len(field.atoms), -1).any(axis=1), bool)


def _edit_slice(edit: Edit, alive: NDArray[np.bool_], used: set[str]) -> None:
    (field,) = edit.fields
    kept = _kept_rows(field, alive)
    if kept.all():
        return
    node, at = edit.node, edit.axis
    starts, ends = _ints(node.inputs[1]), _ints(node.inputs[2])
    start, end, _ = slice(int(starts.flat[at]), int(ends.flat[at])).indices(len(kept))
    starts.flat[at], ends.flat[at] = int(kept[:start].sum()), int(kept[:end].sum())
    _replace_ints(node, 1, starts, used)
    _replace_ints(node, 2, ends, used)


def _edit_gather(edit: Edit, alive: NDArray[np.bool_], used: set[str]) -> None:
    (field,) = edit.fields
    kept = _kept_rows(field, alive)
    if kept.all():
        return
    old = _ints(edit.node.inputs[1]) % len(kept)
    _replace_ints(edit.node, 1, (np.cumsum(kept) - 1)[old[kept[old]]], used)


def _edit_pad(edit: Edit, alive: NDArray[np.bool_], used: set[str]) -> None:
    before, after = edit.fields
    amounts = _ints(edit.node.inputs[1])
    rank = amounts.size // 2
    front = int(amounts.flat[edit.axis])
    kept = alive[after.atoms]
    amounts.flat[edit.axis] = int(kept[:front].sum())
    amounts.flat[edit.axis + rank] = int(kept[front + len(before.atoms) :].sum())
    if not kept.all():
        _replace_ints(edit.node, 1, amounts, used)


def _edit_group(edit: Edit, alive: NDArray[np.bool_], used: set[str]) -> None:
    (field,) = edit.fields
    edit.node.attributes["group"] = onnx_ir.AttrInt64("group", _sizes(field, alive)[0])


_EDITS = {
    "gather": _edit_gather,
    "group": _edit_group,
    "pad": _edit_pad,
    "reshape": _edit_reshape,
    "slice": _edit_slice,
    "split": _edit_split,
}
