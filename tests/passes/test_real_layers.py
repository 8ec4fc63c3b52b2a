"""What is proven about layer-wise pruning, and what usually holds, on layers of trained networks and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsecc.calib import Calibration
from sparsecc.ir import Model
from sparsecc.passes.prune.admm import alternate
from sparsecc.passes.prune.exact_obs import inverse_of, kept, removal_curves, without
from sparsecc.passes.prune.gram import damped, inverse_factor, quadratic_error
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.prune.obs import sweep
from sparsecc.passes.prune.selection import Cap, Selection
from sparsecc.passes.structure.obs import compensate
from sparsecc.sparse import Pattern

Array = NDArray[np.float64]

#: Outputs looked at per layer: rows are problems of their own, and exact solutions of many take long.
ROWS = 12


@dataclass(frozen=True)
class Layer:
    """Some rows of a weight, second moments of its inputs (damped, their inverse, as measured), and their means."""

    name: str
    weight: Array
    gram: Array
    inverse: Array
    moments: Array
    mean: Array

    def error(self, weight: Array) -> float:
        return quadratic_error(weight - self.weight, self.gram)

    @property
    def squares(self) -> Array:
        return np.square(self.weight) * np.diag(self.gram)

    def masked(self, mask: NDArray[np.bool_]) -> Array:
        return np.where(mask, self.weight, 0.0)


def layers_of(model: Model, batches: list[dict[str, NDArray]], match: str) -> list[Layer]:
    source = Calibration.from_batches(batches, model, threads=1)
    sites = [site for site in model.sites(match) if site.shape[1] >= 64]
    found = []
    for step in source.walk(model, sites):
        for name, moments in step.items():
            (site,) = (site for site in sites if site.name == name)
            weight = site.numpy()[:ROWS].astype(np.float64)
            gram, _ = damped(moments.gram, 0.01)
            found.append(Layer(name, weight, gram, inverse_of(gram), moments.gram, moments.mean))
    return found


#: Which layers of each model.
MATCHES = {"resnet": "*", "minilm": r"re:layer[./](1[./]|4[./]attention)"}


@pytest.fixture(scope="module", params=MATCHES)
def layers(request: pytest.FixtureRequest, trained: Callable[[str], Any]) -> list[Layer]:
    found = layers_of(*trained(request.param), MATCHES[request.param])
    assert len(found) >= 10
    return found


def selection(pattern: str, sparsity: float = 0.5, scope: str = "row") -> Selection:
    parsed = Pattern.parse(pattern)
    return Selection(parsed, sparsity if parsed.needs_sparsity else None, scope)


def swept(layer: Layer, chosen: Selection):
    columns = layer.weight.shape[1]
    every = 4 if chosen.pattern.kind == "nm" else 128
    return sweep(
        layer.weight, inverse_factor(layer.gram), lambda squares, at: chosen.part(squares, at, columns), every
    )


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_the_update_and_the_mask(layers: list[Layer], pattern: str) -> None:
    """Least squares is the best on any mask (proven); Wanda beats magnitude, and a fit beats a mask (usual)."""
    chosen, wins = selection(pattern), np.zeros(4, int)
    for layer in layers:
        by_size, by_wanda = chosen.mask(np.square(layer.weight)), chosen.mask(layer.squares)
        sparsegpt = swept(layer, chosen)
        assert sparsegpt.error == pytest.approx(layer.error(sparsegpt.weight), rel=1e-6)
        alps, its_mask = alternate(layer.weight, layer.gram, chosen.mask, by_wanda, 60)
        fitted = refit_rows(layer.weight, by_wanda, layer.gram)
        for mask, other in (
            (by_size, layer.masked(by_size)),
            (by_wanda, layer.masked(by_wanda)),
            (by_wanda, fitted),
            (sparsegpt.mask, sparsegpt.weight),
            (its_mask, alps),
        ):
            assert layer.error(without(layer.weight, layer.inverse, mask)) <= layer.error(other) * (1 + 1e-8)
        assert layer.error(alps) <= layer.error(fitted)
        wins += [
            layer.error(layer.masked(by_wanda)) <= layer.error(layer.masked(by_size)),
            layer.error(sparsegpt.weight) <= layer.error(layer.masked(by_wanda)),
            layer.error(sparsegpt.weight) <= layer.error(layer.masked(sparsegpt.mask)),
            layer.error(fitted) <= layer.error(sparsegpt.weight),
        ]
    assert (wins > len(layers) / 2).all(), (wins, len(layers))


def test_larger_supports_are_never_worse_and_freer_patterns_keep_more(layers: list[Layer]) -> None:
    for layer in layers:
        nested = [selection("unstructured", p).mask(layer.squares) for p in (0.9, 0.7, 0.5)]
        errors = [layer.error(without(layer.weight, layer.inverse, mask)) for mask in nested]
        assert errors == sorted(errors, reverse=True)
        ordered = [
            *(selection("unstructured", scope=scope) for scope in ("layer", "row")),
            Selection(Pattern("unstructured"), 0.5, "row", (Cap(5, 8),)),
            *(selection(pattern) for pattern in ("4:8", "2:4")),
        ]
        kept_scores = [layer.squares[item.mask(layer.squares)].sum() for item in ordered]
        assert kept_scores == sorted(kept_scores, reverse=True)
        blocks = [
            layer.squares[selection(pattern, scope="layer").mask(layer.squares)].sum()
            for pattern in ("1x1", "2x2", "4x4")
        ]
        assert blocks == sorted(blocks, reverse=True)


def test_what_removing_weights_and_inputs_costs(layers: list[Layer]) -> None:
    """One weight, a group of a row, and a column of all rows, against the closed forms and against slicing."""
    for layer in layers:
        one = np.ones(layer.weight.shape, bool)
        one[3, 5] = False
        expected = layer.weight[3, 5] ** 2 / layer.inverse[5, 5]
        assert layer.error(without(layer.weight, layer.inverse, one)) == pytest.approx(expected, rel=1e-6)
        gone = np.zeros(len(layer.gram), bool)
        gone[[2, 7, 8, 30, 41]] = True
        columns = layer.weight[:, gone]
        expected = np.trace(columns @ np.linalg.solve(layer.inverse[np.ix_(gone, gone)], columns.T))
        mask = np.broadcast_to(~gone, layer.weight.shape)
        best = without(layer.weight, layer.inverse, mask)
        assert layer.error(best) == pytest.approx(expected, rel=1e-6)
        assert layer.error(best) <= layer.error(layer.masked(mask))
        # What structured removal makes of the layer: the same, given the same ridge.
        cut = compensate(layer.weight, ~gone, layer.gram, layer.gram, 1e-12)
        np.testing.assert_allclose(cut, best, rtol=1e-4, atol=1e-6 * np.abs(best).max())
        schur = layer.gram - layer.gram[:, ~gone] @ np.linalg.solve(
            layer.gram[np.ix_(~gone, ~gone)], layer.gram[~gone]
        )
        assert np.trace(layer.weight @ schur @ layer.weight.T) == pytest.approx(expected, rel=1e-6)


def test_a_bias_takes_away_the_square_of_the_mean_error(layers: list[Layer]) -> None:
    for layer in layers:
        pruned = layer.masked(selection("2:4").mask(layer.squares))
        change = layer.weight - pruned
        centred = layer.moments - np.outer(layer.mean, layer.mean)
        before, after = quadratic_error(change, layer.moments), quadratic_error(change, centred)
        assert before - after == pytest.approx(
            np.square(change @ layer.mean).sum(), rel=1e-6, abs=1e-9 * before
        )
        assert -1e-9 * before <= after <= before


def test_one_removal_at_a_time_is_the_best_choice_of_zeros(layers: list[Layer]) -> None:
    """The losses add up (proven); a mask chosen so beats the others after the best fit of each (usual)."""
    small, wins = [layer for layer in layers if layer.weight.shape[1] <= 384], np.zeros(2, int)
    for layer in small:
        columns = layer.weight.shape[1]
        curves = removal_curves(layer.weight, layer.inverse, Pattern("unstructured"), columns // 2)
        mask = kept(curves, columns // 2, Pattern("unstructured"), (len(layer.weight), columns))
        ours = layer.error(without(layer.weight, layer.inverse, mask))
        assert ours == pytest.approx(curves.losses.sum(), rel=1e-5)
        chosen = selection("unstructured")
        by_wanda = chosen.mask(layer.squares)
        wins += [
            ours <= layer.error(without(layer.weight, layer.inverse, by_wanda)),
            ours <= layer.error(without(layer.weight, layer.inverse, swept(layer, chosen).mask)),
        ]
    assert (wins > 0.9 * len(small)).all(), (wins, len(small))
