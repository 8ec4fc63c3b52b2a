"""What the dense model computes for healing: the numbers, in which type, and how much is kept."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="healing needs PyTorch: pip install 'sparsecc[heal]'")

from sparsecc.calib import open_session, tap  # noqa: E402
from sparsecc.errors import UsageError  # noqa: E402
from sparsecc.heal.graph import TorchGraph  # noqa: E402
from sparsecc.heal.targets import Targets  # noqa: E402
from sparsecc.ir import Model  # noqa: E402
from sparsecc.pm import Pipeline  # noqa: E402

BATCHES = [{"x": np.random.default_rng(number).standard_normal((8, 24), np.float32)} for number in range(3)]


def dense(outputs: str = "float[B,6] y") -> Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[B,24] x) => ({outputs}) {{ h = MatMul(x, w1)  a = Relu(h)  y = MatMul(a, w2) }}"""
    )
    for name, shape in (("w1", (24, 32)), ("w2", (32, 6))):
        array = 0.3 * np.random.default_rng(7).standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def targets(*, narrow: bool = False, byte_budget: int = 1 << 20, reference: Model | None = None) -> Targets:
    model = dense()
    Pipeline.parse("prune-magnitude{sparsity=0.6}").run(model)
    return Targets(
        model, reference or dense(), TorchGraph(model), BATCHES, byte_budget=byte_budget, narrow=narrow
    )


def test_they_are_what_onnxruntime_computes_with_the_dense_model():
    found = targets()
    assert (found.states, found.outputs) == (["a"], ["y"])
    expected = open_session(tap(dense(), found.names)).run(BATCHES[1])
    for name, tensor in found.of(1).items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("narrow", [False, True])
def test_what_is_not_kept_is_computed_to_the_same_bits(narrow):
    kept, anew = targets(narrow=narrow), targets(narrow=narrow, byte_budget=0)
    assert kept.of(2) is kept.of(2)
    assert anew.of(2) is not anew.of(2)
    for name, tensor in kept.of(2).items():
        assert tensor.dtype == (torch.bfloat16 if narrow else torch.float32)
        assert torch.equal(tensor, anew.of(2)[name])


def test_judging_is_in_float32_also_where_training_is_not():
    found = targets(narrow=True)
    found.of(0)
    for name, tensor in found.of(0, exact=True).items():
        assert torch.equal(tensor, targets().of(0)[name])


def test_another_model_is_refused():
    with pytest.raises(UsageError, match="other outputs"):
        targets(reference=dense("float[B,6] y, float[B,32] a"))
