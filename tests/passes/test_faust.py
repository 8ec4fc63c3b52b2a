"""Products of sparse factors: fast transforms come back exactly, errors never rise, other weights are refused."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from sparsecc.calib import open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.factor.palm import (
    Limits,
    digit_reversal,
    greedy_support,
    palm4msa,
    product,
    sparse_factors,
)
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault


def hadamard(size: int) -> np.ndarray:
    whole = np.ones((1, 1))
    while len(whole) < size:
        whole = np.kron(whole, [[1.0, 1.0], [1.0, -1.0]])
    return whole


def fourier(size: int) -> np.ndarray:
    return np.exp(-2j * np.pi * np.outer(np.arange(size), np.arange(size)) / size)


def as_real(matrix: np.ndarray) -> np.ndarray:
    """Complex numbers as blocks of 2 x 2."""
    one, turn = np.eye(2), np.array([[0.0, -1.0], [1.0, 0.0]])
    return np.kron(matrix.real, one) + np.kron(matrix.imag, turn)


def distance(factors: list[np.ndarray], matrix: np.ndarray) -> float:
    return float(np.linalg.norm(product(factors) - matrix) / np.linalg.norm(matrix))


def test_hadamard_32_is_five_factors_of_two_per_row():
    factors, error = sparse_factors(hadamard(32), [2] * 5)
    assert error < 1e-20
    assert len(factors) == 5
    np.testing.assert_allclose(product(factors), hadamard(32), atol=1e-12)
    for factor in factors:
        assert (np.count_nonzero(factor, axis=0) == 2).all()
        assert (np.count_nonzero(factor, axis=1) == 2).all()


@pytest.mark.parametrize("radices", [(2, 2, 2, 2), (4, 4), (2, 2, 3), (3, 4), (4, 3), (5, 3)])
def test_fourier_matrices_come_back(radices):
    matrix = fourier(int(np.prod(radices)))
    factors, error = sparse_factors(matrix, radices)
    assert distance(factors, matrix) < 1e-12
    assert error < 1e-20
    for factor, radix in zip(factors, radices, strict=True):
        assert np.count_nonzero(factor, axis=1).max() <= radix


@pytest.mark.parametrize("radices", [(2, 2, 2), (4, 4), (3, 2)])
def test_fourier_matrices_of_real_blocks_come_back(radices):
    matrix = as_real(fourier(int(np.prod(radices))))
    factors, _ = sparse_factors(matrix, radices, block=2)
    assert distance(factors, matrix) < 1e-12
    for factor, radix in zip(factors, radices, strict=True):
        assert np.count_nonzero(factor, axis=1).max() <= 2 * radix


def test_signs_and_scales_of_outputs_and_inputs_do_not_matter():
    rng = np.random.default_rng(0)
    matrix = rng.choice([-1.0, 1.0], (16, 1)) * hadamard(16) * 0.25 * rng.choice([-1.0, 1.0], 16)
    factors, _ = sparse_factors(matrix.astype(np.float32).astype(np.float64), [2] * 4)
    assert distance(factors, matrix) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_errors_never_rise_and_limits_hold(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 14, 4)
    matrix = rng.standard_normal((sizes[0], sizes[3])) @ np.diag(np.exp(rng.standard_normal(sizes[3])))
    limits = [Limits(int(rng.integers(1, 4)), int(rng.integers(1, 4))) for _ in range(3)]
    start = [rng.standard_normal(shape) for shape in itertools.pairwise(sizes)]
    start = [factor * limit.support(factor) for factor, limit in zip(start, limits, strict=True)]
    factors, errors = palm4msa(matrix, start, limits, 40)
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(errors))
    assert np.square(product(factors) - matrix).sum() == pytest.approx(errors[-1])
    for factor, limit in zip(factors, limits, strict=True):
        assert np.count_nonzero(factor, axis=1).max() <= limit.per_row
        assert np.count_nonzero(factor, axis=0).max() <= limit.per_column


def test_without_limits_a_step_of_one_factor_is_the_matrix():
    matrix = np.random.default_rng(1).standard_normal((5, 7))
    factors, errors = palm4msa(matrix, [np.zeros((5, 7))], [Limits(7, 5)], 3)
    np.testing.assert_allclose(factors[0], matrix, rtol=1e-6)
    assert errors[-1] < 1e-12


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_degenerate_matrices(value):
    matrix = np.full((8, 8), value)
    factors, error = sparse_factors(matrix, [2] * 3)
    assert error <= np.square(matrix).sum()
    assert all(np.isfinite(factor).all() for factor in factors)


def test_supports_take_the_largest_and_blocks_where_all_are_equal():
    scores = np.array([[3.0, 2.0, 0.0], [2.5, 1.0, 0.5]])
    expected = [[True, False, False], [False, True, False]]
    np.testing.assert_array_equal(greedy_support(scores, 1, 1), expected)
    even = greedy_support(np.ones((4, 4)) + 1e-9 * np.arange(16).reshape(4, 4), 2, 2)
    np.testing.assert_array_equal(even, np.kron(np.eye(2), np.ones((2, 2))).astype(bool))
    assert not greedy_support(np.zeros((3, 3)), 2, 2).any()


def test_reversed_digits():
    np.testing.assert_array_equal(digit_reversal([2, 2, 2]), [0, 4, 2, 6, 1, 5, 3, 7])
    np.testing.assert_array_equal(sorted(digit_reversal([2, 3, 4])), range(24))


def build(body: str, weight: np.ndarray, given: str = "N,32", wide: int = 32) -> Model:
    text = f"g (float[{given}] x) => (float[{given.replace('32', str(wide))}] y) {{ {body} }}"
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>' + text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "w"))
    return Model.from_proto(proto)


@pytest.mark.parametrize(
    ("body", "given"),
    [
        ("[s] y = MatMul(x, w)", "N,32"),
        ("[s] y = MatMul(x, w)", "N,3,32"),
        ("[s] y = Gemm <transB = 1, alpha = 0.5> (x, w)", "N,32"),
    ],
)
def test_transforms_in_graphs_give_the_same_outputs(body, given):
    model = build(body, as_real(fourier(16)), given)
    x = np.random.default_rng(2).standard_normal(
        [3 if axis == "N" else int(axis) for axis in given.split(",")]
    )
    before = open_session(model).run({"x": x.astype(np.float32)})["y"]
    (report,) = Pipeline.parse("factor-faust{min-elements=1 block=2 fan-in=8}").run(model, PassContext())
    (change,) = report.changed
    assert change.detail.startswith("2 sparse factors with 8, 8 entries per row")
    assert change.numbers["parameters"] <= 2 * 8 / 32
    assert graph_fault(model) is None
    assert len(model.sites()) == 2
    np.testing.assert_allclose(open_session(model).run({"x": x.astype(np.float32)})["y"], before, atol=1e-4)


@pytest.mark.parametrize(
    ("weight", "options", "reason"),
    [
        (np.random.default_rng(3).standard_normal((32, 32)), "", "away from 2 sparse factors"),
        (hadamard(32) + np.eye(32), "factors=5", "away from 5 sparse factors"),
        (np.ones((32, 31)), "", "it is 31 x 32: only square transforms are looked for"),
        (hadamard(32), "multiple=3", "32 is no product of what its factors may have in a row"),
        (hadamard(32), "param-ratio=0.2", "hold 384 numbers, 204 are allowed"),
        (hadamard(32), "custom-ops=false keep-slower=false", "takes 8192 bytes, dense 4096"),
    ],
)
def test_refusals_have_a_reason(weight, options, reason):
    model = build("[s] y = MatMul(x, w)", weight, wide=weight.shape[1])
    before = model.fingerprint()
    (report,) = Pipeline.parse(f"factor-faust{{min-elements=1 {options}}}").run(model, PassContext())
    assert not report.changed
    assert reason in report.skipped[0].reason
    assert model.fingerprint() == before


@pytest.mark.parametrize("options", ["fan-in=1", "factors=1", "block=3", "max-error=-1", "max-error=nan"])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="must be"):
        Pipeline.parse(f"factor-faust{{{options}}}")
