"""Units really leave, the layers behind make up for it, and what is not free stays with a reason."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from sparsecc import verify
from sparsecc.calib import Calibration
from sparsecc.errors import SpecError, UsageError
from sparsecc.ir import Model
from sparsecc.ir.axes import AxisGraph
from sparsecc.passes.structure.flops import Flops
from sparsecc.passes.structure.obs import Consumer, compensate, removal_curve
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault, signature

MLP = """g (float[B,16] x) => (float[B,8] y) {
    [up] h = MatMul(x, w) a = Add(h, b) r = Relu(a) [down] y = MatMul(r, v) }"""
CNN = """g (float[B,3,8,8] x) => (float[B,5] y) {
    [c1] a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [c2] c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(r, w2) q = Relu(c)
    [c3] e = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(q, w3) s = Add(e, r)
    p = GlobalAveragePool(s) f = Flatten(p) [fc] y = Gemm(f, w4, b4) }"""
GROUPED = """g (float[B,3,8,8] x) => (float[B,5] y) {
    [c1] a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
    [c2] c = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=4>(r, w2) q = Relu(c)
    [c3] e = Conv<kernel_shape=[1,1]>(q, w3) s = Relu(e)
    p = GlobalAveragePool(s) f = Flatten(p) [fc] y = Gemm(f, w4, b4) }"""
SMALL = {
    "bert_base": {"seq": 6, "layers": 1, "hidden": 32, "heads": 4, "intermediate": 48, "vocabulary": 40},
    "llama_block": {"seq": 6, "hidden": 32, "heads": 8, "kv_heads": 2, "intermediate": 48},
    "mobilenet_v2": {"image": 16, "stages": ((1, 16, 1, 1), (6, 24, 2, 1))},
}


@pytest.fixture(scope="module")
def zoo(root: Path) -> Iterator[ModuleType]:
    sys.path.insert(0, str(root / "models"))
    yield importlib.import_module("zoo")
    sys.path.remove(str(root / "models"))


def build(text: str, **shapes: tuple[int, ...]) -> Model:
    rng = np.random.default_rng(5)
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, shape in shapes.items():
        array = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


def mlp() -> Model:
    return build(MLP, w=(16, 32), b=(32,), v=(32, 8))


def cnn() -> Model:
    return build(CNN, w1=(8, 3, 3, 3), b1=(8,), w2=(16, 8, 3, 3), w3=(8, 16, 3, 3), w4=(8, 5), b4=(5,))


def grouped() -> Model:
    return build(GROUPED, w1=(16, 3, 3, 3), b1=(16,), w2=(24, 4, 3, 3), w3=(8, 24, 1, 1), w4=(8, 5), b4=(5,))


def data(model: Model, batches: int = 4, batch: int = 16) -> Calibration:
    found = []
    for seed in range(batches):
        inputs = verify.make_inputs(model, seed=seed)
        fixed = model.input_specs()[0].shape[0] not in ("B", None)
        found.append(inputs if fixed else {k: _many(v, batch, seed) for k, v in inputs.items()})
    return Calibration.from_batches(found, model, threads=1)


def _many(array: np.ndarray, batch: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((batch, *array.shape[1:])).astype(array.dtype)
    return np.cumsum(mixed, axis=1) / 2  # inputs that depend on each other, as real ones do


def error(model: Model, reference: Model, inputs: Calibration) -> float:
    runs = [list(verify.session(item, threads=1).run(batch).values())
            for item in (model, reference) for batch in inputs]  # fmt: skip
    ours, theirs = runs[: len(runs) // 2], runs[len(runs) // 2 :]
    return sum(float(np.square(a[0] - b[0]).sum()) for a, b in zip(ours, theirs, strict=True))


def cut(model: Model, inputs: Calibration, options: str):
    (report,) = Pipeline.parse(f"prune-structured{{{options}}}").run(model, PassContext(calibration=inputs))
    assert graph_fault(model) is None
    return report


@pytest.mark.parametrize("make", [mlp, cnn, grouped])
def test_shapes_shrink_and_compensation_pays(make) -> None:
    reference = make()
    inputs = data(reference)
    errors = {}
    for way in ("none", "linear", "affine"):
        model = make()
        report = cut(model, inputs, f"flops-ratio=0.6 multiple=1 compensation={way} damping=0.0001")
        assert report.changed
        assert signature(model) == signature(reference)
        before = {site.name: site.shape for site in reference.sites()}
        assert any(site.shape[0] < before[site.name][0] for site in model.sites())
        assert any(site.shape[1] < before[site.name][1] for site in model.sites())
        errors[way] = error(model, reference, inputs)
    assert errors["affine"] <= errors["linear"] * 1.05
    assert errors["affine"] < errors["none"] * 0.8


def test_grouped_convolutions_keep_equally_many_channels_per_group() -> None:
    model = grouped()
    report = cut(model, data(model), "flops-ratio=0.6 multiple=1 match=c1")
    (change,) = [item for item in report.changed if item.site == "c1"]
    left = change.numbers["units_after"]
    shapes = {site.name: site.weight_shape for site in model.sites()}
    assert change.numbers["units_before"] == 4
    assert shapes["c1"][0] == 4 * left
    assert shapes["c2"] == (24, left, 3, 3)
    assert {site.groups for site in model.sites()} == {1, 4}


@pytest.mark.parametrize("name", SMALL)
def test_architectures(zoo: ModuleType, name: str) -> None:
    model = Model.from_proto(zoo.build(name, **SMALL[name]))
    reference, inputs = model.copy(), data(model, 2)
    report = cut(model, inputs, "flops-ratio=0.7 multiple=4 refit=all")
    assert report.changed
    assert signature(model) == signature(reference)
    assert model.nbytes < reference.nbytes
    if name == "llama_block":
        heads = [change for change in report.changed if "q_proj" in change.site]
        assert all(change.numbers["units_before"] == 2 for change in heads)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_what_cannot_be_measured_or_reached_is_said() -> None:
    model = mlp()
    bad = Calibration.from_batches([{"x": np.full((4, 16), 3e38, np.float32)}], model, threads=1)
    report = cut(model, bad, "flops-ratio=0.5 multiple=1")
    assert not report.changed
    assert any("NaN or infinite" in skip.reason for skip in report.skipped)
    report = cut(mlp(), data(mlp()), "flops-ratio=0.5 multiple=32")
    assert not report.changed
    assert any("leave none to remove" in skip.reason for skip in report.skipped)
    assert any("was not reached" in note for note in report.notes)


def test_layers_without_names_are_compensated_too() -> None:
    text = """g (float[B,16] x) => (float[B,8] y) {
        h = MatMul(x, w) r = Relu(h) q = MatMul(r, v) s = Relu(q) y = MatMul(s, u) }"""
    shapes = {"w": (16, 32), "v": (32, 16), "u": (16, 8)}
    inputs, errors = data(build(text, **shapes)), []
    for compensation in ("none", "affine"):
        model = build(text, **shapes)
        cut(model, inputs, f"flops-ratio=0.6 multiple=1 compensation={compensation}")
        errors.append(error(model, build(text, **shapes), inputs))
    assert errors[1] < 0.7 * errors[0]


def test_the_ratio_is_of_multiplications_and_is_reached() -> None:
    model = cnn()
    inputs = data(model)
    whole = model.copy()

    def count(item: Model) -> float:
        axes = AxisGraph(item)
        flops = Flops(item, axes, item.sites(), next(iter(inputs)))
        return flops.total(np.zeros(len(axes.removal), bool))

    assert count(whole) == 16 * 64 * 9 * (3 * 8 + 8 * 16 + 16 * 8) + 16 * 8 * 5
    report = cut(model, inputs, "flops-ratio=0.5 multiple=1")
    ratio = count(model) / count(whole)
    assert 0.35 < ratio <= 0.5
    assert f"{100 * ratio:.1f} %" in report.notes[0]


def test_what_is_left_is_a_multiple() -> None:
    model = mlp()
    cut(model, data(model), "flops-ratio=0.7 multiple=8")
    assert {site.name: site.shape for site in model.sites()} == {"up": (16, 16), "down": (8, 16)}


def test_a_duplicate_neuron_costs_nothing() -> None:
    model = mlp()
    up = next(site for site in model.sites() if site.name == "up")
    weight = up.numpy().copy()
    weight[3] = weight[20]
    up.replace(weight)
    bias = model.onnx.graph.initializers["b"]
    array = bias.const_value.numpy().copy()
    array[3] = array[20]
    import onnx_ir

    bias.const_value = onnx_ir.Tensor(array, name="b")
    reference, inputs = model.copy(), data(model)
    cut(model, inputs, "flops-ratio=0.97 multiple=1 damping=0.0000001")
    output = np.square(next(iter(verify.session(reference).run(next(iter(inputs))).values()))).sum()
    assert error(model, reference, inputs) < 1e-4 * output


@pytest.mark.parametrize("width", [1, 3])
def test_removal_costs_are_the_measured_increase(width: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 12)) @ rng.standard_normal((12, 12))
    gram, weight = x.T @ x / len(x), rng.standard_normal((5, 12))
    columns = np.arange(12).reshape(-1, width)
    curve = removal_curve([Consumer(weight, gram, columns)], 64, 1e-12)
    energy = np.trace(weight @ gram @ weight.T)
    for count in range(1, len(columns) - 1):
        kept = np.ones(12, bool)
        kept[columns[curve.order[:count]]] = False
        change = compensate(weight, kept, gram, gram, 1e-12) - weight
        assert np.trace(change @ gram @ change.T) / energy == pytest.approx(curve.error[count], rel=1e-6)
    slices = weight.copy()
    slices[:, columns[curve.order[0]]] = 0
    sliced = np.trace((slices - weight) @ gram @ (slices - weight).T) / energy
    assert curve.error[1] <= sliced
    assert (np.diff(curve.error) >= 0).all()


def test_reasons_and_refusals() -> None:
    model = mlp()
    with pytest.raises(UsageError, match="calibration"):
        Pipeline.parse("prune-structured").run(model, PassContext())
    report = cut(model, data(model), "match=down")
    assert not report.changed
    assert "output" in report.skipped[0].reason
    with pytest.raises(UsageError, match="matches none"):
        cut(model, data(model), "match=nothing")


@pytest.mark.parametrize(
    "option", ["flops-ratio=0", "flops-ratio=1", "max-removed=1", "multiple=0", "damping=0"]
)
def test_options_that_mean_nothing_are_refused(option: str) -> None:
    with pytest.raises(SpecError):
        Pipeline.parse(f"prune-structured{{{option}}}")


def test_zeros_that_a_fit_fills_are_told() -> None:
    for sparse in (True, False):
        model = mlp()
        (down,) = (site for site in model.sites() if site.name == "down")
        if sparse:
            down.replace(np.where(np.arange(down.shape[1]) % 2, down.numpy(), 0).astype(np.float32))
        report = cut(model, data(model), "flops-ratio=0.7 multiple=4")
        assert any("filled their zeros (as down)" in note for note in report.notes) == sparse
