"""Weights as tensor trains: TT-SVD and its bound, Kronecker whitening, sweeps, and the rewritten graph."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.factor.tensor_train_fit import (
    Modes,
    affordable_ranks,
    fit_train,
    kronecker_factors,
    near_factors,
    train_svd,
)
from sparsecc.passes.prune.gram import quadratic_error
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault

SHAPES = [(12, 20, 2), (30, 24, 3), (15, 49, 2), (4, 4, 2), (8, 27, 3), (105, 8, 3)]


def modes(rows: int, columns: int, count: int) -> Modes:
    first, second = near_factors(rows, count), near_factors(columns, count)
    assert first is not None
    assert second is not None
    return Modes(first[::-1], second)


def correlated(size: int, rng: np.random.Generator, rows: int | None = None) -> np.ndarray:
    """Second moments of inputs of mixed and very different sizes, damped where there are few of them."""
    mixed = rng.standard_normal((size, size)) * np.exp(rng.standard_normal(size))
    x = rng.standard_normal((rows or 4 * size, size)) @ mixed
    gram = x.T @ x / len(x)
    return gram + 0.01 * np.trace(gram) / size * np.eye(size)


@pytest.mark.parametrize(
    ("size", "count", "expected"),
    [(768, 2, (24, 32)), (30, 3, (2, 3, 5)), (49, 2, (7, 7)), (7, 2, None), (6, 3, None), (1, 1, None)],
)
def test_factors_are_as_equal_as_they_can_be(size, count, expected):
    assert near_factors(size, count) == expected


@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_full_ranks_hold_every_matrix(rows, columns, count):
    rng = np.random.default_rng(rows)
    weight, cut = rng.standard_normal((rows, columns)), modes(rows, columns, count)
    np.testing.assert_array_equal(cut.matrix(cut.tensor(weight)), weight)
    cores, dropped = train_svd(weight, cut, cut.full)
    np.testing.assert_allclose(cut.product(cores), weight, atol=1e-12)
    assert sum(dropped) < 1e-12
    assert cut.numbers(cut.full) == sum(core.size for core in cores)


def test_entries_are_products_of_the_matrices_of_the_cores():
    """Against the definition, one entry at a time."""
    rng = np.random.default_rng(1)
    cut, ranks = Modes((3, 2, 2), (2, 3, 2)), (1, 4, 3, 1)
    cores = [
        rng.standard_normal((r, n, k, s))
        for r, n, k, s in zip(ranks, cut.rows, cut.columns, ranks[1:], strict=False)
    ]
    found = cut.product(cores)
    for output in np.ndindex(*cut.rows[::-1]):
        for given in np.ndindex(*cut.columns):
            value = np.eye(1)
            for core, n, k in zip(cores, output[::-1], given, strict=True):
                value = value @ core[:, n, k]
            row = np.ravel_multi_index(output, cut.rows[::-1])
            column = np.ravel_multi_index(given, cut.columns)
            assert found[row, column] == pytest.approx(value[0, 0])


@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_tt_svd_stays_below_what_it_drops(rows, columns, count, share):
    weight, cut = (
        np.random.default_rng(columns).standard_normal((rows, columns)),
        modes(rows, columns, count),
    )
    ranks = affordable_ranks(cut, int(share * rows * columns))
    if ranks is None:
        assert cut.numbers([1] * (count - 1)) > share * rows * columns
        return
    assert cut.numbers(ranks) <= share * rows * columns
    cores, dropped = train_svd(weight, cut, ranks)
    error = np.square(cut.product(cores) - weight).sum()
    assert error <= sum(dropped) * (1 + 1e-9)
    tensor = cut.tensor(weight)
    for at, rank in enumerate(
        ranks, 1
    ):  # of each cut, the tail of the unfolding is what no train can get below
        values = np.linalg.svd(tensor.reshape(math.prod(tensor.shape[:at]), -1), compute_uv=False)
        assert np.square(values[rank:]).sum() <= error * (1 + 1e-9)


def test_kronecker_products_come_back():
    rng = np.random.default_rng(3)
    parts = [correlated(size, rng) for size in (3, 4, 2)]
    whole = np.kron(np.kron(parts[0], parts[1]), parts[2])
    found = kronecker_factors(whole, (3, 4, 2))
    np.testing.assert_allclose(np.kron(np.kron(found[0], found[1]), found[2]), whole, rtol=1e-9)


@pytest.mark.parametrize("rows", [3, 200])
def test_kronecker_factors_of_any_gram_are_positive(rows):
    found = kronecker_factors(correlated(12, np.random.default_rng(rows), rows), (3, 4))
    assert all(np.linalg.eigvalsh(factor).min() > 0 for factor in found)


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (15, 49), (4, 4)])
def test_two_cores_are_the_best_where_the_gram_is_a_kronecker_product(rows, columns):
    rng = np.random.default_rng(rows)
    cut, weight = modes(rows, columns, 2), rng.standard_normal((rows, columns))
    roots = [np.linalg.cholesky(correlated(size, rng)) for size in cut.columns]
    root = np.kron(*roots)
    ranks = (max(1, min(cut.sizes) // 2),)
    cores, objectives = fit_train(weight, root @ root.T, cut, ranks, 1, 2)
    values = np.linalg.svd(cut.tensor(weight @ root), compute_uv=False)
    best = np.square(values[ranks[0] :]).sum()
    assert objectives[0] == pytest.approx(best, rel=1e-6)
    assert quadratic_error(cut.product(cores) - weight, root @ root.T) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_sweeps_only_lower_the_error(rows, columns, count):
    rng = np.random.default_rng(rows + columns)
    weight, gram, cut = (
        rng.standard_normal((rows, columns)),
        correlated(columns, rng, 7),
        modes(rows, columns, count),
    )
    ranks = affordable_ranks(cut, int(0.7 * rows * columns))
    assert ranks is not None
    cores, objectives = fit_train(weight, gram, cut, ranks, 4, 3)
    total = quadratic_error(weight, gram)
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(objectives))
    assert quadratic_error(cut.product(cores) - weight, gram) == pytest.approx(
        objectives[-1], abs=1e-9 * total
    )


def test_many_steps_reach_the_least_squares_solution_of_a_core():
    """With the second core as found, the first is what solves its normal equations."""
    rng = np.random.default_rng(5)
    cut, weight, gram = Modes((3, 2), (2, 3)), rng.standard_normal((6, 6)), correlated(6, rng)
    cores, objectives = fit_train(weight, gram, cut, (2,), 60, 40)
    jacobian = []
    for at in range(cores[0].size):
        unit = np.zeros(cores[0].size)
        unit[at] = 1.0
        jacobian.append((cut.product([unit.reshape(cores[0].shape), cores[1]])).ravel())
    root = np.kron(np.eye(6), np.linalg.cholesky(gram).T)  # acts on rows laid end to end
    design, wanted = root @ np.array(jacobian).T, root @ weight.ravel()
    solved = np.linalg.lstsq(design, wanted, rcond=None)[0]
    assert np.square(design @ solved - wanted).sum() == pytest.approx(objectives[-1], rel=2e-3)


def test_zero_and_rank_one_weights_are_met_exactly():
    gram, cut = correlated(12, np.random.default_rng(8)), Modes((3, 2), (3, 4))
    for weight in (np.zeros((6, 12)), np.ones((6, 12))):
        cores, _ = fit_train(weight, gram, cut, (2,), 2, 4)
        np.testing.assert_allclose(cut.product(cores), weight, atol=1e-9)


def build(body: str, given: str, **weights: np.ndarray) -> Model:
    text = f"g (float[{given}] x) => (float[{given.replace('24', 'n')}] y) {{ {body} }}"
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def factorised(model: Model, x: np.ndarray, options: str):
    source = Calibration.from_batches([{"x": x}], model, threads=1)
    spec = f"factor-tensor-train{{multiple=1 min-elements=1 keep-slower=true bias=false {options}}}"
    (report,) = Pipeline.parse(spec).run(model, PassContext(calibration=source, threads=1))
    return report


PRODUCTS = [
    ("[s] y = MatMul(x, w)", "N,24", (24, 40)),
    ("[s] h = MatMul(x, w) y = Add(h, b)", "N,T,24", (24, 40)),
    ("[s] h = MatMul(x, w) y = Relu(h)", "N,2,M,24", (24, 40)),
    ("[s] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)", "N,24", (40, 24)),
]


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize(("body", "given", "shape"), PRODUCTS)
def test_the_chain_computes_the_weight_that_was_reported(body, given, shape, cores):
    rng = np.random.default_rng(len(body))
    model = build(
        body,
        given,
        w=rng.standard_normal(shape).astype(np.float32),
        b=rng.standard_normal(40).astype(np.float32),
    )
    axes = [int(axis) if axis.isdigit() else 5 for axis in given.split(",")]
    x = rng.standard_normal(axes).astype(np.float32)
    whole = model.copy()
    (change,) = factorised(model, x, f"cores={cores} param-ratio=0.6").changed
    assert graph_fault(model) is None
    found = [site.numpy() for site in model.sites()]
    assert len(found) == cores
    assert change.numbers["parameters"] == sum(core.size for core in found) / (24 * 40) <= 0.6
    # what it does to unit vectors is the weight, as far from the old one as was reported
    unit = np.eye(24, dtype=np.float32).reshape(24, *[1] * (len(axes) - 2), 24)
    unit = np.repeat(unit, 2, 1) if len(axes) == 4 else unit
    whole, now = (
        [open_session(part).run({"x": given})["y"] for given in (unit, 0 * unit)] for part in (whole, model)
    )
    assert now[0].shape == (*unit.shape[:-1], 40)
    np.testing.assert_allclose(now[1], whole[1], atol=1e-5)
    if "Relu" not in body:
        lost, old = now[0] - whole[0], whole[0] - whole[1]
        assert np.linalg.norm(lost) / np.linalg.norm(old) == pytest.approx(
            change.numbers["relative_error"], rel=1e-3
        )
    for count in (0, 1, 3):
        given_now = np.repeat(x[:1], count, 0)
        assert len(open_session(model).run({"x": given_now})["y"]) == count


def test_full_ranks_give_the_same_outputs():
    rng = np.random.default_rng(9)
    weight = np.kron(rng.standard_normal((4, 8)), rng.standard_normal((6, 5))).astype(np.float32)
    x = rng.standard_normal((64, 3, 24)).astype(np.float32)
    cut = Modes((8, 5), (4, 6))
    assert near_factors(24, 2) == cut.columns
    ordered = (
        weight.reshape(4, 6, 8, 5).transpose(0, 1, 3, 2).reshape(24, 40)
    )  # a product of rank 1, outputs (5, 8)
    model = build("[s] y = MatMul(x, w)", "N,T,24", w=ordered)
    dense = open_session(model).run({"x": x})["y"]
    (change,) = factorised(model, x, "param-ratio=0.1").changed
    assert change.detail.startswith("tensor train 8 x 5 by 4 x 6, rank 1:")
    assert change.numbers["macs"] == 4 * 6 * 5 + 5 * 4 * 8
    np.testing.assert_allclose(open_session(model).run({"x": x})["y"], dense, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "given", "shape", "reason"),
    [
        ("[s] y = MatMul(x, w)", "N,24", (24, 41), "41 has no 2 factors of 2 or more"),
        ("[s] y = Conv(x, w)", "N,24,9", (8, 24, 1), "it is a convolution: tensor trains are for products"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 4), "9 numbers do not hold cores of rank 1 of 4 x 24 weights"),
    ],
)
def test_refusals_have_a_reason(body, given, shape, reason):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = build(body, given, w=weight)
    x = np.ones([int(axis) if axis.isdigit() else 5 for axis in given.split(",")], np.float32)
    report = factorised(model, x, "param-ratio=0.1")
    assert [item.reason for item in report.skipped] == [reason]


@pytest.mark.parametrize("options", ["cores=1", "cores=4", "sweeps=-1", "param-ratio=0", "param-ratio=2"])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="must be"):
        Pipeline.parse(f"factor-tensor-train{{{options}}}")
