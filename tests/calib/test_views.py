"""Sums of the views against matrices that are really unfolded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecc.calib.views import Patches, Rows, States, Statistic, View


def reference(rows: np.ndarray, statistic: Statistic) -> np.ndarray:
    rows = rows.astype(np.float64)
    return {"mean": rows.sum(0), "mean_square": (rows**2).sum(0), "gram": rows.T @ rows}[statistic]


def sums(view: View, x: np.ndarray, statistic: Statistic) -> tuple[np.ndarray, int]:
    found = view.sums(x, statistic, np.random.default_rng(0))
    return found.total, found.rows


def unfold(x: np.ndarray, view: Patches, pads: tuple[int, ...]) -> np.ndarray:
    """Patches ``[groups, rows, K]`` by loops over every output position."""
    rank = len(view.kernel)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    extents = [(k - 1) * d + 1 for k, d in zip(view.kernel, view.dilations, strict=True)]
    starts = [range(0, n - e + 1, s) for n, e, s in zip(padded.shape[2:], extents, view.strides, strict=True)]
    rows = []
    for picture in padded:
        for start in itertools.product(*starts):
            window = tuple(slice(a, a + e, d) for a, e, d in zip(start, extents, view.dilations, strict=True))
            rows.append(picture[(slice(None), *window)].reshape(view.groups, -1))
    return np.stack(rows, axis=1)


@pytest.mark.parametrize("statistic", ["mean", "mean_square", "gram"])
def test_rows(statistic: Statistic) -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float16)
    total, count = sums(Rows(), x, statistic)
    np.testing.assert_allclose(total, reference(x.reshape(-1, 3), statistic))
    assert total.dtype == np.float64
    assert count == 10


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Patches, np.ndarray]:
    rank = draw(st.integers(1, 3))

    def axes(low: int, high: int, count: int = rank) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(count))

    groups = draw(st.integers(1, 3))
    view = Patches(
        kernel=axes(1, 3),
        strides=axes(1, 3),
        dilations=axes(1, 2),
        pads=axes(0, 2, 2 * rank),
        groups=groups,
        positions=10_000,
    )
    channels = groups * draw(st.integers(1, 2))
    sizes = tuple(
        draw(st.integers((k - 1) * d + 1, 7)) for k, d in zip(view.kernel, view.dilations, strict=True)
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return view, rng.standard_normal((draw(st.integers(1, 2)), channels, *sizes)).astype(np.float32)


@settings(max_examples=60)
@given(convolutions(), st.sampled_from(["mean", "mean_square", "gram"]))
def test_patches(case: tuple[Patches, np.ndarray], statistic: Statistic) -> None:
    view, x = case
    patches = unfold(x, view, view.pads)
    expected = np.stack([reference(group, statistic) for group in patches])
    total, count = sums(view, x, statistic)
    assert count == patches.shape[1]
    np.testing.assert_allclose(total, expected[0] if view.groups == 1 else expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("odd_first", [False, True])
def test_same_padding(odd_first: bool) -> None:
    x = np.arange(1, 13, dtype=np.float32).reshape(1, 1, 12)
    view = Patches((3,), (2,), (1,), None, odd_first=odd_first)
    total, count = sums(view, x, "mean_square")
    expected = unfold(x, view, (1, 0) if odd_first else (0, 1))[0]
    assert count == len(expected) == 6
    np.testing.assert_allclose(total, (expected**2).sum(0))


def test_gram_of_chosen_positions() -> None:
    x = np.random.default_rng(1).standard_normal((3, 2, 9, 9)).astype(np.float32)
    view = Patches((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), positions=20)
    total, count = sums(view, x, "gram")
    assert count == 3 * 20
    assert np.linalg.eigvalsh(total).min() > -1e-9
    again, _ = sums(view, x, "gram")
    np.testing.assert_array_equal(total, again)
    chosen = np.sort(np.random.default_rng(0).choice(81, 20, replace=False))
    rows = unfold(x, view, view.pads)[0].reshape(3, 81, -1)[:, chosen].reshape(60, -1)
    np.testing.assert_allclose(total, reference(rows, "gram"))


@pytest.mark.parametrize("statistic", ["mean", "mean_square", "gram"])
def test_states(statistic: Statistic) -> None:
    y = np.random.default_rng(2).standard_normal((4, 2, 3, 5)).astype(np.float32)
    rows = np.concatenate([y[:-1, 0].reshape(-1, 5), y[1:, 1].reshape(-1, 5)])
    total, count = sums(States(("forward", "reverse"), from_zero=False), y, statistic)
    np.testing.assert_allclose(total, reference(rows, statistic))
    assert count == len(rows)
    _, with_zero = sums(States(("forward", "reverse"), from_zero=True), y, statistic)
    assert with_zero == len(rows) + 2 * 3
