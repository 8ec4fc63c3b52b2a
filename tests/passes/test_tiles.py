"""Tiles dense or N:M: which are chosen, what that costs, and the split into two products."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.hybrid.tile_selection import Tile, TileSelection, cheapest
from sparsecc.pm import PassContext, Pipeline, SiteOverride
from sparsecc.sparse import Pattern, keep_mask, matches

RNG = np.random.default_rng(11)
TWO_FOUR = Pattern.parse("2:4")


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def selection(sparsity: float, tile: str = "4x8", **options) -> TileSelection:
    return TileSelection(TWO_FOUR, sparsity, options.pop("scope", "layer"), (), Tile.parse(tile), **options)


def build(text: str, **weights: np.ndarray) -> Model:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["": 17]>\n' + text)
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def run(model: Model, spec: str, overrides=(), **inputs: np.ndarray):
    copy = model.copy()
    source = Calibration.from_batches([inputs], copy, threads=1)
    reports = Pipeline.parse(spec).run(copy, PassContext(calibration=source, overrides=overrides))
    return copy, reports[-1]


def outputs(model: Model, **inputs: np.ndarray) -> np.ndarray:
    return open_session(model).run(inputs)["y"]


@pytest.mark.parametrize("shape", [(8, 16), (12, 16), (9, 14), (1, 10)])
def test_the_chosen_tiles_are_the_best_of_all_that_free_as_much(shape):
    squares = np.square(normal(*shape)).astype(float)
    keep = keep_mask(squares, TWO_FOUR)
    tile = Tile(4, 4)
    costs, freed = tile.sums(np.where(keep, 0, squares)).ravel(), tile.sums(~keep).ravel()
    assert len(costs) <= 12
    for share in np.linspace(0, 1, 7):
        chosen = cheapest(costs, freed, share)
        ours = freed[chosen].sum()
        assert ours >= share * freed.sum() - 1e-6
        for size in range(len(costs) + 1):
            for other in map(list, itertools.combinations(range(len(costs)), size)):
                if freed[other].sum() >= ours:
                    assert costs[other].sum() >= costs[chosen].sum() - 1e-9


@pytest.mark.parametrize("options", [{}, {"scope": "row"}, {"ends": True}])
@pytest.mark.parametrize("shape", [(16, 32), (13, 27), (3, 5)])
def test_from_dense_to_pure_n_m_nested_and_monotone(shape, options):
    squares = np.square(normal(*shape))
    steps = [selection(share / 2, **options).mask(squares) for share in np.linspace(0, 1, 9)]
    assert steps[0].all()
    np.testing.assert_array_equal(steps[-1], keep_mask(squares, TWO_FOUR))
    kept = [squares[mask].sum() for mask in steps]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(kept))
    if "ends" not in options:
        assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(steps))


def test_rows_of_tiles_have_equal_counts_and_ends_are_whole_rows():
    squares = np.square(normal(16, 32))
    mask = selection(0.25, scope="row").mask(squares)
    assert (mask.reshape(4, -1).sum(1) == 96).all()
    ends = selection(0.25, ends=True)
    mask = ends.mask(squares)
    sparse = ends.sparse_rows(squares)
    assert sparse in (slice(0, 8), slice(8, 16))
    assert mask.sum() == 16 * 32 * 0.75
    np.testing.assert_array_equal(mask[sparse], keep_mask(squares[sparse], TWO_FOUR))
    assert selection(0.0, ends=True).sparse_rows(squares) == slice(0, 0)


def layer(n: int = 48, k: int = 64) -> Model:
    return build(
        f"""g (float[B,T,{k}] x) => (float[B,T,{n}] y) {{
            [up] h = MatMul(x, w) a = Add(h, b) y = Relu(a)
        }}""",
        w=normal(k, n),
        b=normal(n),
    )


def test_fraction_zero_is_the_model_itself_and_one_is_plain_n_m():
    model, x = layer(), normal(4, 30, 64)
    untouched, report = run(model, "prune-tiles{sparsity=0}", x=x)
    assert untouched.fingerprint() == model.fingerprint()
    assert report.skipped[0].reason.startswith("already 2:4 in tiles of 16x64 at sparsity 0")
    whole, _ = run(model, "prune-tiles{sparsity=0.5}", x=x)
    plain, _ = run(model, "prune-wanda-ols{pattern=2:4}", x=x)
    np.testing.assert_array_equal(*(side.sites()[0].numpy() for side in (whole, plain)))


@pytest.mark.parametrize("score", ["diagonal", "obs"])
def test_more_sparse_tiles_lose_more_and_a_second_run_changes_nothing(score):
    model, x = layer(49, 76), normal(4, 100, 76) @ normal(76, 76)
    errors = []
    for sparsity in (0.1, 0.2, 0.3, 0.4, 0.5):
        spec = f"prune-tiles{{sparsity={sparsity} tile=8x8 score={score}}}"
        after, report = run(model, spec, x=x)
        found = report.changed[0].numbers
        assert sparsity - 1e-6 <= 1 - found["density_after"] <= sparsity + 33 / (49 * 76)
        errors.append(found["output_error"])
        again, second = run(after, spec, x=x)
        assert not second.changed
        assert again.fingerprint() == after.fingerprint()
    assert errors == sorted(errors)


@pytest.mark.parametrize(
    ("text", "weights", "shape"),
    [
        ("[s] h = MatMul(x, w) y = Relu(h)", {"w": (64, 40)}, (3, 5, 64)),
        ("[s] y = Gemm<transB=1, alpha=0.5, beta=2.0>(x, w, b)", {"w": (40, 64), "b": (40,)}, (9, 64)),
        ("[s] y = Gemm(x, w, b)", {"w": (64, 40), "b": (1, 40)}, (9, 64)),
        ("[s] y = Gemm(x, w)", {"w": (64, 40)}, (9, 64)),
        (
            "[s] h = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w, b) y = Relu(h)",
            {"w": (40, 8, 3, 3), "b": (40,)},
            (2, 8, 9, 9),
        ),
        ("[s] y = Conv(x, w)", {"w": (40, 64, 1)}, (2, 64, 9)),
    ],
)  # fmt: skip
def test_ends_run_as_two_products(text, weights, shape):
    dims = {2: "B,64", 3: f"B,{shape[1]},S" if "Conv" in text else "B,T,64", 4: "B,8,H,W"}[len(shape)]
    model = build(
        f"g (float[{dims}] x) => (float[{','.join('abcd'[: len(shape)])}] y) {{ {text} }}",
        **{name: normal(*size) for name, size in weights.items()},
    )
    x = normal(*shape)
    spec = "prune-tiles{sparsity=0.3 tile=8x8 shape=ends min-elements=1 bias=false}"
    split, report = run(model, spec, x=x)
    assert len(report.changed) == 1
    assert not any("stays one product" in note for note in report.notes)
    parts = {site.name: site.numpy() for site in split.sites()}
    assert set(parts) == {"s", "s.dense"}
    assert matches(parts["s"], TWO_FOUR)
    assert (len(parts["s"]), len(parts["s.dense"])) == (24, 16)
    assert (parts["s.dense"] != 0).all()
    whole, equal = model.copy(), []
    for names in (("s", "s.dense"), ("s.dense", "s")):
        whole.sites()[0].replace(np.concatenate([parts[name] for name in names]))
        equal.append(np.allclose(outputs(whole, x=x), outputs(split, x=x), atol=1e-4))
    assert sorted(equal) == [False, True]
    again, second = run(split, spec, x=x)
    assert not second.changed
    assert again.fingerprint() == split.fingerprint()


def test_what_cannot_be_split_keeps_its_mask_and_says_so():
    model = build(
        """g (float[B,64] x) => (float[B,64] y) {
            [one] h = MatMul(x, w) r = Relu(h) [two] y = MatMul(r, w)
        }""",
        w=normal(64, 64),
    )
    after, report = run(model, "prune-tiles{shape=ends tile=8x8}", x=normal(50, 64))
    assert report.notes == ["one stays one product: its weight is shared by 2 nodes"]
    assert (after.sites()[0].numpy() == 0).sum() == 64 * 64 // 4


def test_a_sparse_half_that_gains_nothing_is_told_to_the_plan():
    model = layer()
    source = Calibration.from_batches([{"x": normal(2, 40, 64)}], model, threads=1)
    ctx = PassContext(calibration=source)
    *_, report = Pipeline.parse("prune-tiles{shape=ends},restore-dense").run(model, ctx)
    assert ctx.unpaid == {"up": False}
    assert [skip.site for skip in report.skipped] == ["up", "up.dense"]


def test_grouped_convolutions_have_tiles_of_their_own_in_each_group():
    model = build(
        "g (float[B,16,9,9] x) => (float[B,32,h,w] y) { [g] y = Conv<group=2>(x, v) }", v=normal(32, 8, 3, 3)
    )
    after, _ = run(model, "prune-tiles{tile=4x8 min-elements=1}", x=normal(8, 16, 9, 9))
    kept = (after.sites()[0].numpy() != 0).reshape(2, -1)
    assert (kept.sum(1) == 16 * 72 * 3 // 4).all()


def test_wrong_options_and_overrides():
    for spec, words in {
        "prune-tiles{pattern=16x1}": "N:M",
        "prune-tiles{sparsity=0.6}": "sparsity must be in",
        "prune-tiles{tile=16x6}": "cut groups of 4",
        "prune-tiles{tile=16}": "unknown tile",
        "prune-tiles{tile=0x8}": "unknown tile",
    }.items():
        with pytest.raises(SpecError, match=words):
            Pipeline.parse(spec)
    x = normal(2, 40, 64)
    for pattern, words in {
        "3:6": "cut groups of 6",
        "16x1": "an override says 16x1",
        "dense": "override",
    }.items():
        override = SiteOverride("up", pattern=Pattern.parse(pattern))
        _, report = run(layer(), "prune-tiles", (override,), x=x)
        assert words in report.skipped[0].reason
    _, report = run(
        layer(), "prune-tiles{sparsity=0.5}", (SiteOverride("up", pattern=Pattern.parse("3:4")),), x=x
    )
    assert "removes less than sparsity 0.5" in report.skipped[0].reason


def test_layers_larger_than_one_problem_are_solved_whole(monkeypatch):
    """Passes whose rows stand alone take large weights in parts; tiles, ranks and factors span all rows."""
    model, x = layer(64, 64), normal(4, 50, 64)
    for spec in ("prune-tiles{shape=ends tile=8x8}", "sparse-lowrank{multiple=1}", "prune-armor{block=8}"):
        whole, _ = run(model, spec, x=x)
        with monkeypatch.context() as patch:
            patch.setattr("sparsecc.passes.prune.gram_pass._ELEMENTS", 64 * 20)
            parts, report = run(model, spec, x=x)
        assert report.changed
        assert parts.fingerprint() == whole.fingerprint()
