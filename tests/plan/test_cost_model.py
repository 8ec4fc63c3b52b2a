"""Estimates of times: what was measured, what lies between and beyond, and what they say about themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparsecc.errors import MeasurementError, SpecError, UsageError
from sparsecc.plan.cost_model import CostModel, isotonic, nonnegative_fit
from sparsecc.plan.costs import CostTable, machine_facts
from sparsecc.plan.workload import ProfileKey, Workload, call_key

SIZES = tuple(itertools.product((1, 16, 128), (64, 384), (64, 1536)))
DENSITIES = (0.5, 0.2, 0.08)


def truth(work: Workload, density: float) -> float:
    return (
        2e-3 + 1e-8 * work.multiplications * density + 3e-8 * work.n * work.k * density + 5e-8 * work.outputs
    )


def table_of(
    works: list[Workload],
    time: Callable[[Workload, float], float] = truth,
    densities: tuple[float, ...] = DENSITIES,
    threads: int = 1,
) -> CostTable:
    table = CostTable(None, machine_facts())
    for work, density in itertools.product(works, densities):
        key = ProfileKey(work, "pattern 16x1", density, threads, 1, 0)
        table.put(str(key), {"dense": time(work, 1.0), "16x1": time(work, density)})
    return table


def products(sizes: tuple[tuple[int, int, int], ...] = SIZES) -> list[Workload]:
    return [Workload("MatMul", *size) for size in sizes]


def test_what_was_measured_is_told_as_it_was() -> None:
    model = CostModel(table_of(products(), lambda work, density: truth(work, density) * (1 + work.k % 7 / 9)))
    for work, density in itertools.product(products(), DENSITIES):
        found = model.estimate(work, "16x1", density)
        assert found.source == "measured"
        assert found.ms == pytest.approx(truth(work, density) * (1 + work.k % 7 / 9), rel=1e-12)
    assert model.estimate(products()[0]).ms == pytest.approx(truth(products()[0], 1.0) * (1 + 64 % 7 / 9))
    assert model.estimate(products()[0], "16x1", 0.203).source == "measured"  # nearly the same density


def test_gemm_is_the_same_product_as_matmul() -> None:
    model = CostModel(table_of(products()))
    assert model.estimate(Workload("Gemm", 16, 64, 64), "16x1", 0.2).source == "measured"


@pytest.mark.parametrize("size", [(4, 100, 200), (64, 200, 800), (2048, 384, 384), (1, 4096, 64)])
def test_a_sum_of_costs_is_found_from_its_measurements(size: tuple[int, int, int]) -> None:
    model = CostModel(table_of(products()))
    work = Workload("MatMul", *size)
    for density in (0.04, 0.13, 0.5, 0.9):
        found = model.estimate(work, "16x1", density)
        assert found.source == "interpolated"
        assert found.ms == pytest.approx(truth(work, density), rel=1e-6)
    assert max(model.left_out_errors().values()) < 1e-6


def test_errors_of_left_out_products_become_the_spread() -> None:
    rng = np.random.default_rng(0)
    noise = {work: float(np.exp(rng.normal(0, 0.2))) for work in products()}
    model = CostModel(table_of(products(), lambda work, density: truth(work, density) * noise.get(work, 1.0)))
    error = model.left_out_errors()["linear", "16x1"]
    assert 0.05 < error < 0.5
    near = model.estimate(Workload("MatMul", 16, 384, 1000), "16x1", 0.2)
    assert error < near.spread < 4 * error
    far = model.estimate(Workload("MatMul", 16, 40000, 90000), "16x1", 0.2)
    assert far.spread > 2 * near.spread


@pytest.mark.parametrize("size", [(16, 64, 64), (16, 100, 3000), (5000, 3, 7)])
def test_fewer_weights_never_take_longer(size: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    model = CostModel(
        table_of(products(), lambda work, density: truth(work, density) * rng.uniform(0.7, 1.4))
    )
    times = [
        model.estimate(Workload("MatMul", *size), "16x1", float(density)).ms
        for density in np.geomspace(0.001, 1.0, 400)
    ]
    assert all(0 < before <= after * (1 + 1e-12) for before, after in itertools.pairwise(times))


def test_runs_on_a_slower_machine_count_by_their_dense_times() -> None:
    work = Workload("MatMul", 16, 64, 64)
    table = CostTable(None, machine_facts())
    for density, slower in ((0.5, 1.0), (0.2, 3.0), (0.08, 1.0)):
        key = ProfileKey(work, "pattern 16x1", density, 1, 1, 0)
        table.put(str(key), {"dense": slower, "16x1": density * slower})
    assert CostModel(table).estimate(work, "16x1", 0.2).ms == pytest.approx(0.2)


def test_the_call_of_a_session_is_not_the_product() -> None:
    table = table_of(products())
    table.put(call_key(1), {"empty": 1e-3})
    work = products()[0]
    assert CostModel(table).estimate(work, "16x1", 0.2).ms == pytest.approx(truth(work, 0.2) - 1e-3)
    table.put(call_key(1), {"empty": 5.0})
    assert CostModel(table).estimate(work, "16x1", 0.2).ms == pytest.approx(0.1 * truth(work, 0.2))
    table.put(call_key(1), {"empty": float("nan")})
    with pytest.raises(UsageError, match="no time under 'call threads=1'"):
        CostModel(table)


def test_all_places_of_groups_are_stored() -> None:
    work, table = products()[0], CostTable(None, machine_facts())
    table.put(str(ProfileKey(work, "pattern 2:4", 0.5, 1, 1, 0)), {"dense": 2.0, "fp16 2:4": 1.0})
    for density in (0.5, 0.1):
        assert CostModel(table).estimate(work, "fp16 2:4", density).source == "measured"


def test_convolutions_alone_pay_for_their_borders() -> None:
    table = CostTable(None, machine_facts())
    works = [Workload("Conv", 64, n, 9 * n, (3, 3), (1, 1)) for n in (16, 32, 64)]
    table.put(call_key(1), {"empty": 0.1})
    for work in works:
        table.put(str(ProfileKey(work, "pair", 1.0, 1, 1, 0)), {"dense": 1.1, "pair": 1.9})
        table.put(str(ProfileKey(work, "pattern 16x1", 0.5, 1, 1, 0)), {"dense": 2.1, "16x1": 0.6})
    model = CostModel(table)
    assert model.estimate(works[0]).ms == pytest.approx(0.8 * 2.0)  # a fifth of 1.0 is saved between two
    assert model.estimate(works[0], "16x1", 0.5).ms == pytest.approx(0.5)
    assert set(model.forms) == {"conv"}
    table.put(str(ProfileKey(works[0], "pair", 1.0, 1, 1, 1)), {"dense": 1.0})
    with pytest.raises(UsageError, match="measure again"):
        CostModel(table)


def test_one_measured_product_gives_estimates_that_know_little() -> None:
    model = CostModel(table_of([Workload("MatMul", 16, 64, 64)], densities=(0.2,)))
    found = model.estimate(Workload("MatMul", 32, 64, 64), "16x1", 0.2)
    assert found.ms > 0
    assert found.spread >= 0.5
    assert model.left_out_errors() == {}


def test_without_a_profile_it_is_said_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no profile; 'sparsecc targets profile -o"):
        CostModel(CostTable(None, {}))
    with pytest.raises(UsageError, match="does not exist"):
        CostModel.load(tmp_path / "none.json")


def test_forms_and_threads_that_were_not_measured_are_refused() -> None:
    model = CostModel(table_of(products()))
    with pytest.raises(MeasurementError, match="no profile of 2:4 for linear products"):
        model.estimate(products()[0], "2:4", 0.5)
    with pytest.raises(MeasurementError, match="for conv products"):
        model.estimate(Workload("Conv", 64, 8, 72, (3, 3), (1, 1)), "16x1", 0.5)
    with pytest.raises(MeasurementError, match="density 0"):
        model.estimate(products()[0], "16x1", 0.0)
    with pytest.raises(UsageError, match=r"profiled with \[1\] threads, not 2"):
        CostModel(table_of(products()), threads=2)
    both = table_of(products())
    for key, times in table_of(products(), threads=2):
        both.put(key, times)
    with pytest.raises(UsageError, match="give one of them"):
        CostModel(both)
    assert CostModel(both, threads=2).threads == 2


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_no_times_are_refused(ms: float) -> None:
    table = table_of(products())
    key = next(iter(table))[0]
    table.put(key, {"16x1": ms})
    with pytest.raises(UsageError, match="no positive times"):
        CostModel(table)


@pytest.mark.parametrize(
    "key",
    [
        "profile ",
        "profile MatMul 1x2: pattern 16x1 density=0.5 threads=1 copies=1 seed=0",
        "profile MatMul 0x2x3: dense density=0.5 threads=1 copies=1 seed=0",
        "profile MatMul 1x2x3: dense density=0 threads=1 copies=1 seed=0",
        "profile MatMul 1x2x3: dense density=0.5 threads=" + "9" * 5000 + " copies=1 seed=0",
    ],
)
def test_keys_that_are_none_are_refused(key: str) -> None:
    table = table_of(products())
    table.put(key, {"dense": 1.0})
    with pytest.raises(SpecError):
        CostModel(table)


def test_a_table_of_another_machine_can_be_planned_with(tmp_path: Path) -> None:
    own = table_of(products())
    foreign = CostTable(None, {**own.facts, "machine": "aarch64", "cpu": "Cortex-A72"})
    for key, times in own:
        foreign.put(key, times)
    foreign.put("model 1234 sites=3 threads=1", {"relative": 0.5})  # of other runs: not looked at
    foreign.save(tmp_path / "arm.json")
    with pytest.raises(UsageError, match="another machine"):
        CostTable.open(tmp_path / "arm.json")
    model = CostModel.load(tmp_path / "arm.json")
    assert "Cortex-A72" in model.provenance
    assert "another machine, not measured here" in model.provenance
    assert model.differing == ["cpu", "machine"]
    assert "this machine" in CostModel(own).provenance


@pytest.mark.parametrize(
    "work",
    [
        Workload("MatMul", 128, 1536, 384, activation="Gelu"),
        Workload("Gemm", 1, 1, 1),
        Workload("Conv", 784, 64, 576, (3, 3), (2, 1)),
        Workload("Conv", 784, 64, 9, (3, 3), (1, 1), 64, "Clip"),
        Workload("Conv", 20, 4, 12, (3,), (1,)),
    ],
)
def test_keys_are_read_back(work: Workload) -> None:
    assert Workload.parse(str(work)) == work
    for density in (1.0, 0.5, 0.083333, 2.5e-05):
        key = ProfileKey(work, "pattern 16x1", density, 2, 16, 7)
        assert ProfileKey.parse(str(key)) == key


def test_least_squares_without_negative_numbers() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        columns, target = rng.normal(size=(9, 4)), rng.normal(size=9)
        found = nonnegative_fit(columns, target)
        gradient = columns.T @ (columns @ found - target)
        assert found.min() >= 0
        assert gradient.min() > -1e-9  # going up in any coordinate is no better
        assert np.abs(gradient[found > 0]).max(initial=0) < 1e-9


def test_isotonic_is_the_nearest_rising_sequence() -> None:
    assert isotonic([1, 3, 2, 4]) == [1, 2.5, 2.5, 4]
    assert isotonic([3, 2, 1]) == [2, 2, 2]
    assert isotonic([1, 2]) == [1, 2]
