"""Tensors in the bodies of If, Loop and Scan, seen from outside."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from sparsecc.calib import value_shapes
from sparsecc.calib.lift import Lifter, LiftError, twins
from sparsecc.ir import Model
from sparsecc.verify import session

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
agraph (float[n, 3] x, bool c, int64 rounds) => (float[m, k] y)
{
    go = Constant <value = bool {1}> ()
    y = If (c) <
        then_branch = yes () => (float[n, 3] a) {
            doubled = Add(x, x)
            out, inner = Loop (rounds, go, doubled) <
                body = once (int64 i, bool keep, float[n, 3] state)
                    => (bool keep_on, float[n, 3] next, float[p, q] shown) {
                    keep_on = Identity(keep)
                    next = Add(state, x)
                    first = Constant <value = int64 {0}> ()
                    odd = Equal(i, first)
                    shown = If (odd) <
                        then_branch = t () => (float[p, q] s) { s = Transpose(next) },
                        else_branch = e () => (float[p, q] r) { r = Transpose(state) }
                    >
                }
            >
            a = Identity(out)
        },
        else_branch = no () => (float[k, n] b) { flat = Transpose(x) b = Identity(flat) }
    >
}
"""
X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def model() -> Model:
    return Model.from_proto(onnx.parser.parse_model(TEXT))


def _values(model: Model) -> dict[str, object]:
    graphs = list(model.graphs())
    return {
        value.name: value
        for graph in graphs
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs))
    }


def _shapes(model: Model, c: bool, rounds: int) -> dict[str, tuple[int, ...]]:
    values = _values(model)
    names = ("x", "doubled", "flat", "state", "next", "s", "r", "i", "y")
    before = model.fingerprint()
    found = value_shapes(
        model, [values[name] for name in names], {"x": X, "c": np.array(c), "rounds": np.array(rounds)}
    )
    assert model.fingerprint() == before
    return {value.name: shape for value, shape in found.items()}


def test_shapes_in_bodies(model: Model) -> None:
    everywhere = {"x": (2, 3)}
    assert _shapes(model, False, 3) == {**everywhere, "flat": (3, 2), "y": (3, 2)}
    then = {**everywhere, "doubled": (2, 3), "y": (2, 3)}
    assert _shapes(model, True, 0) == then
    rounds = {"state": (2, 3), "next": (2, 3), "i": ()}
    assert _shapes(model, True, 1) == {**then, **rounds, "s": (3, 2)}
    assert _shapes(model, True, 3) == {**then, **rounds, "s": (3, 2), "r": (3, 2)}


def test_shapes_that_change_are_left_out() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    agraph (float[n, 3] x, int64 rounds) => (float[m, 3] y)
    {
        go = Constant <value = bool {1}> ()
        y = Loop (rounds, go, x) <
            body = once (int64 i, bool keep, float[n, 3] state) => (bool keep_on, float[m, 3] next) {
                keep_on = Identity(keep)
                next = Concat <axis = 0> (state, state)
                same = Abs(x)
            }
        >
    }
    """
    model = Model.from_proto(onnx.parser.parse_model(text))
    values = _values(model)
    found = value_shapes(model, [values[name] for name in ("state", "same")], {"x": X, "rounds": np.array(3)})
    assert {value.name: shape for value, shape in found.items()} == {"same": (2, 3)}


def test_copies_of_tensors_in_bodies(model: Model) -> None:
    copy, values = model.copy(), _values(model)
    graph = copy.onnx.graph
    pairs, lifter = twins(model.onnx.graph, graph), Lifter.of(copy.onnx)
    float32 = np.dtype(np.float32)
    lifted = [lifter.copy_of(pairs[values[name]], float32) for name in ("doubled", "flat", "next")]
    graph.outputs[:] = [item.value for item in lifted]
    assert [item.stacked for item in lifted] == [0, 0, 1]
    for c in (True, False):
        results = session(copy).run({"x": X, "c": np.array(c), "rounds": np.array(2)})
        doubled, flat, following = results.values()
        np.testing.assert_array_equal(doubled, 2 * X if c else np.zeros(0))
        np.testing.assert_array_equal(flat, np.zeros(0) if c else X.T)
        np.testing.assert_array_equal(following, [3 * X, 4 * X] if c else np.zeros(0))
    with pytest.raises(LiftError, match="branch in a loop"):
        lifter.copy_of(pairs[values["s"]], float32)
    with pytest.raises(LiftError, match="function body"):
        lifter.copy_of(values["x"], float32)
