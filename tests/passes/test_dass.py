"""Gated units: which sites are factors, and what their rows keep."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.prune.dass import gated_product
from sparsecc.pm import PassContext, Pipeline
from sparsecc.sparse import density

RNG = np.random.default_rng(8)
GATES = {
    "silu": "s = Sigmoid(g) a = Mul(g, s) h = Mul(a, u)",
    "gelu": "e = Erf(g) f = Add(e, one) i = Mul(g, f) a = Mul(i, one) h = Mul(u, a)",
    "relu with biases": "gb = Add(g, bias) ub = Add(bias, u) a = Relu(gb) h = Mul(a, ub)",
}


def gated(gate: str, up_input: str = "x") -> Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[B,32] x, float[B,32] z) => (float[B,32] y) {{
            [gate] g = MatMul(x, wg)
            [up] u = MatMul({up_input}, wu)
            {gate}
            [down] y = MatMul(h, wd)
        }}"""
    )
    shapes = {"wg": (32, 64), "wu": (32, 64), "wd": (64, 32), "one": (), "bias": (64,)}
    for name, shape in shapes.items():
        array = np.asarray(RNG.standard_normal(shape), np.float32)
        if name == "wu":
            array *= np.linspace(0.1, 3, 64, dtype=np.float32)  # rows of very different size
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_factors_are_found_behind_any_activation(gate):
    found = {site.name: gated_product(site) for site in gated(gate).sites()}
    assert {name: value and value.name for name, value in found.items()} == {
        "gate": "h",
        "up": "h",
        "down": None,
    }


def test_products_of_different_inputs_are_no_gate():
    assert all(gated_product(site) is None for site in gated(GATES["silu"], "z").sites())


def pruned(model: Model, spec: str) -> Model:
    copy = model.copy()
    rng = np.random.default_rng(0)
    x = {name: rng.standard_normal((200, 32)).astype(np.float32) for name in ("x", "z")}
    source = Calibration.from_batches([x], copy)
    Pipeline.parse(spec).run(copy, PassContext(calibration=source))
    return copy


def test_rows_with_larger_products_keep_more():
    model = gated(GATES["silu"])
    by_dass, by_wanda = (pruned(model, f"prune-{name}{{sparsity=0.5}}") for name in ("dass", "wanda"))
    counts = {site.name: np.count_nonzero(site.numpy(), axis=1) for site in by_dass.sites()}
    assert counts["gate"].sum() == counts["up"].sum() == 32 * 32
    assert counts["gate"][-16:].mean() > counts["gate"][:16].mean() + 4
    np.testing.assert_array_equal(by_dass.sites("down")[0].numpy(), by_wanda.sites("down")[0].numpy())


def test_group_patterns_are_those_of_wanda():
    model = gated(GATES["silu"])
    by_dass = pruned(model, "prune-dass{pattern=2:4}")
    by_wanda = pruned(model, "prune-wanda{pattern=2:4}")
    for ours, theirs in zip(by_dass.sites(), by_wanda.sites(), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
        assert density(ours.numpy()) == 0.5


def test_scaling_a_unit_and_its_consumer_changes_no_decision_below():
    """Row i of W_u times c and column i of W_d by c: the layer below keeps the same weights."""
    model = gated(GATES["silu"])
    scaled = model.copy()
    up, down = scaled.sites("up")[0], scaled.sites("down")[0]
    factors = np.exp2(RNG.integers(-2, 3, 64)).astype(np.float32)
    up.replace(up.numpy() * factors[:, None])
    down.replace(down.numpy() / factors)
    before = pruned(model, "prune-dass{match=down}").sites("down")[0].numpy() != 0
    after = pruned(scaled, "prune-dass{match=down}").sites("down")[0].numpy() != 0
    np.testing.assert_array_equal(before, after)


def test_refuses_a_negative_exponent():
    with pytest.raises(SpecError, match="alpha"):
        Pipeline.parse("prune-dass{alpha=-1}")
