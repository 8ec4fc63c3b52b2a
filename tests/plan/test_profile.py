"""What is measured for a cost table: which products, in which forms, once."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from sparsecc.errors import MeasurementError
from sparsecc.ir import Model
from sparsecc.plan import profile as measuring
from sparsecc.plan import timing
from sparsecc.plan.cost_model import CostModel
from sparsecc.plan.costs import CostTable, machine_facts
from sparsecc.plan.workload import ProfileKey, Workload, workload_of


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SITE_SECONDS", 0.0)


def small_model() -> Model:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[1,16,10,10] x) => (float[1,24] y, float[1,64,8,8] d) {
            c = Conv<strides=[1,1]>(x, w0) r = Relu(c)
            d = Conv<group=64, pads=[1,1,1,1]>(r, w1)
            m = GlobalAveragePool(r) f = Flatten(m)
            y = Gemm<transB=1>(f, w2, b2)
        }"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w0", (64, 16, 3, 3)), ("w1", (64, 1, 3, 3)), ("w2", (24, 64)), ("b2", (24,))):
        array = rng.standard_normal(shape, dtype=np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def test_products_of_a_model() -> None:
    inputs = {"x": np.ones((1, 16, 10, 10), np.float32)}
    found = measuring.products_of(small_model(), inputs)
    assert [str(product.work) for product in found] == [
        "Conv 64x64x144 k3x3 s1x1 g1 act=Relu",
        "Conv 64x64x9 k3x3 s1x1 g64",
        "Gemm 1x24x64",
    ]
    assert [product.work.kind for product in found] == ["conv", "depthwise", "linear"]
    assert [product.work.inputs for product in found] == [64 * 16, 64 * 64, 64]
    keys = measuring.planned(found, 1, 0, library=True)
    assert {key.series for key in keys if key.work.kind == "depthwise"} == {"static dense"}
    assert len(set(map(str, keys))) == len(keys)
    assert measuring.planned([*found, *found], 1, 0, library=True) == keys
    assert not any(key.series.startswith("pattern") for key in measuring.planned(found, 1, 0, library=False))


def test_sizes_of_convolutions_are_those_of_onnx() -> None:
    for size, stride, pad, dilation in itertools.product((7, 8, 9), (1, 2, 3), (0, 1), (1, 2)):
        proto = onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["": 17]> g (float[2,3,{size},{size}] x) => (float[A,B,C,D] y) {{
            y = Conv<strides=[{stride},1], pads=[{pad},0,1,{pad}], dilations=[{dilation},1]>(x, w) }}"""
        )
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 3, 3, 2), np.float32), "w"))
        y = ReferenceEvaluator(proto).run(None, {"x": np.ones((2, 3, size, size), np.float32)})[0]
        (site,) = Model.from_proto(proto).sites()
        work = workload_of(site, (2, 3, size, size))
        assert (work.rows * work.n, work.k) == (y.size, 18)
    with pytest.raises(MeasurementError, match="not known"):
        workload_of(site, (2, 3))


def test_every_form_is_measured_once_and_kept(tmp_path: Path) -> None:
    linear, conv = (
        Workload("MatMul", 4, 32, 64),
        Workload("Conv", 16, 16, 72, (3, 3), (2, 2), activation="Relu"),
    )
    products = [
        measuring.Product(linear, lambda: measuring._linear_model(linear), 4 * 32 * 64 * 2),
        measuring.Product(conv, lambda: measuring._conv_model(conv, 4), 1),
    ]
    assert [product.copies for product in products] == [2, 1]
    wanted = {"static dense", "low-rank", "pattern 16x1", "pattern 2:4"}
    keys = [key for key in measuring.planned(products, 1, 0, library=True) if key.series in wanted]
    keys = [key for key in keys if key.density in (1.0, 0.5) or key.series == "low-rank"]
    table = CostTable(tmp_path / "cpu.json", machine_facts())
    assert measuring.profile(table, products, keys, seconds=0) == (0, [])
    told: list[tuple[int, int]] = []
    done, notes = measuring.profile(table, products, keys, progress=lambda _, at, of: told.append((at, of)))
    assert (done, notes) == (len(keys), [])
    assert told == [(at, len(keys)) for at in range(len(keys) + 1)]

    def fail() -> Model:
        raise AssertionError("measured again")

    again = CostTable(tmp_path / "cpu.json", machine_facts())
    others = [measuring.Product(product.work, fail, product.bytes) for product in products]
    assert measuring.profile(again, others, keys) == (len(keys), [])
    model = CostModel(again)
    assert set(model.forms["linear"]) == {
        "dense", "low-rank", "static int8 dense", "int8 dense", "16x1", "fp16 16x1", "int8 16x1", "2:4", "fp16 2:4",
        "int8 2:4",
    }  # fmt: skip
    assert set(model.forms["conv"]) == {
        "dense", "low-rank", "static int8 dense", "16x1", "fp16 16x1", "2:4", "fp16 2:4",
    }  # fmt: skip


def test_what_cannot_be_measured_is_told_and_the_rest_goes_on() -> None:
    work = Workload("MatMul", 4, 32, 64)
    product = measuring.Product(work, lambda: measuring._linear_model(work), 1)
    wrong = ProfileKey(work, "low-rank", 0.001, 1, 1, 0)  # no rank is that small
    right = ProfileKey(work, "static dense", 1.0, 1, 1, 0)
    done, (note,) = measuring.profile(CostTable(None, {}), [product], [wrong, right])
    assert done == 1
    assert note.startswith(str(wrong))


def test_general_products_are_made_as_they_say() -> None:
    products = measuring.generic_products()
    assert {product.work.kind for product in products} == {"linear", "pointwise", "conv", "depthwise"}
    for product in products:
        model = product.model()
        (site,) = model.sites()
        (spec,) = model.input_specs()
        shape = tuple(int(dim) for dim in spec.shape or ())
        assert measuring.workload_of_site(model, site, shape) == product.work
    assert measuring.expected_seconds(measuring.planned(products, 1, 0, library=True)) < 1800
