"""Exact optimal brain surgeon: against the definition, step by step, and what the pass makes of it."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from sparsecc.calib import Calibration
from sparsecc.errors import SpecError
from sparsecc.ir import Model
from sparsecc.passes.prune.exact_obs import (
    Curves,
    counts_by_merging,
    inverse_of,
    kept,
    removal_curves,
    without,
)
from sparsecc.passes.prune.gram import damped, quadratic_error
from sparsecc.passes.structure.obs import Consumer, removal_curve
from sparsecc.pm import PassContext, PassReport, Pipeline
from sparsecc.sparse import Pattern, density, matches

SEEDS = range(5)
UNSTRUCTURED = Pattern("unstructured")


def layer(seed: int, rows: int = 6, columns: int = 11, samples: int = 60):
    """A weight, and the damped Gram matrix of inputs that are correlated and badly scaled."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((samples, columns)) @ rng.standard_normal((columns, columns))
    inputs = mixed * np.exp(rng.standard_normal(columns))
    return rng.standard_normal((rows, columns)), damped(inputs.T @ inputs, 0.01)[0]


def best_on(weight, gram, mask) -> NDArray[np.float64]:
    """Least squares on the support, row by row."""
    fitted = np.zeros_like(weight)
    for row, support in enumerate(mask):
        fitted[row, support] = np.linalg.solve(gram[np.ix_(support, support)], (weight @ gram)[row, support])
    return fitted


def greedy(row, gram, steps: int) -> tuple[list[int], list[float]]:
    """ExactOBS as the paper has it: the whole inverse is brought up to date at every step."""
    inverse, values, alive = np.linalg.inv(gram), row.copy(), np.ones(len(row), bool)
    order, losses = [], []
    for _ in range(steps):
        cost = np.where(alive, np.square(values) / np.where(alive, np.diag(inverse), 1), np.inf)
        at = int(np.argmin(cost))
        order.append(at)
        losses.append(float(cost[at]))
        values -= values[at] / inverse[at, at] * inverse[at]
        inverse -= np.outer(inverse[at], inverse[at]) / inverse[at, at]
        alive[at] = False
    return order, losses


@pytest.mark.parametrize("seed", SEEDS)
def test_the_order_is_that_of_the_definition(seed):
    weight, gram = layer(seed)
    curves = removal_curves(weight, inverse_of(gram), UNSTRUCTURED, 9)
    for row, order, losses in zip(weight, curves.order, curves.losses, strict=True):
        expected, costs = greedy(row, gram, 9)
        assert order.tolist() == expected
        np.testing.assert_allclose(losses, costs, rtol=1e-8)


@pytest.mark.parametrize("pattern", ["unstructured", "2x1", "4x1", "2x2", "1x3", "6x4"])
@pytest.mark.parametrize("seed", SEEDS)
def test_losses_add_up_to_the_error_and_what_stays_is_the_best_there_is(pattern, seed):
    weight, gram = layer(seed)
    chosen = Pattern.parse(pattern)
    units = chosen.grid((6, 11))[1]
    curves = removal_curves(weight, inverse_of(gram), chosen, units)
    for count in range(units + 1):
        mask = kept(curves, count, chosen, (6, 11))
        fitted = without(weight, inverse_of(gram), mask)
        assert matches(np.where(mask, 1.0, 0.0), chosen)
        np.testing.assert_allclose(fitted, best_on(weight, gram, mask), rtol=1e-7, atol=1e-9)
        error = quadratic_error(fitted - weight, gram)
        assert error == pytest.approx(curves.losses[:, :count].sum(), rel=1e-8, abs=1e-12)


def test_lines_are_treated_alike_however_many_at_a_time(monkeypatch):
    weight, gram = layer(1)
    whole = removal_curves(weight, inverse_of(gram), UNSTRUCTURED, 8)
    monkeypatch.setattr("sparsecc.passes.prune.exact_obs._PIVOT_BYTES", 1)
    apart = removal_curves(weight, inverse_of(gram), UNSTRUCTURED, 8)
    np.testing.assert_array_equal(whole.order, apart.order)
    np.testing.assert_allclose(whole.losses, apart.losses, rtol=1e-12)


