"""Laws that every registered pass obeys, whoever wrote it."""

from __future__ import annotations

import dataclasses
import inspect
import re

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, Moments, synthetic_inputs
from sparsecc.ir import Model
from sparsecc.pm import Pass, PassContext, PassReport, Pipeline, RewriteCost, get_pass, pass_names
from sparsecc.pm.checks import graph_fault, signature

NAMES = pass_names()
#: Passes that take the kernels of convolutions apart.
KERNELS = ("factor-spatial-svd", "factor-tucker", "factor-cp", "factor-separable")
TENSORS = {np.float32: "float", np.float16: "float16"}


class FakeCalibration:
    """Statistics that depend on nothing but the site's name."""

    unavailable: dict[str, str] = {}  # noqa: RUF012

    def __iter__(self):
        return iter(())

    def mean_square(self, model, sites):
        return {site.name: self._rng(site).random(site.shape[1]) for site in sites if site.in_main_graph}

    def gram(self, model, sites):
        roots = {site.name: self._rng(site).standard_normal((site.shape[1],) * 2) for site in sites}
        return {name: root @ root.T for name, root in roots.items()}

    def walk(self, model, sites, reference=None):
        for site in sites:
            root = self._rng(site).standard_normal((2 * site.shape[1], site.groups * site.shape[1]))
            parts = [part.T @ part for part in np.split(root, site.groups, axis=1)]
            gram = parts[0] if site.groups == 1 else np.stack(parts)
            mean = np.zeros(gram.shape[:-1])
            yield {site.name: Moments(gram, mean, gram, mean, gram, len(root))}

    @staticmethod
    def _rng(site) -> np.random.Generator:
        return np.random.default_rng(list(site.name.encode()))


class FakeCosts:
    """Sparse is always twice as fast."""

    def site_times_ms(self, model, site, layouts, base=None):
        return {"dense": 1.0, **{str(layout): 0.5 for layout in layouts}}

    def relative_time(self, model, sites, quantization=None):
        return 1.0 - 0.1 * len(sites)

    def rewritten(self, model, site, rewrite, key, *, custom_ops):
        dense = site.shape[0] * site.shape[1] * site.dtype.itemsize
        return RewriteCost(1.0, 0.5, dense, 1)

    def relative_time_of(self, model, candidate):
        return 0.5


def context() -> PassContext:
    return PassContext(calibration=FakeCalibration(), costs=FakeCosts())


def measured(model: Model) -> PassContext:
    """A context that calibrates on real runs of ``model``, which reads one ``x``."""
    batches = [synthetic_inputs(model, seed) for seed in range(4)]
    return PassContext(calibration=Calibration.from_batches(batches, model, threads=1), threads=1)


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def sparse_weight(*shape: int, dtype=np.float32) -> np.ndarray:
    """Weights with a tenth left, so that passes that look for zeros find some."""
    rng = np.random.default_rng(list(shape))
    return (rng.standard_normal(shape) * (rng.random(shape) < 0.1)).astype(dtype)


def empty() -> Model:
    return build("g (float[2] x) => (float[2] x) {}")


def no_weights() -> Model:
    return build("g (float[B,4] x) => (float[B,4] y) { y = Relu(x) }")


def layers(dtype=np.float32) -> Model:
    kind = TENSORS[dtype]
    return build(
        f"""g ({kind}[B,T,64] x) => ({kind}[B,T,64] y) {{
            k = Constant<value_float=2.0>()
            [up] h = MatMul(x, w1)
            b = Add(b1, h)
            r = Relu(b)
            [down] d = MatMul(r, w2)
            y = Identity(d)
        }}""",
        w1=sparse_weight(64, 96, dtype=dtype),
        b1=sparse_weight(1, 96, dtype=dtype),
        w2=sparse_weight(96, 64, dtype=dtype),
    )


def tokens() -> Model:
    rows = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    return build(
        """g (float[B,4] x) => (float[B,4,64] y) {
            i = Cast<to=7>(x)
            [embed] e = Gather(table, i)
            t = Transpose<perm=[1,0]>(table)
            [head] y = MatMul(e, t)
        }""",
        table=rows,
    )


def words() -> Model:
    rows = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    return build(
        """g (float[B,4] x) => (float[B,4,32] y) {
            i = Cast<to=7>(x)
            [embed] e = Gather(table, i)
            y = Tanh(e)
        }""",
        table=rows,
    )


