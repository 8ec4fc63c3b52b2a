"""ONNX operators on tensors of PyTorch: shapes, slices and indices."""

from __future__ import annotations

import math

import torch

from sparsecc.heal.operators import Call, Operator, Tensor, as_ints, axes_of, torch_dtype

__all__ = ["OPERATORS_SHAPE"]


def _shape(call: Call, x: Tensor) -> Tensor:
    end = call.node.attributes.get_int("end", None)
    return torch.tensor(list(x.shape)[call.integer("start", 0) : end], dtype=torch.int64, device=x.device)


def _reshape(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    wanted = as_ints(shape)
    if not call.integer("allowzero", 0):
        wanted = [x.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


def _transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.integers("perm") or list(reversed(range(x.ndim))))


def _unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = axes_of(call, axes) or []
    rank = x.ndim + len(wanted)
    for axis in sorted(axis % rank for axis in wanted):
        x = x.unsqueeze(axis)
    return x


def _squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    wanted = axes_of(call, axes)
    if wanted is None:
        return x.squeeze()
    kept = {axis % x.ndim for axis in wanted}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in kept])


def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.integer("axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _concat(call: Call, *inputs: Tensor) -> Tensor:
    return torch.cat(inputs, dim=call.integer("axis", 0))


def _split(call: Call, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, count = call.integer("axis", 0), len(call.node.outputs)
    given = as_ints(sizes) if sizes is not None else call.integers("split")
    each = -(-x.shape[axis] // count)
    return tuple(torch.split(x, given if given is not None else each, dim=axis))


def _slice(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = as_ints(starts) if starts is not None else call.integers("starts") or []
    last = as_ints(ends) if ends is not None else call.integers("ends") or []
    over = axes_of(call, axes) or list(range(len(first)))
    by = as_ints(steps) if steps is not None else [1] * len(first)
    for start, end, axis, step in zip(first, last, over, by, strict=True):
        size = x.shape[axis]
        begin, stop, stride = slice(start, _open_end(end, size, step), step).indices(size)
        picked = range(begin, stop, stride)
        if stride == 1:
            x = x.narrow(axis, begin, len(picked))
        else:
            x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64, device=x.device))
    return x


def _open_end(end: int, size: int, step: int) -> int | None:
    """ONNX walks past the first element with any end below -size, Python only with None."""
    return None if step < 0 and end < -size else end


def _gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.integer("axis", 0) % x.ndim
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices).to(torch.int64)
    picked = x.index_select(axis, wrapped.reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.integer("axis", 0) % x.ndim
    wrapped = torch.where(indices < 0, indices + x.shape[axis], indices).to(torch.int64)
    return torch.gather(x, axis, wrapped)


def _expand(call: Call, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(as_ints(shape))))


def _tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(as_ints(repeats))


def _range(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    attr = call.node.attributes.get("value")
    if attr is None:
        return torch.zeros(as_ints(shape), device=shape.device)
    value = attr.as_tensor()
    dtype = torch_dtype(value.dtype)
    return torch.full(as_ints(shape), value.numpy().item(), dtype=dtype, device=shape.device)


def _pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    given = as_ints(pads) if pads is not None else call.integers("pads") or []
    over = as_ints(axes) if axes is not None else list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for number, axis in enumerate(over):
        before[axis], after[axis] = given[number], given[number + len(over)]
    mode = call.text("mode", "constant")
    if mode == "constant":
        fill = call.number("value", 0.0) if value is None else value.item()
        widths = [width for axis in reversed(range(x.ndim)) for width in (before[axis], after[axis])]
        return torch.nn.functional.pad(x, widths, value=fill)
    for axis in range(x.ndim):
        if before[axis] or after[axis]:
            x = x.index_select(axis, _border(mode, x.shape[axis], before[axis], after[axis]).to(x.device))
    return x


def _border(mode: str, size: int, before: int, after: int) -> Tensor:
    """Index of the element that stands at each place of an axis padded by its own elements."""
    places = torch.arange(-before, size + after)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places % size
    return (size - 1) - ((size - 1) - places.abs()).abs()


def _trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = 0 if k is None else int(k.item())
    return torch.triu(x, diagonal) if call.integer("upper", 1) else torch.tril(x, diagonal)


def _cumsum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    along = int(axis.item())
    flipped = x.flip(along) if call.integer("reverse", 0) else x
    total = torch.cumsum(flipped, along)
    if call.integer("exclusive", 0):
        total = total - flipped
    return total.flip(along) if call.integer("reverse", 0) else total


OPERATORS_SHAPE: dict[str, Operator] = {
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumsum,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": lambda call, x: torch.tensor(x.numel(), dtype=torch.int64, device=x.device),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
