"""Constant fan-in: rows of equally many weights, and neurons that are nothing but a constant leave for good."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration
from sparsecc.ir import Model
from sparsecc.pm import PassContext, Pipeline
from sparsecc.verify import session

RNG = np.random.default_rng(2)
ABLATED = [3, 10, 20]


def mlp() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,48] x) => (float[B,16] y) {
            [up] h = MatMul(x, w) a = Add(h, b) r = Relu(a) [down] d = MatMul(r, v) y = Add(d, c)
        }"""
    )
    shapes = {"w": (48, 32), "b": (32,), "v": (32, 16), "c": (16,)}
    for name, shape in shapes.items():
        array = RNG.standard_normal(shape).astype(np.float32)
        if name == "b":
            array[ABLATED] = 0.5, 1.5, -1.0  # constants behind the activation: 0.5, 1.5 and nothing
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def calibration(model: Model) -> Calibration:
    x = RNG.standard_normal((200, 48)) @ RNG.standard_normal((48, 48))
    return Calibration.from_batches([{"x": x.astype(np.float32)}], model, threads=1)


@pytest.mark.parametrize("method", ["wanda", "wanda-ols", "sparsegpt", "alps", "obc"])
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_every_row_keeps_the_same_number(method: str, sparsity: float) -> None:
    model = mlp()
    Pipeline.parse(f"prune-{method}{{sparsity={sparsity}}}").run(
        model, PassContext(calibration=calibration(model))
    )
    for site in model.sites():
        assert len(set(np.count_nonzero(site.numpy(), axis=1).tolist())) <= 1, site.name


def test_neurons_without_inputs_leave_and_their_constants_go_into_the_next_bias() -> None:
    """Structured removal finds that they cost nothing; what they put out was not nothing."""
    model = mlp()
    up = model.sites("up")[0]
    weight = up.numpy().copy()
    weight[ABLATED] = 0
    up.replace(weight)
    masked, source = model.copy(), calibration(model)
    options = "flops-ratio=0.92 multiple=1 damping=1e-6"  # three of 32 neurons
    Pipeline.parse(f"prune-structured{{{options}}}").run(model, PassContext(calibration=source))
    assert [site.shape for site in model.sites()] == [(29, 48), (16, 29)]
    kept = np.delete(np.arange(32), ABLATED)
    np.testing.assert_array_equal(model.sites("up")[0].numpy(), weight[kept])
    x = RNG.standard_normal((20, 48)).astype(np.float32)
    before, after = (session(item).run({"x": x})["y"] for item in (masked, model))
    np.testing.assert_allclose(after, before, rtol=1e-3, atol=1e-3)
