"""Cuts of constant patterns: even, stored, read by the library; computed patterns are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import scipy.sparse

from sparsecc import emit, runtime
from sparsecc.algebra import Compressed, Dense, Tensor, Walk, split
from sparsecc.errors import ModelError, SpecError
from sparsecc.ir import Model
from sparsecc.ir.cuts import store_cuts, stored_cuts
from sparsecc.ir.ops_algebra import CUTS, Csr, einsum_node
from sparsecc.ir.packed import packed_weight
from sparsecc.pm import PassContext, Pipeline
from sparsecc.target import Target

FORMS = {"ij,j->i": [(700,)], "ij,jn->in": [(700, 9)], "ij,ik,jk->ij": [(500, 5), (700, 5)]}


def pattern(rows: int = 500, columns: int = 700) -> tuple[np.ndarray, np.ndarray]:
    """One full row, many empty ones, and a few entries everywhere else."""
    mask = np.random.default_rng(0).random((rows, columns)) < 0.08
    mask[rows // 3] = True
    mask[rows // 2 :] = False
    return np.concatenate([[0], np.cumsum(mask.sum(1))]), np.nonzero(mask)[1]


def model_of(
    equation: str, constant: bool = True, positions: np.ndarray | None = None, kind: type = np.int64
) -> Model:
    found, coordinates = pattern()
    arrays = {
        "positions": (found if positions is None else positions).astype(kind),
        "coordinates": coordinates.astype(kind),
        "values": np.random.default_rng(1).standard_normal(len(coordinates)).astype(np.float32),
        "shape": np.array([500, 700]),
    }
    inner = {
        name: ir.Value(name=name, shape=ir.Shape(array.shape),
                       type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                       const_value=ir.Tensor(array, name=name) if constant or name == "shape" else None)
        for name, array in arrays.items()
    }  # fmt: skip
    dense = [
        ir.Value(name=f"x{at}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        for at, shape in enumerate(FORMS[equation])
    ]
    node = einsum_node(equation, Csr(*inner.values()), *dense, name="op")
    node.outputs[0].name = "y"
    free = [value for value in inner.values() if value.const_value is None]
    graph = ir.Graph(
        [*free, *dense], node.outputs, nodes=[node], opset_imports={"": 18, node.domain: 1}, name="g",
        initializers=[value for value in inner.values() if value.const_value is not None],
    )  # fmt: skip
    model = Model(ir.Model(graph, ir_version=8))
    emit.finalize(model)
    return model


def cut(model: Model, text: str = "partition"):
    return Pipeline.parse(text).run(model, PassContext())[0]


def cuts_of(model: Model) -> np.ndarray | None:
    found = next(iter(model.onnx.graph)).attributes.get(CUTS)
    return None if found is None else np.array(found.as_ints()).reshape(2, -1)


def outputs(model: Model, library: bool = True, threads: int = 1) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    if library:
        runtime.register(options)
    proto = model.to_proto()
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(2)
    feeds = {item.name: rng.standard_normal(item.shape).astype(np.float32) for item in session.get_inputs()}
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("equation", FORMS)
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_parts_are_even_and_results_the_same(equation, kind):
    model = model_of(equation, kind=kind)
    before = outputs(model)
    report = cut(model)
    cuts = cuts_of(model)
    steps = np.diff(cuts.sum(0))
    positions, coordinates = pattern()
    assert steps.sum() == 500 + len(coordinates)
    assert steps.max() <= -(-steps.sum() // 64)
    assert report.changed[0].numbers["work"] == steps.sum()
    assert report.changed[0].numbers["max"] == steps.max()
    inside = cuts[1] - positions[np.maximum(cuts[0] - 1, 0)]
    assert (inside >= 0).all()
    onnx.checker.check_model(model.to_proto(), full_check=True)
    results = [outputs(model, threads=threads) for threads in (1, 2, 3)]
    for y in (*results, outputs(model, library=False)):
        np.testing.assert_allclose(y, before, rtol=1e-4, atol=1e-4)
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


def test_once_is_enough_and_fewer_parts_are_among_more():
    model = model_of("ij,j->i")
    cut(model)
    many = cuts_of(model)
    again = cut(model)
    assert (again.changed, again.skipped[0].reason) == ([], "it is cut like that already")
    cut(model, "partition{parts=16}")
    np.testing.assert_array_equal(cuts_of(model), many[:, ::4])


def test_what_is_left_alone_has_a_reason():
    model = model_of("ij,j->i", constant=False)
    (skip,) = cut(model).skipped
    assert "computed when the model runs" in skip.reason
    positions, _ = pattern()
    model = model_of("ij,j->i", positions=positions[::-1].copy())
    (skip,) = cut(model).skipped
    assert "malformed" in skip.reason
    assert cuts_of(model) is None
    assert cut(model_of("ij,j->i"), "partition{match=other*}").changed == []


@pytest.mark.parametrize("parts", [0, 3, 48, 8192])
def test_wrong_numbers_of_parts(parts):
    with pytest.raises(SpecError, match="power of two"):
        Pipeline.parse(f"partition{{parts={parts}}}")


def wrong(change):
    positions, coordinates = pattern()
    cuts = np.array([[0, 250, 500], [0, int(positions[250]), len(coordinates)]])
    change(cuts)
    return cuts.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        (wrong(lambda c: c.__setitem__((0, 0), 1)), "do not begin at 0"),
        (wrong(lambda c: c.__setitem__((1, 0), -5)), "do not begin at 0"),
        (wrong(lambda c: c.__setitem__((0, 2), 499)), "do not end at the end"),
        (wrong(lambda c: c.__setitem__((1, 2), 1 << 40)), "do not end at the end"),
        (wrong(lambda c: c.__setitem__((0, 1), 501)), "do not rise"),
        (wrong(lambda c: c.__setitem__((0, 1), -3)), "do not rise"),
        (wrong(lambda c: c.__setitem__((0, 1), 1 << 60)), "do not rise"),
        (wrong(lambda c: c.__setitem__((1, 1), 0)), "not in the row before it"),
        (wrong(lambda c: c.__setitem__((1, 1), c[1, 1] + 1)), "not in the row before it"),
        ([0, 1, 2], "expected two per cut"),
        ([0, 0], "1 to 4096 parts"),
        ([0] * 20_000, "expected two per cut"),
    ],
)
def test_wrong_tables_are_refused(cuts, message):
    model = model_of("ij,j->i")
    node = next(iter(model.onnx.graph))
    node.attributes[CUTS] = ir.AttrInt64s(CUTS, cuts)
    with pytest.raises(Exception, match=message):
        outputs(model)
    good = model_of("ij,j->i")
    np.testing.assert_allclose(outputs(model, library=False), outputs(good), rtol=1e-4, atol=1e-4)


def test_tables_of_computed_patterns_are_not_looked_at():
    model = model_of("ij,j->i", constant=False)
    next(iter(model.onnx.graph)).attributes[CUTS] = ir.AttrInt64s(CUTS, [7, 7, 7, 7])
    runtime.register(options := onnxruntime.SessionOptions())
    session = onnxruntime.InferenceSession(
        model.to_proto().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    positions, coordinates = pattern()
    feeds = {"positions": positions, "coordinates": coordinates,
             "values": np.ones(len(coordinates), np.float32), "x0": np.ones(700, np.float32)}  # fmt: skip
    np.testing.assert_allclose(session.run(None, feeds)[0], np.diff(positions), rtol=1e-5)


def chain(equations: list[str], *, same: bool = True, features: int | str = 9) -> Model:
    """y = A relu(A relu(.. x)) with A the pattern above, or each time another; ``features`` columns."""
    rng = np.random.default_rng(3)
    mask = rng.random((400, 400)) < 0.05
    x = ir.Value(name="x", shape=ir.Shape((400, features)), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 18, "ai.sparsecc": 1}, name="g")
    value, first = x, None
    for at, equation in enumerate(equations):
        if first is None or not same:
            first = emit.csr_constants(graph, scipy.sparse.csr_array(mask * (at + 1.0)), f"a{at}")
            mask = rng.random((400, 400)) < 0.05
        node = einsum_node(equation, first, value, name=f"op{at}")
        relu = ir.Node("", "Relu", [node.outputs[0]], name=f"relu{at}")
        graph.extend([node, relu])
        node.outputs[0].name, relu.outputs[0].name = f"p{at}", f"r{at}"
        value = relu.outputs[0]
    graph.outputs.append(value)
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape((400, features))
    model = Model(ir.Model(graph, ir_version=8))
    emit.finalize(model)
    return model


SPMM = "ij,jn->in"


def test_regions_have_one_table_that_fits_the_cache():
    model = chain([SPMM, SPMM, SPMM], features=7)
    before = outputs(model)
    report = Pipeline.parse("partition{parts=1 fit=l2}").run(
        model, PassContext(target=Target("cpu", l2_bytes=24_000))
    )[0]
    tables = [list(node.attributes[CUTS].as_ints()) for node in model.onnx.graph if CUTS in node.attributes]
    assert len(tables) == 3
    assert tables[0] == tables[1] == tables[2]
    (numbers,) = {tuple(sorted(change.numbers.items())) for change in report.changed}
    numbers = dict(numbers)
    assert "one table for op0, op1, op2" in report.changed[0].detail
    # By hand: what each part reads and writes, every tensor once; one part less would not fit.
    node = next(iter(model.onnx.graph))
    positions, coordinates = (value.const_value.numpy() for value in node.inputs[:2])
    walk = Walk.of(Tensor((400, 400), (0, 1), (Dense(400), Compressed(400, positions, coordinates)),
                          np.ones(len(coordinates), np.float32)))  # fmt: skip

    def touched(parts):
        rows, entries = split([walk], parts).cursors[0]
        sets = []
        for part in range(parts):
            mine = slice(entries[part], entries[part + 1])
            columns = len(set(coordinates[mine].tolist()))
            sets.append(
                (rows[part + 1] - rows[part] + 1) * (4 + 3 * 7 * 4)  # three results
                + len(coordinates[mine]) * (4 + 4)  # coordinates and the values, which all share
                + columns * 3 * 7 * 4  # three operands
            )
        return max(sets)

    parts = numbers["parts"]
    assert parts > 1
    assert parts & (parts - 1) == 0
    assert numbers["set_bytes"] == touched(parts) <= 24_000 < touched(parts // 2)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    for y in (outputs(model), outputs(model, threads=2), outputs(model, library=False)):
        np.testing.assert_allclose(y, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("model", "cache", "detail"),
    [
        (lambda: chain([SPMM, SPMM], same=False), 24_000, "cut into 8 parts"),
        (lambda: chain([SPMM], features="N"), 24_000, "shapes that are not known"),
        (lambda: chain([SPMM, SPMM]), 100, "not even so many fit"),
        (lambda: chain([SPMM]), 1 << 30, "cut into 2 parts"),
    ],
)
def test_regions_are_of_one_pattern_and_sizes_must_be_known(model, cache, detail):
    report = Pipeline.parse("partition{parts=2 fit=l2}").run(
        model(), PassContext(target=Target("cpu", l2_bytes=cache))
    )[0]
    for change in report.changed:
        assert detail in change.detail
        assert change.numbers["max"] <= -(-change.numbers["work"] // change.numbers["parts"])
        assert "op0, op1" not in change.detail or cache == 100


def test_kernels_take_as_many_parts_as_the_table_has_where_there_is_work_for_them():
    """More than 64, which is the most that they cut into themselves."""
    model = chain([SPMM], features=300)
    before = outputs(model)
    cut(model, "partition{parts=512}")
    alone = outputs(model)
    np.testing.assert_allclose(alone, before, rtol=1e-3, atol=1e-3)
    for threads in (2, 3):
        np.testing.assert_array_equal(outputs(model, threads=threads), alone)


def test_scores_and_weights_of_attention_are_one_region():
    seen = scipy.sparse.csr_array(np.tri(64, dtype=np.float32))
    model = emit.sparse_attention_model(seen, heads=2, size=8)
    report = cut(model, "partition{fit=l2}")
    assert len(report.changed) == 2
    assert all("one table for" in change.detail for change in report.changed)


@pytest.mark.parametrize("layout", ["unstructured", "16x1", "2:4"])
def test_tables_of_packed_weights(layout):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((48, 40)).astype(np.float32)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[3,40] x) => (float[3,48] y) { y = Gemm<transB=1>(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = Model.from_proto(proto)
    lower = f"prune-magnitude{{pattern={layout} sparsity=0.5}},choose-layout{{layout={layout}}},lower-sparse"
    Pipeline.parse(lower).run(model, PassContext())
    before = outputs(model)
    (skip,) = cut(model).skipped
    assert "the library deals packed weights itself" in skip.reason
    (change,) = cut(model, "partition{parts=4 packed=true}").changed
    node = next(node for node in model.onnx.graph if node.domain)
    table, packed = stored_cuts(node), packed_weight(node)
    rows, columns = packed.pattern.grid(packed.shape)
    starts = np.searchsorted(packed.validate(), np.arange(rows + 1) * columns)
    assert table[:, -1].tolist() == [rows, starts[-1]]
    for row, unit in table[:, 1:].T:
        assert starts[row - 1] <= unit <= starts[row]
    assert np.diff(table.sum(0)).max() == change.numbers["max"] <= -(-(rows + starts[-1]) // 4)
    emit.finalize(model)
    onnx.checker.check_model(model.to_proto(), full_check=True)
    np.testing.assert_array_equal(outputs(model), before)
    np.testing.assert_allclose(outputs(model, library=False), before, rtol=1e-4, atol=1e-4)
    assert "already" in cut(model, "partition{parts=4 packed=true}").skipped[0].reason
    on_cuda = Pipeline.parse("partition").run(model, PassContext(target=Target("cuda")))[0]
    assert on_cuda.changed[0].numbers["parts"] == 64
    shape = node.inputs[3]
    shape.const_value = ir.Tensor(np.array([48, 4]), name=shape.name)
    assert "malformed" in cut(model, "partition{packed=true}").skipped[0].reason


@pytest.mark.parametrize("numbers", [[], [0, 0], [0, 1, 2], [1, 2, 0, 3], [0, 2, 1, 0, 1, 2]])
def test_tables_that_do_not_rise_are_refused(numbers):
    node = next(iter(model_of("ij,j->i").onnx.graph))
    node.attributes[CUTS] = ir.AttrInt64s(CUTS, numbers)
    with pytest.raises(ModelError, match="attribute 'cuts'"):
        stored_cuts(node)
    assert store_cuts(node, np.array([[0, 5], [0, 7]]))
    np.testing.assert_array_equal(stored_cuts(node), [[0, 5], [0, 7]])
    node.attributes[CUTS] = ir.AttrString(CUTS, "no")
    with pytest.raises(ModelError, match="is no table"):
        stored_cuts(node)
