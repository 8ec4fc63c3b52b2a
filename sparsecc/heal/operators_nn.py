"""ONNX operators on tensors of PyTorch: products, convolutions, pooling and normalisation."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from sparsecc.heal.operators import Call, Operator, Tensor

__all__ = ["OPERATORS_NN"]

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}


def _matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.mT if call.integer("transA", 0) else a
    b = b.mT if call.integer("transB", 0) else b
    product = a @ b
    alpha, beta = call.number("alpha", 1.0), call.number("beta", 1.0)
    product = product if alpha == 1 else product * alpha
    return product if c is None else product + (c if beta == 1 else c * beta)


def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.text("equation", ""), *inputs)


def _window(call: Call, kernel: list[int]) -> tuple[list[int], list[int]]:
    """Strides and dilations."""
    ones = [1] * len(kernel)
    return call.integers("strides") or ones, call.integers("dilations") or ones


def _pads(call: Call, sizes: list[int], kernel: list[int]) -> tuple[list[int], list[int]]:
    """Zeros before and behind each spatial axis."""
    rank, auto = len(kernel), call.text("auto_pad", "NOTSET")
    strides, dilations = _window(call, kernel)
    if auto == "VALID":
        return [0] * rank, [0] * rank
    if auto == "NOTSET":
        pads = call.integers("pads") or [0] * (2 * rank)
        return pads[:rank], pads[rank:]
    before, behind = [], []
    for size, side, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (side - 1) * dilation + 1 - size, 0)
        less, more = total // 2, total - total // 2
        before.append(more if auto == "SAME_LOWER" else less)
        behind.append(less if auto == "SAME_LOWER" else more)
    return before, behind


def _padded(x: Tensor, before: list[int], behind: list[int], value: float = 0.0) -> Tensor:
    widths = [width for pair in zip(reversed(before), reversed(behind), strict=True) for width in pair]
    return functional.pad(x, widths, value=value) if any(widths) else x


def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel = list(weight.shape[2:])
    strides, dilations = _window(call, kernel)
    before, behind = _pads(call, list(x.shape[2:]), kernel)
    same = before == behind
    return _CONV[len(kernel)](
        x if same else _padded(x, before, behind),
        weight,
        bias,
        stride=strides,
        padding=before if same else 0,
        dilation=dilations,
        groups=call.integer("group", 1),
    )


def _ceil_extra(call: Call, x: Tensor, kernel: list[int], before: list[int], behind: list[int]) -> list[int]:
    """Further places behind each axis so that ``ceil_mode`` has its last window, which starts inside the input."""
    strides, dilations = _window(call, kernel)
    extra = []
    for axis, (side, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        size = x.shape[2 + axis] + before[axis] + behind[axis] - (side - 1) * dilation - 1
        count = -(-size // stride) + 1
        if (count - 1) * stride >= x.shape[2 + axis] + before[axis]:
            count -= 1
        extra.append(max((count - 1) * stride - size, 0) if call.integer("ceil_mode", 0) else 0)
    return extra


def _max_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.integers("kernel_shape") or []
    strides, dilations = _window(call, kernel)
    before, behind = _pads(call, list(x.shape[2:]), kernel)
    extra = _ceil_extra(call, x, kernel, before, behind)
    x = _padded(x, before, [a + b for a, b in zip(behind, extra, strict=True)], -math.inf)
    return _MAX_POOL[len(kernel)](x, kernel, stride=strides, dilation=dilations)


def _average_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.integers("kernel_shape") or []
    strides, dilations = _window(call, kernel)
    before, behind = _pads(call, list(x.shape[2:]), kernel)
    extra = _ceil_extra(call, x, kernel, before, behind)
    counted = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype, device=x.device)
    if call.integer("count_include_pad", 0):
        counted = _padded(counted, before, behind, 1.0)
        counted = _padded(counted, [0] * len(kernel), extra)
    else:
        counted = _padded(counted, before, [a + b for a, b in zip(behind, extra, strict=True)])
    x = _padded(x, before, [a + b for a, b in zip(behind, extra, strict=True)])
    window = torch.ones([1, 1, *kernel], dtype=x.dtype, device=x.device)
    convolve = _CONV[len(kernel)]
    ones = window.expand(x.shape[1], *window.shape[1:])
    total = convolve(x, ones, stride=strides, dilation=dilations, groups=x.shape[1])
    return total / convolve(counted, window, stride=strides, dilation=dilations)


def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return functional.batch_norm(x, mean, variance, scale, bias, False, 0.0, call.number("epsilon", 1e-5))


def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=call.number("epsilon", 1e-5))


def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[call.integer("axis", -1) % x.ndim :]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return functional.layer_norm(x, shape, scale, bias, call.number("epsilon", 1e-5))
    y = functional.layer_norm(x, shape, None, None, call.number("epsilon", 1e-5)) * scale
    return y if bias is None else y + bias


def _rms_norm(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    axes = tuple(range(call.integer("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + call.number("epsilon", 1e-5)) * scale


OPERATORS_NN: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "RMSNormalization": _rms_norm,
}
