"""Monarch and block tensor-train: projections, sweeps, and the rewritten graph."""

from __future__ import annotations

import itertools
import math

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.factor.btt_fit import BlockFactors, blocks_of, fit, project, refit_left
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import quadratic_error
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault

#: (N, K, grid): square, rectangular, one row, one column, one of each, single entries.
SHAPES = [
    (12, 12, (3, 4)), (12, 20, (4, 5)), (20, 12, (2, 3)), (6, 8, (1, 4)), (8, 6, (4, 1)), (5, 7, (1, 1)),
    (1, 6, (1, 2)), (6, 1, (3, 1)), (6, 6, (6, 6)),
]  # fmt: skip


def correlated(size: int, seed: int, rows: int | None = None) -> np.ndarray:
    """Second moments of inputs of mixed and very different sizes, damped as passes do."""
    rng = np.random.default_rng([seed, size])
    x = rng.standard_normal((rows or 4 * size, size)) @ rng.standard_normal((size, size))
    x *= np.exp(rng.standard_normal(size))
    gram = x.T @ x / len(x)
    return gram + 0.01 * np.trace(gram) / size * np.eye(size)


def monarch(rows: int, columns: int, grid: tuple[int, int], rank: int, rng) -> BlockFactors:
    (down, across), height, width = grid, rows // grid[0], columns // grid[1]
    return BlockFactors(
        rng.standard_normal((down, across, height, rank)), rng.standard_normal((down, across, rank, width))
    )


