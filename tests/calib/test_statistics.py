"""Statistics of whole models against the arrays that onnxruntime returns, or that NumPy computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

from sparsecc.calib import Calibration, calibration, open_session
from sparsecc.calib.stepwise import Stepwise
from sparsecc.errors import UsageError
from sparsecc.ir import Model


def model_of(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()
    )
    return Model.from_proto(proto)


RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.fixture
def two_layers() -> Model:
    return model_of(
        """g (float[B, T, 6] x) => (float[B, T, 3] y, float[B, T, 4] z)
        { [q] h = MatMul(x, w1)  [k] z = MatMul(x, w2)  r = Relu(h)  [o] y = MatMul(r, w3) }""",
        w1=normal(6, 8),
        w2=normal(6, 4),
        w3=normal(8, 3),
    )


def batches(count: int = 3) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(2, 5 + number, 6)} for number in range(count)]


def test_siblings_share_and_layers_follow_the_activations(two_layers: Model) -> None:
    data = batches()
    source = Calibration.from_batches(data, two_layers)
    sites = two_layers.sites()
    rows = np.concatenate([batch["x"].reshape(-1, 6) for batch in data]).astype(np.float64)
    w1 = sites[0].numpy().T
    hidden = np.maximum(rows @ w1, 0)
    squares, means = source.mean_square(two_layers, sites), source.mean(two_layers, sites)
    grams = source.gram(two_layers, sites)
    for name, expected in (("q", rows), ("k", rows), ("o", hidden)):
        np.testing.assert_allclose(squares[name], (expected**2).mean(0), rtol=1e-5)
        np.testing.assert_allclose(means[name], expected.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grams[name], expected.T @ expected / len(rows), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(np.diag(grams[name]), squares[name])
    assert source.unavailable == {}


def test_bytes_are_bounded_by_runs_in_groups(two_layers: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches()
    sites = two_layers.sites()
    whole = Calibration.from_batches(data, two_layers).mean_square(two_layers, sites)
    steps: list[list[str]] = []
    run = Stepwise.run
    monkeypatch.setattr(
        Stepwise, "run", lambda self, names, *rest: steps.append(list(names)) or run(self, names, *rest)
    )
    deep = model_of(
        """g (float[B, 4] x) => (float[B, 4] y)
        { a = Relu(x) [f1] b = MatMul(a, w1) [f2] c = MatMul(b, w2) [f3] y = MatMul(c, w3) }""",
        **{f"w{i}": normal(4, 4) for i in (1, 2, 3)},
    )
    inputs = [{"x": normal(8, 4)} for _ in range(2)]
    together = Calibration.from_batches(inputs, deep)
    alone = Calibration.from_batches(inputs, deep, byte_budget=1)
    pair = Calibration.from_batches(inputs, deep, byte_budget=2 * 8 * 4 * 4)
    results = [source.mean_square(deep, deep.sites()) for source in (together, alone, pair)]
    steps = [names for names in steps if not names[0].startswith("sparsecc_shape")]
    assert steps == [["a", "b", "c"], ["a"], ["b"], ["c"], ["a", "b"], ["c"]]
    for result in results[1:]:
        for name, expected in results[0].items():
            np.testing.assert_allclose(result[name], expected, rtol=1e-6)
    assert set(whole) == {"q", "k", "o"}


def test_tied_weight_sees_the_rows_of_all_its_nodes() -> None:
    model = model_of(
        """g (float[B, 4] x, float[C, 4] z) => (float[B, 3] y, float[C, 3] v)
        { [first] y = MatMul(x, w) [second] v = MatMul(z, w) }""",
        w=normal(4, 3),
    )
    x, z = normal(2, 4), normal(6, 4)
    source = Calibration.from_batches([{"x": x, "z": z}], model)
    found = source.mean_square(model, model.sites())
    np.testing.assert_allclose(found["first"], (np.concatenate([x, z]).astype(float) ** 2).mean(0))


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_gives_the_output_energy(groups: int) -> None:
    """With one output per group the mean of y**2 is w G w^T, whatever the geometry."""
    weight = normal(groups, 2, 3, 3)
    model = model_of(
        f"""g (float[B, {2 * groups}, H, W] x) => (float[B, {groups}, P, Q] y)
        {{ [conv] y = Conv<strides = [2, 1], pads = [1, 0, 2, 1], dilations = [1, 2],
                           group = {groups}>(x, w) }}""",
        w=weight,
    )
    source = Calibration.from_batches([{"x": normal(2, 2 * groups, 9, 8)} for _ in range(2)], model)
    gram = source.gram(model, model.sites())["conv"].reshape(groups, 18, 18)
    outputs = [open_session(model).run(batch)["y"] for batch in source]
    energy = np.mean([np.square(y, dtype=np.float64).mean((0, 2, 3)) for y in outputs], axis=0)
    flat = weight.reshape(groups, -1).astype(np.float64)
    np.testing.assert_allclose(np.einsum("gi,gij,gj->g", flat, gram, flat), energy, rtol=1e-5)
    square = source.mean_square(model, model.sites())["conv"]
    assert square.shape == ((18,) if groups == 1 else (groups, 18))
    np.testing.assert_allclose(square.reshape(groups, 18), np.einsum("gii->gi", gram))


def lstm(outputs: str, attributes: str = "", extra: str = "", directions: int = 1) -> Model:
    return model_of(
        f"""g (float[T, B, 3] x) => (float[D, B, 4] h)
        {{ [rnn] {outputs} = LSTM<hidden_size = 4{attributes}>(x, w, r{extra}) }}""",
        w=normal(directions, 16, 3),
        r=normal(directions, 16, 4),
        start=normal(directions, 2, 4),
    )


def lstm_states(model: Model, x: np.ndarray) -> np.ndarray:
    proto = model.to_proto()
    proto.graph.node[0].output[0] = "all"
    proto.graph.output.append(onnx.helper.make_tensor_value_info("all", onnx.TensorProto.FLOAT, [*"TDBH"]))
    return open_session(Model.from_proto(proto)).run({"x": x}, ["all"])["all"].astype(np.float64)


def test_recurrent_weight_sees_the_states_even_if_the_model_drops_them() -> None:
    model = lstm('"", h')
    x = normal(5, 2, 3)
    source = Calibration.from_batches([{"x": x}], model)
    found = source.mean_square(model, model.sites())
    states = lstm_states(model, x)[:, 0]
    rows = np.concatenate([np.zeros((1, 2, 4)), states[:-1]]).reshape(-1, 4)
    np.testing.assert_allclose(found["rnn.R"], (rows**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(found["rnn.W"], (x.reshape(-1, 3).astype(float) ** 2).mean(0))
    assert model.onnx.graph[0].outputs[0].name in ("", None)


def test_both_directions_with_an_initial_state() -> None:
    model = lstm('"", h', ', direction = "bidirectional"', ', "", "", start', directions=2)
    x = normal(5, 2, 3)
    found = Calibration.from_batches([{"x": x}], model).mean_square(model, model.sites())
    states = lstm_states(model, x)
    start = model.onnx.graph.initializers["start"].const_value.numpy()
    rows = np.concatenate([states[:-1, 0].reshape(-1, 4), states[1:, 1].reshape(-1, 4), start.reshape(-1, 4)])
    np.testing.assert_allclose(found["rnn.R"], (rows**2).mean(0), rtol=1e-5)


def test_sites_in_bodies() -> None:
    """A branch counts when it is taken; a loop in every round; a weight that two branches share in both."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B, 4] x, bool c, int64 rounds) => (float[B, 4] y, float[B, 4] z)
        <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16},
         float[4, 4] v = {0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0, 0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5}>
        {
            go = Constant <value = bool {1}> ()
            y = If (c) <
                then_branch = a () => (u) { [inner] u = MatMul(x, w) },
                else_branch = b () => (t) { twice = Add(x, x) t = MatMul(twice, w) }
            >
            z = Loop (rounds, go, x) <
                body = once (int64 i, bool keep, float[B, 4] state) => (bool keep_on, float[B, 4] next) {
                    keep_on = Identity(keep)
                    [looped] next = MatMul(state, v)
                }
            >
        }"""
    )
    model = Model.from_proto(proto)
    first, second = normal(3, 4).astype(np.float64), normal(2, 4).astype(np.float64)
    batches = [
        {"x": first.astype(np.float32), "c": np.array(True), "rounds": np.array(2)},
        {"x": second.astype(np.float32), "c": np.array(False), "rounds": np.array(0)},
    ]
    source = Calibration.from_batches(batches, model)
    found = source.mean_square(model, model.sites())
    np.testing.assert_allclose(found["inner"], (np.concatenate([first, 2 * second]) ** 2).mean(0), rtol=1e-6)
    v = model.onnx.graph.initializers["v"].const_value.numpy()
    np.testing.assert_allclose(found["looped"], (np.concatenate([first, first @ v]) ** 2).mean(0), rtol=1e-6)
    gram = source.gram(model, [site for site in model.sites() if site.name == "looped"])["looped"]
    np.testing.assert_allclose(np.diag(gram), found["looped"], rtol=1e-6)
    never = Calibration.from_batches(batches[:1], model).mean_square(model, model.sites())
    np.testing.assert_allclose(never["inner"], (first**2).mean(0), rtol=1e-6)


def test_recurrent_states_in_a_body() -> None:
    inner = lstm('"", h')
    x = normal(5, 2, 3)
    expected = Calibration.from_batches([{"x": x}], inner).mean_square(inner, inner.sites())
    proto = inner.to_proto()
    node, output = proto.graph.node[0], proto.graph.output[0]
    branch = onnx.helper.make_graph([node], "taken", [], [output])
    other = onnx.helper.make_graph(
        [onnx.helper.make_node("Unsqueeze", ["x", "axes"], ["other"])], "other", [],
        [onnx.helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.array([1]), "axes")],
    )  # fmt: skip
    choice = onnx.helper.make_node("If", ["c"], ["result"], then_branch=branch, else_branch=other)
    proto.graph.ClearField("node")
    proto.graph.node.append(choice)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
    proto.graph.output[0].name = "result"
    model = Model.from_proto(proto)
    source = Calibration.from_batches([{"x": x, "c": np.array(True)}], model)
    found = source.mean_square(model, model.sites())
    assert found.keys() == expected.keys() == {"rnn.W", "rnn.R"}
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def test_what_cannot_be_measured_is_left_out_with_the_reason() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B, 4] x, bool c) => (float[B, 4] y)
        <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}>
        { y = If(c) <then_branch = a () => (u) { [inner] u = MatMul(x, w) },
                     else_branch = b () => (v) { v = Identity(x) }> }"""
    )
    model = Model.from_proto(proto)
    source = Calibration.from_batches([{"x": normal(2, 4), "c": np.array(False)}], model)
    assert source.mean_square(model, model.sites()) == {}
    assert source.unavailable["inner"] == "its input is a constant or is never computed"
    assert source.to_json()["unavailable"] == source.unavailable


def test_half_precision_is_summed_in_float64() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float16[B, 4] x) => (float16[B, 2] y) { [fc] y = MatMul(x, w) }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 2), np.float16), "w"))
    model = Model.from_proto(proto)
    source = Calibration.from_batches([{"x": np.full((100, 4), 300, np.float16)}], model)
    np.testing.assert_array_equal(source.mean_square(model, model.sites())["fc"], [90_000] * 4)


def test_progress_counts_batches_of_all_groups(two_layers: Model) -> None:
    calls: list[tuple[int, int]] = []
    source = calibration.Calibration.from_batches(batches(), two_layers, byte_budget=1)
    source.progress = lambda description, done, total: calls.append((done, total))
    source.mean_square(two_layers, two_layers.sites())
    assert calls == [(n, 6) for n in range(1, 7)]


def test_another_model_than_the_inputs_are_for(two_layers: Model) -> None:
    source = Calibration.from_batches(batches(), two_layers)
    other = model_of("g (float[B, 7] x) => (float[B, 2] y) { [fc] y = MatMul(x, w) }", w=normal(7, 2))
    with pytest.raises(UsageError, match="do not fit"):
        source.mean_square(other, other.sites())