def residuals() -> Model:
    return build(
        """g (float[B,64] x) => (float[B,64] y) {
            [up] h = MatMul(x, w)
            r = Relu(h)
            [down] d = MatMul(r, v)
            s = Add(x, d)
            [up2] h2 = MatMul(s, w2)
            r2 = Relu(h2)
            [down2] d2 = MatMul(r2, v2)
            y = Add(s, d2)
        }""",
        w=sparse_weight(64, 96),
        v=sparse_weight(96, 64),
        w2=sparse_weight(64, 96),
        v2=sparse_weight(96, 64),
    )


def residual() -> Model:
    return build(
        """g (float[B,64] x) => (float[B,64] y) {
            e = Relu(x)
            [up] h = MatMul(e, w)
            r = Relu(h)
            [down] d = MatMul(r, v)
            y = Add(e, d)
        }""",
        w=sparse_weight(64, 96),
        v=sparse_weight(96, 64),
    )


def convolutions() -> Model:
    return build(
        """g (float[B,32,H,W] x) => (float[B,32,H2,W2] y) {
            [first] c = Conv<group=2, pads=[1,1,1,1]>(x, w)
            n = BatchNormalization(c, s, s, s, s)
            r = Relu(n)
            [second] q = Conv(r, v)
            [third] y = Conv(q, u)
        }""",
        w=sparse_weight(32, 16, 3, 3),
        v=sparse_weight(32, 32, 1, 1),
        u=sparse_weight(32, 32, 2, 2),
        s=np.ones(32, np.float32),
    )


def branches() -> Model:
    return build(
        """g (bool c, float[2,64] x) => (float[2,64] y) {
            y = If(c) <
                then_branch = t () => (float[2,64] p) { [then] p = MatMul(x, w) },
                else_branch = e () => (float[2,64] q) { [else] m = MatMul(x, v) q = Identity(m) }
            >
        }""",
        w=sparse_weight(64, 64),
        v=sparse_weight(64, 64),
    )


def mixture() -> Model:
    return build(
        """g (float[B,32] x) => (float[B,32] y) {
            [router] s = MatMul(x, r)
            p = Softmax(s)
            t = Transpose<perm = [1, 0]>(p)
            c = Unsqueeze(t, last)
            e = MatMul(x, w)
            m = Mul(e, c)
            y = ReduceSum<keepdims = 0>(m, first)
        }""",
        r=sparse_weight(32, 8),
        w=np.stack([sparse_weight(32, 32) for _ in range(8)]),
        last=np.array([-1]),
        first=np.array([0]),
    )


def transform() -> Model:
    walsh = np.ones((1, 1), np.float32)
    while len(walsh) < 64:
        walsh = np.kron(walsh, np.array([[1, 1], [1, -1]], np.float32))
    return build("g (float[B,64] x) => (float[B,64] y) { [spectrum] y = MatMul(x, w) }", w=walsh)


def tied() -> Model:
    return build(
        """g (float[B,64] x) => (float[B,64] y) {
            [first] h = MatMul(x, w)
            r = Relu(h)
            [second] y = MatMul(r, w)
        }""",
        w=sparse_weight(64, 64),
    )


def tied_on_other_axes() -> Model:
    return build(
        """g (float[B,64] x) => (float[B,64] y) {
            [first] h = MatMul(x, w)
            [second] y = Gemm<transB=1>(h, w)
        }""",
        w=sparse_weight(64, 64),
    )


def not_finite() -> Model:
    weight = sparse_weight(64, 64)
    weight[0, 0], weight[1, 1] = np.nan, np.inf
    return build("g (float[B,64] x) => (float[B,64] y) { [bad] y = MatMul(x, w) }", w=weight)


def zero_size() -> Model:
    text = "g (float[B,0] x) => (float[B,8] y) { [hollow] y = MatMul(x, w) }"
    return build(text, w=np.zeros((0, 8), np.float32))


def unknown_domain() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "other": 1]>
        g (float[B,64] x) => (float[B,64] y) { h = other.Op(x) [known] y = MatMul(h, w) }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(sparse_weight(64, 64), "w"))
    return Model.from_proto(proto)


def half() -> Model:
    return layers(np.float16)


MODELS = [
    *(empty, no_weights, layers, residual, half, convolutions, branches, tied, tied_on_other_axes, mixture),
    *(not_finite, zero_size, unknown_domain, tokens),
]


def prepared(name: str, model: Model) -> Model:
    """Run the passes that must come before: lowering reads the marks of choose-layout."""
    before = {"confirm-layout": "choose-layout", "lower-sparse": "choose-layout"}.get(name)
    if before is not None:
        Pipeline.parse(before).run(model, context())
    return model


