"""What is proven about factorised layers, on layers of trained networks and their inputs.

``SPARSECC_ALL_LAYERS=1`` looks at every layer of the models; else at some of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsecc.calib import Calibration
from sparsecc.ir import Model
from sparsecc.passes.factor.cur_fit import link
from sparsecc.passes.factor.dictionary import Support, compot, principal_samples, refit, rocket
from sparsecc.passes.factor.skeleton_selection import pick_columns, pick_rows, scaled
from sparsecc.passes.factor.spectra import tail_errors, whitened_spectrum
from sparsecc.passes.factor.weighted import Importance, asvd_factors, asvd_scale, fisher_factors
from sparsecc.passes.hybrid.lowrank import affordable_rank, best_factors, truncated
from sparsecc.passes.prune.gram import damped, quadratic_error, shifted_target
from sparsecc.sparse import Pattern

Array = NDArray[np.float64]

#: Which layers of each model are looked at where not all are.
SOME = {
    "resnet": r"re:^(/?layer1[./]0|/?layer3[./]2|/?linear|/?conv1)",
    "minilm": r"re:layer[./]2[./](attention[./]self[./]query|intermediate)",
    "stories": r"re:layers.(0.w[qko1]|3.w2)",
}

#: Share of the numbers of a layer that its factors hold.
RATIO = 0.6

#: What rounding may make of an equality.
ROUNDING = 1 + 1e-7


@dataclass(frozen=True)
class Layer:
    """A weight, second moments of its inputs (damped), and how large inputs are on average."""

    name: str
    weight: Array
    gram: Array

    @property
    def rank(self) -> int:
        return max(1, affordable_rank(*self.weight.shape, RATIO))

    @property
    def energy(self) -> Array:
        return np.diag(self.gram)

    def error(self, other: Array) -> float:
        """Share of the outputs' energy that ``other`` misses."""
        return quadratic_error(other - self.weight, self.gram) / quadratic_error(self.weight, self.gram)

    def best(self, rank: int) -> float:
        return self.error(best_factors(self.weight, self.gram, rank).product())


def layers_of(model: Model, batches: list[dict[str, NDArray]], match: str) -> list[Layer]:
    source = Calibration.from_batches(batches, model, threads=1)
    sites = {site.name: site for site in model.sites(match) if site.groups == 1 and min(site.shape) >= 8}
    found = []
    for step in source.walk(model, list(sites.values())):
        for name, moments in step.items():
            weight = sites[name].numpy().astype(np.float64)
            found.append(Layer(name, weight, damped(moments.gram, 0.01)[0]))
    return found


@pytest.fixture(scope="module", params=SOME)
def layers(request: pytest.FixtureRequest, trained: Callable[[str], Any]) -> list[Layer]:
    whole = os.environ.get("SPARSECC_ALL_LAYERS") == "1"
    found = layers_of(*trained(request.param), "*" if whole else SOME[request.param])
    assert len(found) >= (15 if whole else 2)
    return found


def others(layer: Layer, rank: int) -> dict[str, Array]:
    """Weights of ``rank`` by other methods."""
    rng = np.random.default_rng(0)
    weight = layer.weight
    sizes = np.exp(rng.standard_normal(len(weight)))
    return {
        "svd": truncated(weight, rank).product(),
        "asvd": asvd_factors(weight, asvd_scale(np.sqrt(layer.energy), 0.5), rank).product(),
        "diagonal": asvd_factors(weight, asvd_scale(np.sqrt(layer.energy), 1.0), rank).product(),
        "fwsvd": fisher_factors(weight, Importance(sizes), rank).product(),
        "gfwsvd": fisher_factors(weight, Importance(np.diag(sizes), layer.gram), rank).product(),
    }


def test_no_weight_of_that_rank_beats_the_whitened_svd(layers: list[Layer]) -> None:
    wins = 0
    for layer in layers:
        best = layer.best(layer.rank)
        tail = tail_errors(whitened_spectrum(layer.weight, layer.gram))
        assert best == pytest.approx(tail[layer.rank], rel=1e-6, abs=1e-10), layer.name
        found = {name: layer.error(other) for name, other in others(layer, layer.rank).items()}
        for name, error in found.items():
            assert best <= error * ROUNDING + 1e-12, (layer.name, name)
        wins += found["asvd"] < found["svd"]
    assert wins >= len(layers) / 2  # usual, not proven


def test_more_rank_is_never_worse_and_all_of_it_is_exact(layers: list[Layer]) -> None:
    for layer in layers:
        full = min(layer.weight.shape)
        ranks = [1, full // 4, full // 2, full - 1, full]
        errors = [layer.best(rank) for rank in ranks]
        assert (np.diff(errors) <= 1e-12).all()
        assert errors[-1] < 1e-9


def test_reduced_rank_regression_is_at_least_as_good_on_shifted_inputs(layers: list[Layer]) -> None:
    """``||X W^T - Xh V^T||^2`` is a constant plus ``Q(V - target)``, with what noise adds to the inputs."""
    for layer in layers:
        noisy, ridge = damped(layer.gram, 0.2)
        assert ridge > 0
        target = shifted_target(layer.weight, noisy, layer.gram, 1e-12, 1.0)
        fitted = best_factors(target, noisy, layer.rank).product()
        for other in (
            best_factors(layer.weight, noisy, layer.rank),
            best_factors(layer.weight, layer.gram, layer.rank),
        ):
            assert (
                quadratic_error(fitted - target, noisy)
                <= quadratic_error(other.product() - target, noisy) * ROUNDING
            )


def test_links_fitted_to_outputs_are_between_the_best_rank_and_other_links(layers: list[Layer]) -> None:
    for layer in layers:
        rank = max(1, layer.rank // 2)
        seen = scaled(layer.weight, layer.energy)
        rows = pick_rows(seen, rank, "deim")
        columns = pick_columns(layer.weight, seen, layer.energy, rank, "deim")
        left, right = layer.weight[:, columns], layer.weight[rows]
        root = np.linalg.cholesky(layer.gram)
        fitted, plain = (
            layer.error(left @ link(layer.weight, left, right, own) @ right) for own in (root, None)
        )
        assert layer.best(rank) <= fitted * ROUNDING + 1e-12, layer.name
        assert fitted <= plain * ROUNDING + 1e-12, layer.name


def test_dictionaries_without_sparsity_are_the_best_rank_and_refits_never_lose(layers: list[Layer]) -> None:
    for layer in layers:
        rank = max(2, layer.rank)
        samples = principal_samples(layer.weight, layer.gram)
        whole = quadratic_error(layer.weight, layer.gram)
        assert float(np.square(samples).sum()) == pytest.approx(whole, rel=1e-8)
        dense = compot(samples, rank, Support(Pattern("unstructured"), rank), 3)
        assert dense.errors[-1] / whole == pytest.approx(layer.best(rank), rel=1e-6, abs=1e-9), layer.name
        half = Support(Pattern("unstructured"), rank // 2)
        for start in (compot(samples, rank, half, 3), rocket(samples, layer.weight, rank, half)):
            errors = np.array(refit(samples, start, 2).errors)
            assert (np.diff(errors) <= 1e-9 * whole).all(), layer.name
            assert errors[-1] / whole >= layer.best(rank) / ROUNDING - 1e-12