def test_the_cheapest_next_beats_the_order_of_magnitudes_on_average():
    wins = 0
    for seed in range(40):
        weight, gram = layer(seed)
        curves = removal_curves(weight, inverse_of(gram), UNSTRUCTURED, 5)
        ours = curves.losses.sum()
        largest = np.argsort(-np.abs(weight), axis=1)[:, :6]
        mask = np.zeros(weight.shape, bool)
        np.put_along_axis(mask, largest, True, 1)
        wins += ours <= quadratic_error(without(weight, inverse_of(gram), mask) - weight, gram)
    assert wins > 36


@pytest.mark.parametrize(
    ("caps", "stay", "legal"),
    [
        ([(2, 4)], 6, lambda kept: [kept[:, i : i + 4].sum(1) <= 2 for i in (0, 4, 8)]),
        ([(3, 4)], 5, lambda kept: [kept[:, i : i + 4].sum(1) <= 3 for i in (0, 4, 8)]),
        (
            [(2, 3), (4, 6)],
            7,
            lambda kept: [*(kept[:, i : i + 3].sum(1) <= 2 for i in (0, 3, 6, 9)), kept[:, :6].sum(1) <= 4],
        ),
    ],
)
def test_caps_hold_and_counts_are_exact(caps, stay, legal):
    weight, gram = layer(2)
    curves = removal_curves(weight, inverse_of(gram), UNSTRUCTURED, 11 - stay, caps)
    mask = kept(curves, 11 - stay, UNSTRUCTURED, weight.shape)
    assert (mask.sum(1) == stay).all()
    assert all(group.all() for group in legal(mask))


def test_caps_that_do_not_bind_change_nothing():
    weight, gram = layer(3)
    free = removal_curves(weight, inverse_of(gram), UNSTRUCTURED, 6)
    mask = kept(free, 6, UNSTRUCTURED, weight.shape)
    wide = [(int(mask[:, i : i + 4].sum(1).max()), 4) for i in (0, 4, 8)]
    same = removal_curves(weight, inverse_of(gram), UNSTRUCTURED, 6, [max(wide)])
    np.testing.assert_array_equal(free.order, same.order)


def test_merging_curves_is_the_best_way_to_share_a_count():
    losses = np.cumsum(np.random.default_rng(4).random((3, 5)), axis=1)  # every step dearer than the last
    curves = Curves(np.tile(np.arange(5), (3, 1)), losses, np.zeros((3, 5), bool))
    for total in range(16):
        counts = counts_by_merging(curves, total)
        assert counts.sum() == total
        cost = sum(losses[line, :count].sum() for line, count in enumerate(counts))
        best = min(
            sum(losses[line, :count].sum() for line, count in enumerate(ways))
            for ways in itertools.product(range(6), repeat=3)
            if sum(ways) == total
        )
        assert cost == pytest.approx(best)


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_protected_weights_leave_last(scope):
    weight, gram = layer(5)
    protected = np.zeros(weight.shape, bool)
    protected[np.arange(6), np.abs(weight).argmin(1)] = True
    curves = removal_curves(
        weight, inverse_of(gram), UNSTRUCTURED, 11 if scope == "layer" else 8, protected=protected
    )
    counts = counts_by_merging(curves, 48) if scope == "layer" else 8
    mask = kept(curves, counts, UNSTRUCTURED, weight.shape)
    assert mask.sum() == 18
    assert mask[protected].all()


def test_inputs_that_are_dead_double_or_few_and_a_single_row():
    rng = np.random.default_rng(6)
    inputs = rng.standard_normal((5, 11))
    inputs[:, 3] = 0
    inputs[:, 7] = inputs[:, 6]
    gram = damped(inputs.T @ inputs, 1e-6)[0]
    weight = rng.standard_normal((1, 11))
    curves = removal_curves(weight, inverse_of(gram), UNSTRUCTURED, 10)
    assert np.isfinite(curves.losses).all()
    # One of two equal inputs takes over from the other for nothing, and so do five of eleven from the rest.
    assert curves.losses[0, :6].sum() < 1e-4 * quadratic_error(weight, gram)
    mask = kept(curves, 6, UNSTRUCTURED, (1, 11))
    assert not mask[0, [6, 7]].all()
    assert np.isfinite(without(weight, inverse_of(gram), mask)).all()


