"""Times of sites in models that passes have changed since the first was timed."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import onnx
import pytest

from sparsecc.errors import MeasurementError
from sparsecc.ir import Model
from sparsecc.passes.lower.linear_form import linear_form
from sparsecc.plan import CostTable, MeasuredCosts
from sparsecc.plan.alone import form_ends, part_model
from sparsecc.plan.copies import copies_of, rows_of
from sparsecc.target import Target


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

    def time_variants(self, variants, names, inputs=None, copies=1):
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


def test_rows_of_several_copies_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that stay in the cache of the core and those that do not take different times."""
    table, taken = CostTable(None, {}), []

    def time_variants(self, variants, names, inputs=None, copies=1):
        taken.append(copies)
        return dict.fromkeys(["dense", *names], float(copies))

    monkeypatch.setattr(MeasuredCosts, "_time_variants", time_variants)
    model = chain(64, 32)
    (site,) = model.sites()
    part = part_model([form_ends(linear_form(model, site, site.node))], (3, 64), model)
    for whole, count in ((0, 1), (64 * 32 * 4, 1), (5 * 64 * 32 * 4, 5)):
        inputs = {"x": np.ones((3, 64), np.float32)}
        costs = MeasuredCosts(table, inputs, 1, copies=functools.partial(copies_of, whole=whole))
        assert costs.site_times_ms(model, site, []) == {"dense": count}
        cost, _ = costs.part_rewritten(part, lambda own: None, "as it is", custom_ops=False)
        assert cost.dense_ms == count
    assert taken == [1, 1, 5, 5]
    assert sorted(key.endswith(" copies=5") for key, _ in table) == [False, False, True, True]


def test_copies_are_as_large_as_the_model_as_far_as_caches_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "host", classmethod(lambda cls: cls(l3_bytes=32 << 20)))
    mega = 1 << 20
    assert copies_of(mega, 128, whole=mega) == 1  # the only weight of its model
    assert copies_of(mega, 128, whole=4 * mega) == 4
    assert copies_of(mega, 128, whole=100 * mega) == 8  # beyond the caches of a core
    assert copies_of(4 * mega, 1, whole=31 * mega) == 2
    assert copies_of(4 * mega, 1, whole=100 * mega) == 10  # waits for memory
    assert copies_of(1000, 1, whole=100 * mega) == 16
    assert copies_of(100 * mega, 1, whole=100 * mega) == 1
    assert rows_of("Conv", (2, 64, 7, 7)) == 98
    assert rows_of("MatMul", (1, 12, 64)) == 12
