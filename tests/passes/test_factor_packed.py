"""Packed weights: the mathematics of planes and seeds, the graphs that unpack them, and models of several sizes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.emit import finalize
from sparsecc.errors import ModelError, SpecError
from sparsecc.ir import Model, Planes
from sparsecc.ir.planes import plane_name
from sparsecc.ir.write import written_nbytes
from sparsecc.passes.factor import seeds, signs
from sparsecc.passes.factor.bitstack import stack_planes
from sparsecc.passes.hybrid.lowrank import Factors
from sparsecc.passes.prune.gram import damped, quadratic_error
from sparsecc.passes.prune.selection import Selection
from sparsecc.passes.tidy.graph import add_constant
from sparsecc.pm import PassContext, Pipeline, RewriteCost
from sparsecc.pm.checks import graph_fault
from sparsecc.sparse import Pattern

RNG = np.random.default_rng(11)
SHAPES = [(12, 16), (7, 13), (1, 9), (9, 1), (20, 5)]


def problem(rows: int, columns: int, samples: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, damped Gram matrix and inputs, badly scaled; one input is always zero, two are equal."""
    x = RNG.standard_normal((samples, columns)) @ RNG.standard_normal((columns, columns))
    x *= np.exp(RNG.standard_normal(columns))
    if columns > 3:
        x[:, 1], x[:, 2] = 0.0, x[:, 3]
    return RNG.standard_normal((rows, columns)), damped(x.T @ x / samples, 0.01)[0], x


def keep(share: float) -> Selection:
    return Selection(Pattern.parse("unstructured"), 1 - share, "row")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_the_alternation_of_a_sparse_part_and_a_plane_never_rises(shape, rank):
    weight, gram, _ = problem(*shape)
    energy = np.diag(gram).copy()
    rank = min(rank, *shape)
    found = signs.decompose(weight, energy, rank, keep(0.3).mask, 20, np.random.default_rng(0))
    assert (np.diff(found.objectives) <= 1e-9 * np.square(weight).sum()).all()
    rest = (weight - found.dense()) * np.sqrt(energy)
    assert np.square(rest).sum() == pytest.approx(found.objectives[-1], rel=1e-9, abs=1e-12)
    assert (found.sparse[~found.mask] == 0).all()
    assert (found.mask.sum(1) == keep(0.3).mask(np.square(weight)).sum(1)).all()
    fitted = signs.refit(found, weight, gram, 4, 3)
    assert (np.diff(fitted.objectives) <= 1e-9 * quadratic_error(weight, gram)).all()
    assert quadratic_error(weight - fitted.dense(), gram) == pytest.approx(
        fitted.objectives[-1], rel=1e-6, abs=1e-9
    )
    np.testing.assert_array_equal(fitted.mask, found.mask)
    np.testing.assert_array_equal(fitted.plane.positive, found.plane.positive)


def test_a_long_fit_of_a_factor_is_the_least_squares_solution():
    weight, gram, _ = problem(6, 8)
    start = signs.fit_plane(weight, np.sqrt(np.diag(gram)), 2, np.random.default_rng(1))
    fitted = signs.refit_plane(start, weight, gram, 60)
    # brute force: the right factor for the left one that was found, as one linear system in root(gram)
    left, bits, root = fitted.factors.left, fitted.signs(), np.linalg.cholesky(gram)
    columns = []
    for r in range(2):
        for k in range(8):
            unit = np.zeros((2, 8))
            unit[r, k] = 1
            columns.append(((bits * (left @ unit)) @ root).ravel())
    design = np.array(columns).T
    best = np.linalg.lstsq(design, (weight @ root).ravel(), rcond=None)[0]
    least = np.square(design @ best - (weight @ root).ravel()).sum()
    assert quadratic_error(weight - fitted.dense(), gram) == pytest.approx(least, rel=1e-6)


def test_an_input_that_is_always_zero_gets_no_weight_from_slab():
    weight = RNG.standard_normal((5, 8))
    energy = np.array([1, 0, 2, 1, 3, 1, 0, 1.0])
    found = signs.decompose(weight, energy, 1, keep(0.4).mask, 10, np.random.default_rng(0))
    assert np.isfinite(found.dense()).all()
    assert (found.dense()[:, energy == 0] == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [0, 2])