def build(columns: int = 40) -> Model:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[B,{columns}] x) => (float[B,32] y) {{ [fc] y = MatMul(x, w) }}"""
    )
    weight = np.random.default_rng(0).standard_normal((columns, 32)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return Model.from_proto(proto)


def pruned(model: Model, spec: str) -> PassReport:
    rng = np.random.default_rng(1)
    columns = int(model.sites("fc")[0].shape[1])
    x = rng.standard_normal((200, columns)) @ rng.standard_normal((columns, columns))
    source = Calibration.from_batches([{"x": x.astype(np.float32)}], model, threads=1)
    (report,) = Pipeline.parse(spec).run(model, PassContext(calibration=source, threads=1))
    return report


def test_rows_lose_what_their_curves_say_or_all_the_same_number():
    by_layer, by_row = build(), build()
    errors = [
        pruned(model, f"prune-obc{{sparsity=0.6 scope={scope}}}").changed[0].numbers["output_error"]
        for model, scope in ((by_layer, "layer"), (by_row, "row"))
    ]
    assert errors[0] <= errors[1]
    counts = [np.count_nonzero(model.sites("fc")[0].numpy(), axis=1) for model in (by_layer, by_row)]
    assert (counts[1] == 16).all()
    assert counts[0].sum() == 16 * 32
    assert len(set(counts[0].tolist())) > 1


def test_it_is_better_than_other_ways_to_choose_zeros():
    errors = []
    for method in ("obc", "sparsegpt", "wanda-ols"):
        model = build()
        report = pruned(model, f"prune-{method}{{sparsity=0.7 sequential=false}}")
        assert density(model.sites("fc")[0].numpy()) == pytest.approx(0.3)
        errors.append(report.changed[0].numbers["output_error"])
    assert errors[0] < 0.8 * min(errors[1:])


def test_too_many_inputs_and_options_that_mean_nothing():
    report = pruned(build(), "prune-obc{max-inputs=39}")
    assert report.skipped[0].reason == "40 inputs per output are too many (max-inputs=39): use prune-alps"
    with pytest.raises(SpecError, match="caps leave 20 entries, but 24"):
        pruned(build(), "prune-obc{sparsity=0.4 caps=2:4}")
    for options in ("max-inputs=0", "scope=layer caps=2:4"):
        with pytest.raises(SpecError):
            Pipeline.parse(f"prune-obc{{{options}}}")


def test_columns_cost_what_llm_surgeon_says_where_outputs_count_alike():
    """Its cost of a column, twice and with the identity for outputs, is the exact rise of the error (van der Ouderaa
    et al. 2024), and so is that of a block of one column over all rows here and of an input of structured removal.
    """
    weight, gram = layer(7)
    inverse = np.linalg.inv(gram)
    costs = 2 * 0.5 * np.square(weight).sum(0) / np.diag(inverse)
    first = removal_curves(weight, inverse_of(gram), Pattern.parse("6x1"), 1)
    assert first.order[0, 0] == costs.argmin()
    assert first.losses[0, 0] == pytest.approx(costs.min())
    structured = removal_curve([Consumer(weight, gram, np.arange(11)[:, None])], 11, 1e-12)
    energy = quadratic_error(weight, gram)
    assert structured.order[0] == costs.argmin()
    assert structured.error[1] * energy == pytest.approx(costs.min(), rel=1e-6)
    for column, cost in enumerate(costs):
        mask = np.ones(weight.shape, bool)
        mask[:, column] = False
        error = quadratic_error(without(weight, inverse_of(gram), mask) - weight, gram)
        assert error == pytest.approx(cost, rel=1e-8)
