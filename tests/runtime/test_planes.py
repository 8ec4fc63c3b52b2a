"""Bytes in quad planes through the C interface, against plain integer arithmetic, on every instruction set.

Sums are exact; what follows is float32, so a result is checked to be an integer nearest to the formula in double
precision, up to the rounding of a few float32 operations.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from sparsecc.errors import ModelError, UsageError
from sparsecc.runtime import (
    ConvGeometry,
    NativePlaneConv,
    PlaneQuantization,
    add_planes,
    concat_planes,
    dequantize_planes,
    get_library_path,
    int8_isas,
    max_pool_planes,
    mean_planes,
    quantize_planes,
)
from sparsecc.runtime.capi_planes import QuantizationStruct
from sparsecc.sparse import Pattern, SparseTensor, keep_mask

ISAS = int8_isas()
PATTERNS = ("8x4", "16x4", "4x4", "16x1", "1x4", "3x5", "1x1")
EPS = float(np.finfo(np.float32).eps)
CANARY = 0xA5

LIBRARY = ctypes.CDLL(get_library_path())
LIBRARY.sparsecc_plane_kernel_table.restype = ctypes.c_char_p


def to_quads(x: np.ndarray, fill: int = 77) -> np.ndarray:
    """NCHW to quad planes; channels that do not exist hold ``fill``."""
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 4), (0, 0), (0, 0)), constant_values=fill)
    return np.ascontiguousarray(
        x.reshape(x.shape[0], x.shape[1] // 4, 4, *x.shape[2:]).transpose(0, 1, 3, 4, 2).astype(np.uint8)
    )


def from_quads(y: np.ndarray, channels: int) -> np.ndarray:
    return y.transpose(0, 1, 4, 2, 3).reshape(y.shape[0], y.shape[1] * 4, *y.shape[2:4])[:, :channels]


def convolve(x: np.ndarray, weight: np.ndarray, g: ConvGeometry) -> np.ndarray:
    """The oracle: sums of products, one place of the kernel after the other; weight is [N, kh, kw, C/groups]."""
    x = np.pad(x, ((0, 0), (0, 0), *zip(g.pad_begin, g.pad_end, strict=True)))
    out = [(x.shape[2 + i] - (g.kernel[i] - 1) * g.dilation[i] - 1) // g.stride[i] + 1 for i in range(2)]
    y = np.zeros((x.shape[0], weight.shape[0], *out), np.int64)
    group_out, group_in = weight.shape[0] // g.groups, weight.shape[3]
    for n, (ky, kx) in itertools.product(range(weight.shape[0]), np.ndindex(*g.kernel)):
        first = n // group_out * group_in
        top, left = ky * g.dilation[0], kx * g.dilation[1]
        seen = x[:, first : first + group_in, top : top + (out[0] - 1) * g.stride[0] + 1 : g.stride[0],
                 left : left + (out[1] - 1) * g.stride[1] + 1 : g.stride[1]]  # fmt: skip
        y[:, n] += np.einsum("bchw,c->bhw", seen.astype(np.int64), weight[n, ky, kx].astype(np.int64))
    return y


def check_stored(
    y: np.ndarray, z: np.ndarray, size: np.ndarray, to: PlaneQuantization, roundings: int = 8
) -> None:
    """y must be z, in steps of y's scale, rounded; ``size`` bounds what was added up to get there."""
    room = roundings * EPS * size + 1e-9
    zero_point = to.y[1]
    assert (y >= np.clip(np.ceil(z - 0.5 - room) + zero_point, *to.bounds)).all()
    assert (y <= np.clip(np.floor(z + 0.5 + room) + zero_point, *to.bounds)).all()


