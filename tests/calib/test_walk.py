"""Statistics measured front to back, while the front changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from sparsecc.calib import Calibration, Moments, open_session, stepwise, tap
from sparsecc.ir import Model
from sparsecc.ir.mapped import is_mapped

RNG = np.random.default_rng(11)


def normal(*shape: int) -> NDArray[Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: NDArray[Any]) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def residual() -> Model:
    """Two siblings, a residual connection around a block, and a head that reads the first input again."""
    return build(
        """g (float[B,8] x) => (float[B,4] y) {
            [q] q = MatMul(x, wq)
            [k] k = MatMul(x, wk)
            m = Mul(q, k)
            [o] o = MatMul(m, wo)
            r = Add(o, x)
            a = Relu(r)
            [up] u = Gemm<transB=1>(a, wu)
            s = Add(u, q)
            t = Concat<axis=1>(s, x)
            [head] y = MatMul(t, wh)
        }""",
        wq=normal(8, 8), wk=normal(8, 8), wo=normal(8, 8), wu=normal(8, 8), wh=normal(16, 4),
    )  # fmt: skip


def inputs(model: Model, batches: int = 3) -> list[dict[str, NDArray[Any]]]:
    return [{"x": normal(5 + number, 8)} for number in range(batches)]


def take_all(source: Calibration, model: Model, reference: Model | None) -> list[list[str]]:
    """Walk, halving each weight on the way and checking moments against plain runs of the whole model."""
    steps = []
    names = {site.name: site.input_name for site in model.sites()}
    for found in source.walk(model, model.sites(), reference):
        steps.append(list(found))
        for name, moments in found.items():
            here, there = (rows_of(source, side, names[name]) for side in (model, reference or model))
            np.testing.assert_allclose(moments.gram, here.T @ here / len(here), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(moments.cross, there.T @ here / len(here), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                moments.reference_gram, there.T @ there / len(here), rtol=1e-5, atol=1e-6
            )
            np.testing.assert_allclose(moments.mean, here.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(moments.reference_mean, there.mean(0), rtol=1e-5, atol=1e-6)
            assert moments.rows == len(here)
        for name in found:
            (site,) = model.sites(name)
            site.replace(site.numpy() / 2)
    return steps


def rows_of(source: Calibration, model: Model, name: str) -> NDArray[np.float64]:
    parts = []
    for batch in source:
        values = batch if name in batch else open_session(tap(model, [name])).run(batch)
        parts.append(values[name].reshape(-1, values[name].shape[-1]).astype(np.float64))
    return np.concatenate(parts)


@pytest.mark.parametrize("byte_budget", [1 << 20, 0], ids=["memory", "files"])
@pytest.mark.parametrize("with_reference", [True, False])
def test_each_step_sees_the_changed_front_and_the_reference(byte_budget: int, with_reference: bool) -> None:
    model = residual()
    source = Calibration.from_batches(inputs(model), model, byte_budget=byte_budget)
    steps = take_all(source, model, model.copy() if with_reference else None)
    assert steps == [["q", "k"], ["o"], ["up"], ["head"]]
    assert source.unavailable == {}


def test_a_small_budget_takes_inputs_one_by_one_but_siblings_together() -> None:
    model = build(
        """g (float[B,8] x, float[B,8] z) => (float[B,8] y) {
            [a] a = MatMul(x, wa) [b] b = MatMul(x, wb) [c] c = MatMul(z, wc)
            d = Add(a, b) y = Add(c, d)
        }""",
        wa=normal(8, 8), wb=normal(8, 8), wc=normal(8, 8),
    )  # fmt: skip
    batches = [{"x": normal(4, 8), "z": normal(4, 8)}]
    assert take_all(Calibration.from_batches(batches, model), model, model.copy()) == [["a", "b", "c"]]
    small = Calibration.from_batches(batches, model, moment_budget=1)
    assert take_all(small, model, None) == [["a", "b"], ["c"]]


def test_nodes_run_once_in_each_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step opens the part behind the last one, not the whole front again."""
    model = residual()
    nodes: list[int] = []
    whole = stepwise.open_session
    monkeypatch.setattr(
        "sparsecc.calib.stepwise.open_session",
        lambda part, **options: nodes.append(len(part.onnx.graph)) or whole(part, **options),
    )
    source = Calibration.from_batches(inputs(model), model)
    for _ in source.walk(model, model.sites()):
        pass
    # The first step reads the input itself; then q, k, Mul | MatMul, Add, Relu | Gemm, Add, Concat.
    assert nodes == [3, 3, 3]


