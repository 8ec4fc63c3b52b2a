"""Sketches: the form that a pass gives, without its fit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.ir import Model
from sparsecc.pm import PassContext, Pipeline
from sparsecc.sparse import detect

HIDDEN = 128


def mlp() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[n,64] x) => (float[n,64] y) {
            [up] a = MatMul(x, w0)  b = Add(a, b0)  h = Relu(b)
            [down] c = MatMul(h, w1)  y = Add(c, b1)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w0", (64, HIDDEN)), ("b0", HIDDEN), ("w1", (HIDDEN, 64)), ("b1", 64)):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def data(model: Model) -> Calibration:
    rng = np.random.default_rng(1)
    return Calibration.from_batches(
        [{"x": rng.standard_normal((64, 64)).astype(np.float32)} for _ in range(4)], model
    )


@pytest.mark.parametrize(
    "spec",
    [
        "prune-sparsegpt{pattern=16x1 sparsity=0.5}",
        "prune-wanda{sparsity=0.6}",
        "factor-rrr{param-ratio=0.5}",
        "factor-btt{param-ratio=0.5}",
        "prune-structured{keep=0.5}",
        "prune-tiles{sparsity=0.3}",
        "quantize",
    ],
)
def test_a_sketch_has_the_form_of_the_result(spec: str) -> None:
    (pass_,) = Pipeline.parse(spec).passes
    fitted, sketched = mlp(), mlp()
    ctx = PassContext(calibration=data(fitted))
    assert pass_.run(fitted, ctx).changed
    assert pass_.sketch(sketched, ctx).changed
    sketched.check()
    assert [node.op_type for node in sketched.onnx.graph] == [node.op_type for node in fitted.onnx.graph]
    for a, b in zip(fitted.sites(), sketched.sites(), strict=True):
        assert a.shape == b.shape
        assert detect(a.numpy()) == detect(b.numpy())
        assert np.count_nonzero(a.numpy()) == pytest.approx(np.count_nonzero(b.numpy()), rel=0.02)


def test_keep_leaves_the_share_of_every_class_and_refits() -> None:
    model, original = mlp(), mlp()
    report = Pipeline.parse("prune-structured{keep=0.7}").run(model, PassContext(calibration=data(model)))[0]
    assert [site.shape for site in model.sites()] == [(96, 64), (64, 96)]  # 89.6 of 128, in steps of 8
    assert report.changed[0].numbers["units_after"] == 96
    batch = next(iter(data(original)))
    (before,), (after,) = (open_session(item).run(batch).values() for item in (original, model))
    assert np.linalg.norm(after - before) < 0.5 * np.linalg.norm(before)


def test_keep_leaves_classes_alone_of_which_a_layer_does_not_match() -> None:
    model = mlp()
    (report,) = Pipeline.parse("prune-structured{keep=0.5 match=up}").run(
        model, PassContext(calibration=data(model))
    )
    assert not report.changed
    assert "'down' has these units too" in report.skipped[0].reason
    both = Pipeline.parse('prune-structured{keep=0.5 match="re:^(?:up|down)$"}')
    assert both.run(model, PassContext(calibration=data(model)))[0].changed
