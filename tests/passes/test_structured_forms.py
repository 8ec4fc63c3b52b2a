"""Graphs that structured matrices become: grids of blocks, shared bases, Kronecker products, block diagonals."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault


def build(body: str, given: str, opset: int = 17, **weights: np.ndarray) -> Model:
    text = f"g (float[{given}] x) => (float[{', '.join('abcd'[: given.count(',') + 1])}] y) {{ {body} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def factorised(model: Model, x: np.ndarray, spec: str):
    source = Calibration.from_batches([{"x": x}], model, threads=1)
    name, _, options = spec.partition(" ")
    spec = f"{name}{{min-elements=1 keep-slower=true bias=false {options}}}"
    return Pipeline.parse(spec).run(model, PassContext(calibration=source, threads=1))[0]


PRODUCTS = [
    ("[s] y = MatMul(x, w)", "N,24", (24, 40)),
    ("[s] h = MatMul(x, w) y = Add(h, b)", "N,T,24", (24, 40)),
    ("[s] y = MatMul(x, w)", "N,2,T,24", (24, 40)),
    ("[s] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)", "N,24", (40, 24)),
    ("[s] y = MatMul(x, w)", "N,23", (23, 37)),
]
SPECS = [
    "factor-btt multiple=1", "factor-btt multiple=2 across=2 down=2", "factor-btt multiple=1 across=5 down=3",
    "factor-monarch", "factor-monarch param-ratio=0.99", "factor-blast multiple=1", "factor-blast blocks=2",
    "factor-blockdiag-lowrank multiple=1 blocks=4", "factor-blockdiag-lowrank multiple=2 blocks=2",
    "factor-kronecker", "factor-kronecker param-ratio=0.2",
]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "given", "shape", "spec"),
    # blocks of the two forms in "bl" divide both sides, which are primes in one case
    [(*item, spec) for item in PRODUCTS for spec in SPECS if item[2] != (23, 37) or "bl" not in spec],
)
def test_the_chain_computes_the_weight_that_was_reported(body, given, shape, spec):
    rng = np.random.default_rng(len(body))
    bias = rng.standard_normal(40).astype(np.float32)
    model = build(body, given, w=rng.standard_normal(shape).astype(np.float32), b=bias)
    axes = [int(axis) if axis.isdigit() else 5 for axis in given.split(",")]
    x = rng.standard_normal([64, *axes[1:]]).astype(np.float32)
    whole = model.copy()
    (change,) = factorised(model, x, spec).changed
    assert graph_fault(model) is None
    constants = [value.const_value for value in model.onnx.graph.initializers.values()]
    stored = sum(
        tensor.numpy().size for tensor in constants if tensor.dtype.name == "FLOAT" and tensor.name != "b"
    )
    assert stored - (1 if "alpha" in body else 0) - (40 if "beta" in body else 0) == pytest.approx(
        change.numbers["parameters"] * math.prod(shape)
    )
    ratio = 0.99 if "0.99" in spec else 0.7
    assert change.numbers["parameters"] <= ratio
    # what it does to unit vectors is the weight, as far from the old one as was reported
    unit = np.eye(axes[-1], dtype=np.float32).reshape(axes[-1], *[1] * (len(axes) - 2), axes[-1])
    unit = np.repeat(unit, 2, 1) if len(axes) == 4 else unit
    before, now = (
        [open_session(part).run({"x": given})["y"] for given in (unit, 0 * unit)] for part in (whole, model)
    )
    assert now[0].shape == before[0].shape
    np.testing.assert_allclose(now[1], before[1], atol=1e-5)
    lost, old = now[0] - before[0], before[0] - before[1]
    assert np.linalg.norm(lost) / np.linalg.norm(old) == pytest.approx(
        change.numbers["relative_error"], rel=1e-3
    )


@pytest.mark.parametrize("opset", [9, 12, 13])
@pytest.mark.parametrize("spec", ["factor-btt multiple=1 down=2", "factor-blockdiag-lowrank multiple=1"])
def test_parts_are_cut_in_every_opset(spec, opset):
    rng = np.random.default_rng(opset)
    weight = rng.standard_normal((24, 40)).astype(np.float32)
    model = build("[s] y = MatMul(x, w)", "N,T,24", opset, w=weight)
    x = rng.standard_normal((8, 9, 24)).astype(np.float32)
    (change,) = factorised(model, x, spec).changed
    assert graph_fault(model) is None
    y, dense = open_session(model).run({"x": x})["y"], x @ weight
    error = np.linalg.norm(y - dense) / np.linalg.norm(dense)
    assert error == pytest.approx(math.sqrt(change.numbers["output_error"]), rel=0.05)


def test_one_panel_is_reduced_rank_regression_and_four_beat_it_on_wide_weights():
    rng = np.random.default_rng(8)
    x = (rng.standard_normal((600, 64)) @ rng.standard_normal((64, 64))).astype(np.float32)
    weight = np.concatenate(
        [rng.standard_normal((16, rank)) @ rng.standard_normal((rank, 16)) for rank in (1, 1, 2, 2)], axis=1
    )
    errors = []
    for spec in ("factor-rrr multiple=1", "factor-btt multiple=1 across=1", "factor-btt multiple=1"):
        model = build("[s] y = MatMul(x, w)", "N,64", w=weight.T.astype(np.float32))
        (change,) = factorised(model, x, f"{spec} param-ratio=0.3").changed
        errors.append(change.numbers["output_error"])
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    assert errors[2] < 1e-6 < errors[0]


@pytest.mark.parametrize(
    ("body", "given", "shape", "spec", "reason"),
    [
        ("[s] y = Conv(x, w)", "N,24,9", (8, 24, 1), "factor-btt", "it is a convolution: this form is for products"),
        ("[s] y = MatMul(x, w)", "24", (24, 40), "factor-btt", "its input is one vector"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 4), "factor-btt across=50",
         "4 x 24 weights do not fill a grid of 1 x 50 blocks"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 4), "factor-btt multiple=8 param-ratio=0.1",
         "9 numbers do not hold 1 x 4 blocks of rank 8"),
        ("[s] y = MatMul(x, w)", "N,23", (23, 4), "factor-blast", "4 x 23 weights cannot be cut into 4 x 4 blocks"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 4), "factor-blast param-ratio=0.2",
         "19 numbers do not hold 4 x 4 blocks of shared rank 8 of 4 x 24 weights"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 5), "factor-blockdiag-lowrank",
         "5 x 24 weights cannot be cut into 8 blocks on the diagonal"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 8), "factor-blockdiag-lowrank param-ratio=0.2",
         "38 numbers do not hold 8 blocks and factors of rank 8 of 8 x 24 weights"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 4), "factor-kronecker param-ratio=0.1",
         "9 numbers do not hold a sum of Kronecker products of 4 x 24 weights"),
        ("[s] y = MatMul(x, w)", "N,24", (24, 4), "factor-monarch param-ratio=0.1",
         "9 numbers do not hold blocks of rank 1 of 4 x 24 weights"),
    ],
)  # fmt: skip
def test_refusals_have_a_reason(body, given, shape, spec, reason):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = build(body, given, w=weight) if given != "24" else vector_model(weight)
    x = np.ones([int(axis) if axis.isdigit() else 5 for axis in given.split(",")], np.float32)
    assert [item.reason for item in factorised(model, x, spec).skipped] == [reason]


def vector_model(weight: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[24] x) => (float[40] y) { [s] y = MatMul(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return Model.from_proto(proto)


@pytest.mark.parametrize(
    "spec",
    [
        "btt{across=-1}", "btt{down=0}", "btt{sweeps=-1}", "monarch{param-ratio=0}", "blast{blocks=0}",
        "blast{sweeps=-1}", "blockdiag-lowrank{blocks=1}", "blockdiag-lowrank{sweeps=0}", "kronecker{sweeps=-1}",
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused(spec):
    with pytest.raises(SpecError, match="must be"):
        Pipeline.parse(f"factor-{spec}")
