"""What the sparse operators mean, in NumPy and double precision: the oracle of tests and ``verify``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sparsecc.errors import ModelError
from sparsecc.sparse import LAYOUT_VERSION, Pattern, QuantizedTensor, SparseTensor

__all__ = [
    "activated",
    "check_version",
    "convolve",
    "evaluate",
    "evaluate_int8",
    "quantize_linear",
    "to_bytes",
]

Array = NDArray[np.float64]

_erf = np.vectorize(math.erf, otypes=[np.float64])

_FIXED: Mapping[str, Callable[[Array], Array]] = {
    "": lambda z: z,
    "Relu": lambda z: np.maximum(z, 0),
    "Sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "Tanh": np.tanh,
    "Gelu": lambda z: 0.5 * z * (1 + _erf(z / math.sqrt(2))),
    "GeluTanh": lambda z: 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "Silu": lambda z: z / (1 + np.exp(-z)),
    "HardSwish": lambda z: z * np.clip(z / 6 + 0.5, 0, 1),
}


def evaluate(
    inputs: Mapping[str, NDArray[Any]], attributes: Mapping[str, object], activation: str, *, conv: bool
) -> NDArray[np.float32]:
    """Return the operator's result, float32.

    Args:
        inputs: arrays by input name.
        attributes: values by attribute name.
        activation: name suffix of the fused activation.
        conv: convolution, otherwise matrix multiplication.

    Raises:
        ModelError: the packed weight is malformed.
    """
    weight = _dense_weight(inputs, attributes)
    x, bias = inputs["x"].astype(np.float64), inputs["bias"].astype(np.float64)
    spatial = x.ndim - 2 if conv else 0
    z = (convolve(x, weight, attributes) if conv else x @ weight.T) + bias.reshape(-1, *[1] * spatial)
    z = z + inputs.get("residual", np.float64(0))
    with np.errstate(over="ignore"):
        return _activate(z, activation, inputs, attributes).astype(np.float32)


def evaluate_int8(
    inputs: Mapping[str, NDArray[Any]], attributes: Mapping[str, object], activation: str
) -> NDArray[np.float32]:
    """Return the result, float32, of a matrix product with int8 weights; the integers in it are exact.

    Args:
        inputs: arrays by input name.
        attributes: values by attribute name.
        activation: name suffix of the fused activation.

    Raises:
        ModelError: the packed weight is malformed.
    """
    check_version(attributes)
    outputs, columns = (int(side) for side in inputs["shape"])
    weight = QuantizedTensor(
        Pattern.parse(str(attributes["layout"])),
        (outputs, columns),
        inputs["values"],
        inputs["indices"],
        inputs["scales"],
    )
    x = inputs["x"]
    if "x_scale" not in inputs:
        stored, scale, zero_point = quantize_linear(x)
    else:
        scale, zero_point = np.float32(inputs["x_scale"].item()), int(inputs["x_zero_point"].item())
        stored = x if x.dtype == np.uint8 else to_bytes(x, scale, zero_point)
    sums = (stored.astype(np.int64) - zero_point) @ weight.decode_codes().T.astype(np.int64)
    z = sums.astype(np.int32) * (float(scale) * weight.scales.astype(np.float64)) + inputs["bias"]
    with np.errstate(over="ignore"):
        return _activate(z, activation, inputs, attributes).astype(np.float32)


def quantize_linear(x: NDArray[np.float32]) -> tuple[NDArray[np.uint8], np.float32, int]:
    """Return ``DynamicQuantizeLinear`` of finite x: bytes, scale and zero point, rounded as it says."""
    low, high = np.float32(min(x.min(initial=0), 0)), np.float32(max(x.max(initial=0), 0))
    scale = np.float32(1) if low == high else (high - low) / np.float32(255)
    zero_point = int(np.clip(np.rint(-low / scale), 0, 255))
    return to_bytes(x, scale, zero_point), scale, zero_point


def to_bytes(x: NDArray[np.float32], scale: np.float32, zero_point: int) -> NDArray[np.uint8]:
    """Return ``QuantizeLinear`` of x; NaN becomes 0."""
    with np.errstate(over="ignore"):
        stored = np.clip(np.rint(x / scale) + zero_point, 0, 255)
    return np.where(np.isnan(stored), 0, stored).astype(np.uint8)


def check_version(attributes: Mapping[str, object]) -> None:
    """Refuse the attributes of a node whose weight is packed in another version's way (``ModelError``)."""
    if attributes["layout_version"] != LAYOUT_VERSION:
        raise ModelError(f"layout_version {attributes['layout_version']} is not {LAYOUT_VERSION}")


def _dense_weight(inputs: Mapping[str, NDArray[Any]], attributes: Mapping[str, object]) -> Array:
    check_version(attributes)
    shape = [int(side) for side in inputs["shape"]]
    packed = SparseTensor(
        Pattern.parse(str(attributes["layout"])),
        (shape[0], math.prod(shape[1:])),
        inputs["values"],
        inputs["indices"],
    )
    return packed.decode().astype(np.float64).reshape(shape)


def activated(z: Array, activation: str) -> Array:
    """Return the activation, one without parameters, of ``z``."""
    with np.errstate(over="ignore"):
        return _FIXED[activation](z)


def _activate(
    z: Array, activation: str, inputs: Mapping[str, NDArray[Any]], attributes: Mapping[str, object]
) -> Array:
    if activation == "LeakyRelu":
        return np.where(z < 0, cast(float, attributes["alpha"]) * z, z)
    if activation == "Clip":
        return cast(Array, np.minimum(np.maximum(z, inputs["lo"]), inputs["hi"]))
    return _FIXED[activation](z)


def convolve(x: Array, weight: Array, attributes: Mapping[str, object]) -> Array:
    """Return the convolution over any number of spatial axes, groups included."""
    axes = weight.ndim - 2
    keys = ("strides", "pads", "dilations")
    strides, pads, dilations = (cast("list[int]", attributes[key]) for key in keys)
    groups = cast(int, attributes["group"])
    x = np.pad(x, [(0, 0), (0, 0), *((pads[axis], pads[axes + axis]) for axis in range(axes))])
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, tuple(range(2, 2 + axes)))
    every = [slice(None), slice(None), *(slice(None, None, step) for step in (*strides, *dilations))]
    windows = windows[tuple(every)]
    windows = windows.reshape(x.shape[0], groups, -1, *windows.shape[2:])
    weight = weight.reshape(groups, -1, *weight.shape[1:])
    space, kernel = "hw"[:axes], "pq"[:axes]
    y = np.einsum(f"bgc{space}{kernel},goc{kernel}->bgo{space}", windows, weight, optimize=True)
    return cast(Array, y.reshape(x.shape[0], -1, *y.shape[3:]))
