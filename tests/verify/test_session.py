from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from sparsecc import verify
from sparsecc.calib import engine, tap, tensor_shapes
from sparsecc.errors import ModelError, UnsupportedModelError, UsageError
from sparsecc.ir import Model

MLP = """
<ir_version: 8, opset_import: ["": 17]>
mlp (float[B, 3] x) => (float[B, 2] y)
<float[3, 4] w1 = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[4, 2] w2 = {1, 0, 0, 1, 1, 0, 0, 1}>
{
    h = MatMul(x, w1)
    r = Relu(h)
    y = MatMul(r, w2)
}
"""


def proto(text: str = MLP) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


@pytest.fixture
def model() -> Model:
    return Model.from_proto(proto())


def test_runs_model_and_file_alike(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(proto(), path)
    x = np.array([[1, 0, -1]], np.float32)
    expected = np.maximum(x @ np.arange(1, 13).reshape(3, 4), 0) @ [[1, 0], [0, 1], [1, 0], [0, 1]]
    for source in (model, path, str(path)):
        got = verify.session(source).run({"x": x, "unused": x})
        np.testing.assert_array_equal(got["y"], expected)


def test_large_weights_are_handed_over_as_arrays(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"x": np.ones((2, 3), np.float32)}
    expected = verify.session(model).run(x)
    monkeypatch.setattr(engine, "_INLINE_LIMIT", 0)
    monkeypatch.setattr(engine, "_INLINE_TENSOR", 0)
    np.testing.assert_array_equal(verify.session(model).run(x)["y"], expected["y"])
    assert model.onnx.graph.initializers["w1"].const_value.numpy()[0, 0] == 1


def test_weights_that_were_handed_over_live_as_long_as_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime reads the arrays it was given; those of tensors in a protobuf exist nowhere else."""
    monkeypatch.setattr(engine, "_INLINE_LIMIT", 0)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[5000] x) => (float[5000] y) { y = Add(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(5000, np.float32), "w"))
    session = verify.session(Model.from_proto(proto))
    others = [np.full(5000, number, np.float32) for number in range(2, 50)]
    found = session.run({"x": np.zeros(5000, np.float32)})["y"]
    assert len(others) == 48
    np.testing.assert_array_equal(found, 1)


def test_weights_in_files_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_MAPPED_TENSOR", 0)
    monkeypatch.setattr(engine, "_INLINE_TENSOR", 0)
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[B,512] x) => (float[B,4] y) { y = MatMul(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((512, 4), np.float32), "w"))
    Model.from_proto(proto).save(tmp_path / "m.onnx", external_data=True)
    model = Model.load(tmp_path / "m.onnx")
    monkeypatch.setattr(Model, "to_proto", None)  # would copy
    found = verify.session(model).run({"x": np.ones((2, 512), np.float32)})["y"]
    np.testing.assert_array_equal(found, 512)


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (b"", ModelError, "not an ONNX model"),
        (b"hello, not a model", ModelError, "not an ONNX model"),
        (None, ModelError, "no such file"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes | None, kind: type[Exception], words: str) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(kind, match=words) as caught:
        verify.session(path)
    assert "\n" not in str(caught.value)
    assert "m.onnx" in str(caught.value)


def bad(change: str) -> bytes:
    changed = proto()
    if change == "operator":
        changed.graph.node[1].op_type = "Frobnicate"
    elif change == "domain":
        changed.graph.node[1].domain = "foo.bar"
        changed.opset_import.add(domain="foo.bar", version=1)
    elif change == "opset":
        changed.opset_import[0].version = 9999
    else:
        changed.ir_version = 999
    return changed.SerializeToString()


@pytest.mark.parametrize(
    ("change", "word"),
    [("operator", "Frobnicate"), ("domain", "foo.bar:Relu"), ("opset", "9999"), ("ir", "999")],
)
def test_unsupported(tmp_path: Path, change: str, word: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(bad(change))
    with pytest.raises(UnsupportedModelError, match=word) as caught:
        verify.session(path)
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit(model: Model) -> None:
    runnable = verify.session(model)
    with pytest.raises(UsageError, match="no array for input x"):
        runnable.run({"z": np.ones((1, 3), np.float32)})
    for wrong in (np.ones((1, 4), np.float32), np.ones((1, 3)), np.ones(3, np.float32)):
        with pytest.raises(UsageError, match="do not fit"):
            runnable.run({"x": wrong})


def test_options(model: Model) -> None:
    with pytest.raises(UsageError, match="choose all, extended"):
        verify.session(model, optimization="most")
    with pytest.raises(UsageError, match="threads"):
        verify.session(model, threads=-1)


def test_tap_returns_inner_tensors_and_leaves_the_model_alone(model: Model) -> None:
    tapped = tap(model, ["h", "r"])
    got = verify.session(tapped).run({"x": np.array([[-1, 0, 0]], np.float32)})
    np.testing.assert_array_equal(got["h"], [[-1, -2, -3, -4]])
    np.testing.assert_array_equal(got["r"], [[0, 0, 0, 0]])
    assert [value.name for value in model.onnx.graph.outputs] == ["y"]
    with pytest.raises(UsageError, match="nothing"):
        tap(model, ["nothing"])


def test_tensor_shapes(model: Model) -> None:
    shapes = tensor_shapes(model, ["r", "x", "w1", "y", "nothing"], {"x": np.ones((5, 3), np.float32)})
    assert shapes == {"r": (5, 4), "x": (5, 3), "w1": (3, 4), "y": (5, 2)}
    assert tensor_shapes(model, ["nothing"], {}) == {}
