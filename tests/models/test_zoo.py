"""The zoo builds valid models of the stated sizes whose weights carry the wanted zeros."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from sparsecc.errors import SpecError
from sparsecc.sparse import Pattern, matches

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))

import zoo

TINY = {
    "bert_base": {
        "layers": 2,
        "hidden": 64,
        "heads": 4,
        "intermediate": 128,
        "vocabulary": 50,
        "positions": 16,
    },
    "minilm_l6": {
        "layers": 1,
        "hidden": 48,
        "heads": 3,
        "intermediate": 96,
        "vocabulary": 50,
        "positions": 16,
    },
    "llama_block": {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 96},
    "resnet50": {"depths": (1, 2, 1, 1), "width": 8, "image": 32, "classes": 10},
    "mobilenet_v1": {"image": 32, "classes": 10},
    "mobilenet_v2": {"image": 32, "classes": 10, "stages": ((1, 16, 1, 1), (6, 24, 2, 2)), "head": 64},
}


def tiny(name: str, **options) -> onnx.ModelProto:
    return zoo.build(name, **{"seq": 8, **TINY[name], **options})


def feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {}
    for value in model.graph.input:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT64:
            arrays[value.name] = (
                np.zeros(shape, np.int64) if "type" in value.name else np.ones(shape, np.int64)
            )
        else:
            arrays[value.name] = rng.standard_normal(shape, dtype=np.float32)
    return arrays


def run(model: onnx.ModelProto, arrays: dict[str, np.ndarray] | None = None) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds(model) if arrays is None else arrays)[0]


def pruned_weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Every weight that is to be pruned, as ``[outputs, inputs]``."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        weight = arrays.get(node.input[1]) if node.op_type in ("MatMul", "Conv") else None
        if weight is None or "stem" in node.name or "depthwise" in node.name:
            continue
        weights[node.name] = weight.T if node.op_type == "MatMul" else weight.reshape(weight.shape[0], -1)
    return weights


@pytest.mark.parametrize("opset", [13, 17, 20])
@pytest.mark.parametrize("name", sorted(TINY))
def test_builds_and_runs(name, opset):
    model = tiny(name, opset=opset)
    assert model.opset_import[0].version == opset
    y = run(model)
    assert np.isfinite(y).all()
    assert 0.005 < y.std() < 50  # neither denormals nor infinities may disturb the timing


@pytest.mark.parametrize("name", sorted(TINY))
def test_zeros_of_the_wanted_pattern_in_every_linear_weight(name):
    for pattern, sparsity in (("unstructured", 0.75), ("16x1", 0.5), ("2:4", 0.5)):
        weights = pruned_weights(tiny(name, pattern=pattern, sparsity=sparsity))
        assert weights
        for node, weight in weights.items():
            assert matches(weight, Pattern.parse(pattern)), node
            unit = 16 * weight.shape[1] if pattern == "16x1" else weight.size  # partial blocks at the edge
            if weight.shape[0] % 16 == 0 and weight.shape[1] % 4 == 0:
                assert np.mean(weight == 0) == pytest.approx(sparsity, abs=16 / unit + 1e-6), node


def test_stem_depthwise_and_classifier_stay_dense():
    model = tiny("mobilenet_v1", pattern="unstructured", sparsity=0.9)
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    dense = [
        v
        for k, v in arrays.items()
        if k.endswith("weight") and ("stem" in k or "depthwise" in k or "class" in k)
    ]
    assert len(dense) == 15
    assert all((weight != 0).all() for weight in dense)


@pytest.mark.parametrize("name", ["bert_base", "resnet50", "mobilenet_v2", "llama_block"])
def test_batch_elements_are_independent(name):
    model = tiny(name, batch=2)
    arrays = feeds(model)
    swapped = {key: value[::-1].copy() for key, value in arrays.items()}
    np.testing.assert_allclose(run(model, arrays)[::-1], run(model, swapped), rtol=1e-4, atol=1e-4)


def test_same_arguments_give_the_same_bytes():
    options = {"pattern": "16x1", "sparsity": 0.5, "seed": 3}
    assert tiny("resnet50", **options).SerializeToString() == tiny("resnet50", **options).SerializeToString()
    assert tiny("resnet50", seed=4).SerializeToString() != tiny("resnet50", seed=3).SerializeToString()


def test_decoding_step_with_cache_continues_the_whole_sequence():
    whole = tiny("llama_block", layers=1, seq=6)
    x = feeds(whole)["hidden_states"]
    keys, values = cached_keys_and_values(whole, x)
    step = tiny("llama_block", layers=1, seq=1, past=5)
    last = run(
        step, {"hidden_states": x[:, 5:], "past.0.key": keys[:, :, :5], "past.0.value": values[:, :, :5]}
    )
    np.testing.assert_allclose(last[:, 0], run(whole, {"hidden_states": x})[:, 5], rtol=1e-4, atol=1e-4)


def cached_keys_and_values(model: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run the model with its keys (after rotation) and values as further outputs."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    scope = "/layers.0/attention"
    names = [f"{scope}/k_rotary/Add_output_0", f"{scope}/v/Transpose_output_0"]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    keys, values = session.run(names, {"hidden_states": x})
    return keys, values


def test_separate_batch_normalisation_is_available():
    model = tiny("resnet50", batch_norm=1)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("BatchNormalization") == kinds.count("Conv")
    assert np.isfinite(run(model)).all()


@pytest.mark.parametrize(
    ("name", "millions"),
    [("minilm_l6", 22.6), ("resnet50", 25.5), ("mobilenet_v1", 4.2), ("mobilenet_v2", 3.5)],
)
def test_real_sizes(name, millions):
    model = zoo.build(name)
    parameters = sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type == 1)
    assert parameters / 1e6 == pytest.approx(millions, abs=0.1)


def test_mistakes_are_named():
    with pytest.raises(KeyError, match="known are: bert_base"):
        zoo.build("vgg")
    with pytest.raises(SpecError):
        tiny("resnet50", pattern="sixteen")


def test_command_line(tmp_path):
    path = tmp_path / "tiny.onnx"
    sizes = [f"--set={key}={value}" for key, value in TINY["minilm_l6"].items()]
    arguments = ["minilm_l6", "-o", str(path), "--seq=8", "--pattern=16x1", "--sparsity=0.5", *sizes]
    result = CliRunner().invoke(zoo.main, arguments)
    assert result.exit_code == 0, result.output
    assert np.isfinite(run(onnx.load(path))).all()


@pytest.mark.parametrize(
    ("option", "message"),
    [("--set=x=1", "no such size"), ("--set=layers", "FIELD=INTEGER"), ("--pattern=0x1", "pattern")],
)
def test_command_line_mistakes_are_one_line(tmp_path, option, message):
    path = tmp_path / "tiny.onnx"
    result = CliRunner().invoke(zoo.main, ["minilm_l6", "-o", str(path), option])
    assert result.exit_code == 2
    assert message in result.output
    assert not path.exists()
