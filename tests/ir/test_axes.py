"""Coupled axes: any order the graph allows leaves outputs alone, removal is the same as inputs that count nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import networkx as nx
import numpy as np
import onnx
import onnx_ir
import pytest

from sparsecc.calib import open_session, synthetic_inputs
from sparsecc.errors import PassError
from sparsecc.ir import Model
from sparsecc.ir.axes import AxisGraph, permute, remove
from sparsecc.passes.tidy.constants import lift_constants
from sparsecc.pm.checks import graph_fault

#: Name -> (graph, weights by name and shape, orbits that can be removed as (producer, units)).
GRAPHS = {
    "mlp": (
        "g (float[B,8] x) => (float[B,3] y) { [up] h = Gemm<transB=1>(x, w, b) r = Relu(h) [down] y = MatMul(r, v) }",
        {"w": (6, 8), "b": (6,), "v": (6, 3)},
        {("up", 6)},
    ),
    "residual with LayerNormalization": (
        """g (float[B,T,8] x) => (float[B,T,3] y) {
            [stem] s = MatMul(x, w) [up] u = MatMul(s, w1) g = Erf(u) [down] d = MatMul(g, w2) a = Add(s, d)
            n = LayerNormalization<axis=-1>(a, scale, shift) [head] y = MatMul(n, v) }""",
        {"w": (8, 6), "w1": (6, 10), "w2": (10, 6), "scale": (6,), "shift": (6,), "v": (6, 3)},
        {("up", 10)},
    ),
    "convolutions, BatchNormalization, pooling, Flatten": (
        """g (float[B,3,8,8] x) => (float[B,5] y) {
            [c1] a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1)
            n = BatchNormalization(a, s, t, m, v) r = Relu(n)
            [dw] d = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=8>(r, w2, b2) q = PRelu(d, slope)
            p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(q)
            [c2] e = Conv<kernel_shape=[1,1]>(p, w3) f = Flatten(e) [fc] y = Gemm(f, w4) }""",
        {"w1": (8, 3, 3, 3), "b1": (8,), "s": (8,), "t": (8,), "m": (8,), "v": (8,), "w2": (8, 1, 3, 3), "b2": (8,),
         "slope": (8, 1, 1), "w3": (6, 8, 1, 1), "w4": (96, 5)},
        {("c1", 8), ("c2", 6)},
    ),
    "Concat and Split": (
        """g (float[B,4] x) => (float[B,2] y) {
            [a] p = MatMul(x, wa) [b] q = MatMul(x, wb) c = Concat<axis=1>(p, q) r = Relu(c)
            sizes = Constant<value_ints=[3,6]>() one, two = Split<axis=1>(r, sizes)
            [c] u = MatMul(one, wc) [d] v = MatMul(two, wd) y = Add(u, v) }""",
        {"wa": (4, 5), "wb": (4, 4), "wc": (3, 2), "wd": (6, 2)},
        {("a", 3), ("a", 2), ("b", 4)},
    ),
    "grouped convolution": (
        """g (float[B,3,4,4] x) => (float[B,2,4,4] y) {
            [c1] a = Conv<kernel_shape=[1,1]>(x, w1) [c2] b = Conv<kernel_shape=[1,1], group=2>(a, w2)
            [c3] y = Conv<kernel_shape=[1,1]>(b, w3) }""",
        {"w1": (8, 3, 1, 1), "w2": (12, 4, 1, 1), "w3": (2, 12, 1, 1)},
        {("c1", 4), ("c2", 6)},
    ),
    "grouped convolutions one after the other, and a shuffle between them": (
        """g (float[B,3,4,4] x) => (float[B,2,4,4] y) {
            [c1] a = Conv<kernel_shape=[1,1]>(x, w1) [c2] b = Conv<kernel_shape=[1,1], group=2>(a, w2)
            r = Reshape(b, wide) t = Transpose<perm=[0,2,1,3,4]>(r) f = Reshape(t, flat)
            [c3] c = Conv<kernel_shape=[3,3], group=2>(f, w3) [c4] y = Conv<pads=[1,1,1,1]>(c, w4) }""",
        {"w1": (8, 3, 1, 1), "w2": (12, 4, 1, 1), "w3": (4, 6, 3, 3), "w4": (2, 4, 1, 1),
         "wide": [0, 2, 6, 4, 4], "flat": [0, 12, 4, 4]},
        {("c1", 4), ("c2", 1), ("c3", 2)},
    ),
    "two branches of an Inception block": (
        """g (float[B,3,6,6] x) => (float[B,2] y) {
            [a1] a = Conv(x, w1) p = Relu(a) [b1] b = Conv(x, w2) q = Relu(b)
            [b2] e = Conv<pads=[1,1,1,1]>(q, w3) r = Relu(e)
            m = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1], strides=[1,1]>(x) [d1] d = Conv(m, w4)
            c = Concat<axis=1>(p, r, d) [n1] n = Conv(c, w5) g = GlobalAveragePool(n) f = Flatten(g)
            [fc] y = Gemm(f, w6) }""",
        {"w1": (4, 3, 1, 1), "w2": (5, 3, 1, 1), "w3": (6, 5, 3, 3), "w4": (3, 3, 1, 1), "w5": (7, 13, 1, 1),
         "w6": (7, 2)},
        {("a1", 4), ("b1", 5), ("b2", 6), ("d1", 3), ("n1", 7)},
    ),
    "shortcut by Slice and Pad": (
        """g (float[B,3,4,4] x) => (float[B,2,2,2] y) {
            [c1] a = Conv<kernel_shape=[1,1]>(x, w1) [c2] b = Conv<kernel_shape=[1,1], strides=[2,2]>(a, w2)
            s = Slice(a, starts, ends, axes, steps) p = Pad(s, pads) t = Add(b, p) [c3] y = Conv(t, w3) }""",
        {"w1": (4, 3, 1, 1), "w2": (8, 4, 1, 1), "w3": (2, 8, 1, 1), "starts": [0, 0], "ends": [9, 9],
         "axes": [2, 3], "steps": [2, 2], "pads": [0, 2, 0, 0, 0, 2, 0, 0]},
        {("c1", 4), ("c2", 4)},
    ),
    "half of the channels by Slice, others by Gather": (
        """g (float[B,4] x) => (float[B,2] y) {
            [a] p = MatMul(x, wa) half = Slice(p, from, to, axis) rest = Gather<axis=1>(p, picked)
            [c] u = MatMul(half, wc) [d] v = MatMul(rest, wd) y = Add(u, v) }""",
        {"wa": (4, 8), "wc": (3, 2), "wd": (4, 2), "from": [0], "to": [3], "axis": [1], "picked": [7, 3, 4, 3]},
        {("a", 3), ("a", 2), ("a", 1)},
    ),
    "squeeze and excite": (
        """g (float[B,3,4,4] x) => (float[B,2,4,4] y) {
            [c1] a = Conv(x, w1) p = GlobalAveragePool(a) [s1] q = Conv(p, w2) r = Relu(q) [s2] t = Conv(r, w3)
            u = Sigmoid(t) m = Mul(a, u) [c2] y = Conv(m, w4) }""",
        {"w1": (6, 3, 1, 1), "w2": (4, 6, 1, 1), "w3": (6, 4, 1, 1), "w4": (2, 6, 1, 1)},
        {("c1", 6), ("s1", 4)},
    ),
    "one weight for two layers": (
        """g (float[B,4] x) => (float[B,2] y) {
            [a] p = MatMul(x, w) q = Relu(p) [c] u = MatMul(q, v) o = Sin(x) [b] r = MatMul(o, w) s = Relu(r)
            [d] t = MatMul(s, v) y = Add(u, t) }""",
        {"w": (4, 6), "v": (6, 2)},
        {("a", 6)},
    ),
}  # fmt: skip

#: Name -> (graph, weights, words of the reason for which the orbit of [a] stays).
REFUSED = {
    "a recurrent layer": (
        """g (float[T,B,4] x) => (float[T,1,B,5] y) { [a] h = MatMul(x, wa) y, s = LSTM<hidden_size=5>(h, w, r) }""",
        {"wa": (4, 6), "w": (1, 20, 6), "r": (1, 20, 5)},
        "LSTM",
    ),
    "Softmax over it": (
        "g (float[B,4] x) => (float[B,2] y) { [a] h = MatMul(x, wa) s = Softmax(h) y = MatMul(s, v) }",
        {"wa": (4, 6), "v": (6, 2)},
        "Softmax",
    ),
    "an output": ("g (float[B,4] x) => (float[B,6] y) { [a] y = MatMul(x, wa) }", {"wa": (4, 6)}, "output 'y'"),
    "a sum with an input": (
        "g (float[B,4] x, float[B,6] z) => (float[B,2] y) { [a] h = MatMul(x, wa) s = Add(h, z) y = MatMul(s, v) }",
        {"wa": (4, 6), "v": (6, 2)},
        "cannot follow",
    ),
    "a weight that is read elsewhere": (
        """g (float[B,4] x) => (float[B,2] y, float[4,6] z) {
            [a] h = MatMul(x, wa) y = MatMul(h, v) z = Softmax(wa) }""",
        {"wa": (4, 6), "v": (6, 2)},
        "read by Softmax",
    ),
    "its size is read": (
        """g (float[B,4] x) => (float[B,2] y, int64[2] z) { [a] h = MatMul(x, wa) y = MatMul(h, v) z = Shape(h) }""",
        {"wa": (4, 6), "v": (6, 2)},
        "its size is read",
    ),
    "a quantised weight behind it": (
        """g (float[B,4] x) => (float[B,2] y) {
            [a] h = MatMul(x, wa) f = DequantizeLinear(q, scale) y = MatMul(h, f) }""",
        {"wa": (4, 6), "q": np.ones((6, 2), np.int8), "scale": np.float32(0.1)},
        "cannot follow",
    ),
    "a bias that is computed": (
        """g (float[B,4] x) => (float[B,2] y) {
            [a] h = MatMul(x, wa) [b] g = Gemm(x, wb, h) y = MatMul(g, v) }""",
        {"wa": (4, 6), "wb": (4, 6), "v": (6, 2)},
        "as a setting",
    ),
    "a scale that is computed": (
        """g (float[4] s, float[B,6] x) => (float[B,2] y) {
            [a] h = MatMul(s, wa) n = LayerNormalization(x, h) y = MatMul(n, v) }""",
        {"wa": (4, 6), "v": (6, 2)},
        "as a setting",
    ),
    "a weight that also multiplies an input": (
        """g (float[B,6] x) => (float[B,2] y) {
            [a] h = MatMul(x, wa) [b] u = MatMul(h, v) [c] w = MatMul(x, v) y = Add(u, w) }""",
        {"wa": (6, 6), "v": (6, 2)},
        "'v' is read by MatMul 'c' too",
    ),
    "rows that an embedding looks up": (
        """g (int64[B] i) => (float[B,2] y) {
            e = Gather(table, i) [a] h = Gemm<transB=1>(e, table) y = MatMul(h, v) }""",
        {"table": (6, 4), "v": (6, 2)},
        "'table' is read by Gather",
    ),
    "where the maxima are": (
        """g (float[B,3,4,4] x) => (float[B,2,4,4] y) {
            [a] h = Conv(x, wa) p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h) [c] q = Conv(p, w)
            y = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(q, i) }""",
        {"wa": (2, 3, 1, 1), "w": (2, 2, 1, 1)},
        "further outputs",
    ),
    "a transposition of unknown rank": (
        """g (float[B,3,4,4] x, int64[n] s) => (float y) {
            z = Reshape(x, s) [a] h = Conv(z, wa) t = Transpose(h) y = MatMul(t, v) }""",
        {"wa": (6, 3, 1, 1), "v": (6, 2)},
        "unknown rank",
    ),
    "its size is read where the rank is unknown": (
        """g (float[B,3,4,4] x, int64[n] s) => (float y, int64 size) {
            z = Reshape(x, s) [a] h = Conv(z, wa) y = Conv(h, v) t = Shape(h) size = Gather(t, at) }""",
        {"wa": (6, 3, 1, 1), "v": (2, 6, 1, 1), "at": np.int64(1)},
        "its size is read",
    ),
    "a range of all axes": (
        """g (float[B,4] x) => (float[B,2] y, float[2,6] z) {
            [a] h = MatMul(x, wa) z = Slice(h, from, to) y = MatMul(h, v) }""",
        {"wa": (4, 6), "v": (6, 2), "from": [0], "to": [2]},
        "output 'z'",
    ),
}  # fmt: skip


def build(text: str, weights: dict[str, object]) -> Model:
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, item in weights.items():
        array = np.asarray(item)
        if isinstance(item, tuple):
            array = np.abs(rng.standard_normal(item)).astype(np.float32) + 0.1
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model = Model.from_proto(proto)
    lift_constants(model.onnx)
    return model


ZOO = {
    "bert_base": {"seq": 6, "layers": 2, "hidden": 32, "heads": 4, "intermediate": 48, "vocabulary": 40},
    "llama_block": {"seq": 6, "layers": 2, "hidden": 32, "heads": 8, "kv_heads": 2, "intermediate": 48},
    "resnet50": {"depths": (2, 1), "width": 8, "image": 32, "batch_norm": 1},
    "mobilenet_v2": {"image": 32, "stages": ((1, 16, 1, 1), (6, 24, 2, 2))},
}


@pytest.fixture(scope="module")
def zoo(root: Path) -> Iterator[ModuleType]:
    sys.path.insert(0, str(root / "models"))
    yield importlib.import_module("zoo")
    sys.path.remove(str(root / "models"))


@pytest.fixture(params=[*GRAPHS, *ZOO])
def model(request: pytest.FixtureRequest, zoo: ModuleType) -> Model:
    name = request.param
    return from_zoo(zoo, name) if name in ZOO else build(*GRAPHS[name][:2])


def from_zoo(zoo: ModuleType, name: str) -> Model:
    return Model.from_proto(zoo.build(name, **ZOO[name]))


def outputs(model: Model, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return list(open_session(model, optimization="disable").run(inputs).values())


def feed(model: Model) -> dict[str, np.ndarray]:
    return synthetic_inputs(model, seed=1)


def assert_close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def test_any_allowed_order_computes_the_same(model: Model) -> None:
    inputs, rng = feed(model), np.random.default_rng(3)
    before = outputs(model, inputs)
    axes = AxisGraph(model)
    content: dict[int, int] = {}
    for orbit in axes.orbits("order"):
        if orbit.reason is None:
            content.update(zip(orbit.units.tolist(), rng.permutation(orbit.units).tolist(), strict=True))
    assert content
    permute(axes, content)
    assert graph_fault(model) is None
    assert_close(outputs(model, inputs), before)
    back = {new: old for old, new in content.items()}
    permute(axes, back)
    for one, other in zip(outputs(model, inputs), before, strict=True):
        np.testing.assert_array_equal(one, other)


def test_removal_is_the_same_as_consumers_that_do_not_look(model: Model) -> None:
    inputs, rng = feed(model), np.random.default_rng(4)
    axes = AxisGraph(model)
    chosen = [
        rng.choice(orbit.units, max(1, len(orbit.units) // 3), replace=False)
        for orbit in axes.orbits("removal")
        if orbit.reason is None and len(orbit.units) > 1
    ]
    if not chosen:
        assert all(orbit.reason for orbit in axes.orbits("removal"))
        return
    units = np.concatenate(chosen)
    masked = model.copy()
    for part in AxisGraph(masked).parts:
        if part.role == "columns":
            array = part.value.const_value.numpy().copy()
            columns = np.atleast_2d(axes.units(part.atoms, "removal"))[0]  # the same in all groups
            array[(slice(None),) * part.axis + (np.isin(columns, units),)] = 0
            part.value.const_value = onnx_ir.Tensor(array, name=part.value.name)
    parts = [part.value for part in axes.parts if np.isin(axes.units(part.atoms, "removal"), units).any()]
    sizes = [value.const_value.size for value in parts]
    remove(model, axes, units)
    assert graph_fault(model) is None
    assert all(value.const_value.size < size for value, size in zip(parts, sizes, strict=True))
    assert_close(outputs(model, inputs), outputs(masked, inputs))


@pytest.mark.parametrize("name", GRAPHS)
def test_what_can_be_removed(name: str) -> None:
    text, weights, expected = GRAPHS[name]
    found = [
        (orbit.name, len(orbit.units))
        for orbit in AxisGraph(build(text, weights)).orbits("removal")
        if orbit.reason is None and orbit.consumers()
    ]
    assert set(found) == expected, found


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_followed_freezes_with_the_reason(name: str) -> None:
    text, weights, words = REFUSED[name]
    orbits = AxisGraph(build(text, weights)).orbits("removal")
    assert words in next(str(orbit.reason) for orbit in orbits if orbit.name == "a")


def test_copies_that_are_told_apart_keep_their_order() -> None:
    text = """g (float[B,4] x) => (float[B,2] y) {
        [a] h = MatMul(x, w) c = Concat<axis=1>(h, h) d = Add(c, b) r = Relu(d) g = Gather<axis=1>(r, picked)
        y = MatMul(g, v) }"""
    weights = {"w": (4, 3), "b": (6,), "v": (6, 2)}
    (plain,) = AxisGraph(build(text, {**weights, "picked": [0, 1, 2]} | {"v": (3, 2)})).orbits("order")[:1]
    (mixed,) = AxisGraph(build(text, {**weights, "picked": [3, 1, 2, 0, 4, 5]})).orbits("order")[:1]
    assert "picks among copies" in str(plain.reason)
    assert "picks among copies" in str(mixed.reason)


@pytest.mark.parametrize(
    "middle",
    [
        "p, q = Split<axis=1>(h, sizes) r = Relu(p) s = Sigmoid(q) c = Concat<axis=1>(r, s) y = MatMul(c, v)",
        "p, q = Split<axis=1>(h, sizes) m = ReduceMax<axes=[1]>(p) u = MatMul(h, v) y = Add(u, m)",
    ],
)
def test_what_is_computed_otherwise_neither_changes_places_nor_leaves_as_one(middle: str) -> None:
    text = f"g (float[B,4] x) => (float[B,2] y) {{ [a] h = MatMul(x, w) {middle} }}"
    model = build(text, {"w": (4, 6), "v": (6, 2), "sizes": [2, 4]})
    for level in ("order", "removal"):
        free = [orbit for orbit in AxisGraph(model).orbits(level) if orbit.name == "a"]
        assert [orbit.units.tolist() for orbit in free] == [[0, 1], [2, 3, 4, 5]]


def test_a_grid_that_is_cut_anew_keeps_the_order_across_both_cuts() -> None:
    text = """g (float[B,4] x) => (float[B,2] y) {
        [a] h = MatMul(x, w) wide = Reshape(h, two) tall = Reshape(wide, four)
        m = ReduceSum<keepdims=0>(tall, last) y = MatMul(m, v) }"""
    weights = {"w": (4, 8), "two": [0, 2, 4], "four": [0, 4, 2], "last": [2], "v": (4, 2)}
    free = [orbit for orbit in AxisGraph(build(text, weights)).orbits("order") if orbit.name == "a"]
    assert [len(orbit.units) for orbit in free] == [2, 2, 2, 2]


def test_softmax_over_all_axes_behind_the_first_in_old_models() -> None:
    text = "g (float[B,3,4,4] x) => (float[B,2,4,4] y) { [a] h = Conv(x, w) s = Softmax(h) y = Conv(s, v) }"
    model = build(text, {"w": (6, 3, 1, 1), "v": (2, 6, 1, 1)})
    assert AxisGraph(model).orbits("removal")[0].reason is None
    model.onnx.graph.opset_imports[""] = 11
    assert "Softmax" in str(AxisGraph(model).orbits("removal")[0].reason)


def test_heads_and_groups_of_queries_are_units(zoo: ModuleType) -> None:
    heads = AxisGraph(from_zoo(zoo, "bert_base")).orbits("removal")
    assert [len(orbit.units) for orbit in heads if orbit.reason is None] == [4, 48, 4, 48]
    roles = [(part.role, part.value.name) for part in heads[1].parts]
    assert roles[-1] == ("columns", "layers.0.attention.output.weight")
    assert sum(role == "rows" for role, _ in roles) == 3
    groups = AxisGraph(from_zoo(zoo, "llama_block")).orbits("removal")
    assert [len(orbit.units) for orbit in groups if orbit.reason is None] == [2, 48, 2, 48]


def test_order_within_heads_only_and_not_under_rotation(zoo: ModuleType) -> None:
    orbits = AxisGraph(from_zoo(zoo, "llama_block")).orbits("order")
    value = [orbit for orbit in orbits if "v_proj" in orbit.name]
    assert [(len(orbit.units), orbit.reason) for orbit in value] == [(4, None)] * 4
    assert all(orbit.reason for orbit in orbits if "q_proj" in orbit.name)


def test_the_graph_is_a_networkx_multigraph_of_tensors_and_constants() -> None:
    axes = AxisGraph(build(*GRAPHS["mlp"][:2]))
    assert isinstance(axes.graph, nx.MultiDiGraph)
    assert nx.has_path(axes.graph, ("w", (0,)), ("v", (0,)))
    assert axes.graph.get_edge_data(("h", (1,)), ("r", (1,)))[0]["op"] == "Relu"


def test_no_axis_is_emptied() -> None:
    model = build(*GRAPHS["mlp"][:2])
    axes = AxisGraph(model)
    with pytest.raises(PassError, match="nothing"):
        remove(model, axes, axes.orbits("removal")[0].units)


def test_units_of_different_places_are_not_exchanged() -> None:
    axes = AxisGraph(build(*GRAPHS["Concat and Split"][:2]))
    (first, second, *_) = [orbit for orbit in axes.orbits("order") if orbit.reason is None]
    with pytest.raises(PassError, match="same places"):
        permute(axes, {int(first.units[0]): int(second.units[0]), int(second.units[0]): int(first.units[0])})