class Case:
    """A random convolution, its packed weight and the arrays that go in."""

    def __init__(self, seed: int, pattern: str, **fixed: Any) -> None:
        rng = self.rng = np.random.default_rng(seed)

        def draw(name: str, low: int, high: int) -> int:
            return int(fixed[name]) if name in fixed else int(rng.integers(low, high + 1))

        groups = draw("groups", 1, 3)
        channels, outputs = draw("channels", 1, 9) * groups, draw("outputs", 1, 14) * groups
        kernel = fixed.get("kernel") or tuple(int(k) for k in rng.integers(1, 4, 2))
        pairs = {
            name: fixed.get(name) or tuple(int(i) for i in rng.integers(low, high + 1, 2))
            for name, low, high in (
                ("stride", 1, 3),
                ("dilation", 1, 2),
                ("pad_begin", 0, 3),
                ("pad_end", 0, 3),
            )
        }
        self.geometry = ConvGeometry(kernel, groups=groups, **pairs)
        least = [
            max(1, (kernel[i] - 1) * pairs["dilation"][i] + 1 - pairs["pad_begin"][i] - pairs["pad_end"][i])
            for i in range(2)
        ]
        self.size = fixed.get("size") or tuple(least[i] + int(rng.integers(0, 20)) for i in range(2))
        self.batch = draw("batch", 1, 3)
        columns = channels // groups * kernel[0] * kernel[1]
        sparsity = fixed.get("sparsity", float(rng.choice([0.0, 0.5, 0.9])))
        codes = rng.choice([*range(-128, 128), *[-128, -127, 127] * 20], (outputs, columns))
        self.codes = (codes * keep_mask(rng.random(codes.shape), Pattern.parse(pattern), sparsity)).astype(
            np.int8
        )
        if fixed.get("empty_rows"):
            self.codes[rng.random(outputs) < 0.6] = 0
        self.pattern, self.channels, self.outputs = pattern, channels, outputs
        self.x = rng.integers(0, 256, (self.batch, channels, *self.size)).astype(np.uint8)
        self.scales = rng.uniform(0.2, 2, outputs).astype(np.float32)
        self.bias = (rng.standard_normal(outputs) * 3).astype(np.float32)
        low, high = sorted(int(i) for i in rng.choice([0, 20, 128, 200, 255, 255], 2))
        wide = float(np.abs(self.codes.astype(np.int64)).sum(1).max(initial=1)) * 2
        residual = bool(fixed.get("residual", rng.random() < 0.5))
        self.to = PlaneQuantization(
            (float(np.float32(rng.uniform(0.5, 2))), int(rng.integers(0, 256))),
            (float(np.float32(wide * rng.uniform(0.3, 2))), int(rng.integers(0, 256))),
            (0, 255) if rng.random() < 0.5 else (low, high),
            (float(np.float32(wide * rng.uniform(0.3, 2))), int(rng.integers(0, 256))) if residual else None,
        )

    def op(self, isa: str | None = None) -> NativePlaneConv:
        tensor = SparseTensor.encode(self.codes.astype(np.float32), Pattern.parse(self.pattern))
        return NativePlaneConv(
            self.pattern, self.codes.shape, tensor.values.astype(np.int8), tensor.indices, self.scales,
            self.geometry, self.to, bias=self.bias, isa=isa,
        )  # fmt: skip

    def sums(self) -> np.ndarray:
        weight = self.codes.reshape(self.outputs, *self.geometry.kernel, -1)
        return convolve(self.x.astype(np.int64) - self.to.x[1], weight, self.geometry)

    def residual(self, shape: tuple[int, ...]) -> np.ndarray | None:
        return None if self.to.residual is None else self.rng.integers(0, 256, shape).astype(np.uint8)

    def check(self, isa: str, executor: Any = None) -> np.ndarray:
        sums = self.sums()
        residual = self.residual(sums.shape)
        per_output = (self.scales.astype(np.float64) * self.to.x[0])[:, None, None]
        z = sums * per_output + self.bias[:, None, None]
        size = np.abs(sums) * per_output + np.abs(self.bias[:, None, None])
        if residual is not None:
            assert self.to.residual is not None
            z = z + (residual.astype(np.float64) - self.to.residual[1]) * self.to.residual[0]
            size = size + 510 * self.to.residual[0]
        with self.op(isa) as op:
            y = run(
                op, to_quads(self.x), sums.shape, None if residual is None else to_quads(residual), executor
            )
        check_stored(from_quads(y, self.outputs), z / self.to.y[0], size / self.to.y[0], self.to)
        return y


