"""Graphs of convolutions as several smaller ones: geometry, biases, refusals, reports."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.factor.base import rewrite
from sparsecc.passes.factor.conv_forms import Canonical, Separable, Spatial, Tucker
from sparsecc.passes.hybrid.rewriting import PART_KEY
from sparsecc.plan import preset
from sparsecc.pm import PassContext, Pipeline, RewriteCost, get_pass
from sparsecc.pm.checks import graph_fault

RNG = np.random.default_rng(7)
PASSES = ["factor-spatial-svd", "factor-tucker", "factor-cp", "factor-separable"]
OUT, IN = 6, 4


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(body: str, sizes: tuple[object, ...], **weights: np.ndarray) -> Model:
    given, results = ", ".join(str(size) for size in sizes), ", ".join(f"d{at}" for at in range(len(sizes)))
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]>\ng (float[{given}] x) => (float[{results}] y) {{ {body} }}'
    )
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    return open_session(model).run({"x": x})["y"]


def context(model: Model, x: np.ndarray) -> PassContext:
    parts = [{"x": part} for part in np.array_split(x, 2)]
    return PassContext(calibration=Calibration.from_batches(parts, model, threads=1), threads=1)


GEOMETRIES = [
    ("group = 1", (3, 3), (7, 8), None),
    ("pads = [1, 2, 0, 1], strides = [2, 3]", (3, 2), (9, 10), None),
    ("pads = [2, 2, 2, 2], dilations = [2, 1], strides = [1, 2]", (3, 5), (9, 8), None),
    ('auto_pad = "SAME_UPPER", strides = [2, 2]', (3, 3), (7, 8), None),
    ('auto_pad = "SAME_LOWER", strides = [2, 1]', (4, 3), (9, 6), None),
    ('auto_pad = "SAME_UPPER", strides = [2, 2]', (3, 2), (7, 9), ("H", "W")),
    ('auto_pad = "SAME_LOWER", strides = [3, 2]', (4, 3), (11, 8), ("H", "W")),
    ('auto_pad = "VALID", strides = [2, 1]', (3, 3), (9, 6), ("H", "W")),
    ("pads = [1, 0], strides = [2]", (3,), (11,), None),
    ("pads = [1, 0, 1, 1, 1, 0], strides = [1, 2, 1]", (2, 3, 2), (5, 6, 4), None),
]


def forms(kernel: tuple[int, ...], strides: tuple[int, ...]) -> list:
    places = int(np.prod(kernel))
    found = [
        Tucker(strides, normal(2, 3, *kernel), normal(OUT, 2), normal(3, IN)),
        Tucker(strides, normal(OUT, 3, *kernel), None, normal(3, IN)),
        Tucker(strides, normal(2, IN, *kernel), normal(OUT, 2), None),
        Canonical(strides, normal(OUT, 5), normal(5, IN), normal(5, places), kernel),
        Separable(strides, normal(OUT, IN, 2), normal(IN, 2, *kernel)),
        Separable(strides, normal(OUT, IN, 1), normal(IN, 1, *kernel)),
    ]
    if len(kernel) > 1:
        found.append(Spatial(strides, normal(OUT, 3, *kernel[1:]), normal(3, IN, kernel[0])))
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("attributes", "kernel", "sizes", "named"), GEOMETRIES)
def test_chains_compute_the_weight_they_stand_for(attributes, kernel, sizes, named, bias):
    body = f"[s] y = Conv <{attributes}> (x, w{', b' if bias else ''})"
    model = build(body, ("N", IN, *(named or sizes)), w=normal(OUT, IN, *kernel), b=normal(OUT))
    x = normal(3, IN, *sizes)
    (site,) = model.sites()
    assert site.conv is not None
    for form in forms(kernel, site.conv.strides):
        whole, chain = model.copy(), model.copy()
        whole.sites()[0].replace(form.dense().astype(np.float32))
        expected = outputs(whole, x)
        rewrite(chain, chain.sites()[0], form)
        assert graph_fault(chain) is None
        found = outputs(chain, x)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        stored = [site.numpy().size for site in chain.sites()]
        assert sum(stored) == form.numbers
        nodes = [node for node in chain.onnx.graph if node.op_type == "Conv"]
        assert [len(node.inputs) == 3 for node in nodes] == [False] * (len(nodes) - 1) + [bias]
        assert all(PART_KEY in node.metadata_props for node in nodes)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1), (1, 3)])
def test_multiplications_per_position_count_steps(strides):
    model = build(
        f"[s] y = Conv <pads = [1, 1, 1, 1], strides = [{strides[0]}, {strides[1]}]> (x, w)",
        ("N", IN, 12, 12),
        w=normal(OUT, IN, 3, 3),
    )
    x = normal(1, IN, 12, 12)
    positions = outputs(model, x)[0, 0].size
    for form in forms((3, 3), strides):
        chain = model.copy()
        rewrite(chain, chain.sites()[0], form)
        assert multiplications(chain, x) == form.macs * positions


def multiplications(model: Model, x: np.ndarray) -> int:
    """Of all convolutions, by the shapes of their results."""
    copy = model.copy()
    total = 0
    graph = copy.onnx.graph
    for node in [node for node in graph if node.op_type == "Conv"]:
        if node.outputs[0] not in graph.outputs:
            graph.outputs.append(node.outputs[0])
    results = open_session(copy).run({"x": x})
    for site in copy.sites():
        result = results[str(site.node.outputs[0].name)]
        total += result.size * site.numpy().shape[1]
    return total


def network() -> tuple[Model, np.ndarray]:
    """Two convolutions with what real networks have between, and pictures whose neighbours are alike."""
    body = """[a] h = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b)
        n = BatchNormalization(h, gain, shift, mean, variance) r = Relu(n)
        [z] y = Conv <pads = [1, 1, 1, 1]> (r, v, c)"""
    weights = {"w": normal(16, 8, 3, 3), "b": normal(16), "v": normal(8, 16, 3, 3), "c": normal(8)}
    statistics = {name: normal(16) for name in ("gain", "shift", "mean")} | {
        "variance": normal(16) ** 2 + 0.5
    }
    x = normal(24, 8, 14, 14)
    smooth = x[..., 1:, 1:] + x[..., :-1, 1:] + x[..., 1:, :-1] + x[..., :-1, :-1]
    return build(body, ("N", 8, 13, 13), **weights, **statistics), smooth


@pytest.mark.parametrize("name", PASSES)
def test_passes_fit_front_to_back_and_report_what_they_did(name):
    model, x = network()
    dense = model.copy()
    spec = f"tidy,{name}{{param-ratio=0.6 min-elements=1 multiple=1}}"
    report = Pipeline.parse(spec).run(model, context(model, x))[-1]
    assert [item.site for item in report.changed] == ["a", "z"]
    assert graph_fault(model) is None
    stored = sum(site.numpy().size for site in model.sites())
    weights = sum(site.numpy().size for site in dense.sites())
    assert 0.4 * weights < stored <= 0.6 * weights
    shares = [item.numbers["parameters"] for item in report.changed]
    assert stored == pytest.approx(shares[0] * 1152 + shares[1] * 1152)
    assert all(0 < item.numbers["output_error"] < 0.5 for item in report.changed)
    expected, found = outputs(dense, x), outputs(model, x)
    assert (
        np.square(found - expected).sum()
        < 0.6 * np.square(expected - expected.mean((0, 2, 3), keepdims=True)).sum()
    )
    np.testing.assert_allclose(
        found.mean((0, 2, 3)), expected.mean((0, 2, 3)), atol=2e-2
    )  # biases are fitted too
    again = Pipeline.parse(spec).run(model, context(model, x))[-1]
    assert not again.changed


REFUSED = [
    ("[s] y = Conv <group = 2> (x, w)", {"w": (8, 3, 3, 3)}, ("N", 6, 9, 8), PASSES, "convolution of 2 groups"),
    ("[s] y = Conv <group = 6> (x, w)", {"w": (6, 1, 3, 3)}, ("N", 6, 9, 8), PASSES, "convolution of 6 groups"),
    ("[s] y = Conv (x, w)", {"w": (8, 6, 1, 1)}, ("N", 6, 9, 8), PASSES, "one entry: use factor-rrr"),
    ("[s] y = MatMul(x, w)", {"w": (8, 6)}, ("N", 8), PASSES, "for MatMul use factor-rrr"),
    ("[s] y = Conv (x, w)", {"w": (8, 6, 3)}, ("N", 6, 9), PASSES[:1], "along one axis only"),
    ("[s] y = Conv (x, w)", {"w": (8, 6, 1, 3)}, ("N", 6, 9, 8), PASSES[:1], "along one axis only"),
    ("[s] y = Conv (x, w)", {"w": (2, 2, 3, 3)}, ("N", 2, 9, 8), PASSES[:3], "18 numbers do not hold"),
    ("[s] y = Conv (x, w)", {"w": (2, 2, 2, 2)}, ("N", 2, 9, 8), PASSES[3:], "8 numbers do not hold 4 kernels"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "shapes", "sizes", "names", "reason"), REFUSED)
def test_refusals_have_a_reason(body, shapes, sizes, names, reason):
    model = build(body, sizes, **{name: normal(*shape) for name, shape in shapes.items()})
    x = normal(20, *sizes[1:])
    before = model.fingerprint()
    for name in names:
        (report,) = Pipeline.parse(f"{name}{{param-ratio=0.5 min-elements=1}}").run(model, context(model, x))
        assert not report.changed
        assert reason in report.skipped[0].reason
    assert model.fingerprint() == before


def test_half_precision_holds_and_dead_inputs_do_no_harm():
    weight = normal(16, 8, 3, 3).astype(np.float16)
    body = "[s] y = Conv <pads = [1, 1, 1, 1]> (x, w)"
    model = build(body, ("N", 8, 9, 9), w=weight)
    for value in (*model.onnx.graph.inputs, *model.onnx.graph.outputs):
        assert value.type is not None
        value.dtype = model.onnx.graph.initializers["w"].dtype
    x = normal(20, 8, 9, 9).astype(np.float16)
    x[:, 3] = 0
    for name in PASSES:
        copy = model.copy()
        spec = f"{name}{{param-ratio=0.6 min-elements=1 multiple=1}}"
        (report,) = Pipeline.parse(spec).run(copy, context(copy, x))
        assert report.changed
        assert all(site.dtype == np.float16 for site in copy.sites())
        assert np.isfinite(outputs(copy, x).astype(np.float32)).all()


def test_presets():
    for name in ("spatial-svd", "tucker", "cp", "separable"):
        passes = preset(method=name, param_ratio=0.6, calibrated=True).passes
        assert str(passes[1]) == f"factor-{name}{{param-ratio=0.6}}"


class Costs:
    """Times by the kind of a form; dense takes 1 ms."""

    def __init__(self, **times: float) -> None:
        self.times = times

    def rewritten(self, model, site, rewrite, key, *, custom_ops):
        copy = model.copy()
        rewrite(copy, next(item for item in copy.sites() if item.name == site.name))
        assert graph_fault(copy) is None
        return RewriteCost(1.0, self.times[key.split()[0]], 10**9, 1)


def test_the_best_form_is_the_one_with_the_least_error_of_those_that_pay():
    dense, x = network()
    options = "param-ratio=0.6 min-elements=1 multiple=1"
    errors = {}
    kinds = {
        "factor-rrr": "LowRank", "factor-spatial-svd": "Spatial",
        "factor-tucker": "Tucker", "factor-separable": "Separable",
    }  # fmt: skip
    best_of = f'factor-best{{match=a {options} forms="rrr,spatial-svd,tucker,separable"}}'
    for name in kinds:
        model = dense.copy()
        (report,) = Pipeline.parse(f"{name}{{match=a {options}}}").run(model, context(model, x))
        errors[name] = report.changed[0].numbers["output_error"]
    model = dense.copy()
    (report,) = Pipeline.parse(best_of).run(model, context(model, x))
    assert report.changed[0].numbers["output_error"] == pytest.approx(min(errors.values()), rel=1e-6)
    # the one that loses least takes longer than dense, and one more is out
    best, second, *_ = sorted(errors, key=errors.__getitem__)
    times = dict.fromkeys(kinds.values(), 0.5) | {kinds[best]: 1.5, kinds[second]: 0.25}
    model = dense.copy()
    ctx = replace(context(model, x), costs=Costs(**times))
    (report,) = Pipeline.parse(best_of).run(model, ctx)
    (change,) = report.changed
    assert change.numbers["output_error"] == pytest.approx(errors[second], rel=1e-6)
    assert change.numbers["gain"] == 4
    assert graph_fault(model) is None


def test_where_no_form_pays_or_suits_all_reasons_are_told():
    model, x = network()
    ctx = replace(context(model, x), costs=Costs(LowRank=2, Canonical=3))
    spec = 'factor-best{match=a multiple=1 min-elements=1 forms="rrr,cp"}'
    (report,) = Pipeline.parse(spec).run(model, ctx)
    reason = report.skipped[0].reason
    assert reason.startswith("no form pays: rrr: not faster: rank ")
    assert "; cp: not faster: CP rank " in reason
    (report,) = Pipeline.parse("factor-best{match=a multiple=64 min-elements=1}").run(
        model, context(model, x)
    )
    assert report.skipped[0].reason.startswith("no form suits: rrr: 806 numbers do not hold")
    assert get_pass("factor-best")(forms=("cp",)).forms == ("cp",)
    for wrong, message in (
        ("slab", "forms cannot hold slab"),
        ("cur", "forms cannot hold cur"),
        ("x", "unknown pass"),
    ):
        with pytest.raises(SpecError, match=message):
            Pipeline.parse(f"factor-best{{forms={wrong}}}")


def test_linear_layers_get_the_forms_that_suit_them():
    model = build("[s] y = MatMul(x, w)", ("N", 24), w=normal(24, 40))
    x = normal(200, 24) @ normal(24, 24)
    (report,) = Pipeline.parse("factor-best{min-elements=1 multiple=1}").run(model, context(model, x))
    assert report.changed[0].detail.startswith("rank ")


def test_on_a_real_layer_kernels_of_their_own_lose_least_and_channels_most(data_dir):
    model = Model.load(data_dir / "models" / "resnet20_cifar10.onnx")
    archive = np.load(data_dir / "images" / "cifar10_test_2500.npz")
    pictures = np.moveaxis(archive["images"][::50], -1, 1).astype(np.float32) / 255
    x = (pictures - np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)) / 0.225
    batches = [{"input": part.astype(np.float32)} for part in np.array_split(x, 2)]
    errors = {}
    for name in ("factor-rrr", "factor-tucker", "factor-spatial-svd", "factor-cp"):
        copy = model.copy()
        ctx = PassContext(calibration=Calibration.from_batches(batches, copy, threads=1), threads=1)
        spec = f"tidy,{name}{{match=layer1.1.conv1 param-ratio=0.7 min-elements=1 sequential=false}}"
        (change,) = Pipeline.parse(spec).run(copy, ctx)[-1].changed
        assert change.numbers["parameters"] <= 0.7
        errors[name] = change.numbers["output_error"]
    assert sorted(errors, key=errors.__getitem__) == [
        "factor-cp", "factor-spatial-svd", "factor-tucker", "factor-rrr",
    ]  # fmt: skip
    assert errors["factor-cp"] < 0.1 * errors["factor-rrr"]
