"""Random inputs that respect the types, shapes and table sizes of a model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.calib.check import require_numbers
from sparsecc.errors import UsageError
from sparsecc.ir import Model, TensorSpec

__all__ = ["index_bounds", "resolve_shapes", "synthetic_inputs"]

#: What a symbolic dimension stands for, by its name.
_BATCH = re.compile(r"batch|^[bn]$")
_STEPS = re.compile(r"seq|len|time|tok|^[tls]$")
_SIDE = re.compile(r"height|width|^[hw]$")

#: Steps of a sequence, samples of a waveform (a floating-point input of rank 2), side of a picture.
_TOKENS, _SAMPLES, _PIXELS = 16, 512, 224

#: Operators that hand indices on unchanged.
_INDEX_CARRIERS = frozenset(
    {
        "Cast",
        "Identity",
        "Reshape",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Flatten",
        "Slice",
        "Expand",
        "Split",
    }
)


def synthetic_inputs(
    model: Model, seed: int = 0, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, NDArray[Any]]:
    """Return seeded random inputs: they exercise every operator but say nothing about real data.

    Floats are standard normal. Integers that index a constant table stay below its size; other integers are 1
    when the name says mask, else 0 or 1. A symbolic dimension is 1 for a batch, 16 for a sequence (512 for a
    floating-point input of rank 2, a waveform) and 224 for
    a picture side, by its name or place, and the same wherever its name appears.

    Args:
        model: the model.
        seed: same seed, same arrays, whatever ran before.
        shapes: shapes that settle symbolic dimensions, by input name.

    Raises:
        UsageError: ``shapes`` names no input or contradicts the model.
        UnsupportedModelError: an input is no tensor of numbers.
    """
    for spec in model.input_specs():
        require_numbers(spec)
    bounds = index_bounds(model)
    resolved = resolve_shapes(model, shapes)
    arrays = {}
    for spec in model.input_specs():
        digest = hashlib.sha256(spec.name.encode()).digest()
        rng = np.random.default_rng([seed, int.from_bytes(digest[:8], "little")])
        arrays[spec.name] = _random(spec, resolved[spec.name], bounds.get(spec.name), rng)
    return arrays


def resolve_shapes(
    model: Model, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return a concrete shape for each input; see :func:`synthetic_inputs` for how symbols are settled.

    Raises:
        UsageError: ``shapes`` names no input, has another rank, contradicts a fixed dimension, or gives one
            symbol two sizes.
    """
    specs = {spec.name: spec for spec in model.input_specs()}
    symbols: dict[str, int] = {}
    for name, shape in (shapes or {}).items():
        if name not in specs:
            raise UsageError(f"shape given for '{name}', but the inputs are {', '.join(specs)}")
        _bind(specs[name], shape, symbols)
    return {spec.name: _resolved(spec, (shapes or {}).get(spec.name), symbols) for spec in specs.values()}


def _bind(spec: TensorSpec, shape: Sequence[int], symbols: dict[str, int]) -> None:
    """Enter the sizes that ``shape`` gives the symbols of ``spec`` into ``symbols``."""
    if spec.shape is None:
        return
    if len(shape) != len(spec.shape):
        raise UsageError(
            f"shape {list(shape)} of input '{spec.name}' should have {len(spec.shape)} dimensions"
        )
    for want, size in zip(spec.shape, shape, strict=True):
        known = symbols.setdefault(want, size) if isinstance(want, str) else want
        if known is not None and known != size:
            raise UsageError(
                f"shape {list(shape)} of input '{spec.name}' contradicts the model: '{want}' is {known}"
            )


def _resolved(spec: TensorSpec, given: Sequence[int] | None, symbols: dict[str, int]) -> tuple[int, ...]:
    if given is not None:
        return tuple(given)
    if spec.shape is None:
        raise UsageError(
            f"input '{spec.name}' has no declared shape; give it with --input-shapes {spec.name}:1,16"
        )
    shape = []
    for axis, size in enumerate(spec.shape):
        if isinstance(size, int):
            shape.append(size)
        elif size is None:
            shape.append(_default_size("", axis, spec))
        else:
            shape.append(symbols.setdefault(size, _default_size(size, axis, spec)))
    return tuple(shape)


def _default_size(symbol: str, axis: int, spec: TensorSpec) -> int:
    rank = len(spec.shape or ())
    if _STEPS.search(symbol.lower()):
        return _SAMPLES if rank == 2 and "float" in spec.dtype else _TOKENS
    if axis == 0 or _BATCH.search(symbol.lower()):
        return 1
    is_side = (rank == 4 and axis >= 2) or _SIDE.search(symbol.lower())
    return _PIXELS if is_side else _TOKENS


def _random(
    spec: TensorSpec, shape: tuple[int, ...], bound: int | None, rng: np.random.Generator
) -> NDArray[Any]:
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape, dtype=np.float64).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    if bound is not None:
        return rng.integers(0, bound, shape).astype(dtype)
    if "mask" in spec.name.lower():
        return np.ones(shape, dtype)
    return rng.integers(0, 2, shape).astype(dtype)


def index_bounds(model: Model) -> dict[str, int]:
    """Return, for each graph input that indexes constant tables, the size of the smallest of them.

    Indices are followed through casts and reshapes of the main graph to ``Gather``.
    """
    found = {}
    for value in model.onnx.graph.inputs:
        sizes = _table_sizes(value, set())
        if value.name and sizes:
            found[value.name] = min(sizes)
    return found


def _table_sizes(value: onnx_ir.Value, seen: set[int]) -> list[int]:
    """Sizes of the constant tables that ``value`` indexes."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    sizes: list[int] = []
    for node, position in value.uses():
        if node.op_type == "Gather" and position == 1:
            table = node.inputs[0]
            shape = None if table is None or table.const_value is None else table.const_value.shape
            if shape is not None and shape.rank():
                sizes.append(int(shape.numpy()[node.attributes.get_int("axis", 0) or 0]))
        elif node.op_type in _INDEX_CARRIERS and position == 0:
            for output in node.outputs:
                sizes.extend(_table_sizes(output, seen))
    return sizes