@pytest.mark.parametrize("name", NAMES)
def test_default_constructs_and_is_its_text(name):
    pass_ = get_pass(name)()
    assert isinstance(pass_, Pass)
    assert str(pass_) == name
    assert Pipeline.parse(str(pass_)).passes == (pass_,)
    assert dataclasses.is_dataclass(pass_)
    assert hash(pass_) == hash(get_pass(name)())


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_a_sample_that_parses_and_explains_every_option(name):
    pass_type = get_pass(name)
    doc = inspect.getdoc(pass_type) or ""
    samples = re.findall(r"Sample: ``([^`]+)``", doc)
    assert samples, "the docstring of a pass ends in a line 'Sample: ``name{option=value}``'"
    for sample in samples:
        (pass_,) = Pipeline.parse(sample).passes
        assert type(pass_) is pass_type
        assert str(pass_) == sample
    for field in dataclasses.fields(pass_type):
        assert re.search(rf"^\s*{field.name}:", doc, re.MULTILINE), f"option {field.name} is not explained"


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_survives_keeps_the_signature_and_gives_reasons(name, make):
    model = prepared(name, make())
    before, bytes_before = signature(model), model.fingerprint()
    (report,) = Pipeline.parse(name).run(model, context())
    assert isinstance(report, PassReport)
    assert signature(model) == before
    assert graph_fault(model) is None
    assert all(item.site and item.reason for item in report.skipped)
    assert all(item.site and item.detail for item in report.changed)
    if not report.changed:
        assert model.fingerprint() == bytes_before
    accounted = {item.site for item in (*report.changed, *report.skipped)}
    if name.startswith("prune-"):
        assert accounted >= {site.name for site in make().sites()}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_is_deterministic(name, make):
    results = []
    for _ in range(2):
        model = prepared(name, make())
        (report,) = Pipeline.parse(name).run(model, context())
        results.append((model.fingerprint(), report.to_json(timings=False)))
    assert results[0] == results[1]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_changes_nothing_more(name, make):
    model = prepared(name, make())
    Pipeline.parse(name).run(model, context())
    stable = model.fingerprint()
    Pipeline.parse(name).run(model, context())
    assert model.fingerprint() == stable


@pytest.mark.parametrize("name", NAMES)
def test_the_model_can_be_saved_and_loaded_after_it(name, tmp_path):
    model = prepared(name, layers())
    Pipeline.parse(name).run(model, context())
    model.save(tmp_path / "model.onnx")
    assert Model.load(tmp_path / "model.onnx").fingerprint() == model.fingerprint()


@pytest.mark.parametrize("name", [name for name in NAMES if not get_pass(name).lossless])
def test_lossy_passes_report_numbers(name, tmp_path):
    makes = {
        "recover-bn": convolutions,
        **dict.fromkeys(KERNELS, convolutions),
        "prune-depth": residual,
        "share-weights": residuals,
        "prune-experts": mixture,
        "factor-mobe": mixture,
        "factor-faust": transform,
        "factor-embedding": tokens,
        "quantize-embedding": words,
    }
    make = makes.get(name, layers)
    model = prepared(name, without_zeros(make()))
    recovers = ".recover." in get_pass(name).__module__
    real = recovers or name in ("prune-depth", "share-weights")  # those run the model
    # Those work on what ran before them.
    spec = f"prune-magnitude,{name}" if recovers or name in ("restore-dense", "round-weights") else name
    if name == "heal":
        pytest.importorskip("torch", reason="healing needs PyTorch: pip install 'sparsecc[heal]'")
        spec = spec.replace("heal", "heal{steps=20}")
    if name == "factor-faust":
        spec = "factor-faust{max-error=1}"  # random weights are no product of sparse factors
    if name in ("factor-embedding", "quantize-embedding"):
        spec = f"{name}{{min-elements=1}}"
    if name == "prune-armor":
        spec = "prune-armor{block=8}"  # larger factors would cost more than they save in layers this small
    if name == "factor-fwsvd":
        np.savez(tmp_path / "fisher.npz", up=np.ones((96, 64)), down=np.ones((64, 96)))
        spec = f'{name}{{fisher="{tmp_path / "fisher.npz"}"}}'
    report = Pipeline.parse(spec).run(model, measured(model) if real else context())[-1]
    assert report.changed
    for change in report.changed:
        assert {"density_before", "density_after", "relative_error"} <= set(change.numbers)


def without_zeros(model: Model) -> Model:
    for site in model.sites():
        rng = np.random.default_rng(0)
        site.replace(rng.standard_normal(site.shape).astype(np.float32))
    return model
