"""How operators that compute hand positions of axes on: products, convolutions, elementwise, norms, reductions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir

from sparsecc.ir.axes.builder import Builder, Field, Part, Role, constant, dims

__all__ = ["RULES", "SEVERAL_INPUTS", "Rule", "pass_through", "place"]

Rule = Callable[[Builder, onnx_ir.Node], None]

_UNARY = set(
    """Abs Cast Ceil Celu Cos Dropout Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log Mish Neg
    Not Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Tanh ThresholdedRelu""".split()  # noqa: SIM905
)
_POOLING = {"GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "LpPool"}
_JOINING = set("Add Sub Mul Div Pow Min Max Sum Mean Where PRelu And Or Equal Greater Less Mod".split())  # noqa: SIM905
_REDUCING = {
    *(f"Reduce{name}" for name in ("Mean", "Sum", "Max", "Min", "L1", "L2", "SumSquare", "Prod")),
    *("ReduceLogSum", "ReduceLogSumExp", "ArgMax", "ArgMin"),
}


def place(node: onnx_ir.Node) -> str:
    """How messages call a node."""
    return f"{node.op_type} {node.name or node.outputs[0].name!r}"


def pass_through(b: Builder, node: onnx_ir.Node) -> None:
    """Output axes are those of the first input."""
    for field in b.of(node.inputs[0]):
        b.put(node, node.outputs[0], field.axes, field.atoms, field)


def pool(b: Builder, node: onnx_ir.Node) -> None:
    """Poolings go over the axes behind the channels."""
    for field in b.of(node.inputs[0]):
        if any(axis > 1 for axis in field.axes):
            b.freeze(field.atoms, f"{place(node)} pools over it")
        else:
            b.put(node, node.outputs[0], field.axes, field.atoms, field)


def _clip(b: Builder, node: onnx_ir.Node) -> None:
    bounds = [dims(value) for value in node.inputs[1:] if value is not None]
    if all(shape is not None and int(np.prod([size or 2 for size in shape])) == 1 for shape in bounds):
        pass_through(b, node)
    else:
        b.freeze_inputs(node, f"{place(node)} has bounds of unknown size")


def join(b: Builder, node: onnx_ir.Node) -> None:
    """Operators that compute each output from the inputs at the same place, with broadcasting."""
    operands = [value for value in node.inputs if value is not None]
    shapes = [dims(value) for value in operands]
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        b.freeze_inputs(node, f"{place(node)} has inputs of unknown rank")
        return
    rank = max(len(shape) for shape in known)
    placed = [
        (number, tuple(axis + rank - len(known[number]) for axis in field.axes), field)
        for number, value in enumerate(operands)
        for field in b.of(value)
    ]
    leading: list[tuple[tuple[int, ...], Field, set[int], list[Field]]] = []
    for number, axes, field in sorted(placed, key=lambda item: -len(item[1])):
        overlapping = [item for item in leading if set(item[0]) & set(axes)]
        if not overlapping:
            leading.append((axes, field, {number}, [field]))
        elif len(overlapping) > 1 or not _unite(b, node, overlapping[0], axes, field):
            for atoms in (field.atoms, *(item[1].atoms for item in overlapping)):
                b.freeze(atoms, f"{place(node)} mixes axes that are cut differently")
        else:
            overlapping[0][2].add(number)
            overlapping[0][3].append(field)
    for axes, field, members, origins in leading:
        parts: list[Part] = []
        for number, value in enumerate(operands):
            if number not in members:
                sizes = (1,) * (rank - len(known[number])) + tuple(known[number])
                parts += _against(b, node, value, [sizes[axis] for axis in axes], axes[0] - rank, field)
        b.put(node, node.outputs[0], axes, field.atoms, *origins, *parts)


def _unite(
    b: Builder,
    node: onnx_ir.Node,
    first: tuple[tuple[int, ...], Field, set[int], list[Field]],
    axes: tuple[int, ...],
    field: Field,
) -> bool:
    """Tie a field to one that overlaps it; return whether that could be expressed."""
    atoms = first[1].atoms
    if set(first[0]) == set(axes):
        turned = field.atoms.transpose([axes.index(axis) for axis in first[0]])
        if turned.shape != atoms.shape:
            return False
        b.same(atoms, turned)
        return True
    if axes == first[0][:1] and len(field.atoms) == len(atoms):
        b.tie_rows(atoms, field.atoms)
        b.fix(field.atoms, "whole rows of a grid keep their order")
        b.fix(atoms, f"{place(node)} may treat each position of a row differently")
        return True
    return False


def _against(
    b: Builder,
    node: onnx_ir.Node,
    value: onnx_ir.Value,
    sizes: Sequence[int | None],
    axis: int,
    field: Field,
) -> list[Part]:
    """An operand without fields beside ``field``: broadcast, a parameter that follows, or a reason to freeze."""
    if all(size == 1 for size in sizes):
        return []
    index = next(i for i, item in enumerate(node.inputs) if item is value)
    inner_varies = any(size != 1 for size in sizes[1:])
    if inner_varies:
        b.fix(field.atoms, f"{place(node)} treats each position of it differently")
    if sizes[0] == 1:
        return []
    if constant(value) is None:
        b.freeze(field.atoms, f"{place(node)} combines it with {value.name!r}, which cannot follow")
        return []
    atoms = field.atoms if field.atoms.ndim == 1 else b.rows_of(field)
    part = b.part(node, index, axis, atoms, "vector")
    return [] if part is None else [part]


def matmul(b: Builder, node: onnx_ir.Node) -> None:
    """MatMul with a constant matrix on the right, or of two tensors (attention)."""
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None or dims(left) is None or dims(right) is None:
        b.freeze_inputs(node, f"{place(node)} has inputs of unknown rank")
        return
    weight = constant(right)
    if weight is not None and len(weight) == 2:
        _linear(b, node, len(dims(left) or ()) - 1, 0, 1)
    elif constant(left) is not None or min(len(dims(left) or ()), len(dims(right) or ())) < 2:
        b.freeze_inputs(node, f"{place(node)} multiplies in a form that is not followed")
    else:
        _product(b, node, left, right)


def gemm(b: Builder, node: onnx_ir.Node) -> None:
    """Gemm with a constant B, which may be transposed."""
    if node.attributes.get_int("transA", 0) or constant(node.inputs[1]) is None:
        b.freeze_inputs(node, f"{place(node)} multiplies in a form that is not followed")
        return
    flipped = bool(node.attributes.get_int("transB", 0))
    _linear(b, node, 1, 1 if flipped else 0, 0 if flipped else 1)


def _linear(b: Builder, node: onnx_ir.Node, axis: int, columns: int, rows: int) -> None:
    for field in b.of(node.inputs[0]):
        if field.axes == (axis,):
            b.part(node, 1, columns, field.atoms, "columns", field)
        elif axis not in field.axes:
            b.put(node, node.outputs[0], field.axes, field.atoms, field)
        elif field.axes[0] == axis:
            b.freeze(field.atoms, f"{place(node)} multiplies one of its axes")
        else:
            b.fix(field.atoms, f"{place(node)} multiplies one of its axes")
            b.put(node, node.outputs[0], field.axes[:1], b.rows_of(field), field)
    weight = constant(node.inputs[1])
    assert weight is not None, "the caller looked"
    atoms = b.fresh(weight[rows])
    parts = [b.part(node, 1, rows, atoms, "rows")]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        shape = dims(node.inputs[2])
        if shape is None or (shape and shape[-1] != 1):
            parts.append(b.part(node, 2, -1, atoms, "vector"))
    b.put(node, node.outputs[0], (axis,), atoms, *(part for part in parts if part is not None))


def _product(b: Builder, node: onnx_ir.Node, left: onnx_ir.Value, right: onnx_ir.Value) -> None:
    """Both operands are tensors: batch axes broadcast, one axis is summed over (-1 below)."""
    shapes = dims(left) or (), dims(right) or ()
    rank = max(map(len, shapes))
    letters = [
        [*range(rank - len(shapes[0]), rank - 1), -1],
        [*range(rank - len(shapes[1]), rank - 2), -1, rank - 1],
    ]
    sizes = [dict(zip(names, shape, strict=True)) for names, shape in zip(letters, shapes, strict=True)]
    sides = [
        [(tuple(names[axis] for axis in field.axes), field) for field in b.of(value)]
        for names, value in zip(letters, (left, right), strict=True)
    ]
    summed = [[item for item in side if -1 in item[0]] for side in sides]
    outputs = [(axes, field.atoms, [field]) for side in sides for axes, field in side if -1 not in axes]
    if summed[0] and summed[1]:
        outputs += _contract(b, node, summed[0][0], summed[1][0])
    else:
        for _, field in (*summed[0], *summed[1]):
            b.freeze(field.atoms, f"{place(node)} sums over it against a tensor that cannot follow")
    for number, side in enumerate(sides):
        for axes, field in side:
            other = sizes[1 - number]
            mates = {axis for names, _ in sides[1 - number] for axis in names}
            for axis in axes:
                if axis >= 0 and axis not in mates and other.get(axis, 1) != 1:
                    b.freeze(field.atoms, f"{place(node)} repeats it along a tensor that cannot follow")
    for axes, atoms, origins in _merged(b, outputs):
        b.put(node, node.outputs[0], axes, atoms, *origins)


def _contract(
    b: Builder,
    node: onnx_ir.Node,
    left: tuple[tuple[int, ...], Field],
    right: tuple[tuple[int, ...], Field],
) -> list[tuple[tuple[int, ...], np.ndarray, list[Field]]]:
    """Unite the summed axes of both sides; what is left of them are rows (heads) of the result."""
    if len(left[0]) < len(right[0]):
        left, right = right, left
    (axes, field), (fewer, other) = left, right
    if not set(fewer) <= set(axes) or (len(axes) > 1 and axes[-1] != -1):
        for item in (field, other):
            b.freeze(item.atoms, f"{place(node)} sums over it in a form that is not followed")
        return []
    turned = other.atoms.transpose([fewer.index(axis) for axis in axes if axis in fewer])
    shape = [
        turned.shape[[a for a in axes if a in fewer].index(axis)] if axis in fewer else 1 for axis in axes
    ]
    b.same(field.atoms, turned.reshape(shape))
    if len(axes) == 1:
        return []
    rows = b.fresh(*field.atoms.shape[:-1])
    b.tie_rows(field.atoms, rows)
    b.tie_rows(rows)
    b.fix(rows, "whole rows of a grid keep their order")
    return [(axes[:-1], rows, [field, other])]


def _merged(
    b: Builder, found: list[tuple[tuple[int, ...], np.ndarray, list[Field]]]
) -> list[tuple[tuple[int, ...], np.ndarray, list[Field]]]:
    """One field per axis: rows of heads on one side go with the grid of heads and dimensions on the other."""
    merged: list[tuple[tuple[int, ...], np.ndarray, list[Field]]] = []
    for axes, atoms, origins in sorted(found, key=lambda item: -int(np.max(item[0]))):
        clash = [number for number, item in enumerate(merged) if set(item[0]) & set(axes)]
        if not clash:
            merged.append((axes, atoms, origins))
            continue
        names, kept, known = merged[clash[0]]
        if len(clash) > 1 or names[0] != axes[0] or len(kept) != len(atoms):
            b.freeze(atoms, "a product of tensors repeats it in a form that is not followed")
            for number in clash:
                b.freeze(merged[number][1], "a product of tensors repeats it in a form that is not followed")
            continue
        b.tie_rows(kept, atoms)
        extra = tuple(axis for axis in axes if axis not in names)
        if extra:
            # Keys and values of grouped queries: the copies for each query of a group are the same positions.
            sizes = [atoms.shape[axes.index(axis)] for axis in extra]
            wide = kept.reshape(len(kept), *[1] * len(extra), *kept.shape[1:])
            kept = np.broadcast_to(wide, (len(kept), *sizes, *kept.shape[1:]))
            names = (names[0], *extra, *names[1:])
        merged[clash[0]] = (names, kept, [*known, *origins])
    return merged


def conv(b: Builder, node: onnx_ir.Node) -> None:
    """Conv, grouped or depthwise."""
    weight = constant(node.inputs[1])
    if weight is None or len(weight) < 3:
        b.freeze_inputs(node, f"the weight of {place(node)} is no plain constant (quantised, or computed)")
        return
    groups = node.attributes.get_int("group", 1) or 1
    fields = b.of(node.inputs[0])
    for field in fields:
        if field.axes != (1,):
            b.freeze(field.atoms, f"{place(node)} convolves over it")
    source = next((field for field in fields if field.axes == (1,)), None)
    atoms = b.fresh(weight[0])
    role: Role = "rows"
    if groups > 1 and weight[1] == 1:
        role = "vector"
        if source is None:
            b.freeze(atoms, f"depthwise {place(node)} reads an input that cannot follow")
        else:
            atoms = np.repeat(source.atoms, weight[0] // groups)
            b.edit(node, "group", [source])
    elif groups > 1:
        b.count_alike(atoms, groups)
        if source is not None:
            b.count_alike(source.atoms, groups)
            b.part(node, 1, 1, source.atoms.reshape(groups, -1), "columns", source)
    elif source is not None:
        b.part(node, 1, 1, source.atoms, "columns", source)
    grid = atoms.reshape(groups, -1) if role == "rows" and groups > 1 else atoms
    parts = [b.part(node, 1, 0, grid, role)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        parts.append(b.part(node, 2, 0, atoms, "vector"))
    origins = [part for part in parts if part is not None]
    b.put(node, node.outputs[0], (1,), atoms, *origins, *([source] if source and role == "vector" else []))


def softmax(b: Builder, node: onnx_ir.Node) -> None:
    """Softmax over one axis: what is removed there changes all others."""
    rank = len(dims(node.inputs[0]) or ())
    versions = {} if node.graph is None else node.graph.opset_imports
    axis = node.attributes.get_int("axis", 1 if versions.get("", 13) < 13 else -1)
    assert axis is not None, "the default is a number"
    for field in b.of(node.inputs[0]):
        # Before opset 13 all axes from `axis` on are taken together.
        if any(item >= axis % max(rank, 1) for item in field.axes):
            b.freeze(field.atoms, f"{place(node)} normalises over it")
        else:
            b.put(node, node.outputs[0], field.axes, field.atoms, field)


def layer_norm(b: Builder, node: onnx_ir.Node) -> None:
    """Normalisation over the last axes: any order is the same function, fewer positions are not."""
    rank = len(dims(node.inputs[0]) or ())
    if not rank:
        b.freeze_inputs(node, f"{place(node)} has an input of unknown rank")
        return
    axis = (node.attributes.get_int("axis", -1) or 0) % rank
    for field in b.of(node.inputs[0]):
        parts: list[Part | None] = []
        if field.axes == (rank - 1,) == (axis,):
            b.keep(field.atoms, f"{place(node)} normalises over it: removal would change the others")
            given = [index for index in range(1, len(node.inputs)) if node.inputs[index] is not None]
            parts = [b.part(node, index, -1, field.atoms, "vector") for index in given]
        elif field.axes[0] >= axis:
            b.freeze(field.atoms, f"{place(node)} normalises over several axes")
        elif any(item >= axis for item in field.axes):
            b.fix(field.atoms, f"{place(node)} treats each position of it differently")
        b.put(node, node.outputs[0], field.axes, field.atoms, field, *filter(None, parts))


def channel_norm(b: Builder, node: onnx_ir.Node) -> None:
    """BatchNormalization and InstanceNormalization: one set of parameters per channel of axis 1."""
    for field in b.of(node.inputs[0]):
        parts: list[Part | None] = []
        if field.axes == (1,):
            parts = [b.part(node, index, 0, field.atoms, "vector") for index in range(1, len(node.inputs))]
        else:
            b.freeze(field.atoms, f"{place(node)} normalises over it or has parameters for it")
        b.put(node, node.outputs[0], field.axes, field.atoms, field, *filter(None, parts))


def reduce(b: Builder, node: onnx_ir.Node) -> None:
    """Reductions: any order of what is reduced gives the same, fewer entries do not."""
    shape = dims(node.inputs[0])
    axes = _reduced_axes(node, shape)
    if shape is None or axes is None:
        b.freeze_inputs(node, f"{place(node)} reduces over axes that are not known")
        return
    keepdims = bool(node.attributes.get_int("keepdims", 1))
    for field in b.of(node.inputs[0]):
        left = [axis for axis in field.axes if axis not in axes]
        if field.axes[0] not in left:
            reason = f"{place(node)} reduces over it: removal would change the result"
            (b.freeze if node.op_type.startswith("Arg") else b.keep)(field.atoms, reason)
            if left:
                b.freeze(field.atoms, reason)
            continue
        atoms = field.atoms if len(left) == len(field.axes) else b.rows_of(field)
        names = left if len(left) == len(field.axes) else left[:1]
        shift = [0 if keepdims else sum(axis < name for axis in axes) for name in names]
        where = tuple(name - lost for name, lost in zip(names, shift, strict=True))
        b.put(node, node.outputs[0], where, atoms, field)


def _reduced_axes(node: onnx_ir.Node, shape: Sequence[int | None] | None) -> set[int] | None:
    if shape is None:
        return None
    if node.op_type.startswith("Arg"):
        return {(node.attributes.get_int("axis", 0) or 0) % len(shape)}
    attribute = node.attributes.get_ints("axes", None)
    listed = node.inputs[1] if len(node.inputs) > 1 else None
    if attribute is not None:
        return {axis % len(shape) for axis in attribute}
    if listed is None:
        return set() if node.attributes.get_int("noop_with_empty_axes", 0) else set(range(len(shape)))
    if constant(listed) is None or listed.const_value is None:
        return None
    return {int(axis) % len(shape) for axis in listed.const_value.numpy().reshape(-1)}


#: Operators whose rules look at every input; of the others only the first holds data.
SEVERAL_INPUTS = frozenset({*_JOINING, "Concat", "Gather", "MatMul"})

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, pass_through),
    **dict.fromkeys(_POOLING, pool),
    **dict.fromkeys(_JOINING, join),
    **dict.fromkeys(_REDUCING, reduce),
    "BatchNormalization": channel_norm,
    "Clip": _clip,
    "Conv": conv,
    "Gemm": gemm,
    "InstanceNormalization": channel_norm,
    "LayerNormalization": layer_norm,
    "LogSoftmax": softmax,
    "MatMul": matmul,
    "RMSNormalization": layer_norm,
    "Softmax": softmax,
}
