"""The operator library through its C interface, against plain NumPy.

Tolerances follow from the arithmetic: k products of at most max|x| max|w| are summed with random
rounding, which stays well below eps (k + 1) max|x| max|w|; the activations add a few ulp.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from sparsecc.runtime import get_library_path
from sparsecc.runtime.capi import VALUE_TYPES
from sparsecc.runtime.capi import WeightDesc as Desc
from sparsecc.runtime.capi import _Geometry as Geometry
from sparsecc.sparse import FLOATS, Pattern, SparseTensor, keep_mask, rounded

EPS = float(np.finfo(np.float32).eps)
CANARY = np.float32(-12345.5)
ERROR_SIZE = 300
ACTIVATIONS = ("none", "relu", "leaky", "clip", "sigmoid", "tanh", "gelu", "gelu_tanh", "silu", "hard_swish")
ALPHA, BETA = 0.25, 0.75  # slope of leaky relu; bounds of clip
LAYOUTS = (
    "unstructured",
    "2:4",
    "1:4",
    "3:5",
    "4:16",
    "16x1",
    "32x1",
    "48x1",
    "20x1",
    "64x1",
    "16x4",
    "4x1",
    "1x4",
    "8x2",
)


NARROW = ("fp16", "bf16")  # what values can be stored in, beside float32


def load_library() -> ctypes.CDLL:
    """The installed library, or the one SPARSECC_OPS_LIBRARY names (for instance a sanitizer build)."""
    library = ctypes.CDLL(str(get_library_path()))
    pointer, number, error = ctypes.c_void_p, ctypes.c_int64, (ctypes.c_char_p, ctypes.c_size_t)
    library.sparsecc_matmul_create.argtypes = (pointer, pointer, *error)
    library.sparsecc_matmul_run.argtypes = (pointer, pointer, number, pointer, pointer, *error)
    library.sparsecc_matmul_destroy.argtypes = (pointer,)
    library.sparsecc_matmul_kernel.argtypes = (pointer, number)
    library.sparsecc_conv_create.argtypes = (pointer, pointer, pointer, *error)
    library.sparsecc_conv_output_size.argtypes = (pointer, pointer, pointer, *error)
    library.sparsecc_conv_run.argtypes = (pointer, pointer, *[number] * 4, pointer, pointer, *error)
    library.sparsecc_conv_add_run.argtypes = (
        pointer, pointer, pointer, *[number] * 4, pointer, pointer, *error,
    )  # fmt: skip
    library.sparsecc_conv_destroy.argtypes = (pointer,)
    library.sparsecc_conv_kernel.argtypes = (pointer,)
    for name in ("matmul_kernel", "conv_kernel", "isas", "version", "kernel_table"):
        getattr(library, f"sparsecc_{name}").restype = ctypes.c_char_p
    return library


LIBRARY = load_library()
ISAS = tuple(LIBRARY.sparsecc_isas().decode().split())
KERNELS = tuple(line.split()[0] for line in LIBRARY.sparsecc_kernel_table().decode().splitlines())


class LibraryError(Exception):
    """The library refused; the text is its message."""


def checked(code: int, error: Any) -> None:
    if code != 0:
        text = error.value.decode()
        assert text
        assert "\n" not in text
        raise LibraryError(text)
    assert error.value == b""


@dataclass
class Packed:
    """Arguments of a descriptor; keeps the arrays alive."""

    layout: bytes
    shape: tuple[int, int]
    values: np.ndarray
    indices: np.ndarray
    bias: np.ndarray | None = None
    activation: int = 0
    alpha: float = ALPHA
    beta: float = BETA
    isa: str | None = None
    version: int = 1
    struct_size: int = ctypes.sizeof(Desc)
    value_count: int | None = None
    index_bytes: int | None = None
    value_type: int | None = None

    def desc(self) -> Desc:
        return Desc(
            self.struct_size,
            self.version,
            self.layout,
            *self.shape,
            self.values.ctypes.data,
            self.values.size if self.value_count is None else self.value_count,
            self.indices.ctypes.data,
            self.indices.size if self.index_bytes is None else self.index_bytes,
            None if self.bias is None else self.bias.ctypes.data,
            self.activation,
            self.alpha,
            self.beta,
            None if self.isa is None else self.isa.encode(),
            VALUE_TYPES[self.values.dtype.name] if self.value_type is None else self.value_type,
        )


def pack(weight: np.ndarray, layout: str, floats: str = "fp32", **options: Any) -> Packed:
    tensor = SparseTensor.encode(weight, Pattern.parse(layout)).stored_as(floats)
    return Packed(layout.encode(), weight.shape, tensor.values, tensor.indices, **options)


@dataclass
class Op:
    """An operator of the library."""

    packed: Packed
    geometry: Geometry | None = None
    handle: ctypes.c_void_p = field(default_factory=ctypes.c_void_p)

    def __post_init__(self) -> None:
        error = ctypes.create_string_buffer(ERROR_SIZE)
        desc = ctypes.byref(self.packed.desc())
        if self.geometry is None:
            code = LIBRARY.sparsecc_matmul_create(desc, ctypes.byref(self.handle), error, ERROR_SIZE)
        else:
            geometry = ctypes.byref(self.geometry)
            code = LIBRARY.sparsecc_conv_create(desc, geometry, ctypes.byref(self.handle), error, ERROR_SIZE)
        assert (code == 0) == bool(self.handle)
        checked(code, error)

    def __enter__(self) -> Op:
        return self

    def __exit__(self, *_: object) -> None:
        destroy = LIBRARY.sparsecc_matmul_destroy if self.geometry is None else LIBRARY.sparsecc_conv_destroy
        destroy(self.handle)

    def kernel(self, rows: int = 1) -> str:
        if self.geometry is None:
            return LIBRARY.sparsecc_matmul_kernel(self.handle, rows).decode()
        return LIBRARY.sparsecc_conv_kernel(self.handle).decode()

    def matmul(self, x: np.ndarray, executor: Any = None) -> np.ndarray:
        with guarded((x.shape[0], self.packed.shape[0])) as (y, address):
            error = ctypes.create_string_buffer(ERROR_SIZE)
            checked(
                LIBRARY.sparsecc_matmul_run(
                    self.handle, x.ctypes.data, x.shape[0], address, executor, error, ERROR_SIZE
                ),
                error,
            )
        return y

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        error = ctypes.create_string_buffer(ERROR_SIZE)
        size = (ctypes.c_int64 * 2)()
        given = (ctypes.c_int64 * 2)(height, width)
        checked(LIBRARY.sparsecc_conv_output_size(self.handle, given, size, error, ERROR_SIZE), error)
        return size[0], size[1]

    def conv(self, x: np.ndarray, executor: Any = None, added: np.ndarray | None = None) -> np.ndarray:
        out = (x.shape[0], self.packed.shape[0], *self.output_size(*x.shape[2:]))
        with guarded(out) as (y, address):
            error = ctypes.create_string_buffer(ERROR_SIZE)
            if added is None:
                code = LIBRARY.sparsecc_conv_run(
                    self.handle, x.ctypes.data, *x.shape, address, executor, error, ERROR_SIZE
                )
            else:
                code = LIBRARY.sparsecc_conv_add_run(
                    self.handle,
                    x.ctypes.data,
                    added.ctypes.data,
                    *x.shape,
                    address,
                    executor,
                    error,
                    ERROR_SIZE,
                )
            checked(code, error)
        return y


class guarded:  # noqa: N801 - used as a function
    """An output array inside a larger one; what lies round it must not change, all of it must be written."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = math.prod(shape)
        self.whole = np.full(size + 128, CANARY, np.float32)
        self.inner = self.whole[64 : 64 + size].reshape(shape)

    def __enter__(self) -> tuple[np.ndarray, int]:
        return self.inner, self.inner.ctypes.data

    def __exit__(self, kind: object, *_: object) -> None:
        assert (self.whole[:64] == CANARY).all()
        assert (self.whole[64 + self.inner.size :] == CANARY).all()
        if kind is None:
            assert not (self.inner == CANARY).any()