@pytest.mark.parametrize(("rows", "columns", "grid"), SHAPES)
def test_projection_is_the_svd_of_every_block_and_exact_where_it_can_be(rows, columns, grid):
    rng = np.random.default_rng(rows * columns)
    weight = rng.standard_normal((rows, columns))
    np.testing.assert_array_equal(
        blocks_of(weight, grid)[0, -1], weight[: rows // grid[0], columns - columns // grid[1] :]
    )
    full = min(rows // grid[0], columns // grid[1])
    errors = []
    for rank in range(1, full + 1):
        found = project(weight, grid, rank)
        tails = np.linalg.svd(blocks_of(weight, grid), compute_uv=False)[..., rank:]
        errors.append(np.square(weight - found.total()).sum())
        assert errors[-1] == pytest.approx(np.square(tails).sum(), abs=1e-12)
        np.testing.assert_allclose(found.balanced().total(), found.total(), atol=1e-12)
        own = monarch(rows, columns, grid, rank, rng)
        np.testing.assert_allclose(project(own.total(), grid, rank).total(), own.total(), atol=1e-10)
        refitted, _ = fit(own.total(), correlated(columns, 1), grid, rank, 3)
        np.testing.assert_allclose(refitted.total(), own.total(), atol=1e-7)
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(0, abs=1e-12)


def test_entries_are_those_of_the_definition():
    rng = np.random.default_rng(2)
    form = monarch(6, 12, (2, 3), 2, rng)
    total = form.total()
    for i, j in np.ndindex(6, 12):
        (k, p), (r, s) = divmod(i, 3), divmod(j, 4)
        assert total[i, j] == pytest.approx(form.left[k, r, p] @ form.right[k, r, :, s])


def test_discrete_fourier_transform_is_monarch_in_the_order_of_its_first_step():
    side = 4
    order = np.arange(side * side).reshape(side, side).T.ravel()  # every fourth one, from each start
    count = np.arange(side * side)
    transform = np.exp(-2j * np.pi * np.outer(count, count) / side**2)[np.ix_(order, order)]
    found = project(transform, (side, side), 1)
    np.testing.assert_allclose(found.total(), transform, atol=1e-12)
    assert np.abs(project(transform[:, order], (side, side), 1).total() - transform[:, order]).max() > 0.1
    hadamard = np.array([[1.0]])
    for _ in range(4):
        hadamard = np.kron(hadamard, [[1, 1], [1, -1]])
    hadamard = hadamard[order]
    np.testing.assert_allclose(project(hadamard, (4, 4), 1).total(), hadamard, atol=1e-12)


@pytest.mark.parametrize(("rows", "columns", "grid"), SHAPES)
def test_sweeps_never_raise_the_error_and_start_at_panels_by_themselves(rows, columns, grid):
    rng = np.random.default_rng(7 * rows + columns)
    weight, gram = rng.standard_normal((rows, columns)), correlated(columns, 2)
    width, height = columns // grid[1], rows // grid[0]
    previous = math.inf
    for rank in range(1, min(height, width) + 1):
        found, objectives = fit(weight, gram, grid, rank, 5)
        assert quadratic_error(weight - found.total(), gram) == pytest.approx(objectives[-1], abs=1e-9)
        assert all(later <= earlier * (1 + 1e-9) + 1e-12 for earlier, later in itertools.pairwise(objectives))
        start = np.zeros_like(weight)
        for (k, r), block in zip(
            np.ndindex(grid), blocks_of(weight, grid).reshape(-1, height, width), strict=True
        ):
            panel = slice(r * width, (r + 1) * width)
            own = best_factors(block, gram[panel, panel], rank).product()
            start[k * height : (k + 1) * height, panel] = own
        assert quadratic_error(weight - start, gram) == pytest.approx(objectives[0], abs=1e-9)
        assert objectives[0] <= quadratic_error(weight - start, gram) * (1 + 1e-9) + 1e-12
        assert objectives[0] < previous + 1e-9
        previous = objectives[0]


def test_uncorrelated_panels_need_no_sweep_and_plain_inputs_give_the_projection():
    rng = np.random.default_rng(4)
    weight = rng.standard_normal((8, 12))
    found, objectives = fit(weight, np.eye(12), (2, 3), 2, 4)
    np.testing.assert_allclose(found.total(), project(weight, (2, 3), 2).total(), atol=1e-10)
    assert objectives[-1] == pytest.approx(objectives[0])
    one, _ = fit(weight, correlated(12, 3), (1, 1), 3, 2)
    best = best_factors(weight, correlated(12, 3), 3)
    np.testing.assert_allclose(one.total(), best.product(), atol=1e-8)


def test_left_factors_solve_the_least_squares_problem_of_their_row():
    rng = np.random.default_rng(5)
    gram, weight = correlated(12, 4), rng.standard_normal((6, 12))
    start = monarch(6, 12, (2, 3), 2, rng)
    found = refit_left(weight, gram, start)
    root = np.linalg.cholesky(gram)
    for k in range(2):
        features = np.zeros((6, 12))
        for r in range(3):
            features[2 * r : 2 * r + 2, 4 * r : 4 * r + 4] = start.right[k, r]
        rows = weight[3 * k : 3 * k + 3]
        expected = np.linalg.lstsq((features @ root).T, (rows @ root).T, rcond=None)[0].T
        np.testing.assert_allclose(found.left[k].transpose(1, 0, 2).reshape(3, 6), expected, atol=1e-8)


def test_duplicate_and_dead_inputs_and_few_samples_are_no_trouble():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((5, 12))
    x[:, 3], x[:, 7] = 0, x[:, 2]
    gram = x.T @ x + 1e-6 * np.eye(12)
    weight = rng.standard_normal((8, 12))
    found, objectives = fit(weight, gram, (2, 3), 2, 6)
    assert np.isfinite(found.total()).all()
    assert objectives[-1] <= objectives[0]
    zero, _ = fit(np.zeros((8, 12)), gram, (2, 3), 2, 2)
    np.testing.assert_array_equal(zero.total(), 0)


def build(body: str, given: str, **weights: np.ndarray) -> Model:
    text = f"g (float[{given}] x) => (float[{', '.join('abcd'[: given.count(',') + 1])}] y) {{ {body} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def factorised(model: Model, x: np.ndarray, spec: str):
    source = Calibration.from_batches([{"x": x}], model, threads=1)
    name, _, options = spec.partition(" ")
    spec = f"{name}{{min-elements=1 keep-slower=true bias=false {options}}}"
    return Pipeline.parse(spec).run(model, PassContext(calibration=source, threads=1))[0]


PRODUCTS = [
    ("[s] y = MatMul(x, w)", "N,24", (24, 40)),
    ("[s] h = MatMul(x, w) y = Add(h, b)", "N,T,24", (24, 40)),
    ("[s] y = MatMul(x, w)", "N,2,T,24", (24, 40)),
    ("[s] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)", "N,24", (40, 24)),
    ("[s] y = MatMul(x, w)", "N,23", (23, 37)),
]
SPECS = [
    "factor-btt multiple=1", "factor-btt multiple=2 across=2 down=2", "factor-btt multiple=1 across=5 down=3",
    "factor-monarch", "factor-monarch param-ratio=0.99",
]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("body", "given", "shape"), PRODUCTS)
def test_the_chain_computes_the_weight_that_was_reported(body, given, shape, spec):
    rng = np.random.default_rng(len(body))
    bias = rng.standard_normal(40).astype(np.float32)
    model = build(body, given, w=rng.standard_normal(shape).astype(np.float32), b=bias)
    axes = [int(axis) if axis.isdigit() else 5 for axis in given.split(",")]
    x = rng.standard_normal([64, *axes[1:]]).astype(np.float32)
    whole = model.copy()
    (change,) = factorised(model, x, spec).changed
    assert graph_fault(model) is None
    constants = [value.const_value for value in model.onnx.graph.initializers.values()]
    stored = sum(
        tensor.numpy().size for tensor in constants if tensor.dtype.name == "FLOAT" and tensor.name != "b"
    )
    assert stored - (1 if "alpha" in body else 0) - (40 if "beta" in body else 0) == pytest.approx(
        change.numbers["parameters"] * math.prod(shape)
    )
    ratio = 0.99 if "0.99" in spec else 0.7
    assert change.numbers["parameters"] <= ratio
    # what it does to unit vectors is the weight, as far from the old one as was reported
    unit = np.eye(axes[-1], dtype=np.float32).reshape(axes[-1], *[1] * (len(axes) - 2), axes[-1])
    unit = np.repeat(unit, 2, 1) if len(axes) == 4 else unit
    before, now = (
        [open_session(part).run({"x": given})["y"] for given in (unit, 0 * unit)] for part in (whole, model)
    )
    assert now[0].shape == before[0].shape
    np.testing.assert_allclose(now[1], before[1], atol=1e-5)
    lost, old = now[0] - before[0], before[0] - before[1]
    assert np.linalg.norm(lost) / np.linalg.norm(old) == pytest.approx(
        change.numbers["relative_error"], rel=1e-3
    )


def test_one_panel_is_reduced_rank_regression_and_four_beat_it_on_wide_weights():
    rng = np.random.default_rng(8)
    x = (rng.standard_normal((600, 64)) @ rng.standard_normal((64, 64))).astype(np.float32)
    weight = np.concatenate(
        [rng.standard_normal((16, rank)) @ rng.standard_normal((rank, 16)) for rank in (1, 1, 2, 2)], axis=1
    )
    errors = []
    for spec in ("factor-rrr multiple=1", "factor-btt multiple=1 across=1", "factor-btt multiple=1"):
        model = build("[s] y = MatMul(x, w)", "N,64", w=weight.T.astype(np.float32))
        (change,) = factorised(model, x, f"{spec} param-ratio=0.3").changed
        errors.append(change.numbers["output_error"])
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    assert errors[2] < 1e-6 < errors[0]


@pytest.mark.parametrize(
    ("body", "given", "shape", "spec", "reason"),
    [
        ("[s] y = Conv(x, w)", "N,24,9", (8, 24, 1), "factor-btt", "it is a convolution: this form is for products"),
        ("[s] y = MatMul(x, w)", "24", (24, 40), "factor-btt", "its input is one vector"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 4), "factor-btt across=50",
         "4 x 24 weights do not fill a grid of 1 x 50 blocks"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 4), "factor-btt multiple=8 param-ratio=0.1",
         "9 numbers do not hold 1 x 4 blocks of rank 8"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 4), "factor-monarch param-ratio=0.1",
         "9 numbers do not hold blocks of rank 1 of 4 x 24 weights"),
    ],
)  # fmt: skip
def test_refusals_have_a_reason(body, given, shape, spec, reason):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = build(body, given, w=weight) if given != "24" else vector_model(weight)
    x = np.ones([int(axis) if axis.isdigit() else 5 for axis in given.split(",")], np.float32)
    assert [item.reason for item in factorised(model, x, spec).skipped] == [reason]


def vector_model(weight: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[24] x) => (float[40] y) { [s] y = MatMul(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return Model.from_proto(proto)


@pytest.mark.parametrize("options", ["across=-1", "down=0", "sweeps=-1", "param-ratio=0"])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="must be"):
        Pipeline.parse(f"factor-btt{{{options}}}")
