"""Regions of quantised convolutions: what becomes of them, what stays, and that the numbers stay the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsecc import emit, verify
from sparsecc.errors import MeasurementError, UsageError
from sparsecc.ir import Model
from sparsecc.ir.packed import packed_sites
from sparsecc.plan.timing import input_shapes_of_sites
from sparsecc.pm import PassContext, PassReport, Pipeline
from sparsecc.sparse import Pattern, keep_mask


class Qdq:
    """Writes a model between QuantizeLinear and DequantizeLinear, tensor by tensor, with random weights."""

    def __init__(self, *shape: int, dtype: Any = np.uint8, opset: int = 17) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
        self.dtype, self.opset = dtype, opset
        self.channels: dict[str, int] = {"x": shape[1]}

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=name, **attributes))
        return output

    def stored(self, x: str, scale: float = 0.04, zero_point: int = 120) -> str:
        """Quantised and read again."""
        zero = zero_point - (128 if self.dtype is np.int8 else 0)
        about = [self.constant(np.float32(scale)), self.constant(np.array(zero, self.dtype))]
        y = self.node("DequantizeLinear", self.node("QuantizeLinear", x, *about), *about)
        self.channels[y] = self.channels.get(x, 0)
        return y

    def conv(
        self, x: str, outputs: int, kernel: int = 3, stride: int = 1, group: int = 1, sparsity: float = 0.7,
        pads: int | None = None, name: str = "", bias: str = "int32", zero: int = 0,
    ) -> str:  # fmt: skip
        shape = (outputs, self.channels[x] // group, kernel, kernel)
        matrix = self.rng.integers(-127, 128, (outputs, int(np.prod(shape[1:]))))
        matrix = matrix * keep_mask(self.rng.random(matrix.shape), Pattern.parse("8x4"), sparsity)
        codes = np.moveaxis(matrix.reshape(outputs, kernel, kernel, -1), -1, 1).astype(np.int8)
        scales = (self.rng.uniform(0.01, 0.03, outputs) / np.sqrt(shape[1] * kernel**2)).astype(np.float32)
        zeros = self.constant(np.full(outputs, zero, np.int8))
        weight = self.node("DequantizeLinear", self.constant(codes), self.constant(scales), zeros, axis=0)
        added = self.rng.standard_normal(outputs).astype(np.float32) * 0.5
        inputs = [x, weight]
        if bias == "int32":
            steps = scales * np.float32(0.04)
            inputs.append(self.node("DequantizeLinear", self.constant(np.rint(added / steps).astype(np.int32)),
                                    self.constant(steps), axis=0))  # fmt: skip
        elif bias == "float":
            inputs.append(self.constant(added))
        pad = kernel // 2 if pads is None else pads
        y = self.node("Conv", *inputs, name=name or f"conv{len(self.nodes)}", strides=[stride] * 2,
                      pads=[pad] * 4, group=group, kernel_shape=[kernel] * 2)  # fmt: skip
        self.channels[y] = outputs
        return y

    def same(self, op: str, *inputs: str, **attributes: Any) -> str:
        y = self.node(op, *inputs, **attributes)
        self.channels[y] = self.channels[inputs[0]]
        return y

    def output(self, x: str) -> None:
        self.outputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, None))

    def model(self) -> Model:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        return Model.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


class FakeCosts:
    """Whole models take a given share of the time; remembers how often it was asked."""

    def __init__(self, relative: float = 0.5) -> None:
        self.relative, self.asked = relative, 0

    def relative_time_of(self, model: Model, candidate: Model) -> float:
        self.asked += 1
        return self.relative


def network(dtype: Any = np.uint8, **options: Any) -> Qdq:
    """A small residual network: stem, pooling, two blocks (one with a shortcut), mean, classifier."""
    g = Qdq(2, 3, 33, 31, dtype=dtype)
    x = g.stored(g.same("Relu", g.conv(g.stored("x"), 16, 7, 2, sparsity=0.0, name="stem")), 0.04, 0)
    x = g.stored(g.same("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]), 0.04, 0)
    for block, outputs in enumerate((16, 24)):
        stride = 1 if block == 0 else 2
        y = g.stored(g.same("Relu", g.conv(x, 9, 1, name=f"{block}.first", bias="float")), 0.03, 0)
        y = g.stored(g.same("Relu", g.conv(y, 12, 3, stride, name=f"{block}.second", bias="none")), 0.03, 0)
        y = g.stored(g.conv(y, outputs, 1, name=f"{block}.third"), 0.05, 100)
        shortcut = x if block == 0 else g.stored(g.conv(x, 24, 1, stride, name="shortcut"), 0.04, 111)
        x = g.stored(g.same("Relu", g.same("Add", y, shortcut)), 0.05, 0)
    mean = g.stored(g.same("GlobalAveragePool", x), 0.03, 0)
    flat = g.node("Flatten", mean)
    g.output(g.node("MatMul", flat, g.constant(g.rng.standard_normal((24, 5)).astype(np.float32))))
    return g


def run(model: Model, pipeline: str = "lower-conv-int8{keep-slower=true}", costs: Any = None) -> PassReport:
    return Pipeline.parse(pipeline).run(model, PassContext(costs=costs))[-1]


def operators(model: Model) -> Counter[str]:
    return Counter(node.op_type for node in model.onnx.graph)


def feeds(model: Model) -> Mapping[str, np.ndarray]:
    return verify.make_inputs(model, None, 0)


def distance(before: Model, after: Model, *, library: bool) -> float:
    """Largest difference of any result, as a share of the largest value."""
    finished = after.copy()
    emit.finalize(finished)
    onnx.checker.check_model(finished.to_proto(), full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    reference = onnxruntime.InferenceSession(before.to_proto().SerializeToString(), options)
    names = [value.name for value in before.onnx.graph.outputs]
    expected = dict(zip(names, reference.run(names, feeds(before)), strict=True))
    results = verify.session(finished, library=library, threads=1).run(feeds(before), names)
    return max(
        float(np.abs(results[name].astype(float) - expected[name]).max() / np.abs(expected[name]).max())
        for name in names
    )


@pytest.mark.parametrize("library", [True, False], ids=["library", "plain"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_a_residual_network_stays_in_bytes(dtype: Any, library: bool) -> None:
    model = network(dtype).model()
    lowered = model.copy()
    report = run(lowered, "lower-conv-int8{keep-slower=true fuse-add=false}")
    found = operators(lowered)
    assert (found["BlockSparseConvQuads"], found["AddQuads"], found["MaxPoolQuads"]) == (8, 2, 1)
    assert (found["GlobalAveragePoolQuads"], found["QuantizeQuads"], found["DequantizeQuads"]) == (1, 1, 1)
    assert found["Conv"] == found["Relu"] == found["Add"] == found["MaxPool"] == 0
    # The tensor that leaves keeps its QuantizeLinear, for what onnxruntime fuses behind it.
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1)
    assert [outcome.site for outcome in report.changed] == [
        "stem", "0.first", "0.second", "0.third", "1.first", "1.second", "1.third", "shortcut",
    ]  # fmt: skip
    assert distance(model, lowered, library=library) < 0.02


def test_additions_are_taken_over() -> None:
    model = network().model()
    lowered = model.copy()
    run(lowered)
    found = operators(lowered)
    assert (found["BlockSparseConvQuads"], found["BlockSparseConvAddQuads"], found["AddQuads"]) == (6, 2, 0)
    assert distance(model, lowered, library=True) < 0.05
    assert distance(model, lowered, library=False) < 0.05
    weights = {site.name: site.tensor for site in packed_sites(lowered)}
    assert list(weights) == [
        "stem",
        "0.first",
        "0.second",
        "0.third",
        "1.first",
        "1.second",
        "1.third",
        "shortcut",
    ]
    assert weights["1.second"].shape == (12, 81)
    assert all(weight.values.dtype == np.int8 for weight in weights.values())


def test_an_addition_is_not_taken_over_where_bytes_are_bounded_or_read_twice() -> None:
    for zero_point, activation, outputs in ((0, "", 0), (255, "", 0), (100, "Relu", 0), (100, "", 1)):
        g = Qdq(1, 8, 9, 9)
        x = g.stored("x")
        y = g.conv(x, 8)
        y = g.stored(g.same(activation, y) if activation else y, 0.04, zero_point)
        g.output(g.stored(g.same("Add", x, y)))
        if outputs:
            g.output(y)
        model = g.model()
        lowered = model.copy()
        run(lowered)
        assert operators(lowered)["AddQuads"] == 1
        assert distance(model, lowered, library=True) < 0.02


def test_clip_groups_strides_and_pads() -> None:
    g = Qdq(2, 12, 11, 10)
    x = g.conv(g.stored("x"), 18, 3, 3, group=3, pads=2)
    bounds = [g.constant(np.float32(bound)) for bound in (-1.03, 1.77)]
    g.output(g.stored(g.same("Clip", x, *bounds)))
    model = g.model()
    lowered = model.copy()
    run(lowered)
    node = next(node for node in lowered.onnx.graph if node.op_type == "BlockSparseConvQuads")
    assert node.inputs[-1].const_value.numpy().tolist() == [120 - 26, 120 + 44]
    assert distance(model, lowered, library=True) < 0.02


def test_results_in_the_middle_are_kept() -> None:
    g = network()
    middle = next(node for node in g.nodes if node.op_type == "MaxPool").output[0]
    g.outputs.insert(0, helper.make_tensor_value_info(g.nodes[-3].output[0], TensorProto.FLOAT, None))
    quantizer = next(node for node in g.nodes if node.op_type == "QuantizeLinear" and node.input[0] == middle)
    g.outputs.append(helper.make_tensor_value_info(quantizer.output[0], TensorProto.UINT8, None))
    model = g.model()
    lowered = model.copy()
    run(lowered)
    assert [value.name for value in lowered.onnx.graph.outputs] == [
        value.name for value in model.onnx.graph.outputs
    ]
    assert operators(lowered)["DequantizeQuads"] == 2
    assert distance(model, lowered, library=True) < 0.05


def test_what_is_no_step_is_left_with_a_reason() -> None:
    def reason(change: Any, opset: int = 17) -> str:
        g = Qdq(1, 8, 9, 9, opset=opset)
        change(g)
        report = run(g.model())
        assert not report.changed
        return " ".join([outcome.reason for outcome in report.skipped] + list(report.notes))

    assert "its result is not quantised" in reason(lambda g: g.output(g.conv(g.stored("x"), 8)))
    assert "not stored as bytes" in reason(lambda g: g.output(g.stored(g.conv("x", 8))))
    assert "does not fit int8" in reason(lambda g: g.output(g.stored(g.conv(g.stored("x"), 8, zero=100))))
    assert "no region" in reason(lambda g: g.output(g.stored(g.same("Relu", g.stored("x")))))

    def float_weight(g: Qdq) -> None:
        w = g.constant(np.ones((8, 8, 1, 1), np.float32))
        g.output(g.stored(g.node("Conv", g.stored("x"), w, name="c")))

    assert "its weight is not quantised" in reason(float_weight)

    def two_scales(g: Qdq) -> None:
        bytes_ = g.node("QuantizeLinear", "x", g.constant(np.float32(0.1)), g.constant(np.uint8(3)))
        x = g.node("DequantizeLinear", bytes_, g.constant(np.float32(0.2)), g.constant(np.uint8(3)))
        g.channels[x] = 8
        g.output(g.stored(g.conv(x, 8)))

    assert "stored with one scale and read with another" in reason(two_scales)


def test_sums_of_different_shapes_and_pools_that_rescale_stay() -> None:
    g = Qdq(1, 8, 9, 9)
    x = g.stored(g.conv(g.stored("x"), 8))
    mean = g.stored(g.same("GlobalAveragePool", x))
    wide = g.stored(g.same("Add", x, mean))
    g.output(g.stored(g.same("MaxPool", wide, kernel_shape=[2, 2]), 0.07, 100))
    model = g.model()
    lowered = model.copy()
    run(lowered)
    found = operators(lowered)
    assert (found["Add"], found["MaxPool"], found["GlobalAveragePoolQuads"]) == (1, 1, 1)
    assert distance(model, lowered, library=True) < 0.02


def test_regions_are_measured_and_left_where_they_do_not_pay() -> None:
    model = network().model()
    before = model.fingerprint()
    costs = FakeCosts(0.99)
    report = run(model, "lower-conv-int8", costs)
    assert not report.changed
    assert "does not make the whole model faster" in report.skipped[-1].reason
    assert costs.asked >= 1
    assert model.fingerprint() == before
    report = run(model, "lower-conv-int8", FakeCosts(0.5))
    assert "1 of 1 regions rewritten: 2.00x" in report.notes[0]
    assert operators(model)["Conv"] == 0
    with pytest.raises(UsageError, match="keep-slower"):
        run(network().model(), "lower-conv-int8")


def test_regions_that_cannot_be_timed_stay_as_they_are() -> None:
    class Elsewhere:
        def relative_time_of(self, model: Model, candidate: Model) -> float:
            raise MeasurementError("for another machine")

    model = network().model()
    before = model.fingerprint()
    report = run(model, "lower-conv-int8", Elsewhere())
    assert {skip.reason for skip in report.skipped[-2:]} == {"for another machine"}
    assert model.fingerprint() == before


def test_dense_regions_and_unmatched_ones_are_not_tried() -> None:
    g = Qdq(1, 8, 9, 9)
    g.output(g.stored(g.conv(g.stored("x"), 8, sparsity=0.0, name="dense")))
    costs = FakeCosts()
    report = run(g.model(), "lower-conv-int8", costs)
    assert "no convolution of its region has zeros enough" in report.skipped[0].reason
    assert not run(network().model(), "lower-conv-int8{match=other*}", costs).changed
    assert costs.asked == 0
    old = Qdq(1, 8, 9, 9, opset=12)
    old.output(old.stored(old.same("Relu", old.stored("x"))))
    assert "opset 12 is below 13" in run(old.model()).notes[0]


def test_depthwise_convolutions_keep_a_region_together() -> None:
    g = Qdq(1, 12, 13, 9)
    x = g.stored(g.conv(g.stored("x"), 10, 1))
    x = g.stored(g.conv(x, 10, 3, 2, group=10, sparsity=0.0))
    g.output(g.stored(g.conv(x, 12, 1)))
    model = g.model()
    lowered = model.copy()
    run(lowered)
    assert operators(lowered)["BlockSparseConvQuads"] == 3
    assert operators(lowered)["QuantizeQuads"] == 1
    assert distance(model, lowered, library=True) < 0.02


def test_two_regions_with_something_else_between() -> None:
    g = Qdq(1, 8, 9, 9)
    x = g.stored(g.conv(g.stored("x"), 8, name="first"))
    x = g.same("Sigmoid", x)
    g.output(g.stored(g.conv(g.stored(x, 0.01, 0), 8, name="second")))
    model = g.model()
    lowered = model.copy()
    run(lowered)
    found = operators(lowered)
    assert (found["QuantizeQuads"], found["DequantizeQuads"], found["Sigmoid"]) == (2, 2, 1)
    assert distance(model, lowered, library=True) < 0.02
    only = model.copy()
    run(only, "lower-conv-int8{keep-slower=true match=second}")
    assert operators(only)["Conv"] == 1
    assert distance(model, only, library=True) < 0.02


def test_other_sites_can_be_timed_beside_a_region() -> None:
    """The model is run without the library then: its operators on quad planes need their bodies."""
    model = network().model()
    run(model)
    shapes = input_shapes_of_sites(model, feeds(model))
    assert list(shapes.values()) == [(2, 24)]


def test_activation_behind_a_pool_is_not_lost() -> None:
    g = Qdq(2, 3, 9, 9)
    x = g.stored(g.conv(g.stored("x"), 8))
    y = g.stored(g.same("Relu", g.same("MaxPool", x, kernel_shape=[2, 2])))
    g.output(g.stored(g.conv(y, 8)))
    before = g.model()
    after = before.copy()
    Pipeline.parse("lower-conv-int8{keep-slower=true}").run(after, PassContext())
    assert "MaxPool" in [node.op_type for node in after.onnx.graph]
    emit.finalize(after)
    inputs = verify.make_inputs(before, None, 0, None)
    assert verify.worst_rel_l2(verify.compare(before, after, inputs, library=(False, True))) < 1e-2


def fire(g: Qdq, x: str, squeeze: int, expand: int, scale: float = 0.05) -> str:
    """As SqueezeNet has it: two convolutions of one tensor, one behind the other."""
    x = g.stored(g.same("Relu", g.conv(x, squeeze, 1)), 0.04, 0)
    parts = [g.stored(g.same("Relu", g.conv(x, expand, kernel)), scale, 0) for kernel in (1, 3)]
    y = g.same("Concat", *parts, axis=1)
    g.channels[y] = 2 * expand
    return g.stored(y, 0.05, 0)


@pytest.mark.parametrize("library", [True, False], ids=["library", "plain"])
def test_concat_and_average_stay_in_bytes(library: bool) -> None:
    g = Qdq(2, 3, 17, 15)
    x = g.stored(g.same("Relu", g.conv(g.stored("x"), 16, 3, 2)), 0.04, 0)
    x = fire(g, fire(g, x, 6, 12), 5, 8, 0.03)
    pads = {"pads": [1, 1, 1, 1], "count_include_pad": 1}
    branches = [
        g.stored(g.conv(x, 8, 1)),
        g.stored(g.same("AveragePool", x, kernel_shape=[3, 3], **pads), 0.03, 0),
        g.stored(g.conv(x, 12, 3)),
        g.stored(g.same("AveragePool", x, kernel_shape=[3, 1], pads=[1, 0, 1, 0], count_include_pad=1)),
        g.stored(g.same("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1]), 0.05, 0),
    ]
    y = g.node("Concat", *branches, axis=-3)
    g.channels[y] = sum(g.channels[branch] for branch in branches)
    y = g.stored(g.same("Relu", y), 0.05, 20)
    g.output(g.stored(g.conv(g.stored(g.same("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2])), 9, 1)))
    model = g.model()
    lowered = model.copy()
    report = run(lowered)
    found = operators(lowered)
    assert (found["ConcatQuads"], found["QuantizeQuads"], found["DequantizeQuads"]) == (2 + 4, 1, 1)
    assert found["BlockSparseConvQuads"] == 10 + 3
    assert found["Concat"] == found["AveragePool"] == found["MaxPool"] == found["Conv"] == 0
    assert len(report.changed) == 10
    assert distance(model, lowered, library=library) < 0.02


def test_concat_and_averages_that_are_no_steps() -> None:
    """Along pixels, behind an odd number of channels, over fewer pixels at the border; one tensor alone."""
    g = Qdq(1, 8, 8, 8)
    x = g.stored(g.conv(g.stored("x"), 6, 1))
    tall = g.node("Concat", x, x, axis=2)
    g.output(g.stored(tall))
    g.output(g.stored(g.node("Concat", x, x, axis=1)))
    g.output(g.stored(g.node("Concat", x, axis=1)))
    g.output(g.stored(g.same("AveragePool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])))
    g.output(g.stored(g.same("AveragePool", x, kernel_shape=[3, 3], ceil_mode=1, strides=[2, 2])))
    model = g.model()
    lowered = model.copy()
    run(lowered)
    found = operators(lowered)
    assert (found["Concat"], found["AveragePool"], found["ConcatQuads"]) == (3, 2, 0)
    assert distance(model, lowered, library=True) < 0.02


@pytest.mark.parametrize(("height", "width", "steps"), [(9, 10, 1), (11, 13, 1), (9, 8, 0)])
def test_pools_that_round_up(height: int, width: int, steps: int) -> None:
    """A window that would begin behind the input is where releases of onnxruntime differ: nothing is assumed."""
    g = Qdq(2, 8, height, width)
    x = g.stored(g.conv(g.stored("x"), 8, 1), 0.04, 0)
    kernel = [3, 2] if steps else [1, 1]
    pads = [0, 1, 1, 0] if steps else [0, 0, 0, 0]
    pool = g.same("MaxPool", x, kernel_shape=kernel, strides=[2, 3], pads=pads, ceil_mode=1)
    g.output(g.stored(pool, 0.04, 0))
    model = g.model()
    lowered = model.copy()
    run(lowered)
    assert operators(lowered)["MaxPoolQuads"] == steps
    assert distance(model, lowered, library=True) < 0.02


def test_a_region_without_convolutions_is_left_alone() -> None:
    g = Qdq(1, 8, 8, 8)
    g.output(g.stored(g.same("AveragePool", g.stored("x"), kernel_shape=[2, 2])))
    model = g.model()
    assert not run(model).changed
    assert operators(model)["AveragePool"] == 1


@pytest.mark.parametrize("step", [0.04, 0.07])
def test_one_tensor_may_be_quantised_twice(step: float) -> None:
    """As quantisers do that give every reader a pair of its own: nodes still have names of their own."""
    g = Qdq(2, 4, 7, 7)
    middle = g.conv(g.stored("x"), 8)
    for scale in (0.04, step):
        g.output(g.stored(g.conv(g.stored(middle, scale), 8, 1), 0.05))
    model = g.model()
    lowered = model.copy()
    run(lowered)
    assert operators(lowered)["QuantizeQuads"] == 2
    assert distance(model, lowered, library=True) < 0.02