def random_weight(
    rng: np.random.Generator, shape: tuple[int, int], layout: str, sparsity: float
) -> np.ndarray:
    weight = rng.standard_normal(shape).astype(np.float32)
    pattern = Pattern.parse(layout)
    return weight * keep_mask(rng.random(shape), pattern, None if pattern.kind == "nm" else sparsity)


def activate(x: np.ndarray, activation: int) -> np.ndarray:
    erf = np.vectorize(math.erf, otypes=[np.float64])
    sigmoid = 1 / (1 + np.exp(-x))
    return (
        lambda: x,
        lambda: np.maximum(x, 0),
        lambda: np.where(x < 0, ALPHA * x, x),
        lambda: np.clip(x, ALPHA, BETA),
        lambda: sigmoid,
        lambda: np.tanh(x),
        lambda: 0.5 * x * (1 + erf(x / math.sqrt(2))),
        lambda: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        lambda: x * sigmoid,
        lambda: x * np.clip(x / 6 + 0.5, 0, 1),
    )[activation]()


def assert_close(y: np.ndarray, expected: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    """Within the rounding of sums over the inputs of `weight`, plus a few ulp of the result."""
    k = weight.shape[1]
    most = float(np.abs(x).max(initial=0)) * float(np.abs(weight).max(initial=0))
    bound = EPS * (k + 1) * most + 8 * EPS * (1 + np.abs(expected))
    assert (np.abs(y - expected) <= bound).all(), float((np.abs(y - expected) / bound).max())


def expected_matmul(packed: Packed, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    y = x.astype(np.float64) @ weight.T.astype(np.float64)
    return activate(y if packed.bias is None else y + packed.bias, packed.activation)


def check_matmul(weight: np.ndarray, layout: str, x: np.ndarray, executor: Any = None, **options: Any) -> str:
    packed = pack(weight, layout, **options)
    with Op(packed) as op:
        assert_close(op.matmul(x, executor), expected_matmul(packed, weight, x), x, weight)
        return op.kernel(x.shape[0])


def rows_of(rng: np.random.Generator, rows: int, inputs: int) -> np.ndarray:
    return rng.standard_normal((rows, inputs)).astype(np.float32)


def check_large_weight(isa: str, rows: int, executor: Any = None, floats: str = "fp32") -> str:
    """Too large for a second-level cache, with an empty and a full row, and NaN where no weight is."""
    rng = np.random.default_rng(rows)
    weight = rounded(random_weight(rng, (570, 1300), "unstructured", 0.45), floats)
    weight[100], weight[300] = 0, 1
    weight[:, 77] = 0
    bias = rng.standard_normal(570).astype(np.float32)
    packed = pack(weight, "unstructured", isa=isa, bias=bias, floats=floats)
    x = rows_of(rng, rows, 1300)
    expected = expected_matmul(packed, weight, x)
    x[:, 77] = np.nan
    with Op(packed) as op:
        assert_close(op.matmul(x, executor), expected, np.nan_to_num(x), weight)
        return op.kernel(rows)


# --- selection ---------------------------------------------------------------------------------------


def test_every_isa_and_kernel_is_exercised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random tests below run over ISAS; here: each ISA really gives its own kernels, and all of them."""
    monkeypatch.delenv("SPARSECC_ISA", raising=False)
    rng = np.random.default_rng(0)
    seen: set[str] = set()
    for isa, (layout, sparsity), rows in itertools.product(
        ISAS, (("16x1", 0.5), ("32x1", 0.5), ("2:4", None), ("unstructured", 0.6)), (1, 40)
    ):
        weight = random_weight(rng, (48, 64), layout, sparsity or 0.5)
        for floats in FLOATS:
            weight, x = rounded(weight, floats), rows_of(rng, rows, 64)
            seen.add(check_matmul(weight, layout, x, isa=isa, floats=floats))
        seen.add(check_conv(rng, CONV_CASES["1x1"], layout, isa=isa))
    seen |= {check_large_weight(isa, 1, floats=floats) for isa in ISAS for floats in FLOATS}
    assert seen == set(KERNELS)
    assert {name.split("-")[1] for name in seen} == set(ISAS)
    assert ISAS[-1] == "generic"


def test_isas_match_the_machine(cpu_flags: frozenset[str]) -> None:
    assert ("avx2" in ISAS) == ({"avx2", "fma", "f16c", "bmi2"} <= cpu_flags)
    wide = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert ("avx512" in ISAS) == (wide | {"avx2", "fma", "bmi2"} <= cpu_flags)
    assert ("neon" in ISAS) == ("asimd" in cpu_flags)


def test_isa_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(np.eye(16, dtype=np.float32), "16x1")
    for isa in ISAS:
        monkeypatch.setenv("SPARSECC_ISA", isa)
        with Op(packed) as op:
            assert op.kernel() == f"block16-{isa}"
        with Op(replace(packed, isa="generic")) as op:
            assert op.kernel() == "block16-generic"
    with pytest.raises(LibraryError, match=f'"avx1024".*{" ".join(ISAS)}'):
        Op(replace(packed, isa="avx1024"))
    monkeypatch.setenv("SPARSECC_ISA", "mmx")
    with pytest.raises(LibraryError, match="SPARSECC_ISA"):
        Op(packed)


# --- matmul ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matmul_random(isa: str, layout: str) -> None:
    rng = np.random.default_rng(LAYOUTS.index(layout))
    for trial in range(16):
        shape = int(rng.integers(1, 150)), int(rng.integers(1, 400))
        rows = (1, 2, 3, 5, 15, 16, 17, 70, 130)[trial % 9]
        weight = random_weight(rng, shape, layout, float(rng.choice([0.3, 0.7, 0.9, 0.99])))
        bias = rng.standard_normal(shape[0]).astype(np.float32) if trial % 2 else None
        check_matmul(weight, layout, rows_of(rng, rows, shape[1]), isa=isa, bias=bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "32x1", "2:4"])
def test_every_number_of_rows(isa: str, layout: str) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, (37, 75), layout, 0.8)
    for rows in (*range(34), 63, 64, 65):
        check_matmul(weight, layout, rows_of(rng, rows, 75), isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", range(10), ids=ACTIVATIONS)
@pytest.mark.parametrize("layout", ["unstructured", "32x1"])
def test_activations(isa: str, activation: int, layout: str) -> None:
    """One output per value of the activation's argument, over its whole interesting range."""
    inputs = np.concatenate([np.linspace(-12, 12, 1501), [-100, -90, 0, 1e-6, -1e-6, 90, 100]])
    x = inputs.astype(np.float32)[:, None]
    weight = np.ones((3, 1), np.float32)
    for rows in (1, 3, x.shape[0]):
        check_matmul(weight, layout, x[-rows:], isa=isa, activation=activation)
        check_matmul(weight, layout, x[-rows:], isa=isa, activation=activation, bias=np.float32([0, 1, -1]))


@pytest.mark.parametrize("isa", ISAS)
def test_activations_of_nan_and_infinity(isa: str) -> None:
    x = np.float32([[np.nan], [np.inf]])
    for activation, at_infinity in enumerate(
        (np.inf, np.inf, np.inf, BETA, 1, 1, np.inf, np.inf, np.inf, np.inf)
    ):
        with Op(pack(np.ones((1, 1), np.float32), "unstructured", activation=activation, isa=isa)) as op:
            y = op.matmul(x)
        assert np.isnan(y[0, 0])
        assert y[1, 0] == pytest.approx(at_infinity)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "64x1", "16x4", "4x1"])