def test_every_plane_lowers_the_error_of_the_layer(shape, steps):
    weight, gram, _ = problem(*shape)
    planes, errors = stack_planes(weight, gram, 1, 8, steps, np.random.default_rng(0))
    assert len(errors) == len(planes) + 1
    assert (np.diff(errors) < 0).all()
    rest = weight
    for plane, error in zip(planes, errors[1:], strict=True):
        rest = rest - plane.dense()
        assert quadratic_error(rest, gram) == pytest.approx(error, rel=1e-9, abs=1e-9 * errors[0])
        for part in (plane.factors.left, plane.factors.right):
            np.testing.assert_array_equal(part, part.astype(np.float16))


def test_unfitted_planes_strictly_lower_the_scaled_norm_of_what_is_left():
    weight, gram, _ = problem(11, 17)
    scale = np.sqrt(np.diag(gram))
    norms = [np.linalg.norm(weight * scale)]
    for _ in range(6):
        weight = weight - signs.fit_plane(weight, scale, 2, np.random.default_rng(0)).dense()
        norms.append(np.linalg.norm(weight * scale))
    assert (np.diff(norms) < 0).all()


def test_signs_of_zeros_are_positive_and_a_zero_weight_makes_one_empty_plane():
    planes, errors = stack_planes(np.zeros((4, 6)), np.eye(6), 1, 3, 2, np.random.default_rng(0))
    assert len(planes) == 1
    assert errors == (0.0, 0.0)
    assert planes[0].positive.all()
    assert (planes[0].dense() == 0).all()


@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_the_register_visits_every_state_once(bits):
    assert sorted(seeds.orbit(bits)) == list(range(1, 1 << bits))


def test_states_are_the_same_on_every_machine():
    assert seeds.orbit(16)[:6].tolist() == [1, 32768, 16384, 8192, 4096, 34816]
    form = seeds.SeedFormat(8, 3, 16)
    code = seeds.SeedCode(np.array([[1, 2, 3, 4, 2, 0, 8, 15]], np.uint8), 0.25)
    seed = 1 + 2 * 16 + 3 * 256 + 4 * 4096
    basis = [
        [(int(seeds.orbit(16)[(seed + 5 * (3 * c + p)) % 65535]) - 32768) / 32767 for p in range(3)]
        for c in range(8)
    ]
    expected = np.array(basis) @ (np.array([-8, 0, 7]) * 0.25 / 4)
    np.testing.assert_allclose(seeds.decode(code, form)[0], expected, rtol=1e-5)


def test_more_seeds_never_raise_the_distance_and_codes_fit_their_nibbles():
    form = seeds.SeedFormat(8, 3, 12)
    blocks = RNG.standard_normal((50, 8)) * np.exp(2 * RNG.standard_normal((50, 1)))
    blocks[7] = 0
    errors = []
    for count in (512, 1024, 2048, 4095):
        code = seeds.encode(blocks, form, count)
        assert code.nibbles.shape == (50, form.nibbles)
        assert code.nibbles.max() < 16
        errors.append(np.square(blocks - seeds.decode(code, form)).sum(1))
    assert (np.diff(errors, axis=0) <= 1e-12).all()
    assert errors[-1][7] == 0
    assert errors[-1].sum() < 0.05 * np.square(blocks).sum()


def test_the_chosen_seed_is_the_best_of_all_for_few_seeds():
    form = seeds.SeedFormat(4, 2, 8)
    blocks = RNG.standard_normal((20, 4))
    code = seeds.encode(blocks, form)
    chosen = code.nibbles[:, 0] + 16 * code.nibbles[:, 1].astype(int)
    basis = seeds.table(form).reshape(-1, 4, 2).astype(np.float64)
    left = [
        [np.square(block - u @ np.linalg.lstsq(u, block, rcond=None)[0]).sum() for u in basis]
        for block in blocks
    ]
    for row, seed in zip(left, chosen, strict=True):
        assert row[seed] <= min(row) + 1e-5


