"""CUR and interpolative forms: the laws of their mathematics, and the graphs that come of them."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.factor.base import rewrite
from sparsecc.passes.factor.cur_fit import affordable_link_rank, link
from sparsecc.passes.factor.interpolative import Interpolative
from sparsecc.passes.factor.interpolative_fit import kept_units, transfer, unit_columns
from sparsecc.passes.factor.skeleton_selection import (
    column_shares,
    deim,
    leading_vectors,
    leverage,
    pick_columns,
    pick_rows,
    scaled,
)
from sparsecc.passes.hybrid.lowrank import best_factors
from sparsecc.passes.prune.gram import damped, quadratic_error
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault

SHAPES = [(12, 16), (17, 11), (1, 13), (13, 1), (7, 7)]


def problem(rows: int, columns: int, seed: int, samples: int = 70):
    """A weight, and second moments of inputs that go together and differ in size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((columns, columns)) * np.exp(rng.standard_normal(columns))
    x = rng.standard_normal((samples, columns)) @ mixed
    gram = x.T @ x / samples
    return rng.standard_normal((rows, columns)), damped(gram, 1e-3)[0], np.diag(gram)


def picked(weight, gram, energy, count, selection):
    seen = weight @ np.linalg.cholesky(gram) if selection == "leverage" else scaled(weight, energy)
    return pick_rows(seen, count, selection), pick_columns(weight, seen, energy, count, selection)


@pytest.mark.parametrize("seed", range(4))
def test_deim_takes_the_points_of_the_interpolation_systems(seed):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((23, 9)))[0]
    expected: list[int] = []
    for at in range(9):
        known = basis[expected, :at]
        rest = basis[:, at] - basis[:, :at] @ np.linalg.solve(known, basis[expected, at])
        expected.append(int(np.argmax(np.abs(rest))))
    assert deim(basis).tolist() == expected
    assert deim(basis * np.exp(np.arange(9.0))).tolist() == expected


def test_deim_gives_different_points_where_vectors_are_rounding():
    assert sorted(deim(np.ones((4, 4)))) == [0, 1, 2, 3]
    assert sorted(deim(np.zeros((3, 3)))) == [0, 1, 2]
    assert deim(np.zeros((3, 0))).tolist() == []


@pytest.mark.parametrize("shape", SHAPES)
def test_leading_vectors_are_those_of_the_svd(shape):
    matrix = np.random.default_rng(1).standard_normal(shape)
    count = min(shape)
    expected = np.linalg.svd(matrix)[0][:, :count]
    found = leading_vectors(matrix, count)
    np.testing.assert_allclose(np.abs(expected.T @ found), np.eye(count), atol=1e-7)


def test_shares_are_leverage_scores_where_inputs_do_not_go_together():
    weight = np.random.default_rng(2).standard_normal((9, 14))
    energy = np.exp(np.random.default_rng(3).standard_normal(14))
    shares = column_shares(weight, weight * np.sqrt(energy), energy, 5)
    right = np.linalg.svd(weight * np.sqrt(energy))[2][:5]
    np.testing.assert_allclose(leverage(shares), np.square(right).sum(0), rtol=1e-8)