def test_skewed_weights(isa: str, layout: str) -> None:
    """All zero, empty rows, one giant row, a single weight in the last corner, wide and tall."""
    rng = np.random.default_rng(2)
    zero = np.zeros((70, 300), np.float32)
    giant = zero.copy()
    giant[33] = rng.standard_normal(300)
    corner = zero.copy()
    corner[-1, -1] = 2
    sparse_rows = random_weight(rng, (70, 300), layout, 0.5)
    sparse_rows[rng.random(70) < 0.7] = 0
    wide = random_weight(rng, (3, 5000), layout, 0.95)
    tall = random_weight(rng, (3000, 5), layout, 0.5)
    far = np.zeros((17, 70000), np.float32)
    far[0, [3, 69999]] = far[16, 65536] = 1
    for weight, rows in itertools.product((zero, giant, corner, sparse_rows, wide, tall, far), (1, 4, 20)):
        check_matmul(weight, layout, rows_of(rng, rows, weight.shape[1]), isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_large_weights(isa: str, shuffled_executor: Callable[..., Any]) -> None:
    for rows, (threads, floats) in itertools.product((1, 2, 7, 8), ((1, "fp32"), (3, "fp32"), (3, "fp16"))):
        check_large_weight(isa, rows, shuffled_executor(threads), floats)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "4x1"])
