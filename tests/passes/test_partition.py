"""Cuts of constant patterns: even, stored, read by the library; computed patterns are left alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sparsecc import emit, runtime
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.ir.ops_algebra import CUTS, Csr, einsum_node
from sparsecc.pm import PassContext, Pipeline

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
