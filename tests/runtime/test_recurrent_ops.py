"""LSTM and GRU with packed weights in onnxruntime: the library, the function body and NumPy agree."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from sparsecc import emit
from sparsecc.ir import Model
from sparsecc.ir.ops_recurrent import GATES, recurrent_op_node
from sparsecc.sparse import Pattern, SparseTensor, keep_mask

TOLERANCE = 2e-6
STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 20, 16
FEEDS = {"x": ["T", "B", INPUTS], "lengths": ["B"], "initial_h": None, "initial_c": None}


def _packed(rng: np.random.Generator, shape: tuple[int, int], layout: str) -> SparseTensor:
    pattern = Pattern.parse(layout)
    dense = rng.standard_normal(shape).astype(np.float32) / 4
    mask = keep_mask(np.abs(dense), pattern, 0.7 if pattern.needs_sparsity else None)
    return SparseTensor.encode(dense * mask, pattern)


def _model(
    cell: str, direction: str = "forward", layouts: tuple[str, str] = ("16x1", "unstructured"), *,
    lengths: bool = False, state: bool = False, before_reset: bool = False, opset: int = 17,
) -> Model:  # fmt: skip
    rng = np.random.default_rng(0)
    count = 2 if direction == "bidirectional" else 1
    rows = count * GATES[cell] * HIDDEN
    wanted = [
        "x",
        *["lengths"] * lengths,
        *(["initial_h", *["initial_c"] * (cell == "LSTM")] if state else []),
    ]
    values = {
        name: ir.Value(
            name=name,
            shape=ir.Shape(FEEDS[name] or [count, "B", HIDDEN]),
            type=ir.TensorType(ir.DataType.INT32 if name == "lengths" else ir.DataType.FLOAT),
        )
        for name in wanted
    }
    graph = ir.Graph(list(values.values()), [], nodes=[], opset_imports={"": opset}, name="single_op")
    node = recurrent_op_node(
        graph, values["x"], _packed(rng, (rows, INPUTS), layouts[0]), _packed(rng, (rows, HIDDEN), layouts[1]),
        cell=cell, hidden=HIDDEN, name="op", direction=direction, linear_before_reset=before_reset,
        bias=rng.standard_normal((count, 2 * GATES[cell] * HIDDEN)).astype(np.float32),
        lengths=values.get("lengths"),
        initial=tuple(values[name] for name in wanted if name.startswith("initial")),
    )  # fmt: skip
    for name, output in zip(("y", "y_h", "y_c"), node.outputs, strict=False):
        output.name = name
    graph.append(node)
    graph.outputs.extend(node.outputs)
    model = Model(ir.Model(graph, ir_version=8))
    emit.finalize(model)
    return model


def _feeds(model: Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = {"T": STEPS, "B": BATCH}
    feeds = {
        spec.name: rng.standard_normal([sizes.get(dim, dim) for dim in spec.shape]).astype(np.float32)
        for spec in model.input_specs()
    }
    if "lengths" in feeds:
        feeds["lengths"] = np.array([STEPS, 0, 3], np.int32)
    return feeds


def _expected(model: Model, feeds: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    node = next(iter(model.onnx.graph))
    arrays = [
        feeds[value.name] if value.const_value is None else value.const_value.numpy() for value in node.inputs
    ]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return emit.operators()[node.op_type].reference(arrays, attributes)


def _check(session, model: Model) -> None:
    proto, feeds = model.to_proto(), _feeds(model)
    onnx.checker.check_model(proto, full_check=True)
    for library in (True, False):
        results = session(proto, library=library).run(None, feeds)
        for result, expected, output in zip(
            results, _expected(model, feeds), model.onnx.graph.outputs, strict=True
        ):
            assert result.dtype == np.float32
            assert result.shape == expected.shape
            known = [
                dim if isinstance(dim, int) else {"T": STEPS, "B": BATCH}[dim.value] for dim in output.shape
            ]
            assert list(result.shape) == known
            error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
            assert error <= TOLERANCE, f"library={library}: relative L2 {error}"


@pytest.mark.parametrize("state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("lengths", [False, True], ids=["whole", "lengths"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("cell", GATES)
def test_every_variant(session, cell: str, direction: str, lengths: bool, state: bool) -> None:
    for before_reset in (False, True) if cell == "GRU" else (False,):
        model = _model(cell, direction, lengths=lengths, state=state, before_reset=before_reset)
        assert next(iter(model.onnx.graph)).op_type in emit.operators()
        _check(session, model)


@pytest.mark.parametrize("layout", ["unstructured", "2:4", "1:8", "16x1", "4x1", "8x4", "16x3"])
@pytest.mark.parametrize("opset", [11, 13, 21])
def test_every_layout_at_every_opset(session, layout: str, opset: int) -> None:
    _check(session, _model("LSTM", layouts=(layout, "16x1"), opset=opset))
    _check(session, _model("GRU", "bidirectional", layouts=("unstructured", layout), opset=opset))


def test_without_library_decoding_is_folded_away(session, tmp_path) -> None:
    for cell in GATES:
        dump = tmp_path / f"{cell}.onnx"
        session(_model(cell, state=True).to_proto(), library=False, optimized=str(dump))
        assert {node.op_type for node in onnx.load(dump).graph.node} == {cell}


def test_threads_change_nothing_but_rounding(session) -> None:
    model = _model("LSTM", "bidirectional", state=True)
    rng = np.random.default_rng(2)
    feeds = {
        "x": rng.standard_normal((200, 4, INPUTS)).astype(np.float32),
        "initial_h": np.zeros((2, 4, HIDDEN), np.float32),
        "initial_c": np.zeros((2, 4, HIDDEN), np.float32),
    }
    one, two = (session(model.to_proto(), library=True, threads=count).run(None, feeds) for count in (1, 2))
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_no_rows(session) -> None:
    """With the library only: onnxruntime's own LSTM divides by the number of rows."""
    op = session(_model("LSTM").to_proto(), library=True)
    y, y_h, y_c = op.run(None, {"x": np.zeros((3, 0, INPUTS), np.float32)})
    assert y.shape == (3, 1, 0, HIDDEN)
    assert y_h.shape == y_c.shape == (1, 0, HIDDEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: _attribute(node, ir.AttrString("direction", "up")), "'direction' is 'up'"),
        (lambda node: _attribute(node, ir.AttrString("layout_w", "32x1")), "which is not layout '32x1'"),
        (lambda node: _attribute(node, ir.AttrString("layout_r", "2:4")), "row 0 keeps"),
        (lambda node: _attribute(node, ir.AttrInt64("hidden_size", 8)), "expected"),
        (lambda node: _attribute(node, ir.AttrInt64("hidden_size", 1 << 40)), "out of range"),
        (lambda node: _attribute(node, ir.AttrInt64("layout_version", 2)), "layout_version 2"),
        (lambda node: _constant(node, 2, np.zeros(3, np.uint8)), "3 index bytes cannot place"),
        (lambda node: _constant(node, 3, np.array([64], np.int64)), "1 entries, expected 2"),
        (lambda node: _constant(node, 3, np.array([64, -1], np.int64)), "every entry must be in 1"),
        (lambda node: _constant(node, 6, np.array([64, 8], np.int64)), "state weight has 8 inputs|position"),
        (lambda node: _constant(node, 7, np.zeros((2, 128), np.float32)), "'bias' has shape"),
        (lambda node: _constant(node, 4, np.zeros((3, 1), np.float32)), "rank 3"),
    ],
)
def test_malformed(session, change, message: str) -> None:
    model = _model("LSTM")
    change(next(iter(model.onnx.graph)))
    model.onnx.functions.clear()
    with pytest.raises(Exception, match=rf"sparsecc: node 'op' \(SparseLSTM\): .*({message})"):
        session(model.to_proto(), library=True)


def _attribute(node: ir.Node, attribute: ir.Attr) -> None:
    node.attributes[attribute.name] = attribute


def _constant(node: ir.Node, index: int, array: np.ndarray) -> None:
    node.inputs[index].const_value = ir.Tensor(array, name=node.inputs[index].name)
    node.inputs[index].shape = ir.Shape(array.shape)


def test_wrong_inputs(session) -> None:
    op = session(_model("LSTM", lengths=True, state=True).to_proto(), library=True)
    good = _feeds(_model("LSTM", lengths=True, state=True))
    for name, array, message in (
        ("lengths", np.array([1, 2, 6], np.int32), r"length 6 of a sequence is not in 0\.\.5"),
        ("lengths", np.array([1, 2], np.int32), "lengths has shape"),
        ("initial_c", good["initial_c"][:, 1:], "initial_c has shape"),
    ):
        with pytest.raises(Exception, match=message):
            op.run(None, {**good, name: array})