def test_uneven_outputs(isa: str, layout: str, shuffled_executor: Callable[..., Any]) -> None:
    """Outputs of very different numbers of weights in one group: they are brought into another order inside."""
    rng = np.random.default_rng(5)
    for outputs in (32, 75, 300):
        share = np.repeat(rng.permutation(np.linspace(0, 1, -(-outputs // 4))), 4)[:outputs, None]
        weight = random_weight(rng, (outputs, 130), layout, 0.0) * (rng.random((outputs, 130)) < share)
        weight[share[:, 0] == 0] = 0
        bias = rng.standard_normal(outputs).astype(np.float32)
        for rows, activation in itertools.product((1, 2, 7), (0, 4)):
            x = rows_of(rng, rows, 130)
            check_matmul(weight, layout, x, isa=isa, bias=bias, activation=activation)
            check_matmul(weight, layout, x, executor=shuffled_executor(3), isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_a_slice_far_from_the_one_before(isa: str) -> None:
    """More than 2^16 empty slices of 16 inputs in a row."""
    weight = np.zeros((1, 1 << 21), np.float32)
    weight[0, [0, -1]] = 1, 2
    x = np.zeros((1, 1 << 21), np.float32)
    x[0, [0, -1]] = 3, 5
    with Op(pack(weight, "unstructured", isa=isa)) as op:
        assert op.matmul(x)[0, 0] == 13


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "2:4"])
def test_no_inputs(isa: str, layout: str) -> None:
    packed = Packed(layout.encode(), (3, 0), np.zeros(0, np.float32), np.zeros(0, np.uint8), isa=isa)
    packed.bias = np.float32([1, -2, 3])
    with Op(packed) as op:
        for rows in (0, 1, 40):
            y = op.matmul(np.zeros((rows, 0), np.float32))
            np.testing.assert_array_equal(y, np.tile(packed.bias, (rows, 1)))


@pytest.mark.parametrize("isa", ISAS)
def test_pruned_weights_do_not_spread_nan(isa: str) -> None:
    rng = np.random.default_rng(3)
    weight = random_weight(rng, (40, 64), "unstructured", 0.7)
    weight[:, 5] = 0
    for rows in (1, 2, 40):
        x = rows_of(rng, rows, 64)
        x[:, 5] = np.nan
        with Op(pack(weight, "unstructured", isa=isa)) as op:
            assert np.isfinite(op.matmul(x)).all()
        x[:, 6] = np.nan
        with Op(pack(weight, "unstructured", isa=isa)) as op:
            np.testing.assert_array_equal(np.isnan(op.matmul(x)), np.tile(weight[:, 6] != 0, (rows, 1)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "2:4"])
def test_nan_and_infinite_weights(isa: str, layout: str) -> None:
    rng = np.random.default_rng(4)
    weight = random_weight(rng, (32, 32), layout, 0.5)
    stored = np.argwhere(weight != 0)
    weight[tuple(stored[3])], weight[tuple(stored[-1])] = np.nan, np.inf
    for rows in (1, 33):
        with Op(pack(weight, layout, isa=isa)) as op:
            y = op.matmul(np.ones((rows, 32), np.float32))
        np.testing.assert_array_equal(np.isfinite(y), np.tile(np.isfinite(weight.sum(1)), (rows, 1)))


# --- values of 16 bits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("floats", NARROW)
def test_narrow_values_random(isa: str, layout: str, floats: str) -> None:
    rng = np.random.default_rng(LAYOUTS.index(layout))
    for trial, rows in enumerate((1, 2, 3, 5, 17, 70)):
        shape = int(rng.integers(1, 150)), int(rng.integers(1, 400))
        weight = rounded(random_weight(rng, shape, layout, float(rng.choice([0.3, 0.7, 0.9, 0.99]))), floats)
        bias = rng.standard_normal(shape[0]).astype(np.float32) if trial % 2 else None
        check_matmul(weight, layout, rows_of(rng, rows, shape[1]), isa=isa, bias=bias, floats=floats)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "32x1", "2:4"])
@pytest.mark.parametrize("floats", NARROW)
def test_narrow_values_every_number_of_rows(
    isa: str, layout: str, floats: str, shuffled_executor: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(1)
    weight = rounded(random_weight(rng, (37, 75), layout, 0.8), floats)
    executor = shuffled_executor(3)
    for rows in range(34):
        check_matmul(weight, layout, rows_of(rng, rows, 75), executor, isa=isa, floats=floats)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "32x1", "64x1"])