def run(
    op: NativePlaneConv, x: np.ndarray, shape: tuple[int, ...], residual: np.ndarray | None, executor: Any
) -> np.ndarray:
    """The result of ``op``, which must be written whole, and nothing around it; x ends where its memory ends."""
    size = shape[0] * -(-shape[1] // 4) * 4 * shape[2] * shape[3]
    whole = np.full(size + 256, CANARY, np.uint8)
    y = whole[128 : 128 + size].reshape(shape[0], -1, *shape[2:], 4)
    results = []
    for fill in (CANARY, 255 - CANARY):
        whole[:] = fill
        added = None if residual is None else residual.ctypes.data
        op._call("run", op._handle, x.ctypes.data, x.shape[0], *x.shape[2:4], added, y.ctypes.data, executor)
        assert (whole[:128] == fill).all()
        assert (whole[128 + size :] == fill).all()
        results.append(y.copy())
    np.testing.assert_array_equal(*results)
    return results[0]


# --- convolution -------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_random_convolutions(isa: str, pattern: str) -> None:
    for trial in range(20):
        Case(1000 * PATTERNS.index(pattern) + trial, pattern).check(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_every_number_of_pixels_channels_and_outputs(isa: str) -> None:
    """Read as they are, without a copy: from 16 pixels on, where the last unit overlaps the one before."""
    plain = {
        "kernel": (1, 1),
        "stride": (1, 1),
        "pad_begin": (0, 0),
        "pad_end": (0, 0),
        "groups": 1,
        "batch": 2,
    }
    for width in (*range(1, 40), 63, 64, 65, 80, 81):
        Case(width, "8x4", size=(1, width), channels=9, outputs=11, **plain).check(isa)
    for side in range(1, 20):
        Case(side, "8x4", size=(5, 7), channels=side, outputs=5, **plain).check(isa)
        Case(side, "8x4", size=(5, 7), channels=5, outputs=side, **plain).check(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_shapes_of_real_networks(isa: str) -> None:
    same = {
        "kernel": (3, 3),
        "dilation": (1, 1),
        "pad_begin": (1, 1),
        "pad_end": (1, 1),
        "groups": 1,
        "batch": 1,
    }
    for stride, size in itertools.product((1, 2), (7, 14, 28)):
        Case(size, "16x4", channels=8, outputs=24, stride=(stride, stride), size=(size, size), **same).check(
            isa
        )
    Case(1, "16x4", channels=3, outputs=16, kernel=(7, 7), stride=(2, 2), dilation=(1, 1), pad_begin=(3, 3),
         pad_end=(3, 3), groups=1, size=(32, 32)).check(isa)  # fmt: skip
    one_dimension = {"kernel": (1, 5), "pad_begin": (0, 2), "pad_end": (0, 2)}
    Case(2, "8x4", size=(1, 50), stride=(1, 2), dilation=(1, 1), **one_dimension).check(isa)
    # Padding far beyond the kernel, and one that is not needed at the end.
    Case(3, "8x4", kernel=(2, 3), pad_begin=(7, 9), pad_end=(6, 5), stride=(3, 2), size=(4, 3)).check(isa)
    Case(4, "8x4", kernel=(1, 1), pad_begin=(2, 0), pad_end=(0, 4), stride=(1, 1), size=(4, 3)).check(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_groups_that_share_quads_and_blocks(isa: str) -> None:
    for groups, channels, outputs in ((5, 1, 1), (3, 2, 3), (2, 6, 5), (7, 3, 2)):
        Case(groups, "8x4", groups=groups, channels=channels, outputs=outputs).check(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_skewed_weights(isa: str) -> None:
    """Everything zero, empty outputs, one full output among empty ones."""
    for pattern in ("8x4", "1x4"):
        Case(5, pattern, outputs=30, empty_rows=True).check(isa)
        zero, giant = Case(6, pattern, outputs=20), Case(7, pattern, outputs=20, groups=1)
        zero.codes[:] = 0
        zero.check(isa)
        giant.codes[:] = 0
        giant.codes[13] = 100
        giant.check(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_saturates_and_sums_wrap(isa: str) -> None:
    for code, value in itertools.product((-128, 127), (0, 255)):
        case = Case(8, "8x4", channels=70, outputs=9, groups=1, sparsity=0.0)
        case.codes[:], case.x[:] = code, value
        case.check(isa)
    weight, x = np.full((1, 70_000), 127, np.int8), np.full((1, 70_000, 4, 4), 255, np.uint8)
    tensor = SparseTensor.encode(weight.astype(np.float32), Pattern.parse("16x4"))
    wrapped = np.int64(70_000 * 255 * 127 & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    assert wrapped < 0
    to = PlaneQuantization(y=(1e8, 128))
    with NativePlaneConv("16x4", weight.shape, tensor.values.astype(np.int8), tensor.indices,
                         np.ones(1, np.float32), ConvGeometry((1, 1)), to, isa=isa) as op:  # fmt: skip
        assert (from_quads(op(to_quads(x)), 1) == 128 + np.rint(wrapped / 1e8)).all()


def test_forms_for_coarse_and_fine_blocks() -> None:
    """Outputs in eights where their zeros fall together, otherwise in fours; every kernel of the table runs."""
    table = {line.split()[0] for line in LIBRARY.sparsecc_plane_kernel_table().decode().splitlines()}
    seen = set()
    for isa in ISAS:
        for pattern, tall in (("16x4", 8), ("8x4", 8), ("4x4", 4), ("1x4", 4)):
            case = Case(9, pattern, channels=64, outputs=64, groups=1, sparsity=0.8)
            with case.op(isa) as op:
                extended = "avx512vnni" if isa.startswith("avx512amx") else isa
                assert op.kernel == f"planes{tall}-{extended}"
                seen.add(op.kernel)
    assert seen == table


@pytest.mark.parametrize("isa", ISAS)
def test_any_cut_gives_the_same(isa: str, pool_executor: Callable[..., Any]) -> None:
    case = Case(10, "8x4", channels=12, outputs=40, groups=1, batch=2, size=(30, 31), sparsity=0.5,
                residual=False)  # fmt: skip
    expected = case.check(isa)
    for threads in (2, 3, 64):
        np.testing.assert_array_equal(case.check(isa, pool_executor(threads)), expected)


def test_one_operator_in_many_threads_with_changing_sizes() -> None:
    cases = [Case(11, "8x4", size=size, channels=5, outputs=9, groups=1, residual=False) for size in
             ((9, 9), (20, 9), (3, 30))]  # fmt: skip
    with cases[0].op() as op:
        expected = [op(to_quads(case.x)) for case in cases]
        with ThreadPoolExecutor(4) as pool:
            for i, y in enumerate(pool.map(lambda i: op(to_quads(cases[i % 3].x)), range(60))):
                np.testing.assert_array_equal(y, expected[i % 3])


def refused(message: str, *, geometry: dict[str, Any] | None = None, **fields: Any) -> None:
    case = Case(12, "8x4", kernel=(1, 1), groups=1)
    case.geometry = ConvGeometry(**({"kernel": (1, 1)} | (geometry or {})))
    case.to = PlaneQuantization(**fields)
    with pytest.raises(ModelError, match=message):
        case.op()


def test_malformed_operators() -> None:
    for scale in (0.0, -1.0, np.nan, np.inf):
        refused("scale of x", x=(scale, 0))
        refused("scale of y", y=(scale, 0))
        refused("scale of the residual", residual=(scale, 0))
    refused("low is above high", bounds=(9, 8))
    refused("do not fit a float", x=(3e38, 0), y=(1e-38, 0))
    refused("kernel is out of range: 0", geometry={"kernel": (0, 1)})
    refused("weight columns", geometry={"kernel": (1009, 1)})
    refused("groups", geometry={"groups": 0})
    refused("stride", geometry={"stride": (1, -1)})
    case = Case(13, "8x4")
    case.scales[0] = np.nan
    with pytest.raises(ModelError, match="scale of output 0"):
        case.op()


def test_calls_that_do_not_fit() -> None:
    case = Case(14, "8x4", channels=8, outputs=8, groups=1, kernel=(3, 3), pad_begin=(1, 1), pad_end=(0, 0),
                dilation=(1, 1), stride=(1, 1), residual=True)  # fmt: skip
    with case.op() as op:
        with pytest.raises(UsageError, match="expected quad planes"):
            op(np.zeros((1, 2, 9, 9), np.uint8))
        with pytest.raises(UsageError, match="x has 3 quads"):
            op(np.zeros((1, 3, 9, 9, 4), np.uint8))
        with pytest.raises(UsageError, match="kernel covers 3 of an input of 2"):
            op(np.zeros((1, 2, 1, 9, 4), np.uint8))
        with pytest.raises(UsageError, match="residual must be given"):
            op(np.zeros((1, 2, 9, 9, 4), np.uint8))
        with pytest.raises(UsageError, match="residual has shape"):
            op(np.zeros((1, 2, 9, 9, 4), np.uint8), np.zeros((1, 2, 9, 9, 4), np.uint8))
    with pytest.raises(UsageError, match="scales has shape"):
        NativePlaneConv("8x4", (8, 4), np.zeros((0, 8, 4), np.int8), np.zeros(0, np.uint8),
                        np.ones(7, np.float32), ConvGeometry((1, 1)), PlaneQuantization())  # fmt: skip
    wide = Case(15, "8x4", kernel=(1, 1), pad_begin=(1 << 20, 1 << 20), pad_end=(0, 0), stride=(1, 1),
                residual=False)  # fmt: skip
    with wide.op() as op:
        quads = -(-op.channels // 4)
        with pytest.raises(UsageError, match=r"more than 2\^31"):
            op.run(np.zeros((1, quads, 2, 2, 4), np.uint8), np.zeros(4, np.uint8))


# --- everything else -----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_to_bytes_and_back(isa: str) -> None:
    rng = np.random.default_rng(1)
    for shape in ((1, 3, 5, 5), (2, 8, 4, 4), (3, 9, 1, 33), (1, 1, 1, 1), (2, 4, 0, 3)):
        scale, zero_point = np.float32(rng.uniform(0.01, 2)), int(rng.integers(0, 256))
        x = rng.standard_normal(shape).astype(np.float32) * scale * 90
        exact = rng.random(shape) < 0.3
        x[exact] = (np.rint(x[exact] / scale) + np.float32(0.5)) * scale  # ties, where they stay such
        x.flat[:4] = [np.inf, -np.inf, 3e38, -3e38][: x.size]
        with np.errstate(over="ignore"):
            stored = np.clip(np.rint(x / scale) + zero_point, 0, 255).astype(np.uint8)
        y = quantize_planes(x, float(scale), zero_point, isa)
        np.testing.assert_array_equal(from_quads(y, shape[1]), stored)
        back = dequantize_planes(to_quads(stored), shape[1], float(scale), zero_point, isa)
        np.testing.assert_array_equal(back, (stored.astype(np.float32) - zero_point) * scale)


@pytest.mark.parametrize("isa", ISAS)
def test_sum_of_two(isa: str) -> None:
    rng = np.random.default_rng(2)
    for size in (*range(1, 70), 4096, 70_001):
        a, b = rng.integers(0, 256, (2, size)).astype(np.uint8)
        to = PlaneQuantization((0.5, 3), (0.7, int(rng.integers(0, 256))), (0, 255), (0.8, 200))
        if size % 2:
            to = PlaneQuantization(to.x, to.y, (to.y[1], 255), to.residual)
        z = (
            (a.astype(np.float64) - 3) * np.float32(0.5) + (b.astype(np.float64) - 200) * np.float32(0.8)
        ) / np.float32(0.7)
        check_stored(add_planes(a, b, to, isa), z, np.full(size, 800.0), to)


@pytest.mark.parametrize("isa", ISAS)
def test_one_behind_the_other(isa: str) -> None:
    """Copied where bytes mean the same, else stored anew; also more bytes than one task has."""
    rng = np.random.default_rng(4)
    for batch, first, second, size in (
        (1, 1, 1, 1),
        (2, 3, 2, 35),
        (3, 1, 4, 7),
        (1, 2, 3, 9001),
        (2, 0, 1, 3),
    ):
        a = rng.integers(0, 256, (batch, first, 1, size, 4)).astype(np.uint8)
        b = rng.integers(0, 256, (batch, second, 1, size, 4)).astype(np.uint8)
        same = PlaneQuantization((0.3, 7), (0.3, 7), (0, 255), (0.3, 7))
        np.testing.assert_array_equal(concat_planes(a, b, same, isa), np.concatenate([a, b], 1))
        for to in (
            PlaneQuantization((0.5, 3), (0.7, 130), (20, 240), (0.8, 200)),
            PlaneQuantization((0.3, 7), (0.3, 7), (7, 255), (0.2, 0)),
        ):
            assert to.residual is not None
            z = np.concatenate(
                [
                    (array.astype(np.float64) - zero_point) * np.float32(scale)
                    for array, (scale, zero_point) in ((a, to.x), (b, to.residual))
                ],
                1,
            )
            check_stored(concat_planes(a, b, to, isa), z / np.float32(to.y[0]), np.full(z.shape, 800.0), to)


@pytest.mark.parametrize("isa", ISAS)
def test_highest_and_mean(isa: str) -> None:
    rng = np.random.default_rng(3)
    for trial in range(60):
        kernel, stride, dilation = (tuple(int(i) for i in rng.integers(1, high, 2)) for high in (5, 4, 3))
        begin, end = (tuple(int(rng.integers(0, k)) for k in kernel) for _ in range(2))
        size = [int(rng.integers(1, 40)) + (kernel[i] - 1) * dilation[i] for i in range(2)]
        x = rng.integers(0, 256, (2, 3, *size, 4)).astype(np.uint8)
        padded = np.pad(x, ((0, 0), (0, 0), (begin[0], end[0]), (begin[1], end[1]), (0, 0)))
        spans = [(kernel[i] - 1) * dilation[i] + 1 for i in range(2)]
        windows = np.lib.stride_tricks.sliding_window_view(padded, spans, (2, 3))
        windows = windows[:, :, :: stride[0], :: stride[1], :, :: dilation[0], :: dilation[1]]
        y = max_pool_planes(x, ConvGeometry(kernel, stride, dilation, begin, end), isa)
        np.testing.assert_array_equal(y, windows.max((5, 6)), str(trial))
        to = PlaneQuantization((0.3, 9), (0.2, 11), (5, 250))
        z = (x.astype(np.float64).mean((2, 3), keepdims=True) - 9) * np.float32(0.3) / np.float32(0.2)
        check_stored(mean_planes(x, to, isa), z, np.abs(z) + 1, to)


def test_refusals_of_the_rest() -> None:
    x = np.zeros((1, 1, 3, 3, 4), np.uint8)
    with pytest.raises(UsageError, match="pad of a pooling is not smaller than its kernel"):
        max_pool_planes(x, ConvGeometry((2, 2), pad_begin=(2, 0)))
    with pytest.raises(UsageError, match="kernel covers 4"):
        max_pool_planes(x, ConvGeometry((4, 1)))
    with pytest.raises(UsageError, match="the residual is what is added"):
        add_planes(x, x, PlaneQuantization())
    with pytest.raises(UsageError, match="the residual is what comes second"):
        concat_planes(x, x, PlaneQuantization())
    with pytest.raises(UsageError, match="a has shape"):
        concat_planes(x, x[:, :, :2], PlaneQuantization(residual=(1.0, 0)))
    with pytest.raises(UsageError, match="scale of the tensor"):
        quantize_planes(np.zeros((1, 1, 1, 1), np.float32), 0.0, 0)
    with pytest.raises(UsageError, match="scale of the tensor"):
        dequantize_planes(x, 3, float("nan"), 0)
    with pytest.raises(UsageError, match="scale of y"):
        mean_planes(x, PlaneQuantization(y=(0.0, 0)))
    with pytest.raises(UsageError, match="size is not positive"):
        mean_planes(x[:, :, :0], PlaneQuantization())
    short = PlaneQuantization().struct()
    short.struct_size = ctypes.sizeof(QuantizationStruct) - 1
    error = ctypes.create_string_buffer(200)
    arguments = (x.ctypes.data, ctypes.c_int64(1), ctypes.c_int64(9), ctypes.byref(short), x.ctypes.data)
    assert LIBRARY.sparsecc_planes_mean(*arguments, None, None, error, ctypes.c_size_t(200)) == 1
    assert b"caller and library do not match" in error.value
