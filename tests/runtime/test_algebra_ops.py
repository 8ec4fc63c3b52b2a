"""Sparse tensor algebra in onnxruntime: library, function bodies and NumPy agree; bad components are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx_ir
import pytest
import scipy.sparse as sp

from sparsecc import emit, runtime
from sparsecc.algebra import Tensor
from sparsecc.errors import ModelError, SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.ir.ops_algebra import Csr, algebra_names, einsum_node, einsum_operator
from sparsecc.ir.packed import packed_sites
from sparsecc.ir.sparse_ops import DOMAIN

EQUATIONS = {
    "SparseEinsumVector": "ij,j->i",
    "SparseEinsum": "ij,jn->in",
    "SparseEinsumSampled": "ij,ik,jk->ij",
}


def csr(rows: int, columns: int, density: float, kind: type = np.int64, seed: int = 0) -> list[np.ndarray]:
    """Positions and coordinates of a random matrix; the second row is empty, the third nearly full."""
    mask = np.random.default_rng(seed).random((rows, columns)) < density
    mask[1:2], mask[2:3, 1:] = False, density > 0
    return components(mask, kind)


def components(mask: np.ndarray, kind: type = np.int64) -> list[np.ndarray]:
    positions = np.concatenate([[0], np.cumsum(mask.sum(1))])
    return [positions.astype(kind), np.nonzero(mask)[1].astype(kind)]


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def model_of(
    name: str, arrays: Sequence[np.ndarray], opset: int = 18, constant: Sequence[int] = (), **attributes: Any
) -> Model:
    """One node whose inputs are inputs of the graph, but for those with a number in ``constant``."""
    op = emit.operators()[name]
    values = [
        onnx_ir.Value(name=item.name, shape=onnx_ir.Shape(array.shape),
                      type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
                      const_value=onnx_ir.Tensor(array, name=item.name) if at in constant else None)
        for at, (item, array) in enumerate(zip(op.inputs, arrays, strict=True))
    ]  # fmt: skip
    given = {"format": "csr", **({"scale": 0.5} if name == "SparseAttention" else {})}
    if name in EQUATIONS:
        given["equation"] = EQUATIONS[name]
    given.update(attributes)
    node = onnx_ir.Node(
        DOMAIN, name, values, list(onnx_ir.convenience.convert_attributes(given)), name="op", version=1
    )
    node.outputs[0].name = "y"
    inputs = [value for at, value in enumerate(values) if at not in constant]
    graph = onnx_ir.Graph(
        inputs, node.outputs, nodes=[node], opset_imports={"": opset, DOMAIN: 1}, name="g",
        initializers=[values[at] for at in constant],
    )  # fmt: skip
    model = Model(onnx_ir.Model(graph, ir_version=8))
    emit.finalize(model)
    return model


def feeds(model: Model, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    node = next(iter(model.onnx.graph))
    named = zip((value.name for value in node.inputs), arrays, strict=True)
    wanted = {value.name for value in model.onnx.graph.inputs}
    return {str(name): array for name, array in named if name in wanted}


def cases(rows: int, columns: int, density: float, kind: type) -> list[tuple[str, list[np.ndarray], str]]:
    """(operator, inputs, equation) with and without a batch."""
    positions, coordinates = csr(rows, columns, density, kind)
    count, shape = len(coordinates), np.array([rows, columns])
    sparse = [positions, coordinates, floats(count), shape]
    by_head = [positions, coordinates, floats(3, count), shape]
    return [
        ("SparseEinsumVector", [*sparse, floats(columns)], "ij,j->i"),
        ("SparseEinsumVector", [*by_head, floats(2, 1, columns)], "hij,bhj->bhi"),
        ("SparseEinsum", [*sparse, floats(columns, 5)], "ij,jn->in"),
        ("SparseEinsum", [*sparse, floats(2, 3, columns, 17)], "ij,bhjn->bhin"),
        ("SparseEinsum", [*by_head, floats(columns, 1)], "hij,jn->hin"),
        ("SparseEinsum", [*sparse, floats(0, columns, 4)], "ij,bjn->bin"),
        ("SparseEinsumSampled", [*sparse, floats(rows, 6), floats(columns, 6, seed=1)], "ij,ik,jk->ij"),
        ("SparseEinsumSampled", [*by_head, floats(2, 3, rows, 7), floats(2, 1, columns, 7)], "hij,bhik,bhjk->bhij"),
        ("SparseEinsumSampled", [*sparse, floats(rows, 0), floats(columns, 0)], "ij,ik,jk->ij"),
        ("SparseSoftmax", [positions, floats(count)], ""),
        ("SparseSoftmax", [positions, floats(2, 3, count)], ""),
        ("SparseAttention", [floats(2, 3, rows, 4), floats(2, 3, columns, 4, seed=1), floats(2, 3, columns, 4, seed=2),
                             positions, coordinates, shape], ""),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("rows", "columns", "density"),
    [(7, 43, 0.3), (41, 19, 0.1), (5, 7, 0.0), (0, 7, 1.0), (5, 0, 1.0), (1, 1, 1.0)],
)
def test_library_and_body_mean_what_numpy_says(session, rows, columns, density, kind) -> None:
    for name, arrays, equation in cases(rows, columns, density, kind):
        given = {"equation": equation} if equation else {}
        model = model_of(name, arrays, **given)
        proto = model.to_proto()
        onnx.checker.check_model(proto, full_check=True)
        (expected,) = emit.operators()[name].reference(arrays, {"scale": 0.5, **given})
        for library in (True, False):
            (y,) = session(proto, library=library).run(None, feeds(model, arrays))
            assert y.shape == expected.shape
            np.testing.assert_allclose(
                y, expected, rtol=1e-4, atol=1e-5, err_msg=f"{name} {equation} {library}"
            )
        declared = model.onnx.graph.outputs[0].shape
        assert declared is not None
        assert all(
            dim in (size, None) or not isinstance(dim, int)
            for dim, size in zip(declared, y.shape, strict=True)
        )


@pytest.mark.parametrize("opset", [16, 18, 21])
def test_body_in_the_reference_evaluator(opset: int) -> None:
    for name, arrays, equation in cases(7, 9, 0.4, np.int64):
        op = emit.operators()[name]
        if opset < op.oldest_opset or 0 in arrays[-1].shape:
            continue
        given = {"equation": equation} if equation else {}
        model = model_of(name, arrays, opset, **given)
        (y,) = onnx.reference.ReferenceEvaluator(model.to_proto()).run(None, feeds(model, arrays))
        np.testing.assert_allclose(y, op.reference(arrays, {"scale": 0.5, **given})[0], rtol=1e-4, atol=1e-5)


def test_every_operator_is_tried() -> None:
    assert {name for name, _, _ in cases(5, 7, 0.5, np.int64)} == algebra_names()


def test_no_operator_holds_a_packed_weight() -> None:
    """So that inspect and optimize take models with them."""
    for name, arrays, equation in cases(5, 7, 0.5, np.int64):
        assert packed_sites(model_of(name, arrays, **({"equation": equation} if equation else {}))) == []


def test_one_giant_row_on_several_threads_gives_the_same_bits(session) -> None:
    """Also with components that are constants, which are checked once."""
    mask = np.zeros((300, 5000), bool)
    mask[150] = True
    mask[::7, ::997] = True
    positions, coordinates = components(mask)
    sparse = [positions, coordinates, floats(len(coordinates)), np.array(mask.shape)]
    for name, arrays in (
        ("SparseEinsumVector", [*sparse, floats(5000)]),
        ("SparseEinsum", [*sparse, floats(5000, 24)]),
        ("SparseEinsumSampled", [*sparse, floats(300, 24), floats(5000, 24)]),
        ("SparseSoftmax", [positions, floats(len(coordinates))]),
    ):
        results = []
        for threads, constant in ((1, ()), (2, ()), (3, (0, 1, 3) if name in EQUATIONS else ())):
            model = model_of(name, arrays, constant=constant)
            one = session(model.to_proto(), library=True, threads=threads)
            results.append(one.run(None, feeds(model, arrays))[0])
        assert (results[0] == results[1]).all()
        assert (results[0] == results[2]).all()
        (expected,) = emit.operators()[name].reference(arrays, {})
        np.testing.assert_allclose(results[0], expected, rtol=1e-3, atol=1e-3)


# ---- attention --------------------------------------------------------------------------------------


def masks() -> dict[str, np.ndarray]:
    i, j = np.arange(150)[:, None], np.arange(150)[None, :]
    rng = np.random.default_rng(0)
    window = abs(i - j) <= 12
    holes = window & (i % 5 != 3)
    return {
        "window": window,
        "causal window": (j <= i) & (j > i - 33),
        "blocks": i // 50 == j // 50,
        "window and global keys": window | (j < 3) | (i < 3) | (rng.random((150, 150)) < 0.01),
        "strided": (i - j) % 16 == 0,
        "rows that see nothing": holes,
        "nothing": np.zeros((150, 150), bool),
        "all": np.ones((150, 150), bool),
        "wide": (np.arange(61)[:, None] - np.arange(203)) % 37 < 9,
    }


@pytest.mark.parametrize("isa", runtime.isas())
@pytest.mark.parametrize("which", list(masks()))
def test_attention_over_a_pattern(session, monkeypatch, isa: str, which: str) -> None:
    monkeypatch.setenv("SPARSECC_ISA", isa)
    mask = masks()[which]
    queries, keys = mask.shape
    arrays = [
        floats(2, 3, queries, 24),
        floats(2, 3, keys, 24),
        floats(2, 3, keys, 24, seed=3),
        *components(mask),
        np.array(mask.shape),
    ]
    (expected,) = emit.operators()["SparseAttention"].reference(arrays, {"scale": 0.5})
    results = []
    for threads, constant in ((1, ()), (3, (3, 4, 5))):
        model = model_of("SparseAttention", arrays, constant=constant)
        one = session(model.to_proto(), library=True, threads=threads)
        results += [one.run(None, feeds(model, arrays))[0] for _ in range(2)]
    np.testing.assert_allclose(results[0], expected, rtol=1e-4, atol=1e-5)
    assert all((y == results[0]).all() for y in results)
    assert not results[0][:, :, ~mask.any(1)].any()


@pytest.mark.parametrize("constant", [(), (3, 4, 5)])
def test_pattern_of_other_sizes(session, constant: tuple[int, ...]) -> None:
    positions, coordinates = components(masks()["wide"])
    q, k = floats(1, 1, 61, 8), floats(1, 1, 203, 8)
    arrays = [q, k, k, positions, coordinates, np.array([61, 203])]
    model = model_of("SparseAttention", arrays, constant=constant)
    for value in (*model.onnx.graph.inputs, *model.onnx.graph.outputs):
        value.shape = None
    one = session(model.to_proto(), library=True)
    given = feeds(model, arrays)
    one.run(None, given)
    with pytest.raises(Exception, match="there are 61 queries and 100 keys"):
        one.run(None, {**given, "k": k[:, :, :100], "v": k[:, :, :100]})
    with pytest.raises(Exception, match="there are 60 queries and 203 keys"):
        one.run(None, {**given, "q": q[:, :, :60]})


# ---- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
@pytest.mark.parametrize("batch", [None, "B"])
def test_layer_of_a_graph_network(session, shape, batch) -> None:
    adjacency = sp.random(37, 29, 0.2, "csr", random_state=0, dtype=np.float32)
    weight, bias = floats(*shape), floats(shape[1])
    x = floats(29, shape[0]) if batch is None else floats(2, 29, shape[0])
    expected = np.maximum(adjacency.toarray() @ (x @ weight) + bias, 0)
    parts = {"positions": adjacency.indptr, "coordinates": adjacency.indices, "shape": np.array([37, 29])}
    given = {f"adjacency.{name}": array.astype(np.int64) for name, array in parts.items()}
    given["adjacency.values"] = adjacency.data
    for dynamic in (False, True):
        model = emit.gnn_layer_model(None if dynamic else adjacency, weight, bias, batch=batch)
        proto = model.to_proto()
        onnx.checker.check_model(proto, full_check=True)
        for library in (True, False):
            (y,) = session(proto, library=library).run(None, {"x": x, **(given if dynamic else {})})
            np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_layer_from_other_formats() -> None:
    dense = sp.random(9, 9, 0.3, "csr", random_state=0).toarray()
    for matrix in (sp.csc_matrix(dense), sp.coo_array(dense), Tensor.from_scipy(sp.csr_matrix(dense))):
        model = emit.gnn_layer_model(matrix, floats(4, 4), activation="")
        parts = model.onnx.graph.initializers
        found = sp.csr_matrix(
            tuple(
                parts[f"adjacency.{name}"].const_value.numpy()
                for name in ("values", "coordinates", "positions")
            ),
            (9, 9),
        )
        np.testing.assert_allclose(found.toarray(), dense, rtol=1e-6)


def test_models_of_wrong_matrices() -> None:
    with pytest.raises(UsageError, match="bias"):
        emit.gnn_layer_model(sp.eye(4, format="csr"), floats(4, 3), floats(4))
    unsorted = sp.csr_matrix((np.ones(2), np.array([2, 1]), np.array([0, 2])), (1, 4))
    with pytest.raises(ModelError, match="unsorted"):
        emit.gnn_layer_model(unsorted, floats(4, 3))
    cube = Tensor.from_coordinates(np.zeros((1, 3), np.int64), np.ones(1), (2, 2, 2))
    with pytest.raises(UsageError, match="3 modes"):
        emit.gnn_layer_model(cube, floats(2, 3))


@pytest.mark.parametrize("integers", ["int32", "int64"])
def test_attention_in_three_steps(session, integers) -> None:
    mask = masks()["window and global keys"][:60, :70]
    model = emit.sparse_attention_model(
        sp.csr_matrix(mask.astype(np.float32)), heads=3, size=8, integers=integers
    )
    proto = model.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in model.onnx.graph] == [
        "SparseEinsumSampled",
        "SparseSoftmax",
        "SparseEinsum",
    ]
    q, k, v = floats(2, 3, 60, 8), floats(2, 3, 70, 8), floats(2, 3, 70, 8, seed=1)
    scores = np.where(mask, q @ k.swapaxes(-1, -2) / np.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v
    for library in (True, False):
        (y,) = session(proto, library=library).run(None, {"q": q, "k": k, "v": v})
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


# ---- what does not fit ------------------------------------------------------------------------------

POSITIONS, COORDINATES = np.array([0, 2, 2, 3]), np.array([1, 3, 0])
BAD_COMPONENTS: list[tuple[Mapping[int, Any], str]] = [
    ({0: np.array([1, 2, 2, 3])}, "do not begin at 0|do not rise"),
    ({0: np.array([0, 3, 2, 3])}, "do not rise|unsorted"),
    ({0: np.array([0, -5, 2, 3])}, "do not rise"),
    ({0: np.array([0, 1 << 40, 2, 3])}, "do not rise"),
    ({0: np.array([0, 2, 2, 4])}, "last position"),
    ({0: np.array([0, 2, 2, -1])}, "last position|do not rise"),
    ({0: np.array([0, 2, 3])}, "3 positions for 3 rows"),
    ({0: np.zeros(0, np.int64)}, "0 positions for 3 rows"),
    ({0: POSITIONS[None]}, "must be a list"),
    ({1: np.array([1, 4, 0])}, "coordinate 4 is out of range"),
    ({1: np.array([-1, 3, 0])}, "coordinate -1 is out of range"),
    ({1: np.array([3, 1, 0])}, "coordinate 1 is out of range, unsorted"),
    ({1: np.array([1, 1, 0])}, "there twice"),
    ({1: np.array([1 << 40, 3, 0])}, "out of range"),
    ({1: COORDINATES.astype(np.int32)}, "of one type"),
    ({1: COORDINATES.astype(np.float32)}, "int32 or int64"),
]
BAD_EINSUMS: list[tuple[Mapping[int, Any], str]] = [
    ({2: floats(4)}, "4 values for 3 coordinates"),
    ({2: floats(1, 3)}, "0 leading dimensions"),
    ({3: np.array([-3, 4])}, "numbers from 0"),
    ({3: np.array([3, 4, 1])}, "two int64"),
    ({3: np.array([3, 1 << 60])}, "expected .* rows"),
    ({4: floats(5, 2)}, "expected 4 rows"),
    ({4: floats(2)}, "too few dimensions"),
    ({4: floats(2, 4, 2)}, "0 leading dimensions"),
]


def run_bare(session, name: str, arrays: Sequence[np.ndarray], **attributes: Any) -> Any:
    """By the library alone, without declared shapes."""
    model = model_of(name, arrays, **attributes)
    model.onnx.functions.clear()
    for value in (*model.onnx.graph.inputs, *model.onnx.graph.outputs):
        value.shape = None
    return session(model.to_proto(), library=True).run(None, feeds(model, arrays))


@pytest.mark.parametrize(("change", "message"), BAD_COMPONENTS + BAD_EINSUMS)
def test_bad_operands_of_a_product(session, change, message) -> None:
    arrays = [POSITIONS, COORDINATES, floats(3), np.array([3, 4]), floats(4, 2)]
    run_bare(session, "SparseEinsum", arrays)
    arrays = [change.get(at, array) for at, array in enumerate(arrays)]
    with pytest.raises(Exception, match=message):
        run_bare(session, "SparseEinsum", arrays)


@pytest.mark.parametrize(("change", "message"), BAD_COMPONENTS)
def test_bad_components_of_other_operators(session, change, message) -> None:
    given = [change.get(at, array) for at, array in enumerate([POSITIONS, COORDINATES])]
    sampled = [*given, floats(3), np.array([3, 4]), floats(3, 2), floats(4, 2)]
    with pytest.raises(Exception, match=message):
        run_bare(session, "SparseEinsumSampled", sampled)
    q, k = floats(1, 1, 3, 2), floats(1, 1, 4, 2)
    with pytest.raises(Exception, match=message):
        run_bare(session, "SparseAttention", [q, k, k, *given, np.array([3, 4])])
    if 0 in change and len(change[0]) != 3:
        with pytest.raises(Exception, match="position"):
            run_bare(session, "SparseSoftmax", [change[0], floats(3)])


def test_constant_components_are_refused_when_the_session_is_made(session) -> None:
    arrays = [POSITIONS, np.array([1, 9, 0]), floats(3), np.array([3, 4]), floats(4, 2)]
    model = model_of("SparseEinsum", arrays, constant=(0, 1, 3))
    model.onnx.functions.clear()
    with pytest.raises(Exception, match="coordinate 9"):
        session(model.to_proto(), library=True)


@pytest.mark.parametrize(
    ("name", "attributes", "message"),
    [
        ("SparseEinsum", {"format": "coo"}, "'format' is 'coo', expected 'csr'"),
        ("SparseEinsum", {"equation": "ij"}, "'equation' is 'ij'"),
        ("SparseEinsum", {"equation": ",->"}, "not of this operator"),
        ("SparseEinsum", {"equation": "->,,,,"}, "not of this operator"),
        ("SparseEinsumSampled", {"equation": "ij,jn->in"}, "not of this operator"),
        ("SparseSoftmax", {"format": ""}, "expected 'csr'"),
    ],
)
def test_bad_attributes(session, name, attributes, message) -> None:
    sparse = [POSITIONS, COORDINATES, floats(3), np.array([3, 4])]
    arrays = {
        "SparseEinsum": [*sparse, floats(4, 2)],
        "SparseEinsumSampled": [*sparse, floats(3, 2), floats(4, 2)],
        "SparseSoftmax": [POSITIONS, floats(3)],
    }[name]
    with pytest.raises(Exception, match=message):
        run_bare(session, name, arrays, **attributes)


def test_bad_attention_and_samples(session) -> None:
    sparse = [POSITIONS, COORDINATES, np.array([3, 4])]
    with pytest.raises(Exception, match="twice"):
        run_bare(
            session, "SparseAttention", [floats(1, 1, 3, 2), floats(1, 1, 4, 2), floats(1, 1, 4, 3), *sparse]
        )
    with pytest.raises(Exception, match="twice"):
        run_bare(session, "SparseAttention", [floats(3, 2), floats(4, 2), floats(4, 2), *sparse])
    full = [*sparse[:2], floats(3), sparse[2]]
    with pytest.raises(Exception, match="last dimensions differ"):
        run_bare(session, "SparseEinsumSampled", [*full, floats(3, 2), floats(4, 3)])
    with pytest.raises(Exception, match="do not broadcast"):
        run_bare(
            session,
            "SparseEinsumSampled",
            [*full, floats(2, 3, 2), floats(3, 4, 2)],
            equation="ij,bik,bjk->bij",
        )
    with pytest.raises(Exception, match="last position is not the number of values"):
        run_bare(session, "SparseSoftmax", [POSITIONS, floats(4)])


@pytest.mark.parametrize(
    ("equation", "operator", "text"),
    [
        ("y(i) = A(i,j) * x(j)", "SparseEinsumVector", "ij,j->i"),
        ("Y(b,i,n) = A(i,j) * X(b,j,n)", "SparseEinsum", "ij,bjn->bin"),
        ("ab, cbd -> cad", "SparseEinsum", "ab,cbd->cad"),
        ("S(row,col) = P(row,col) * Q(row,k) * K(col,k)", "SparseEinsumSampled", "ab,ac,bc->ab"),
    ],
)
def test_operator_of_an_equation(equation, operator, text) -> None:
    assert einsum_operator(equation) == (operator, text)


@pytest.mark.parametrize(
    "equation",
    ["ij,jn->ni", "ji,jn->in", "bij,hjn->bhin", "ij,ij->i", "ijk,jr,kr->ir", "ij,jn->i", "y(i) = A(i,j) + B(i,j)",
     "y(i) = 2 * A(i,j) * x(j)", "ij,bjn->in", "j,ij->i"],
)  # fmt: skip
def test_equations_without_an_operator(equation) -> None:
    with pytest.raises(SpecError, match="no sparse operator evaluates"):
        einsum_operator(equation)


def test_node_with_too_few_operands() -> None:
    value = onnx_ir.Value(name="v")
    with pytest.raises(SpecError, match="2 dense operands, 1 are given"):
        einsum_node("ij,ik,jk->ij", Csr(value, value, value, value), value, name="n")