@pytest.mark.parametrize("floats", NARROW)
def test_every_narrow_number(isa: str, layout: str, floats: str) -> None:
    """Small ones, infinity and NaN among them: results are the numbers themselves."""
    with np.errstate(invalid="ignore"):
        numbers = np.arange(1 << 16, dtype=np.uint16).view(FLOATS[floats]).astype(np.float32)
    for rows in (1, 2, 40):
        with Op(pack(numbers[:, None], layout, isa=isa, floats=floats)) as op:
            y = op.matmul(np.ones((rows, 1), np.float32))
        np.testing.assert_array_equal(y, np.broadcast_to(numbers, y.shape))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "32x1"])
@pytest.mark.parametrize("floats", NARROW)
def test_narrow_skewed_weights(isa: str, layout: str, floats: str) -> None:
    """All zero, one giant row among empty ones, a single weight in the last corner, no inputs."""
    rng = np.random.default_rng(2)
    zero = np.zeros((70, 300), np.float32)
    giant, corner = zero.copy(), zero.copy()
    giant[33] = rounded(rng.standard_normal(300).astype(np.float32), floats)
    corner[-1, -1] = 2
    for weight, rows in itertools.product((zero, giant, corner, zero[:3, :0]), (0, 1, 4, 20)):
        check_matmul(weight, layout, rows_of(rng, rows, weight.shape[1]), isa=isa, floats=floats)