def test_bits_are_the_formulas_of_the_papers():
    assert seeds.SeedFormat(8, 3, 16).bits_per_weight == 4
    assert seeds.SeedFormat(12, 4, 16).bits_per_weight == 3


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(body: str, given: str, result: str, opset: int = 17, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]>\ng (float[{given}] x) => (float[{result}] y) {{ {body} }}'
    )
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


FORMS = [
    ("[s] y = MatMul(x, w)", {"w": (24, 40)}, ("N", 3, 24), 3),
    ("[s] y = MatMul(x, w)", {"w": (13, 7)}, ("N", 13), 2),
    ("[s] h = MatMul(x, w) y = Add(h, b)", {"w": (21, 1), "b": (1,)}, ("N", 21), 2),
    (
        "[s] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)",
        {"w": (19, 24), "b": (19,)},
        ("N", 24),
        2,
    ),
    ("[s] y = Conv <pads = [1, 0, 1, 0]> (x, w, b)", {"w": (5, 3, 3, 3), "b": (5,)}, ("N", 3, 6, 7), 4),
    ("[s] y = Conv <strides = [2]> (x, w)", {"w": (4, 6, 3)}, ("N", 6, 9), 3),
]
SPECS = ["factor-slab{param-ratio=0.9}", "factor-bitstack{param-ratio=0.9}", "factor-seedlm", "factor-seedlm{bits=3}",
         "factor-seedlm{bits=4 seed-bits=12}"]  # fmt: skip
ALWAYS = "min-elements=1 keep-slower=true"


def spec_with(spec: str, more: str) -> str:
    return f"{spec[:-1]} {more}}}" if spec.endswith("}") else f"{spec}{{{more}}}"


def context(model: Model, x: np.ndarray) -> PassContext:
    parts = [{"x": part} for part in np.array_split(x, 2)]
    return PassContext(calibration=Calibration.from_batches(parts, model, threads=1), threads=1)


def outputs(model: Model, x: np.ndarray) -> np.ndarray:
    return open_session(model).run({"x": x})["y"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("body", "shapes", "given", "rank"), FORMS)
def test_the_unpacked_weight_is_the_one_that_was_fitted(spec, body, shapes, given, rank, monkeypatch):
    from sparsecc.passes.factor.base import FactorPass

    weights = {name: normal(*shape) for name, shape in shapes.items()}
    result = ", ".join(f"d{at}" for at in range(rank))
    model = build(body, ", ".join(map(str, given)), result, **weights)
    x = normal(*[60 if size == "N" else size for size in given])
    ctx, whole, kept = context(model, x), model.copy(), {}
    record = FactorPass.record

    def remember(self, task, fitted, report):
        kept[task.site.name] = fitted.total
        record(self, task, fitted, report)

    monkeypatch.setattr(FactorPass, "record", remember)
    more = ALWAYS if "seedlm" in spec else f"{ALWAYS} bias=false"
    (report,) = Pipeline.parse(spec_with(spec, more)).run(model, ctx)
    assert [item.site for item in report.changed] == ["s"], report.skipped
    assert graph_fault(model) is None
    onnx.checker.check_model(model.to_proto(), full_check=True)
    (site,) = whole.sites()
    site.replace(kept["s"])
    np.testing.assert_allclose(outputs(model, x), outputs(whole, x), rtol=1e-4, atol=2e-4)
    # tidy leaves the weight packed
    tidied = model.copy()
    Pipeline.parse("tidy").run(tidied, ctx)
    assert {node.op_type for node in model.onnx.graph} == {node.op_type for node in tidied.onnx.graph}


@pytest.mark.parametrize("spec", ["factor-slab", "factor-bitstack", "factor-seedlm{seed-bits=12}"])
def test_a_session_makes_the_weight_once_and_the_file_is_small(spec, tmp_path: Path):
    model = build("[s] y = MatMul(x, w)", "N, 96", "N, 160", w=normal(96, 160))
    x = normal(50, 96)
    (report,) = Pipeline.parse(spec).run(model, context(model, x))
    assert len(report.changed) == 1, report.skipped
    constants = sum(value.const_value.nbytes for value in model.onnx.graph.initializers.values())
    shared = sum(value.const_value.nbytes for name, value in model.onnx.graph.initializers.items()
                 if name.startswith("sparsecc."))  # fmt: skip
    assert constants - shared < 0.26 * 4 * 96 * 160
    assert report.changed[0].numbers["parameters"] <= 0.25
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(model.to_proto().SerializeToString(), options)
    assert [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node] == ["MatMul"]


