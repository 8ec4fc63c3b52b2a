"""What random graphs, weights and options have found in the passes that factorise, in its smallest form."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.ir import Model
from sparsecc.pm import PassContext, Pipeline


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).standard_normal(shape).astype(np.float32)


def product(weight: np.ndarray) -> Model:
    text = f"g (float[N,{len(weight)}] x) => (float[N,{weight.shape[1]}] y) {{ [s] y = MatMul(x, w) }}"
    return build(text, w=weight)


def run(model: Model, spec: str, x: np.ndarray):
    source = Calibration.from_batches([{"x": x}], model, threads=1)
    return Pipeline.parse(spec).run(model, PassContext(calibration=source, threads=1))[-1]


@pytest.mark.parametrize("options", ["", "link=frobenius", "merge=true"])
def test_links_between_rows_that_are_equal_but_for_rounding_stay_small(options):
    """Entries of 1e7 told copies of a row apart, and the three products in float32 lost all digits."""
    weight, x = np.outer(normal(12), normal(9)).astype(np.float32), normal(50, 12)
    model = product(weight)
    run(model, f"factor-cur{{min-elements=1 multiple=2 keep-slower=true {options}}}", x)
    assert len(model.sites()) > 1
    np.testing.assert_allclose(open_session(model).run({"x": x})["y"], x @ weight, atol=1e-4)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("shape", [(5, 7), (16, 9), (6, 24)])
def test_packed_weights_hold_no_more_than_they_may(ratio, shape):
    model = product(normal(*shape))
    spec = f"factor-slab{{min-elements=1 param-ratio={ratio} keep-slower=true}}"
    for change in run(model, spec, normal(50, shape[0])).changed:
        assert change.numbers["parameters"] <= ratio
