"""Parts of a model as models of their own."""

from __future__ import annotations

import numpy as np
import onnx.parser
from onnx import numpy_helper

from sparsecc import verify
from sparsecc.ir import Model
from sparsecc.passes.lower.linear_form import linear_form
from sparsecc.plan.alone import site_model


def test_a_part_leaves_the_model_as_it_is() -> None:
    """Tensors are shared: the names of the part must not become those of the model."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        m (float[batch, 8] x) => (float[batch, 8] y) {
            [one] h = MatMul(x, w1)
            hb = Add(h, b1)
            [two] z = MatMul(hb, w2)
            y = Add(z, b2)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (8, 8)), ("b1", (8,)), ("w2", (8, 8)), ("b2", (8,))):
        proto.graph.initializer.append(
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        )
    model = Model.from_proto(proto)
    before = model.fingerprint()
    x = rng.standard_normal((3, 8)).astype(np.float32)
    for site in model.sites():
        alone = site_model(linear_form(model, site, site.node), (3, 8), model)
        assert model.fingerprint() == before
        assert {value.const_value.name for value in model.onnx.graph.initializers.values()} == {
            "w1", "b1", "w2", "b2",
        }  # fmt: skip
        weight, bias = (numpy_helper.to_array(proto.graph.initializer[at]) for at in
                        ((0, 1) if site.name == "one" else (2, 3)))  # fmt: skip
        (source,) = alone.input_specs()
        (found,) = verify.session(alone).run({source.name: x}).values()
        np.testing.assert_allclose(found, x @ weight + bias, rtol=1e-5, atol=1e-5)