def test_old_models_and_small_budgets_are_refused_with_a_reason():
    model = build("[s] y = MatMul(x, w)", "N, 96", "N, 160", opset=11, w=normal(96, 160))
    (report,) = Pipeline.parse("factor-seedlm").run(model, PassContext())
    assert "convert it to 12" in report.skipped[0].reason
    model = build("[s] y = MatMul(x, w)", "N, 96", "N, 160", w=normal(96, 160))
    for spec, words in (
        ("factor-seedlm{param-ratio=0.1}", "raise param-ratio"),
        ("factor-bitstack{param-ratio=0.03}", "do not hold a plane"),
        ("factor-slab{param-ratio=0.05}", "do not hold signs"),
    ):
        (report,) = Pipeline.parse(spec).run(model, context(model, normal(20, 96)))
        assert words in report.skipped[0].reason
    with pytest.raises(SpecError, match="seed-bits 12 or 16"):
        Pipeline.parse("factor-seedlm{bits=5}")


class AsFast:
    """Packed layers of 64 x 64 take as long as dense ones, and alone they carry 16384 bytes of tables."""

    def rewritten(self, model, site, rewrite, key, *, custom_ops):
        return RewriteCost(1.0, 1.0, 4 * 64 * 64, 64 * 64 + 16384)


@pytest.mark.parametrize(("layers", "packed"), [(1, 0), (2, 2)])
def test_tables_count_once_for_all_layers_together(layers, packed):
    body = " ".join(f"[s{at}] h{at + 1} = MatMul(h{at}, w{at})" for at in range(layers))
    body = body.replace("h0", "x").replace(f"h{layers}", "y")
    weights = {f"w{at}": normal(64, 64) for at in range(layers)}
    model = build(body, "N, 64", "N, 64", **weights)
    ctx = dataclasses.replace(context(model, normal(40, 64)), costs=AsFast())
    (report,) = Pipeline.parse("factor-slab").run(model, ctx)
    assert len(report.changed) == packed, report.skipped
    if not packed:
        assert [item.reason for item in report.skipped] == [
            "not smaller: all sites together save 12288 bytes, the tables they share take 16384"
        ]


def test_layers_share_the_tables():
    model = build(
        "[a] h = MatMul(x, w) [z] y = MatMul(h, v)", "N, 96", "N, 96", w=normal(96, 96), v=normal(96, 96)
    )
    Pipeline.parse("factor-seedlm{seed-bits=12}").run(model, PassContext())
    names = [name for name in model.onnx.graph.initializers if name.startswith("sparsecc.")]
    assert {"sparsecc.nibbles", "sparsecc.seeds.12.32"} < set(names)
    own = [name for name in model.onnx.graph.initializers if name not in names]
    assert sorted(own) == ["a.codes", "a.steps", "z.codes", "z.steps"]
    finalize(model)
    assert len(model.to_proto().SerializeToString()) - model.nbytes < 9000


@pytest.fixture(scope="module")
def stacked() -> tuple[Model, np.ndarray, np.ndarray]:
    """A model of two layers as planes, inputs, and what the dense model made of them."""
    text = "[a] h = MatMul(x, w) g = Relu(h) [z] y = MatMul(g, v)"
    model = build(text, "N, 48", "N, 33", w=normal(48, 64), v=normal(64, 33))
    x = normal(80, 48)
    dense = outputs(model, x)
    (report,) = Pipeline.parse("factor-bitstack{min-elements=1 param-ratio=0.4}").run(
        model, context(model, x)
    )
    assert len(report.changed) == 2
    return model, x, dense