@pytest.mark.parametrize("floats", FLOATS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1"])
def test_values_at_any_address(layout: str, floats: str) -> None:
    rng = np.random.default_rng(3)
    weight, x = rounded(random_weight(rng, (40, 64), layout, 0.5), floats), rows_of(rng, 3, 64)
    packed = pack(weight, layout, floats=floats)
    raw = packed.values.tobytes()
    held = np.frombuffer(b"?" + raw, np.uint8)
    assert held.ctypes.data % 2 == 0
    packed.values = np.ndarray(packed.values.size, packed.values.dtype, held, offset=1)
    with Op(packed) as op:
        assert_close(op.matmul(x), expected_matmul(packed, weight, x), x, weight)


# --- threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1", "32x1", "2:4"])
def test_threads(
    isa: str, layout: str, pool_executor: Callable[..., Any], shuffled_executor: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(5)
    for rows, (outputs, inputs) in itertools.product((1, 7, 100), ((600, 90), (30, 500), (1, 17))):
        weight = random_weight(rng, (outputs, inputs), layout, 0.8)
        if layout == "unstructured":
            weight[outputs // 2] = 1  # one giant row
        x = rows_of(rng, rows, inputs)
        for threads in (1, 2, 5, 64):
            log: list[int] = []
            check_matmul(weight, layout, x, shuffled_executor(threads, log), isa=isa)
            assert threads > 1 or not log
        check_matmul(weight, layout, x, pool_executor(4), isa=isa)


def test_one_operator_on_many_threads() -> None:
    """An operator is immutable: calls from several threads at once do not disturb each other."""
    rng = np.random.default_rng(6)
    weight = random_weight(rng, (200, 300), "unstructured", 0.8)
    inputs = [rows_of(rng, rows, 300) for rows in (1, 2, 9, 33, 64, 100) * 3]
    with Op(pack(weight, "unstructured")) as op, ThreadPoolExecutor(6) as pool:
        for x, y in zip(inputs, pool.map(op.matmul, inputs), strict=True):
            np.testing.assert_array_equal(y, op.matmul(x))


# --- convolution -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConvCase:
    image: tuple[int, int]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pad_begin: tuple[int, int] = (0, 0)
    pad_end: tuple[int, int] = (0, 0)
    groups: int = 1
    outputs: int = 32  # per group
    channels: int = 6  # per group
    batch: int = 1

    def geometry(self) -> Geometry:
        return Geometry(self.groups, self.kernel, self.stride, self.dilation, self.pad_begin, self.pad_end)


def expected_conv(case: ConvCase, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    pads = [(0, 0), (0, 0), *zip(case.pad_begin, case.pad_end, strict=True)]
    padded = np.pad(x.astype(np.float64), pads)
    reach = [(k - 1) * d + 1 for k, d in zip(case.kernel, case.dilation, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, reach, (2, 3))
    views = views[:, :, :: case.stride[0], :: case.stride[1], :: case.dilation[0], :: case.dilation[1]]
    views = views.reshape(x.shape[0], case.groups, case.channels, *views.shape[2:])
    kernels = weight.reshape(case.groups, case.outputs, case.channels, *case.kernel)
    y = np.einsum("bgchwij,gocij->bgohw", views, kernels, optimize=True)
    return y.reshape(x.shape[0], -1, *y.shape[3:])


def check_conv(
    rng: np.random.Generator,
    case: ConvCase,
    layout: str,
    executor: Any = None,
    *,
    adds: bool = False,
    **options: Any,
) -> str:
    shape = case.groups * case.outputs, case.channels * math.prod(case.kernel)
    weight = rounded(random_weight(rng, shape, layout, 0.7), options.get("floats", "fp32"))
    x = rng.standard_normal((case.batch, case.groups * case.channels, *case.image)).astype(np.float32)
    packed = pack(weight, layout, bias=rng.standard_normal(shape[0]).astype(np.float32), **options)
    assert packed.bias is not None
    z = expected_conv(case, x, weight) + packed.bias[:, None, None]
    added = rng.standard_normal(z.shape).astype(np.float32) if adds else None
    expected = activate(z if added is None else z + added, packed.activation)
    with Op(packed, case.geometry()) as op:
        assert_close(op.conv(x, executor, added), expected, x, weight)
        return op.kernel()


CONV_CASES = {
    "1x1": ConvCase((9, 13)),
    "1x1 small": ConvCase((7, 7), channels=40, outputs=70),
    "1x1 one pixel": ConvCase((1, 1), channels=33),
    "1x1 batch": ConvCase((14, 14), batch=3),
    "1x1 stride": ConvCase((15, 14), stride=(2, 2)),
    "3x3 same": ConvCase((12, 19), kernel=(3, 3), pad_begin=(1, 1), pad_end=(1, 1)),
    "3x3 stride": ConvCase((33, 20), kernel=(3, 3), stride=(2, 2), pad_begin=(1, 1), pad_end=(1, 1)),
    "3x3 many inputs": ConvCase((8, 8), kernel=(3, 3), channels=50, pad_begin=(1, 1), pad_end=(1, 1)),
    "7x7 stride": ConvCase(
        (30, 30), kernel=(7, 7), stride=(2, 2), pad_begin=(3, 3), pad_end=(3, 3), channels=3
    ),
    "dilated": ConvCase((17, 17), kernel=(3, 2), dilation=(2, 3), pad_begin=(2, 0), pad_end=(0, 3)),
    "1-D": ConvCase((1, 50), kernel=(1, 5), stride=(1, 3), pad_begin=(0, 2), pad_end=(0, 1)),
    "tall": ConvCase((60, 1), kernel=(3, 1), pad_begin=(1, 0)),
    "groups": ConvCase((10, 10), kernel=(3, 3), groups=3, pad_begin=(1, 1), pad_end=(1, 1), batch=2),
    "padding only": ConvCase((1, 1), kernel=(3, 3), pad_begin=(3, 4), pad_end=(4, 3)),
    "padding beyond reach": ConvCase((5, 5), kernel=(2, 2), stride=(3, 4), pad_begin=(0, 5), pad_end=(9, 1)),
    "wide planes": ConvCase((3, 700), kernel=(1, 3), outputs=300, channels=2),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CONV_CASES.values(), ids=CONV_CASES)
def test_conv(isa: str, case: ConvCase) -> None:
    rng = np.random.default_rng(7)
    for layout in ("unstructured", "16x1", "32x1", "2:4", "4x1"):
        kernel = check_conv(rng, case, layout, isa=isa)
        check_conv(rng, case, layout, isa=isa, adds=True, floats="fp16")
        assert kernel == f"{'element4' if layout in ('16x1', '32x1', '4x1') else 'element'}-{isa}"


@pytest.mark.parametrize("isa", ISAS)
def test_conv_random(isa: str) -> None:
    rng = np.random.default_rng(8)
    pair = lambda low, high: (int(rng.integers(low, high)), int(rng.integers(low, high)))  # noqa: E731
    for trial in range(40):
        case = ConvCase(
            pair(7, 25),
            kernel=pair(1, 4),
            stride=pair(1, 4),
            dilation=pair(1, 3),
            pad_begin=pair(0, 3),
            pad_end=pair(0, 3),
            groups=int(rng.choice([1, 1, 2, 4])),
            channels=int(rng.integers(1, 12)),
            batch=int(rng.integers(1, 3)),
            outputs=32,
        )
        layout = ("unstructured", "16x1")[trial % 2]
        check_conv(rng, case, layout, isa=isa, activation=trial // 2 % 10, adds=trial % 4 > 1)


@pytest.mark.parametrize("isa", ISAS)
def test_depthwise_conv(isa: str) -> None:
    case = ConvCase(
        (11, 9), kernel=(3, 3), groups=20, channels=1, outputs=1, pad_begin=(1, 1), pad_end=(1, 1)
    )
    check_conv(np.random.default_rng(9), case, "unstructured", isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ["unstructured", "16x1"])
def test_conv_threads(
    isa: str, layout: str, pool_executor: Callable[..., Any], shuffled_executor: Callable[..., Any]
) -> None:
    rng = np.random.default_rng(10)
    for name in ("1x1", "3x3 same", "groups", "1x1 one pixel", "wide planes"):
        for threads in (2, 7):
            check_conv(rng, CONV_CASES[name], layout, shuffled_executor(threads), isa=isa, adds=True)
        check_conv(rng, CONV_CASES[name], layout, pool_executor(4), isa=isa)


def test_conv_refusals() -> None:
    weight = np.ones((8, 9), np.float32)
    packed = pack(weight, "unstructured")
    good = ConvCase((5, 5), kernel=(3, 3))
    for wrong, message in (
        (replace(good, groups=0), "groups"),
        (replace(good, groups=3), "groups"),
        (replace(good, kernel=(2, 3)), "columns"),
        (replace(good, kernel=(0, 3)), "kernel"),
        (replace(good, kernel=(1 << 40, 1)), "kernel"),
        (replace(good, stride=(0, 1)), "stride"),
        (replace(good, stride=(1, 1 << 60)), "stride"),
        (replace(good, dilation=(-1, 1)), "dilation"),
        (replace(good, pad_begin=(-1, 0)), "pad_begin"),
        (replace(good, pad_end=(0, 1 << 62)), "pad_end"),
    ):
        with pytest.raises(LibraryError, match=message):
            Op(packed, wrong.geometry())
    with pytest.raises(LibraryError, match="cross"):
        Op(pack(np.ones((8, 9), np.float32), "16x1"), replace(good, groups=2).geometry())
    with Op(packed, good.geometry()) as op:
        with pytest.raises(LibraryError, match="covers 3"):
            op.output_size(2, 9)
        with pytest.raises(LibraryError, match="height"):
            op.output_size(-1, 9)
        with pytest.raises(LibraryError, match="channels"):
            op.conv(np.zeros((1, 2, 5, 5), np.float32))
        assert op.conv(np.zeros((0, 1, 5, 5), np.float32)).shape == (0, 8, 3, 3)
    huge = replace(good, pad_begin=(1 << 20, 1 << 20))
    x = np.zeros((1, 1, 5, 5), np.float32)
    error = ctypes.create_string_buffer(ERROR_SIZE)
    with Op(packed, huge.geometry()) as op:
        run = LIBRARY.sparsecc_conv_run
        assert run(op.handle, x.ctypes.data, *x.shape, x.ctypes.data, None, error, ERROR_SIZE) != 0
    assert b"2^31" in error.value


# --- untrusted descriptors ---------------------------------------------------------------------------


def small_packed(layout: str = "unstructured") -> Packed:
    return pack(random_weight(np.random.default_rng(11), (40, 64), layout, 0.5), layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "layout version 2"),
        ({"version": -1}, "layout version -1"),
        ({"struct_size": 8}, "descriptor is 8 bytes"),
        ({"layout": None}, "layout"),
        ({"layout": b""}, "unknown layout"),
        ({"layout": b"dense"}, "unknown layout"),
        ({"layout": b"unstructured "}, "unknown layout"),
        ({"layout": b"4:2"}, "unknown layout"),
        ({"layout": b"4:4"}, "unknown layout"),
        ({"layout": b"1:17"}, "unknown layout"),
        ({"layout": b"0x1"}, "unknown layout"),
        ({"layout": b"16x"}, "unknown layout"),
        ({"layout": b"65x1"}, "unknown layout"),
        ({"layout": b"999999999999999999999x1"}, "unknown layout"),
        ({"layout": b"16x1x1"}, "unknown layout"),
        ({"layout": b"x" * 5000}, "unknown layout"),
        ({"layout": b"\xff\n\xfe"}, "unknown layout"),
        ({"layout": b"16x1"}, "whole number|places|grid"),
        ({"layout": b"2:4"}, "keeps"),
        ({"shape": (0, 64)}, "outputs is 0"),
        ({"shape": (-1, 64)}, "outputs is -1"),
        ({"shape": (40, -64)}, "inputs is -64"),
        ({"shape": (1 << 62, 4)}, "outputs is"),
        ({"shape": (4, 1 << 62)}, "inputs is"),
        ({"shape": (1 << 20, 1 << 20)}, "2\\^31"),
        ({"shape": (40, 0)}, "do not fit"),
        ({"shape": (39, 64)}, "grid"),
        ({"shape": (4, 64)}, "grid"),
        ({"value_count": -1}, "negative"),
        ({"index_bytes": -8}, "negative"),
        ({"value_count": 1 << 62}, "do not fit"),
        ({"value_count": 100}, "more than"),
        ({"index_bytes": 100}, "cannot place|places"),
        ({"index_bytes": 0}, "cannot place"),
        ({"activation": 10}, "activation"),
        ({"activation": -1}, "activation"),
        ({"value_type": 3}, "type of values 3"),
        ({"value_type": -1}, "type of values -1"),
    ],
)
def test_wrong_descriptors_are_refused(change: dict[str, Any], message: str) -> None:
    packed = replace(small_packed(), **change)
    with pytest.raises(LibraryError, match=message):
        Op(packed)
    if "shape" not in change:
        with pytest.raises(LibraryError, match=message):
            Op(packed, ConvCase((3, 3)).geometry())


def test_null_arguments_are_refused() -> None:
    error = ctypes.create_string_buffer(ERROR_SIZE)
    handle = ctypes.c_void_p()
    assert LIBRARY.sparsecc_matmul_create(None, ctypes.byref(handle), error, ERROR_SIZE) != 0
    assert b"null" in error.value
    desc = small_packed().desc()
    assert LIBRARY.sparsecc_matmul_create(ctypes.byref(desc), None, error, ERROR_SIZE) != 0
    assert (
        LIBRARY.sparsecc_conv_create(ctypes.byref(desc), None, ctypes.byref(handle), error, ERROR_SIZE) != 0
    )
    for field_name in ("values", "indices"):
        desc = small_packed().desc()
        setattr(desc, field_name, None)
        assert (
            LIBRARY.sparsecc_matmul_create(ctypes.byref(desc), ctypes.byref(handle), error, ERROR_SIZE) != 0
        )
        assert b"null" in error.value
    assert LIBRARY.sparsecc_matmul_create(None, None, None, 0) != 0
    tiny = ctypes.create_string_buffer(b"zzzzzzzz", 8)
    assert LIBRARY.sparsecc_matmul_create(None, None, tiny, 5) != 0
    assert tiny.raw[4:] == b"\0zzz"
    with Op(small_packed()) as op:
        y = np.zeros((1, 40), np.float32)
        run = LIBRARY.sparsecc_matmul_run
        assert run(op.handle, None, 1, y.ctypes.data, None, error, ERROR_SIZE) != 0
        assert run(op.handle, y.ctypes.data, -1, y.ctypes.data, None, error, ERROR_SIZE) != 0
        assert run(op.handle, None, 0, None, None, error, ERROR_SIZE) == 0
    LIBRARY.sparsecc_matmul_destroy(None)
    LIBRARY.sparsecc_conv_destroy(None)


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ([1, 0], "repeats"),
        ([0, 1], "repeats"),
        ([1, 15, 15, 15, 15, 15, 15, 15], "past the grid"),
        ([1, 15], "places 1 of 2"),
        ([1, 15, 15, 15], "past the grid"),
        ([9, 9], "position 17"),
        ([1, 1, 1, 15], "more than the 2"),
    ],
)
def test_wrong_index_streams_are_refused(stream: list[int], message: str) -> None:
    nibbles = np.array(stream, np.uint8)
    indices = nibbles[::2] | nibbles[1::2] << 4
    packed = Packed(b"unstructured", (2, 8), np.ones(2, np.float32), indices.astype(np.uint8))
    with pytest.raises(LibraryError, match=message):
        Op(packed)


def test_zero_gap_after_a_skip_is_legal() -> None:
    packed = Packed(b"unstructured", (2, 16), np.float32([2, 3]), np.uint8([1 | 15 << 4, 0 | 15 << 4]))
    with Op(packed) as op:
        y = op.matmul(np.arange(16, dtype=np.float32)[None])
    np.testing.assert_array_equal(y, [[0 * 2 + 15 * 3, 0]])


@pytest.mark.parametrize("layout", ["unstructured", "2:4", "16x1", "16x4", "3:5"])
def test_corrupted_indices_are_refused_or_harmless(layout: str) -> None:
    """Bytes flipped, dropped, added: an error, or an operator that runs inside its buffers."""
    rng = np.random.default_rng(12)
    good = small_packed(layout)
    x = {rows: rows_of(rng, rows, 64) for rows in (1, 3, 20)}
    refused = 0
    for trial in range(400):
        indices = good.indices.copy()
        for _ in range(int(rng.integers(1, 4))):
            indices[rng.integers(indices.size)] ^= np.uint8(1 << rng.integers(8))
        if trial % 4 == 1:
            indices = indices[: rng.integers(indices.size)]
        if trial % 4 == 2:
            indices = np.concatenate([indices, rng.integers(0, 256, 5, dtype=np.uint8)])
        if trial % 4 == 3:
            indices = rng.integers(0, 256, indices.size, dtype=np.uint8)
        values = good.values.reshape(-1)
        if trial % 5 == 4:
            values = values[: rng.integers(values.size)].copy()
        packed = replace(
            good, indices=np.ascontiguousarray(indices), values=values, isa=ISAS[trial % len(ISAS)]
        )
        try:
            op = Op(packed)
        except LibraryError:
            refused += 1
            continue
        with op:
            for given in x.values():
                op.matmul(given)
    assert refused > 200
