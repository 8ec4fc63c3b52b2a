"""Errors told from some outputs and from other forms of a part: how near they are to those of all of it."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.ir import Model
from sparsecc.passes.factor.low_rank import FactorRrr
from sparsecc.plan import part_forms
from sparsecc.plan.comparison import error_of, estimate
from sparsecc.plan.part_data import PartData, collect_parts
from sparsecc.plan.part_forms import Form, FormTask, form_errors
from sparsecc.plan.parts import Part, find_parts
from sparsecc.plan.thinning import thinned
from sparsecc.pm import PassContext, Pipeline, Trial, no_progress

WIDTH = 64


def model(text: str, **shapes: tuple[int, ...]) -> Model:
    rng = np.random.default_rng(5)
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    for name, shape in shapes.items():
        array = rng.standard_normal(shape) / math.sqrt(WIDTH)
        if len(shape) == 2:  # a few outputs hold most of the energy, as in transformers
            array *= np.exp(1.2 * rng.standard_normal(shape[1]))
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    return Model.from_proto(proto)


def feed_forward() -> Model:
    return model(
        "(float[n,64] x) => (float[n,320] y) { [up] a = MatMul(x, u) b = Add(a, p) c = Relu(b) [down] d = MatMul(c, w)"
        " y = Add(d, q) }",
        u=(64, 128), p=(128,), w=(128, 320), q=(320,),
    )  # fmt: skip


def part_of(whole: Model) -> tuple[Part, PartData]:
    rng = np.random.default_rng(6)
    mix = rng.standard_normal((WIDTH, WIDTH)) * np.exp(-3 * np.arange(WIDTH) / WIDTH)[:, None]
    batches = [{"x": (rng.standard_normal((128, WIDTH)) @ mix).astype(np.float32)} for _ in range(4)]
    source = Calibration.from_batches(batches, whole, threads=1)
    ((part, data),) = collect_parts(whole, find_parts(whole), source, threads=1, progress=no_progress)
    assert isinstance(data, PartData)
    return part, data


def task(whole: Model, *families: list[tuple[str, ...]]) -> FormTask:
    part, data = part_of(whole)
    alone = part.compared((128, WIDTH)).to_proto().SerializeToString()
    forms = tuple(
        tuple(Form(passes, (1 - place / 10 - number / 100,)) for number, passes in enumerate(family))
        for place, family in enumerate(families)  # each is faster than those before it: none is pointless
    )
    return FormTask("key", alone, data, part.nested, forms)


def test_some_outputs_are_whole_blocks_of_the_last_products_and_compute_the_same() -> None:
    whole = feed_forward()
    alone = part_of(whole)[0].compared((128, WIDTH))
    found = thinned(alone, seed=0)
    assert found is not None
    assert found.share == 128 / 320
    assert {site.name: site.shape for site in found.model.sites()} == {"up": (128, 64), "down": (128, 128)}
    x = np.random.default_rng(0).standard_normal((128, WIDTH)).astype(np.float32)
    (all_of_it,) = open_session(alone).run({"x": x}).values()
    (some,) = open_session(found.model).run({"x": x}).values()
    places = [np.flatnonzero(np.isclose(all_of_it, some[:, [at]]).all(0))[0] for at in range(128)]
    np.testing.assert_allclose(some, all_of_it[:, places], rtol=1e-4, atol=1e-5)
    blocks = np.reshape(places, (-1, 16))
    assert (blocks == blocks[:, :1] + np.arange(16)).all()
    assert (blocks[:, 0] % 16 == 0).all()
    assert (np.diff(blocks[:, 0]) > 0).all()
    assert (thinned(alone, seed=0) or found).model.fingerprint() == found.model.fingerprint()


@pytest.mark.parametrize(
    "text",
    [
        "(float[n,64] x) => (float[n,240] y) { [a] y = MatMul(x, w) }",  # few outputs
        "(float[n,64] x) => (float[n,330] y) { [a] y = MatMul(x, w) }",  # no whole blocks
        "(float[n,64] x) => (float[n,320] y) { [a] y = Gemm(x, w, c) }",  # a matrix is added
    ],
)
def test_parts_that_cannot_be_looked_at_in_pieces_are_left_whole(text: str) -> None:
    columns = int(text.partition("=> (float[n,")[2].partition("]")[0])
    shapes = {"w": (WIDTH, columns), **({"c": (128, columns)} if "c)" in text else {})}
    alone = part_of(model(text, **shapes))[0].compared((128, WIDTH))
    assert thinned(alone, seed=0) is None


PATTERNS = [
    "pattern=16x1 sparsity=0.5",
    "pattern=16x4 sparsity=0.5",
    "pattern=2:4",
    "sparsity=0.5",
    "sparsity=0.8",
]


def test_errors_of_some_outputs_are_near_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    families = [
        [(f"prune-sparsegpt{{{pattern}}}", *narrow)] for pattern in PATTERNS for narrow in ((), ("quantize",))
    ]
    families += [
        [("prune-sparsegpt{pattern=16x1 sparsity=0.7}",), ("prune-sparsegpt{pattern=16x1 sparsity=0.9}",)]
    ]
    own = task(feed_forward(), *families)
    quick = form_errors(own)
    monkeypatch.setattr(part_forms, "thinned", lambda *_: None)
    fitted = part_forms._fitted
    monkeypatch.setattr(part_forms, "_fitted", lambda before, text, trial: fitted(before, text, None))
    whole = form_errors(own)
    assert all(found.spread == 0 for found in whole.values())
    spreads = [found.spread for found in quick.values()]
    assert spreads[0] == 0  # the first is fitted whole
    assert all(0 < spread < 0.2 for spread in spreads[1:])
    ratios = {passes: found.error / whole[passes].error for passes, found in quick.items()}
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios


def test_what_narrow_values_add_is_measured_once_for_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [0.9, 0.7, 0.5]
    specs = [(f"prune-structured{{keep={share}}}",) for share in shares]
    own = task(feed_forward(), specs, [(*spec, "quantize") for spec in specs])
    fitted: list[str] = []
    real = part_forms._fitted

    def counted(before, text, trial):
        fitted.append(text)
        return real(before, text, trial)

    monkeypatch.setattr(part_forms, "_fitted", counted)
    found = form_errors(own)
    assert fitted.count("quantize") == 1
    for spec in specs[1:]:
        assert found[(*spec, "quantize")].error > found[spec].error
        assert found[(*spec, "quantize")].spread > 0
    measured = form_errors(FormTask("key", own.model, own.data, own.nested, ((own.families[1][2],),)))
    assert found[(*specs[2], "quantize")].error == pytest.approx(
        measured[(*specs[2], "quantize")].error, rel=0.1
    )


def test_the_estimate_is_that_of_a_form_that_changes_outputs_alike() -> None:
    rng = np.random.default_rng(1)
    known = [rng.random(320), rng.random(320)]
    rows = np.arange(0, 320, 32)[:, None] + np.arange(16)
    some = [array[rows.ravel()] for array in known]
    found = estimate(known, some, [4 * array for array in some], 0.5)
    assert found == pytest.approx((2 * error_of(known), 0.0))
    uneven = estimate(known, some, [array * rng.random(160) for array in some], 0.5)
    assert uneven is not None
    assert 0 < uneven[1] < 1
    assert estimate([np.zeros(320)], [np.zeros(160)], [np.ones(160)], 0.5) is None


@pytest.mark.parametrize("spec", ["factor-rrr{param-ratio=0.6}", "prune-structured{keep=0.6}", "factor-rrr"])
def test_a_trial_computes_once_what_forms_have_in_common_and_changes_no_form(spec: str) -> None:
    whole = feed_forward()
    part, data = part_of(whole)
    alone = part.compared((128, WIDTH))
    trial = Trial()
    for other in (f"{spec.partition('{')[0]}", spec):
        copies = [alone.copy(), alone.copy()]
        for copy, own in zip(copies, (None, trial), strict=True):
            calibration = part_forms.PartCalibration(data, alone)
            Pipeline.parse(other).run(copy, PassContext(calibration=calibration, threads=1, trial=own))
        for one, two in zip(copies[0].sites(), copies[1].sites(), strict=True):
            np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=1e-4, atol=1e-5)


def test_a_trial_keeps_what_was_made_until_it_forgets() -> None:
    trial, made = Trial(), []

    def make() -> int:
        made.append(1)
        return len(made)

    assert (trial.once("a", make), trial.once("a", make), trial.once(("b", 1), make)) == (1, 1, 2)
    trial.forget()
    assert trial.once("a", make) == 3
    assert (PassContext().once("a", make), PassContext().once("a", make)) == (4, 5)
    assert FactorRrr.by_outputs is False
