"""How operators that only move data hand positions of axes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir.axes.builder import Builder, Dims, Field, constant, dims
from sparsecc.ir.axes.rules import Rule, place
from sparsecc.ir.axes.units import Atoms

__all__ = ["SHAPE_RULES", "constant_ints", "editable_size"]

_Block = tuple[tuple[int, ...], tuple[int, ...]]


def constant_ints(value: onnx_ir.Value | None) -> NDArray[np.int64] | None:
    """Return a constant as integers, or None if it is none."""
    if value is None or constant(value) is None or value.const_value is None:
        return None
    return value.const_value.numpy().astype(np.int64)


def transpose(b: Builder, node: onnx_ir.Node) -> None:
    """Axes change places."""
    shape = dims(node.inputs[0])
    if shape is None:
        b.freeze_inputs(node, f"{place(node)} has an input of unknown rank")
        return
    perm = tuple(node.attributes.get_ints("perm", range(len(shape))[::-1]) or ())
    for field in b.of(node.inputs[0]):
        where = tuple(perm.index(axis) for axis in field.axes)
        b.put(node, node.outputs[0], where, field.atoms, field)


def reshape(b: Builder, node: onnx_ir.Node) -> None:
    """Reshape and Flatten: axes are joined and split in row-major order."""
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    if before is None or after is None:
        b.freeze_inputs(node, f"{place(node)} has an unknown shape")
        return
    blocks = _blocks(node, before, after)
    used: set[int] = set()
    for field in sorted(b.of(node.inputs[0]), key=lambda item: item.axes[0]):
        touched = [block for block in blocks if set(block[0]) & set(field.axes)]
        inside = [axis for block in touched for axis in block[0]]
        sizes = [before[axis] for axis in inside]
        if not set(field.axes) <= set(inside) or None in sizes or used & set(inside):
            b.freeze(field.atoms, f"{place(node)} mixes it with axes of unknown size or other meaning")
            continue
        used |= set(inside)
        atoms = _spread(field, inside, [size for size in sizes if size is not None])
        lengths = {
            axis: before[block[0][0]] if len(block[0]) == len(block[1]) == 1 else after[axis]
            for block in touched
            for axis in block[1]
        }
        wide = [axis for axis, length in lengths.items() if length != 1] or list(lengths)[:1]
        shaped = atoms.reshape([lengths[axis] or 0 for axis in wide])
        made = b.put(node, node.outputs[0], tuple(wide), shaped, field)
        if node.op_type == "Reshape":
            if editable_size(node, wide[0]):
                b.edit(node, "reshape", [made])
            else:
                b.keep(field.atoms, f"the shape that {place(node)} asks for cannot be changed")


def _spread(field: Field, inside: Sequence[int], sizes: Sequence[int]) -> Atoms:
    """The atoms over all axes ``inside``, repeated along those the field does not know."""
    order = np.argsort(field.axes)
    atoms = field.atoms.transpose(order)
    known = iter(atoms.shape)
    shape = [next(known) if axis in field.axes else 1 for axis in inside]
    return np.broadcast_to(atoms.reshape(shape), tuple(sizes))


def _blocks(node: onnx_ir.Node, before: Dims, after: Dims) -> list[_Block]:
    """Groups of axes of the input and the output that hold the same elements, from both ends."""
    if node.op_type == "Flatten":
        axis = node.attributes.get_int("axis", 1) or 0
        split = axis % len(before) if axis < 0 else axis
        return [(tuple(range(split)), (0,)), (tuple(range(split, len(before))), (1,))]
    asked = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    copies = not node.attributes.get_int("allowzero", 0) and asked is not None
    blocks: list[_Block] = []
    first = 0
    while first < min(len(before), len(after)):
        # A zero in the shape copies the axis at the same place, whatever its size.
        copied = copies and asked is not None and asked[first] == 0
        if not copied and (before[first] is None or before[first] != after[first]):
            break
        blocks.append(((first,), (first,)))
        first += 1
    return blocks + sorted(_from_the_end(before, after, first))


def _from_the_end(before: Dims, after: Dims, first: int) -> Iterator[_Block]:
    left, right = len(before), len(after)
    while left > first and right > first:
        low, high = left - 1, right - 1
        one, other = before[low], after[high]
        while one is not None and other is not None and one != other:
            if one < other:
                low -= 1
                one = None if low < first else one * (before[low] or 0) or None
            else:
                high -= 1
                other = None if high < first else other * (after[high] or 0) or None
        if one is None or other is None:
            return
        yield tuple(range(low, left)), tuple(range(high, right))
        left, right = low, high


def editable_size(node: onnx_ir.Node, axis: int) -> bool:
    """Whether the size that a Reshape asks for ``axis`` is a number that can be rewritten, or is computed."""
    shape = node.inputs[1] if len(node.inputs) > 1 else None
    if constant_ints(shape) is not None:
        return True
    concat = None if shape is None else shape.producer()
    if concat is None or concat.op_type != "Concat" or axis >= len(concat.inputs):
        return False
    pieces = [constant(value) or dims(value) for value in concat.inputs]
    return all(piece == (1,) for piece in pieces) and constant(concat.inputs[axis]) is not None


def squeeze(b: Builder, node: onnx_ir.Node) -> None:
    """Axes of size one go away."""
    shape = dims(node.inputs[0])
    axes = _listed_axes(node, None if shape is None else len(shape))
    if shape is not None and axes is None and None not in shape and not node.attributes.get("axes"):
        axes = {axis for axis, size in enumerate(shape) if size == 1} if len(node.inputs) < 2 else None
    if axes is None:
        b.freeze_inputs(node, f"{place(node)} removes axes that are not known")
        return
    for field in b.of(node.inputs[0]):
        if set(field.axes) & axes:
            b.freeze(field.atoms, f"{place(node)} removes it")
            continue
        where = tuple(axis - sum(gone < axis for gone in axes) for axis in field.axes)
        b.put(node, node.outputs[0], where, field.atoms, field)


def unsqueeze(b: Builder, node: onnx_ir.Node) -> None:
    """Axes of size one appear."""
    shape = dims(node.inputs[0])
    listed = node.attributes.get_ints("axes", None)
    given = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = (
        list(listed) if listed is not None else None if given is None else [int(axis) for axis in given.flat]
    )
    if shape is None or axes is None:
        b.freeze_inputs(node, f"{place(node)} adds axes that are not known")
        return
    rank = len(shape) + len(axes)
    old = [axis for axis in range(rank) if axis not in {item % rank for item in axes}]
    for field in b.of(node.inputs[0]):
        b.put(node, node.outputs[0], tuple(old[axis] for axis in field.axes), field.atoms, field)


def _listed_axes(node: onnx_ir.Node, rank: int | None) -> set[int] | None:
    listed = node.attributes.get_ints("axes", None)
    if listed is None and len(node.inputs) > 1:
        given = constant_ints(node.inputs[1])
        listed = None if given is None else tuple(int(axis) for axis in given.flat)
    if rank is None or listed is None:
        return None
    return {axis % rank for axis in listed}


def concat(b: Builder, node: onnx_ir.Node) -> None:
    """Positions of the inputs one after the other; axes that all inputs share are the same."""
    values = [value for value in node.inputs if value is not None]
    shapes = [dims(value) for value in values]
    rank = len(shapes[0] or ())
    if any(shape is None for shape in shapes) or not rank:
        b.freeze_inputs(node, f"{place(node)} has inputs of unknown rank")
        return
    axis = (node.attributes.get_int("axis", 0) or 0) % rank
    lists = [b.of(value) for value in values]
    for field in lists[0]:
        mates = [next((other for other in fields if other.axes == field.axes), None) for fields in lists]
        found = [mate for mate in mates if mate is not None]
        others = [at for at in range(field.atoms.ndim) if field.axes[at] != axis]
        alike = len({tuple(mate.atoms.shape[at] for at in others) for mate in found}) == 1
        if axis in field.axes or len(found) < len(values) or not alike:
            continue
        for mate in found[1:]:
            b.same(found[0].atoms, mate.atoms)
        b.put(node, node.outputs[0], field.axes, field.atoms, *found)
    for number, fields in enumerate(lists):
        for field in fields:
            if axis not in field.axes and not _carried(b, node, field):
                b.freeze(field.atoms, f"{place(node)} puts it beside {values[number].name!r} without one")
    _concat_along(b, node, axis, lists, [shape[axis] for shape in shapes if shape is not None])


def _carried(b: Builder, node: onnx_ir.Node, field: Field) -> bool:
    return any(other.axes == field.axes for other in b.of(node.outputs[0]))


def _concat_along(
    b: Builder, node: onnx_ir.Node, axis: int, lists: Sequence[Sequence[Field]], sizes: Sequence[int | None]
) -> None:
    along = [next((field for field in fields if axis in field.axes), None) for fields in lists]
    present = [field for field in along if field is not None]
    if not present:
        return
    axes = present[0].axes
    at = axes.index(axis)
    others = {(*field.atoms.shape[:at], *field.atoms.shape[at + 1 :]) for field in present}
    partial = len(present) < len(along) and (None in sizes or len(axes) > 1)
    if any(field.axes != axes for field in present) or len(others) > 1 or partial:
        for field in present:
            b.freeze(field.atoms, f"{place(node)} puts it beside axes that are cut differently")
        return
    pieces = []
    for mate, size in zip(along, sizes, strict=True):
        if mate is None:
            atoms = b.fresh(size or 0)
            b.freeze(atoms, f"{place(node)} takes it from a tensor that cannot follow")
            pieces.append(atoms)
        else:
            pieces.append(mate.atoms)
    if at == 0 and len(axes) > 1:
        for field in present:
            b.fix(field.atoms, "whole rows of a grid keep their order")
    elif len(axes) > 1:
        for field in present[1:]:
            b.tie_rows(present[0].atoms, field.atoms)
    b.put(node, node.outputs[0], axes, np.concatenate(pieces, at), *present)


def split(b: Builder, node: onnx_ir.Node) -> None:
    """Consecutive positions of one axis go to each output."""
    shape = dims(node.inputs[0])
    if shape is None:
        b.freeze_inputs(node, f"{place(node)} has an input of unknown rank")
        return
    axis = (node.attributes.get_int("axis", 0) or 0) % len(shape)
    outputs = [dims(value) for value in node.outputs]
    sizes = [None if item is None else item[axis] for item in outputs]
    listed = len(node.inputs) > 1 and constant_ints(node.inputs[1]) is not None
    for field in b.of(node.inputs[0]):
        if axis not in field.axes:
            for value in node.outputs:
                b.put(node, value, field.axes, field.atoms, field)
            continue
        at = field.axes.index(axis)
        b.once(field.atoms, at, f"{place(node)} cuts copies of it apart")
        if None in sizes or sum(size or 0 for size in sizes) != field.atoms.shape[at]:
            b.freeze(field.atoms, f"{place(node)} cuts it in parts of unknown size")
            continue
        ends = np.cumsum([size or 0 for size in sizes])
        made = [
            b.put(node, value, field.axes, np.take(field.atoms, range(end - (size or 0), end), at), field)
            for value, end, size in zip(node.outputs, ends, sizes, strict=True)
        ]
        if at == 0 and listed:
            b.edit(node, "split", made, axis)
        elif at == 0:
            b.keep(field.atoms, f"{place(node)} cuts it in parts whose sizes it does not list")


def slice_(b: Builder, node: onnx_ir.Node) -> None:
    """A range of one or more axes."""
    shape = dims(node.inputs[0])
    settings = [constant_ints(value) for value in node.inputs[1:]]
    if shape is None or len(settings) < 2:
        b.freeze_inputs(node, f"{place(node)} takes a range that is not known")
        return
    listed = len(settings) > 2 and node.inputs[3] is not None
    axes = settings[2] if listed else np.arange(0 if settings[0] is None else settings[0].size)
    if axes is None:
        b.freeze_inputs(node, f"{place(node)} takes a range of axes that are not known")
        return
    names = [int(axis) % len(shape) for axis in axes.flat]
    for field in b.of(node.inputs[0]):
        cut = [name for name in names if name in field.axes]
        atoms: Atoms | None = field.atoms
        for name in cut:
            b.once(field.atoms, field.axes.index(name), f"{place(node)} cuts copies of it apart")
            atoms = _range_of(atoms, field.axes.index(name), settings, names.index(name), len(names))
        if atoms is None:
            b.freeze(field.atoms, f"{place(node)} takes a range of it that is not known")
            continue
        b.put(node, node.outputs[0], field.axes, atoms, field)
        if field.axes[0] in cut:
            steps = settings[3] if len(settings) > 3 else None
            if len(cut) == 1 and (steps is None or steps.flat[names.index(cut[0])] == 1):
                b.edit(node, "slice", [field], names.index(cut[0]))
            else:
                b.keep(field.atoms, f"{place(node)} takes every other position of it")


def _range_of(
    atoms: Atoms | None, at: int, settings: Sequence[NDArray[np.int64] | None], index: int, count: int
) -> Atoms | None:
    starts, ends = settings[0], settings[1]
    steps = settings[3] if len(settings) > 3 else np.ones(count, np.int64)
    if atoms is None or starts is None or ends is None or steps is None:
        return None
    start, end, step = (int(item.flat[index]) for item in (starts, ends, steps))
    if step < 0 and end < -atoms.shape[at]:
        chosen = range(atoms.shape[at])[start::step]
    else:
        chosen = range(atoms.shape[at])[start:end:step]
    return np.take(atoms, chosen, at)


def gather(b: Builder, node: onnx_ir.Node) -> None:
    """Rows of a constant table, or fixed positions of a tensor."""
    data, indices = node.inputs[0], node.inputs[1]
    shape, picked = dims(data), dims(indices)
    for field in b.of(indices):
        b.freeze(field.atoms, f"{place(node)} reads it as indices")
    if shape is None or picked is None:
        b.freeze_inputs(node, f"{place(node)} has inputs of unknown rank")
        return
    axis = (node.attributes.get_int("axis", 0) or 0) % len(shape)
    if constant(data) is not None and axis == 0 and len(shape) == 2 and constant(indices) is None:
        atoms = b.fresh(shape[1] or 0)
        part = b.part(node, 0, 1, atoms, "rows")
        if part is not None:
            b.put(node, node.outputs[0], (len(picked),), atoms, part)
        return
    fixed = constant_ints(indices)
    for field in b.of(data):
        shift = len(picked) - 1
        if axis not in field.axes:
            where = tuple(item + shift if item > axis else item for item in field.axes)
            b.put(node, node.outputs[0], where, field.atoms, field)
        elif fixed is None or fixed.ndim != 1 or not fixed.size:
            b.freeze(field.atoms, f"{place(node)} picks positions of it that are not fixed")
        else:
            at = field.axes.index(axis)
            size = field.atoms.shape[at]
            b.once(field.atoms, at, f"{place(node)} picks among copies of it")
            if fixed.min() < -size or fixed.max() >= size:
                b.freeze(field.atoms, f"{place(node)} picks positions that do not exist")
                continue
            b.put(node, node.outputs[0], field.axes, np.take(field.atoms, fixed, at), field)
            if at == 0:
                b.edit(node, "gather", [field], axis)


def pad(b: Builder, node: onnx_ir.Node) -> None:
    """Padded positions are new; they hold a constant and stay where they are."""
    shape = dims(node.inputs[0])
    amounts = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or amounts is None or len(amounts.flat) != 2 * len(shape) or len(node.inputs) > 3:
        b.freeze_inputs(node, f"{place(node)} adds a number of positions that is not known")
        return
    for field in b.of(node.inputs[0]):
        wide = [axis for axis in field.axes if amounts.flat[axis] or amounts.flat[axis + len(shape)]]
        if not wide:
            b.put(node, node.outputs[0], field.axes, field.atoms, field)
            continue
        axis = field.axes[0]
        front, behind = int(amounts.flat[axis]), int(amounts.flat[axis + len(shape)])
        plain = node.attributes.get_string("mode", "constant") == "constant" and min(front, behind) >= 0
        if not plain or len(field.axes) > 1:
            b.freeze(field.atoms, f"{place(node)} repeats positions of it")
            continue
        extra = b.fresh(front + behind)
        b.fix(extra, f"{place(node)} fills it with a constant")
        atoms = np.concatenate([extra[:front], field.atoms, extra[front:]])
        made = b.put(node, node.outputs[0], field.axes, atoms, field)
        b.edit(node, "pad", [field, made], axis)


def expand(b: Builder, node: onnx_ir.Node) -> None:
    """Axes of size one are repeated; the others must be left as they are."""
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    for field in b.of(node.inputs[0]):
        if before is None or after is None:
            b.freeze(field.atoms, f"{place(node)} has an unknown shape")
            continue
        where = tuple(axis + len(after) - len(before) for axis in field.axes)
        if any(before[one] != after[other] for one, other in zip(field.axes, where, strict=True)):
            b.freeze(field.atoms, f"{place(node)} repeats it")
            continue
        b.keep(field.atoms, f"{place(node)} asks for a size")
        b.put(node, node.outputs[0], where, field.atoms, field)


def resize(b: Builder, node: onnx_ir.Node) -> None:
    """Pictures change size; channels do not."""
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    for field in b.of(node.inputs[0]):
        if before is None or after is None or any(before[axis] != after[axis] for axis in field.axes):
            b.freeze(field.atoms, f"{place(node)} resamples it")
            continue
        if len(node.inputs) > 3:
            b.keep(field.atoms, f"{place(node)} asks for a size")
        b.put(node, node.outputs[0], field.axes, field.atoms, field)


def shape_of(b: Builder, node: onnx_ir.Node) -> None:
    """The sizes are read: those of followed axes must not change unless nobody looks at them."""
    shape = dims(node.inputs[0])
    fields = b.of(node.inputs[0])
    if shape is None:
        for field in fields:
            b.keep(field.atoms, f"its size is read by {place(node)}")
    if shape is None or not fields:
        return
    rank = len(shape)
    start = node.attributes.get_int("start", 0) or 0
    end = node.attributes.get_int("end", rank)
    seen = set(range(rank)[start : rank if end is None else end])
    readers = [use.node for use in node.outputs[0].uses()]
    picked = [constant_ints(reader.inputs[1]) if reader.op_type == "Gather" else None for reader in readers]
    plain = start == 0 and not node.outputs[0].is_graph_output()
    if plain and all(item is not None for item in picked):
        seen &= {int(index) % rank for item in picked if item is not None for index in item.flat}
    for field in fields:
        if seen & set(field.axes) or node.op_type == "Size":
            b.keep(field.atoms, f"its size is read by {place(node)}")


SHAPE_RULES: dict[str, Rule] = {
    "Concat": concat,
    "Expand": expand,
    "Flatten": reshape,
    "Gather": gather,
    "Pad": pad,
    "Reshape": reshape,
    "Resize": resize,
    "Shape": shape_of,
    "Size": shape_of,
    "Slice": slice_,
    "Split": split,
    "Squeeze": squeeze,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
