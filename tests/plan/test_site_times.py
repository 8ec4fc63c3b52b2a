"""Times of sites in models that passes have changed since the first was timed."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from sparsecc.errors import MeasurementError
from sparsecc.ir import Model
from sparsecc.plan import CostTable, MeasuredCosts


def chain(*sizes: int) -> Model:
    names = ["x", *(f"h{at}" for at in range(len(sizes) - 2)), "y"]
    body = " ".join(f"[fc{at}] {names[at + 1]} = MatMul({names[at]}, w{at})" for at in range(len(sizes) - 1))
    text = f"g (float[N,{sizes[0]}] x) => (float[N,{sizes[-1]}] y) {{ {body} }}"
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>' + text)
    for at, shape in enumerate(itertools.pairwise(sizes)):
        weight = np.zeros(shape, np.float32)
        weight[0] = 1.0
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w{at}"))
    return Model.from_proto(proto)


def test_sites_that_passes_make_or_change_are_timed_as_they_are_now(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def time_variants(self, variants, names, inputs=None):
        (x,) = inputs.values()
        timed.append(x.shape)
        return dict.fromkeys(["dense", *names], 1.0)

    monkeypatch.setattr(MeasuredCosts, "_time_variants", time_variants)
    costs = MeasuredCosts(CostTable(None, {}), {"x": np.ones((3, 16), np.float32)}, 1)
    for model, expected in (
        (chain(16, 8, 4), [(3, 16), (3, 8)]),
        (chain(16, 12, 4), [(3, 16), (3, 12)]),  # narrower or wider between
        (chain(16, 12, 4, 2), [(3, 16), (3, 12), (3, 4)]),  # one more
    ):
        timed.clear()
        costs.table = CostTable(None, {})
        for site in model.sites():
            costs.site_times_ms(model, site, [])
        assert timed == expected


def test_sites_that_no_input_reaches_are_not_timed() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (bool c, float[N,4] x) => (float[N,4] y) {
            y = If(c) <then_branch = t () => (float[N,4] p) { r = Relu(x) [then] p = MatMul(r, w) },
                       else_branch = e () => (float[N,4] q) { q = Identity(x) }>
        }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
    model = Model.from_proto(proto)
    costs = MeasuredCosts(CostTable(None, {}), {"c": np.array(False), "x": np.ones((2, 4), np.float32)}, 1)
    (site,) = model.sites()
    with pytest.raises(MeasurementError, match="do not reach it"):
        costs.site_times_ms(model, site, [])