def test_tied_weights_and_loops_of_dependencies_are_measured() -> None:
    model = build(
        """g (float[B,8] x) => (float[B,8] y) {
            [a] a = MatMul(x, w) [b] b = MatMul(a, v) [a2] c = MatMul(b, w) [b2] y = MatMul(c, v)
        }""",
        w=normal(8, 8), v=normal(8, 8),
    )  # fmt: skip
    source = Calibration.from_batches([{"x": normal(6, 8)}], model)
    reference = model.copy()
    found: dict[str, Moments] = {}
    for step in source.walk(model, model.sites(), reference):
        assert len(step) == 1
        found.update(step)
    assert {name: item.rows for name, item in found.items()} == {"a": 12, "b": 12}
    grams = source.gram(model, model.sites())
    for name, moments in found.items():
        np.testing.assert_allclose(moments.gram, grams[name], rtol=1e-6)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_compare_the_same_positions(groups: int) -> None:
    model = build(
        f"""g (float[B,4,20,20] x) => (float[B,4,20,20] y) {{
            [c] a = Conv<pads=[1,1,1,1]>(x, w)
            b = Relu(a)
            [d] y = Conv<pads=[1,1,1,1], group={groups}>(b, v)
        }}""",
        w=normal(4, 4, 3, 3),
        v=normal(4, 4 // groups, 3, 3),
    )
    source = Calibration.from_batches([{"x": normal(2, 4, 20, 20)}], model, seed=3)
    reference = model.copy()
    found: dict[str, Moments] = {}
    for step in source.walk(model, model.sites(), reference):
        found.update(step)
    assert found["d"].rows == 2 * 128
    assert found["d"].gram.shape == ((36, 36) if groups == 1 else (2, 18, 18))
    for moments in found.values():  # nothing was changed: both models give the same rows
        np.testing.assert_allclose(moments.cross, moments.gram, rtol=1e-12)
    np.testing.assert_allclose(source.gram(model, model.sites())["d"], found["d"].gram, rtol=1e-12)


def test_recurrent_weights_and_bodies() -> None:
    model = build(
        """g (bool t, float[S,2,8] x) => (float[S,1,2,4] y, float[S,2,3] z) {
            h = Identity(x)
            [cell] y = LSTM<hidden_size=4>(h, w, r)
            z = If(t) <
                then_branch = yes () => (float[S,2,3] p) { q = Relu(h) [in] p = MatMul(q, v) },
                else_branch = no () => (float[S,2,3] p2) { [out] p2 = MatMul(h, u) }
            >
        }""",
        w=normal(1, 16, 8), r=normal(1, 16, 4), v=normal(8, 3), u=normal(8, 3),
    )  # fmt: skip
    source = Calibration.from_batches([{"t": np.array(True), "x": normal(5, 2, 8)}], model)
    found: dict[str, Moments] = {}
    for step in source.walk(model, model.sites(), model.copy()):
        found.update(step)
    assert {name: item.rows for name, item in found.items()} == {"cell.W": 10, "cell.R": 8, "in": 10}
    assert list(source.unavailable) == ["out"]


def test_bodies_that_read_what_an_earlier_part_computes() -> None:
    """Both the node and the body that reads it are left out of a later step."""
    model = build(
        """g (bool t, float[B,8] x) => (float[B,8] y) {
            [a] a = MatMul(x, w)
            b = If(t) <
                then_branch = yes () => (float[B,8] p) { q = Relu(a) [in] p = MatMul(q, v) },
                else_branch = no () => (float[B,8] p2) { p2 = Identity(a) }
            >
            c = Add(b, x)
            [last] y = MatMul(c, u)
        }""",
        w=normal(8, 8), v=normal(8, 8), u=normal(8, 8),
    )  # fmt: skip
    source = Calibration.from_batches([{"t": np.array(True), "x": normal(6, 8)}], model)
    steps = [list(step) for step in source.walk(model, model.sites(), model.copy())]
    assert steps == [["a"], ["in"], ["last"]]


@pytest.mark.parametrize("moment_budget", [1 << 20, 1], ids=["memory", "files"])
def test_moments_have_the_same_bits_wherever_they_are(
    moment_budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a matrix is summed some rows at a time, and then symmetric to the last bit."""
    monkeypatch.setattr("sparsecc.calib.sequential._ROWS", 3)
    model = residual()
    reference = model.copy()
    for site in model.sites():
        site.replace(site.numpy() * 0.9)
    batches = [{"x": np.linspace(-1, 1, 56, dtype=np.float32).reshape(7, 8) ** number} for number in (1, 2)]
    source = Calibration.from_batches(batches, model)
    expected = {k: v for step in source.walk(model, model.sites(), reference) for k, v in step.items()}
    limited = Calibration.from_batches(batches, model, moment_budget=moment_budget)
    for step in limited.walk(model, model.sites(), reference):
        for name, moments in step.items():
            assert is_mapped(moments.gram) == (moment_budget == 1)
            np.testing.assert_array_equal(moments.gram, moments.gram.T)
            np.testing.assert_array_equal(moments.gram, expected[name].gram)
            np.testing.assert_array_equal(moments.cross, expected[name].cross)


def test_a_step_with_many_weights_runs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What parts hand on to one another, to the next step and to the caller is all there."""
    model = residual()
    names = ["q", "k", "o", "r", "u", "t", "y", "x", "wq"]
    whole: dict[str, list[NDArray[Any]]] = {}
    for batch in (feeds := inputs(model)):
        values = open_session(tap(model, names)).run(batch)
        for name in names:
            whole.setdefault(name, []).append(values[name])
    sizes: list[int] = []
    opened = stepwise.open_session
    monkeypatch.setattr(
        "sparsecc.calib.stepwise.open_session",
        lambda part, **options: sizes.append(part.nbytes) or opened(part, **options),
    )
    monkeypatch.setattr(stepwise, "_WEIGHT_BUDGET", 8 * 8 * 4)
    steps = stepwise.Stepwise(model.copy, lambda: iter(feeds), byte_budget=0, threads=1)
    for asked, later in ((["o", "k"], names), (names, ())):
        for number, found in enumerate(steps.run(asked, later, ())):
            for name in asked:
                np.testing.assert_allclose(found[name], whole[name][number], rtol=1e-5)
    assert max(sizes) == 8 * 8 * 4
    assert len(sizes) == 5


def test_parts_that_change_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stepwise, "_WEIGHT_BUDGET", 1)
    model = residual()
    source = Calibration.from_batches(inputs(model), model)
    assert take_all(source, model, model.copy()) == [["q", "k"], ["o"], ["up"], ["head"]]


def test_large_statistics_take_one_part_of_the_weights_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual()
    source = Calibration.from_batches(inputs(model), model)
    expected = source.mean_square(model, model.sites())
    monkeypatch.setattr(stepwise, "_WEIGHT_BUDGET", 1)
    for name, found in source.mean_square(model, model.sites()).items():
        np.testing.assert_allclose(found, expected[name], rtol=1e-6)
