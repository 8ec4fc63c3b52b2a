"""Sizes that exporters compute from shapes: what can be told of them, and what must not be guessed."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest

from sparsecc.passes.lower.known_sizes import infer_more_shapes, known_number, known_sizes
from sparsecc.passes.tidy.constants import lift_constants

HEAD = """<ir_version: 8, opset_import: ["": 17]>
g (float[B,6,S] x, int64[2,2] square, float[B,6,S] other) => (int64[K] y) {
    shape = Shape(x)
    zero = Constant<value = int64[1] {0}>()  one = Constant<value = int64[1] {1}>()
    two = Constant<value = int64[1] {2}>()  first = Constant<value = int64 {0}>()
    minus = Constant<value = int64[1] {-1}>()  four = Constant<value = int64[1] {4}>()
"""


def graph_of(text: str) -> ir.Graph:
    """The graph of these nodes, shapes inferred; the last line makes ``y``."""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(HEAD + text + "}"))
    lift_constants(model)
    infer_more_shapes(model)
    return model.graph


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = Identity(shape)", ["B", 6, "S"]),
        ("b = Gather(shape, first) b1 = Unsqueeze(b, zero) y = Concat<axis=0>(b1, minus, four)", ["B", -1, 4]),
        ("y = Slice(shape, one, two)", [6]),
        ("y = Slice(shape, minus, four)", ["S"]),
        ("y = Slice(shape, zero, minus, zero, one)", ["B", 6]),
        ("y = Slice(shape, zero, four, zero, two)", None),
        ("c = Slice(shape, one, two) h = Div(c, two) y = Cast<to=7>(h)", [3]),
        ("y = Mul(shape, one)", ["B", 6, "S"]),
        ("y = Mul(shape, two)", [None, 12, None]),
        ("y = Add(shape, minus)", [None, 5, None]),
        ("y = Sub(four, one)", [3]),
        ("c = Slice(shape, one, two) f = Cast<to=1>(c) y = Cast<to=7>(f)", None),
        ("c = Slice(shape, one, two) t = Cast<to=9>(c) y = Cast<to=7>(t)", None),
        ("r = Shape(shape) o = ConstantOfShape<value = int64[1] {7}>(r) y = Identity(o)", [7, 7, 7]),
        ("r = Shape(shape) y = ConstantOfShape<value = int64[1] {1}>(shape)", None),
        ("r = Gather(square, first) y = Identity(r)", None),
        ("t = Concat<axis=0>(two, two) f = Concat<axis=0>(shape, four) s = Reshape(f, t) y = Gather(s, first)", None),
        ("q = Greater(shape, minus) y = Where(q, shape, shape)", None),
        (
            "w = Concat<axis=0>(minus, two, four) n = Mul(w, one) e = Equal(n, minus) y = Where(e, shape, n)",
            ["B", 2, 4],
        ),
        ("e = Equal(shape, minus) w = Concat<axis=0>(one, one, one) y = Where(e, w, shape)", ["B", 6, "S"]),
        ("e = Equal(shape, four) w = Concat<axis=0>(one, one, one) y = Where(e, w, shape)", [None, 6, None]),
    ],
)  # fmt: skip
def test_entries(text: str, expected: list[int | str | None] | None) -> None:
    assert known_sizes(graph_of(text).outputs[0]) == expected


def test_long_chains_take_no_time_and_large_numbers_are_unknown() -> None:
    chain = "c0 = Mul(two, one)" + "".join(f" c{i + 1} = Mul(c{i}, c{i})" for i in range(200))
    graph = graph_of(chain + " y = Mul(c5, one)")
    assert known_sizes(graph.outputs[0]) == [1 << 32]
    deep = {node.outputs[0].name: node.outputs[0] for node in graph}
    assert known_sizes(deep["c6"]) == [None]
    assert known_sizes(deep["c200"]) is None
    floats = "n0 = Cast<to=1>(two)" + "".join(f" n{i + 1} = Mul(n{i}, n{i})" for i in range(60))
    (found,) = (n.outputs[0] for n in graph_of(floats + " y = Identity(two)") if n.outputs[0].name == "n4")
    assert known_number(found) == 2.0**16


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("c = Slice(shape, one, two) f = Cast<to=1>(c) r = Sqrt(f) z = Reciprocal(r)", 6**-0.5),
        ("c = Slice(shape, one, two) f = Cast<to=1>(c) z = Div(f, f)", 1.0),
        ("c = Slice(shape, zero, one) z = Cast<to=1>(c)", None),
        ("z = Cast<to=1>(shape)", None),
        ("f = Cast<to=1>(zero) z = Reciprocal(f)", None),
        ("f = Cast<to=1>(minus) z = Sqrt(f)", None),
    ],
)
def test_number(text: str, expected: float | None) -> None:
    graph = graph_of(f"{text} y = Identity(two)")
    (found,) = (node.outputs[0] for node in graph if node.outputs[0].name == "z")
    assert known_number(found) == (None if expected is None else pytest.approx(expected))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t = Mul(shape, one) z = Expand(other, t)", ["B", 6, "S"]),
        ("b = Slice(shape, zero, one) t = Concat<axis=0>(b, two, four, minus) z = Reshape(x, t)", None),
        ("b = Slice(shape, zero, one) t = Concat<axis=0>(b, two, minus) n = Mul(t, one) z = Reshape(x, n)",
         ["B", 2, None]),
        ("b = Slice(shape, zero, one) s = Slice(shape, two, four) t = Concat<axis=0>(b, s, minus) n = Mul(t, one)"
         " z = Reshape(x, n)", ["B", "S", 6]),
        ("e = Slice(shape, two, four) z = Slice(x, zero, e, two, one)", ["B", 6, "S"]),
        ("e = Slice(shape, zero, one) z = Slice(x, zero, e, two, one)", ["B", 6, None]),
        ("e = Slice(shape, one, two) h = Div(e, two) n = Mul(h, one) z = Slice(x, n, e, one, one)", ["B", 3, "S"]),
    ],
)  # fmt: skip
def test_shapes_behind_computed_targets(text: str, expected: list[int | str | None] | None) -> None:
    graph = graph_of(f"{text} y = Identity(two)")
    (found,) = (node.outputs[0] for node in graph if node.outputs[0].name == "z")
    sizes = None if found.shape is None else [d if isinstance(d, int) else d.value for d in found.shape]
    if expected is None:
        assert sizes is None or None in sizes or any(str(size).startswith("unk__") for size in sizes)
        return
    plain = [None if str(size).startswith("unk__") else size for size in sizes or []]
    assert plain == expected