@pytest.mark.parametrize("selection", ["deim", "leverage"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_output_aware_link_is_the_best_and_never_beats_the_best_rank(shape, selection):
    for seed, count in itertools.product(range(3), {1, min(shape) // 2 or 1, min(shape)}):
        weight, gram, energy = problem(*shape, seed)
        rows, columns = picked(weight, gram, energy, count, selection)
        left, right, root = weight[:, columns], weight[rows], np.linalg.cholesky(gram)
        total = quadratic_error(weight, gram)

        def error(middle, left=left, right=right, weight=weight, gram=gram):
            return quadratic_error(weight - left @ middle @ right, gram)

        aware, plain = link(weight, left, right, root), link(weight, left, right, None)
        best = quadratic_error(weight - best_factors(weight, gram, count).product(), gram)
        assert best <= error(aware) + 1e-9 * total
        assert error(aware) <= error(plain) + 1e-9 * total
        for _ in range(5):
            moved = aware + 1e-3 * np.random.default_rng(seed).standard_normal(aware.shape)
            assert error(aware) <= error(moved) + 1e-9 * total


@pytest.mark.parametrize("selection", ["deim", "leverage"])
def test_a_weight_of_that_rank_comes_back_whole_and_repeats_do_no_harm(selection):
    rng = np.random.default_rng(4)
    _, gram, energy = problem(12, 18, 4)
    weight = rng.standard_normal((12, 5)) @ rng.standard_normal((5, 18))
    weight[:, 7] = weight[:, 3]  # an input twice
    weight[4] = weight[9]
    root = np.linalg.cholesky(gram)
    rows, columns = picked(weight, gram, energy, 5, selection)
    if selection == "deim":
        for known in (root, None):
            whole = weight[:, columns] @ link(weight, weight[:, columns], weight[rows], known) @ weight[rows]
            np.testing.assert_allclose(whole, weight, atol=1e-8)
    more = rng.permutation(12)[:9], rng.permutation(18)[:9]  # far more than there are directions
    repeated = weight[:, more[1]], weight[more[0]]
    middle = link(weight, *repeated, root)
    assert np.isfinite(middle).all()
    np.testing.assert_allclose(repeated[0] @ middle @ repeated[1], weight, atol=1e-7)


def test_the_affordable_link_rank_is_the_break_even_of_the_formula():
    for rows, columns in [(12, 16), (1, 9), (384, 1536), (31, 31)]:
        exact = (np.sqrt(rows**2 + 6 * rows * columns + columns**2) - rows - columns) / 2
        assert affordable_link_rank(rows, columns, rows * columns) == int(exact + 1e-9)
        for numbers in (0, 1, rows * columns // 2):
            rank = affordable_link_rank(rows, columns, numbers)
            assert rank * (rows + columns) + rank * rank <= numbers
            assert (rank + 1) * (rows + columns) + (rank + 1) ** 2 > numbers
    assert affordable_link_rank(100, 100, 7000, 8) == 24


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("selection", ["greedy", "deim", "leverage"])
def test_transfers_are_least_squares_and_no_fewer_inputs_do_better(selection, width):
    weight, gram, energy = problem(5, 8 * width, 6)
    total, before = quadratic_error(weight, gram), np.inf
    for count in (1, 4, 7, 8):
        kept = kept_units(weight, gram, energy, count, selection, width=width)
        assert len(set(kept.tolist())) == count
        assert (np.diff(kept) > 0).all()
        reads = unit_columns(8 * width, width)[kept].ravel()
        weights = transfer(weight, gram, kept, width=width)
        # W G S (S^T G S)^-1, by the formula
        picks = np.eye(8 * width)[:, reads]
        solved = weight @ gram @ picks @ np.linalg.inv(picks.T @ gram @ picks)
        np.testing.assert_allclose(weights, solved, rtol=1e-6, atol=1e-8)
        error = quadratic_error(weight - weights @ picks.T, gram)
        assert error <= before + 1e-9 * total or selection != "greedy"
        before = error
    assert error < 1e-12 * total


def test_greedy_removal_costs_what_it_says_and_is_the_best_for_one():
    weight, gram, energy = problem(6, 9, 8)

    def error(kept):
        left_out = weight.copy()
        left_out[:, kept] -= transfer(weight, gram, np.asarray(kept))
        return quadratic_error(left_out, gram)

    kept = kept_units(weight, gram, energy, 8, "greedy", steps=9)
    every = {gone: error([at for at in range(9) if at != gone]) for gone in range(9)}
    assert error(kept) == min(every.values())


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


GRAPHS = [
    ("[s] y = MatMul(x, w)", {"w": (24, 30)}, ("N", 24)),
    ("[s] h = MatMul(x, w) y = Add(h, b)", {"w": (24, 30), "b": (30,)}, ("N", 3, 24)),
    (
        "[s] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)",
        {"w": (30, 24), "b": (30,)},
        ("N", 24),
    ),
    ("[s] y = Conv <kernel_shape = [3], pads = [1, 1]> (x, w, b)", {"w": (24, 12, 3), "b": (24,)}, ("N", 12, 9)),
    ("[s] y = Conv <strides = [2, 1], pads = [0, 1, 1, 0]> (x, w)", {"w": (19, 13, 3, 3)}, ("N", 13, 9, 8)),
    ("[s] y = Conv (x, w)", {"w": (16, 20, 1, 1)}, ("N", 20, 4, 4)),
]  # fmt: skip
SPECS = [
    "factor-cur{correction=0",
    "factor-cur{merge=true link=frobenius absolute=true",
    "factor-cur{selection=leverage",
    "factor-interpolative{steps=8 run-length=6",
    "factor-interpolative{run-length=1",
    "factor-interpolative{selection=deim",
    "factor-interpolative{selection=leverage",
]


def graph(body: str, given: tuple) -> str:
    sizes, result = ", ".join(map(str, given)), ", ".join(f"d{at}" for at in range(len(given)))
    return f"g (float[{sizes}] x) => (float[{result}] y) {{ {body} }}"


def run(model: Model, x: np.ndarray, spec: str):
    parts = [{"x": part} for part in np.array_split(x, 2)]
    ctx = PassContext(calibration=Calibration.from_batches(parts, model, threads=1), threads=1)
    (report,) = Pipeline.parse(spec).run(model, ctx)
    assert graph_fault(model) is None
    return report


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    return open_session(model).run({"x": x})["y"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("body", "shapes", "given"), GRAPHS)
def test_the_chain_holds_what_was_asked_and_is_as_far_from_dense_as_reported(spec, body, shapes, given):
    weights = {name: normal(*shape) for name, shape in shapes.items()}
    model = build(graph(body, given), **weights)
    dense = model.copy()
    x = normal(200, *given[1:])
    report = run(model, x, f"{spec} param-ratio=0.7 multiple=2 min-elements=1 bias=false}}")
    (change,) = report.changed
    sites = model.sites()
    assert len(sites) == (1 if "interpolative" in spec else 2 if "merge" in spec else 3)
    held = sum(site.numpy().size for site in sites)
    indices = 0 if "cur" in spec else round(change.numbers["parameters"] * weights["w"].size) - held
    assert held + indices <= 0.7 * weights["w"].size
    assert change.numbers["macs"] == held
    expected, found = outputs(dense, x), outputs(model, x)
    assert found.shape == expected.shape
    bias = 0 if "b" not in weights else 2 if "beta" in body else 1
    column = (-1, *[1] * (len(given) - 2)) if "Conv" in body else (-1,)
    shift = bias * weights["b"].reshape(column) if bias else 0.0
    measured = np.square(found - expected).sum() / np.square(expected - shift).sum()
    if "Conv" not in body:  # whose statistics take some of the positions
        assert measured == pytest.approx(change.numbers["output_error"], rel=0.1)
    assert measured < 1


def test_three_factors_hold_rows_and_columns_of_the_weight_itself():
    x = normal(300, 24) @ normal(24, 24)
    text = graph("[a] h = MatMul(x, w) g = Relu(h) [z] y = MatMul(g, v)", ("N", 24))
    weights = {"w": normal(24, 30), "v": normal(30, 24)}
    model = build(text, **weights)
    run(model, x, "factor-cur{param-ratio=0.7 multiple=1 min-elements=1 correction=1}")
    found = {site.name: site.numpy() for site in model.sites()}
    for name, weight in (("a", weights["w"].T), ("z", weights["v"].T)):
        own_rows = {row.tobytes() for row in weight}
        own_columns = {column.tobytes() for column in np.ascontiguousarray(weight.T)}
        assert {row.tobytes() for row in found[f"{name}.rows"]} <= own_rows
        columns = np.ascontiguousarray(found[f"{name}.columns"].T)
        assert {column.tobytes() for column in columns} <= own_columns


def test_inputs_that_follow_from_others_are_not_read():
    rng = np.random.default_rng(9)
    free = rng.standard_normal((400, 12))
    follow = free @ rng.standard_normal((12, 12))
    order = rng.permutation(24)
    x = np.concatenate([free, follow], axis=1)[:, order].astype(np.float32)
    dense = build(graph("[s] y = MatMul(x, w)", ("N", 24)), w=normal(24, 30))
    model = dense.copy()
    run(
        model,
        x,
        "factor-interpolative{param-ratio=0.55 multiple=12 run-length=1 min-elements=1 damping=1e-8}",
    )
    (pick,) = [node for node in model.onnx.graph if node.op_type == "Gather"]
    assert len(pick.inputs[1].const_value.numpy()) == 12
    np.testing.assert_allclose(outputs(model, x), outputs(dense, x), atol=1e-2)


def test_what_cannot_be_is_refused():
    model = build(graph("[s] y = MatMul(x, w)", ("N", 24)), w=normal(24, 30))
    for name in ("factor-cur", "factor-interpolative"):
        report = run(model, normal(60, 24), f"{name}{{param-ratio=0.1 min-elements=1}}")
        assert report.skipped[0].reason.startswith("72 numbers do not hold 8 ")
    for option in ("steps", "run-length"):
        with pytest.raises(SpecError, match=f"{option} must be 1"):
            Pipeline.parse(f"factor-interpolative{{{option}=0}}")


def test_runs_are_picked_through_a_view_and_one_by_one_where_the_rank_is_not_known():
    rng, x = np.random.default_rng(3), normal(5, 3, 24)
    kept = np.array([0, 2, 5], np.int32)
    form = Interpolative(rng.standard_normal((30, 12)), kept, runs=6, length=4).astype(np.dtype(np.float32))
    assert form.numbers == 363
    assert form.bytes(4, custom_ops=False) == 4 * 363
    sizes = np.array([5, 3, 24])
    for text, operators in (
        (graph("[s] y = MatMul(x, w)", ("N", 3, 24)), ["Reshape", "Gather", "Reshape", "MatMul"]),
        (
            "g (float[N,3,24] x, int64[R] n) => (float y) { z = Reshape(x, n) [s] y = MatMul(z, w) }",
            ["Reshape", "Gather", "MatMul"],
        ),
    ):
        model = build(text, w=normal(24, 30))
        (site,) = model.sites()
        rewrite(model, site, form)
        assert [node.op_type for node in model.onnx.graph] == operators
        feed = {"x": x, "n": sizes} if "n)" in text else {"x": x}
        np.testing.assert_allclose(open_session(model).run(feed)["y"], x @ form.dense().T, atol=1e-4)
