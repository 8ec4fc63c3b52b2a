"""Odd layers and odd inputs, for every pruning method and kind of pattern: counts, finite outputs, errors, reasons."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration
from sparsecc.ir import Model
from sparsecc.passes.prune.scores import is_pruned
from sparsecc.passes.prune.selection import Selection
from sparsecc.pm import PassContext, Pipeline
from sparsecc.pm.checks import graph_fault, signature
from sparsecc.sparse import Pattern
from sparsecc.verify import session

METHODS = ("magnitude", "wanda", "dass", "wanda-ols", "sparsegpt", "alps", "obc")
PATTERNS = {"unstructured": "sparsity=0.5", "2:4": "pattern=2:4", "3x2": "pattern=3x2 sparsity=0.5"}
RNG = np.random.default_rng(11)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def matmul(columns: int = 12, rows: int = 9) -> Model:
    return build(
        f"g (float[B,{columns}] x) => (float[B,{rows}] y) {{ [fc] y = MatMul(x, w) }}",
        w=normal(columns, rows),
    )


def mixed(samples: int, columns: int = 12) -> np.ndarray:
    return normal(samples, columns) @ normal(columns, columns)


def dead_input() -> tuple[Model, np.ndarray]:
    x = mixed(40)
    x[:, 5] = 0
    return matmul(), x


def duplicate_inputs() -> tuple[Model, np.ndarray]:
    x = mixed(40)
    x[:, 7] = x[:, 2]
    return matmul(), x


def fewer_samples_than_inputs() -> tuple[Model, np.ndarray]:
    return matmul(), mixed(5)


def all_inputs_zero() -> tuple[Model, np.ndarray]:
    return matmul(), np.zeros((8, 12), np.float32)


def columns_no_multiple_of_the_group() -> tuple[Model, np.ndarray]:
    return matmul(11), mixed(40, 11)


def one_output() -> tuple[Model, np.ndarray]:
    return matmul(rows=1), mixed(40)


def an_empty_row() -> tuple[Model, np.ndarray]:
    model = matmul()
    (site,) = model.sites()
    weight = site.numpy().copy()
    weight[4] = 0
    site.replace(weight)
    return model, mixed(40)


def grouped_convolution() -> tuple[Model, np.ndarray]:
    text = "g (float[B,8,5,5] x) => (float[B,6,5,5] y) { [fc] y = Conv<group=2, pads=[1,1,1,1]>(x, w) }"
    return build(text, w=normal(6, 4, 3, 3)), normal(6, 8, 5, 5)


def convolution_1x1() -> tuple[Model, np.ndarray]:
    text = "g (float[B,12,4,4] x) => (float[B,9,2,2] y) { [fc] y = Conv<strides=[2,2]>(x, w) }"
    return build(text, w=normal(9, 12, 1, 1)), normal(8, 12, 4, 4)


def gemm_with_factors() -> tuple[Model, np.ndarray]:
    text = "g (float[B,12] x) => (float[B,9] y) { [fc] y = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b) }"
    return build(text, w=normal(9, 12), b=normal(9)), mixed(40)


def gemm_of_a_transposed_input() -> tuple[Model, np.ndarray]:
    text = "g (float[12,B] x) => (float[B,9] y) { [fc] y = Gemm<transA=1>(x, w) }"
    return build(text, w=normal(12, 9)), np.ascontiguousarray(mixed(40).T)


def three_axes() -> tuple[Model, np.ndarray]:
    text = "g (float[B,T,12] x) => (float[B,T,9] y) { [fc] y = MatMul(x, w) }"
    return build(text, w=normal(12, 9)), mixed(40).reshape(8, 5, 12)


def weight_on_the_left() -> tuple[Model, np.ndarray]:
    text = "g (float[12,B] x) => (float[9,B] y) { [fc] y = MatMul(w, x) }"
    return build(text, w=normal(9, 12)), np.ascontiguousarray(mixed(40).T)


def shared_weight() -> tuple[Model, np.ndarray]:
    text = (
        "g (float[B,12] x) => (float[B,12] y) { [fc] h = MatMul(x, w) r = Relu(h) [again] y = MatMul(r, w) }"
    )
    return build(text, w=normal(12, 12)), mixed(40)


CASES = [
    *(dead_input, duplicate_inputs, fewer_samples_than_inputs, all_inputs_zero),
    *(columns_no_multiple_of_the_group, one_output, an_empty_row, grouped_convolution, convolution_1x1),
    *(gemm_with_factors, gemm_of_a_transposed_input, three_axes, weight_on_the_left, shared_weight),
]


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    return np.asarray(session(model, threads=1).run({"x": x})["y"], np.float64)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_method(case: Callable[[], tuple[Model, np.ndarray]], pattern: str) -> None:
    dense, x = case()
    source = Calibration.from_batches([{"x": x}], dense, threads=1)
    wanted, errors = outputs(dense, x), {}
    for method in METHODS:
        model = dense.copy()
        fits = method in ("wanda-ols", "sparsegpt", "alps", "obc")
        selection = Selection(
            Pattern.parse(pattern),
            None if pattern == "2:4" else 0.5,
            "layer" if method == "magnitude" else "row",
        )
        options = f"{PATTERNS[pattern]} min-elements=1 min-reduction=1" + (" damping=1e-6" if fits else "")
        (report,) = Pipeline.parse(f"prune-{method}{{{options}}}").run(
            model, PassContext(calibration=source, threads=1)
        )
        assert graph_fault(model) is None
        assert signature(model) == signature(dense)
        named = {item.site for item in (*report.changed, *report.skipped)}
        assert named == {site.name for site in dense.sites()} | {
            name for name, _ in dense.unsupported_sites()
        }
        for site in model.sites():
            if any(change.site == site.name for change in report.changed):
                assert is_pruned(site.numpy(), selection, site.groups), method
            else:
                np.testing.assert_array_equal(site.numpy(), dense.sites(site.name)[0].numpy())
        errors[method] = float(np.square(outputs(model, x) - wanted).sum())
        assert np.isfinite(errors[method])
        # What is fitted does not end up further away than nothing at all.
        if fits and case is not shared_weight:
            assert errors[method] <= np.square(wanted).sum() * (1 + 1e-6)
    if case is not shared_weight:  # the same mask, once left alone and once fitted
        assert errors["wanda-ols"] <= errors["wanda"] * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (gemm_of_a_transposed_input, "transA=1 reads its input transposed"),
        (weight_on_the_left, "left operand"),
    ],
)
def test_forms_that_are_no_sites_have_a_reason(
    case: Callable[[], tuple[Model, np.ndarray]], reason: str
) -> None:
    model, _ = case()
    (report,) = Pipeline.parse("prune-magnitude{min-elements=1}").run(model, PassContext())
    assert [skip.site for skip in report.skipped] == ["fc"]
    assert reason in report.skipped[0].reason


def test_one_output_in_blocks_of_rows_is_refused_with_the_numbers() -> None:
    model, x = one_output()
    source = Calibration.from_batches([{"x": x}], model, threads=1)
    (report,) = Pipeline.parse("prune-obc{pattern=3x2 min-elements=1 min-reduction=1}").run(
        model, PassContext(calibration=source)
    )
    assert report.skipped[0].reason == "pattern 3x2 does not fit 1 outputs x 12 inputs"
