"""Attention, normalisation and gates through the C interface, against NumPy in double precision.

Tolerances: a score is a sum of `size` products, and the relative error of a weight is the absolute error of its
score; the result is an average of values. A normalised row is a few roundings away from the exact one.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sparsecc.emit.reference import activated
from sparsecc.errors import UsageError
from sparsecc.runtime import isas
from sparsecc.runtime.capi_transformer import (
    AttentionDesc,
    NormDesc,
    native_attention,
    native_gate,
    native_norm,
    transformer_library,
)

ISAS = isas()
EPS = float(np.finfo(np.float32).eps)
CANARY = np.float32(-12345.5)


def turned(x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    low, high = np.split(x, 2, axis=-1)
    return x * cosines[:, None] + np.concatenate([-high, low], axis=-1) * sines[:, None]


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    scale: float,
    mask: np.ndarray | None,
    rotary: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    q, k, v = (x.astype(np.float64).transpose(0, 2, 1, 3) for x in (q, k, v))
    if rotary is not None:
        q, k = (turned(x, *rotary) for x in (q, k))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * scale + (0 if mask is None else mask.astype(np.float64))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


def case(
    rng: np.random.Generator, batch: int, queries: int, keys: int, heads: int, size: int, packed: bool
) -> tuple[np.ndarray, ...]:
    """q, k and v; packed: views of one array, rows of which hold all three."""
    if packed and queries == keys:
        whole = rng.standard_normal((batch, queries, 3, heads, size)).astype(np.float32)
        return whole[:, :, 0], whole[:, :, 1], whole[:, :, 2]
    shapes = ((batch, queries, heads, size), *[(batch, keys, heads, size)] * 2)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def check_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray | None,
    rotary: tuple[np.ndarray, np.ndarray] | None = None,
    **options: Any,
) -> np.ndarray:
    scale = 0.3
    room = np.full((q.shape[0], q.shape[1] + 2, q.shape[2], q.shape[3] + 3), CANARY, np.float32)
    y = room[:, 1:-1, :, 1:-2]
    native_attention(q, k, v, scale=scale, mask=mask, rotary=rotary, out=y, **options)
    inside = np.zeros(room.shape, bool)
    inside[:, 1:-1, :, 1:-2] = True
    assert (room[~inside] == CANARY).all()
    most = scale * np.sqrt(np.square(q).sum(-1).max(initial=0) * np.square(k).sum(-1).max(initial=0))
    bound = (
        EPS * (8 + k.shape[1] / 4 + 4 * (q.shape[3] ** 0.5 + 2) * max(1.0, most)) * np.abs(v).max(initial=0)
    )
    assert np.abs(y - attention(q, k, v, scale, mask, rotary)).max(initial=0) <= bound
    return y


SIZES = [
    (1, 1, 1, 1, 1), (2, 3, 5, 3, 7), (1, 17, 16, 2, 16), (1, 8, 49, 1, 24), (2, 33, 33, 2, 64),
    (1, 50, 31, 1, 65), (1, 5, 700, 1, 8), (1, 100, 100, 1, 32), (3, 1, 130, 2, 48),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_of_every_size(isa: str, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    batch, queries, keys, heads, _ = sizes
    masks = (None, (keys,), (batch, 1, 1, keys), (1, heads, queries, keys), (queries, 1), (1, 1, 1, 1))
    for packed, mask in itertools.product((False, True), masks):
        added = None if mask is None else rng.standard_normal(mask).astype(np.float32)
        check_attention(*case(rng, *sizes, packed), added, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_attention_fuzzed(isa: str) -> None:
    rng = np.random.default_rng(1)
    for trial in range(24):
        sizes = (
            *rng.integers(1, 4, 1),
            *rng.integers(1, 70, 2),
            *rng.integers(1, 4, 1),
            *rng.integers(1, 70, 1),
        )
        mask = np.where(rng.random((sizes[1], sizes[2])) < 0.5, -10000, 0).astype(np.float32)
        check_attention(*case(rng, *map(int, sizes), bool(trial % 2)), mask if trial % 3 else None, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_attention_on_threads(isa: str, pool_executor: Callable[[int], Any]) -> None:
    rng = np.random.default_rng(2)
    for sizes, threads in itertools.product(((1, 37, 20, 1, 24), (2, 9, 9, 3, 16)), (2, 3, 16)):
        inputs = case(rng, *sizes, False)
        lent = pool_executor(threads)
        np.testing.assert_array_equal(
            check_attention(*inputs, None, isa=isa, executor=lent),
            check_attention(*inputs, None, isa=isa),
        )


@pytest.mark.parametrize("isa", ISAS)
def test_attention_of_masks_that_are_infinite_and_of_nan(isa: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = case(rng, 1, 21, 37, 2, 8, False)
    mask = np.where(np.arange(37) > np.arange(21)[:, None], -np.inf, 0).astype(np.float32)
    check_attention(q, k, v, mask, isa=isa)
    mask[4] = -np.inf  # nothing to attend to: as softmax has it
    q[0, 7, 1, 3] = np.nan
    y = native_attention(q, k, v, scale=0.3, mask=mask, isa=isa)
    nan = np.isnan(y).any(axis=(0, 3))
    assert nan[4].all()
    assert nan.sum() == 3
    assert nan[7, 1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [2, 6, 30, 32, 34, 64, 70])
def test_attention_whose_heads_share_keys_and_are_turned(
    isa: str, size: int, pool_executor: Callable[[int], Any]
) -> None:
    rng = np.random.default_rng(7)
    shapes = ((1, 4, 1, 7), (2, 4, 2, 50), (1, 6, 6, 33))
    for (batch, heads, kv_heads, rows), positions in itertools.product(shapes, ("", "one", "batch")):
        q, k, v = (
            rng.standard_normal((batch, rows, count, size)).astype(np.float32)
            for count in (heads, kv_heads, kv_heads)
        )
        angle = rng.uniform(-4, 4, (batch if positions == "batch" else 1, rows, size))
        tables = (np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
        rotary = tables if positions else None
        mask = np.triu(np.full((rows, rows), -np.inf, np.float32), 1)
        y = check_attention(q, k, v, mask, rotary, isa=isa)
        for threads in (2, 5):
            lent = pool_executor(threads)
            again = check_attention(q, k, v, mask, rotary, isa=isa, executor=lent)
            np.testing.assert_array_equal(again, y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("low", [-np.inf, float(np.finfo(np.float32).min), -1e30, -1e29])
def test_attention_leaves_out_hidden_keys_only_where_all_rows_have_others(isa: str, low: float) -> None:
    """Whatever the groups of keys and blocks of rows; in a row of nothing but low ones these count."""
    rng = np.random.default_rng(8)
    q, k, v = case(rng, 1, 70, 90, 2, 16, False)
    for keys in (1, 15, 16, 17, 48, 89, 90):
        mask = np.zeros((2, 70, 90), np.float32)
        mask[:, :, keys:] = low
        check_attention(q, k, v, mask, isa=isa)
        mask[1, 69, 89] = 0
        check_attention(q, k, v, mask, isa=isa)
    mask = np.triu(np.full((70, 90), low, np.float32), -20)  # the first rows have no key at all
    if np.isfinite(low):
        check_attention(q, k, v, mask, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_attention_of_large_scores_and_of_nothing(isa: str) -> None:
    q, k, v = (np.full((1, 3, 1, 4), value, np.float32) for value in (1e4, 1e4, 2))
    np.testing.assert_array_equal(native_attention(q, k, v, scale=1, isa=isa), v)
    empty = np.zeros((1, 0, 1, 4), np.float32)
    np.testing.assert_array_equal(native_attention(q, empty, empty, scale=1, isa=isa), np.zeros_like(q))
    assert native_attention(empty, k, v, scale=1, isa=isa).size == 0


def check_norm(
    rng: np.random.Generator,
    rows: int,
    size: int,
    *,
    centred: bool,
    shift: bool,
    residual: int,
    **options: Any,
) -> None:
    x = (rng.standard_normal((rows, size)) * 3 + 5).astype(np.float32)
    gain, bias = rng.standard_normal((2, size)).astype(np.float32)
    other = rng.standard_normal((residual, size)).astype(np.float32) if residual else None
    y, z = native_norm(
        x, gain, shift=bias if shift else None, residual=other, centred=centred, epsilon=1e-3, **options
    )
    total = x.astype(np.float64)
    if other is not None:
        total = total + other[np.arange(rows) % residual]
    np.testing.assert_allclose(z, total, rtol=2 * EPS, atol=8 * EPS)
    deviation = total - total.mean(axis=1, keepdims=True) if centred else total
    root = np.sqrt(np.mean(deviation**2, axis=1, keepdims=True) + 1e-3)
    expected = deviation / root * gain + (bias if shift else 0)
    bound = EPS * (12 + size**0.5) * (1 + np.abs(total).max() / root) * (np.abs(gain) + np.abs(bias))
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("centred", [True, False])
def test_norm_of_every_size(isa: str, centred: bool) -> None:
    rng = np.random.default_rng(4)
    for rows, size in itertools.product((1, 5), (1, 3, 15, 16, 17, 63, 64, 65, 384, 1001)):
        for shift, residual in itertools.product((True, False), (0, rows, 1)):
            check_norm(rng, rows, size, centred=centred, shift=shift, residual=residual, isa=isa)
    check_norm(rng, 12, 20, centred=centred, shift=True, residual=4, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_norm_and_gate_on_threads(isa: str, pool_executor: Callable[[int], Any]) -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((301, 2 * 150)).astype(np.float32)
    lent = pool_executor(3)
    check_norm(rng, 300, 130, centred=True, shift=True, residual=100, isa=isa, executor=lent)
    np.testing.assert_array_equal(
        native_gate(x, "Silu", isa=isa, executor=lent), native_gate(x, "Silu", isa=isa)
    )


@pytest.mark.parametrize("isa", ISAS)
def test_norm_of_nan_stays_in_its_row(isa: str) -> None:
    x = np.ones((3, 40), np.float32)
    x[1, 39] = np.nan
    y, _ = native_norm(x, np.ones(40, np.float32), isa=isa)
    assert np.isnan(y).any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "activation", ["", "Relu", "Sigmoid", "Tanh", "Gelu", "GeluTanh", "Silu", "HardSwish"]
)
def test_gate(isa: str, activation: str) -> None:
    rng = np.random.default_rng(6)
    for rows, size in ((1, 1), (3, 15), (2, 17), (4, 256), (2, 700)):
        x = (rng.standard_normal((rows, 2 * size)) * 4).astype(np.float32)
        gates, ups = x.astype(np.float64)[:, :size], x[:, size:]
        expected = activated(gates, activation) * ups
        bound = 16 * EPS * (1 + np.abs(gates)) * (1 + np.abs(ups))
        assert (np.abs(native_gate(x, activation, isa=isa) - expected) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ["Gelu", "GeluTanh"])
def test_gelu_everywhere(isa: str, activation: str) -> None:
    """Pieces of a table must meet, small numbers keep their relative precision and large ones saturate."""
    grid = np.linspace(-7, 7, 20001)
    small = np.geomspace(1e-30, 0.1, 200)
    gates = np.concatenate([grid, small, -small, [0.0, -0.0, 40.0, -40.0, 1e30, -1e30]]).astype(np.float32)
    y = native_gate(np.concatenate([gates, np.ones_like(gates)])[None], activation, isa=isa)[0]
    expected = activated(gates.astype(np.float64), activation)
    relative = np.where(np.abs(gates) < 0.1, 8 * EPS * np.abs(expected), np.inf)
    bound = np.minimum(relative, 4 * EPS * (1 + np.abs(gates)))
    assert (np.abs(y - expected) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
def test_tanh_ends_at_one(isa: str) -> None:
    """Anything less would leave a share of a large negative input in GeluTanh."""
    large = np.array([8, 8.5, 9, 40, 1e4, 1e30], np.float32)
    gates = np.concatenate([large, -large])
    both = np.concatenate([gates, np.ones_like(gates)])[None]
    assert (native_gate(both, "Tanh", isa=isa)[0] == np.sign(gates)).all()
    assert (native_gate(both, "GeluTanh", isa=isa)[0] == np.maximum(gates, 0)).all()


def test_every_isa_has_its_kernel() -> None:
    rows = [
        line.split()
        for line in transformer_library().sparsecc_transformer_kernel_table().decode().splitlines()
    ]
    assert {row[1] for row in rows} == set(ISAS)


def _error(function: str, *arguments: Any) -> str:
    text = ctypes.create_string_buffer(512)
    assert getattr(transformer_library(), function)(*arguments, text, 512)
    return text.value.decode()


def test_bad_descriptors_are_refused() -> None:
    good = {
        "struct_size": ctypes.sizeof(AttentionDesc),
        "batch": 1,
        "heads": 1,
        "kv_heads": 1,
        "queries": 1,
        "keys": 1,
        "head_size": 1,
    }
    for wrong, message in (
        ({"struct_size": 8}, "struct_size"), ({"batch": -1}, "negative or too large"),
        ({"head_size": 1 << 40}, "too large"), ({"keys": 1 << 40}, "too large"),
        ({"heads": 4, "kv_heads": 3}, "does not divide"), ({"kv_heads": 0}, "does not divide"),
        ({"cosines": 64}, "missing"), ({"cosines": 64, "sines": 64}, "even head size"),
        ({"cosines": 64, "sines": 64, "head_size": 2, "keys": 2}, "as many queries"),
        ({"rotary_strides": (0, -1)}, "stride"), ({"mask_strides": (0, 0, 0, 2)}, "0 or 1"),
        ({"q_strides": (0, -1, 0)}, "stride"), ({}, "must not be null"),
    ):  # fmt: skip
        desc = AttentionDesc(**{**good, **wrong})
        assert message in _error("sparsecc_attention_run", ctypes.byref(desc), None)
    size = ctypes.sizeof(NormDesc)
    for fields, message in (
        ({}, "struct_size"), ({"struct_size": size, "rows": -1}, "rows"),
        ({"struct_size": size, "rows": 1, "size": 1}, "must not be null"),
        ({"struct_size": size, "rows": 1, "size": 1, "residual": 64}, "residual_rows"),
    ):  # fmt: skip
        assert message in _error("sparsecc_norm_run", ctypes.byref(NormDesc(**fields)), None)
    assert "without parameters" in _error("sparsecc_gate_run", None, 1, 1, 2, None, None, None)
    assert "must not be null" in _error("sparsecc_gate_run", None, 1, 1, 1, None, None, None)
    assert "null" in _error("sparsecc_attention_run", None, None)
    assert "null" in _error("sparsecc_norm_run", None, None)
    with pytest.raises(UsageError, match="isa"):
        native_gate(np.ones((1, 2), np.float32), "Silu", isa="sse9")
    with pytest.raises(UsageError, match="fit together"):
        native_attention(*(np.ones((1, n, 1, 1), np.float32) for n in (1, 2, 3)), scale=1)
    one = np.ones((1, 2, 1, 2), np.float32)
    with pytest.raises(UsageError, match="cosines and sines"):
        native_attention(one, one, one, scale=1, rotary=(np.ones((1, 2, 2)), np.ones((1, 2, 3))))