def test_models_of_every_size_are_valid_and_better_the_larger_they_are(stacked, tmp_path: Path):
    model, x, dense = stacked
    planes = Planes.of(model)
    assert planes.sites == ("a", "z")
    assert len(planes.order) > 8
    errors, sizes = [], []
    for count in range(2, len(planes.order) + 1):
        smaller = planes.first(model, count)
        assert graph_fault(smaller) is None
        onnx.checker.check_model(smaller.to_proto(), full_check=True)
        assert Planes.of(smaller).order == planes.order[:count]
        errors.append(np.square(outputs(smaller, x) - dense).sum())
        for external in (False, True):
            path = tmp_path / f"m{external:d}.onnx"
            said = written_nbytes(smaller.onnx, path, external)
            smaller.save(path, external_data=external)
            written = sum(item.stat().st_size for item in tmp_path.glob(f"m{external:d}.onnx*"))
            assert written <= said <= written + 2000
        sizes.append(said)
    assert (np.diff(sizes) > 0).all()
    model.save(tmp_path / "whole.onnx", external_data=True)
    loaded = Model.load(tmp_path / "whole.onnx")
    assert planes.largest(loaded, sizes[3], tmp_path / "m1.onnx") == 5
    assert planes.largest(loaded, sizes[3] - 1, tmp_path / "m1.onnx") == 4
    assert planes.largest(loaded, sizes[0] - 1, tmp_path / "m1.onnx") is None
    assert errors[-1] < 0.05 * errors[0]
    assert Planes.of(model) == planes
    assert (np.diff(errors) < 0).mean() > 0.8  # of the whole model; of each layer it falls always


def test_planes_lie_in_the_data_file_in_the_order_of_their_worth(stacked, tmp_path: Path):
    model, *_ = stacked
    big = model.copy()
    big.save(tmp_path / "m.onnx", external_data=True)
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    offsets = {
        item.name: int(entry.value)
        for item in proto.graph.initializer
        for entry in item.external_data
        if entry.key == "offset"
    }
    order = sorted((name for name in offsets if ".plane." in name), key=offsets.__getitem__)
    assert order == sorted(order)
    assert Planes.of(Model.load(tmp_path / "m.onnx")) == Planes.of(model)


@pytest.mark.parametrize(
    "text",
    ["", "[", "{}", '{"sites": ["a", "z"], "order": [0]}', '{"sites": ["a", "z"], "order": [0, 1, 7]}',
     '{"sites": ["a", "z"], "order": [0, true, 1]}', '{"sites": [1, "z"], "order": [0, 1]}',
     '{"sites": 3, "order": [0, 1]}', '{"sites": ["a", "z"], "order": [0, 1' + ", 1" * 40 + "]}"],
)  # fmt: skip
def test_metadata_that_does_not_fit_is_refused(stacked, text):
    model = stacked[0].copy()
    model.metadata["sparsecc.planes"] = text
    with pytest.raises(ModelError, match="start from the file that factor-bitstack wrote"):
        Planes.of(model)


def test_planes_that_something_else_reads_are_refused(stacked):
    model = stacked[0].copy()
    value = model.onnx.graph.initializers[plane_name(0, "left")]
    value.uses()[0].node.op_type = "Max"
    with pytest.raises(ModelError, match=r"000000\.left"):
        Planes.of(model)


def test_a_second_run_leaves_planes_alone(stacked):
    text = "[s] y = MatMul(x, w)"
    model = build(text, "N, 96", "N, 96", w=normal(96, 96))
    x = normal(40, 96)
    assert len(Pipeline.parse("factor-bitstack").run(model, context(model, x))[0].changed) == 1
    model.onnx.graph.append(onnx_ir.Node("", "MatMul", [model.onnx.graph.inputs[0], add_constant(
        model.onnx.graph, "v", normal(96, 96), set())], name="late"))  # fmt: skip
    (report,) = Pipeline.parse("factor-bitstack").run(model, context(model, x))
    assert not report.changed
    assert [
        (item.site, "planes already" in item.reason) for item in report.skipped if item.site == "late"
    ] == [("late", True)]
    assert ("s.product", "weight is packed in the file: start from the model it was packed from") in (
        model.unsupported_sites()
    )


def test_factors_of_a_plane_are_rounded_evenly():
    plane = signs.SignPlane(np.ones((2, 2), bool), Factors(np.full((2, 1), 1e6), np.full((1, 2), 1e-6)))
    np.testing.assert_allclose(plane.astype(np.dtype(np.float16)).dense(), np.ones((2, 2)), rtol=2e-3)
