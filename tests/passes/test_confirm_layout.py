"""The search for the set of sites that makes the whole model fastest."""

from __future__ import annotations

from sparsecc.passes.lower.confirm_layout import best_subset


def test_all_sites_when_gains_add_up() -> None:
    gains = {f"s{i}": 2.0 for i in range(6)}
    best, time = best_subset(gains, lambda chosen: 1 - 0.1 * len(chosen), 12)
    assert best == frozenset(gains)
    assert time == 1 - 0.1 * 6


def test_dense_when_everything_costs() -> None:
    best, time = best_subset({"a": 1.5, "b": 3.0}, lambda chosen: 1 + 0.1 * len(chosen), 12)
    assert best == frozenset()
    assert time == 1


def test_neighbours_that_only_pay_together() -> None:
    """An island of one site breaks a fused region; the run s4..s7 as a whole pays."""
    gains = {f"s{i}": 1.3 for i in range(8)}

    def time(chosen: frozenset[str]) -> float:
        names = [f"s{i}" in chosen for i in range(8)]
        borders = sum(a != b for a, b in zip([False, *names], [*names, False], strict=True))
        return 1 - 0.05 * sum(names[4:]) + 0.08 * sum(names[:4]) + 0.03 * borders

    best, _ = best_subset(gains, time, 12)
    assert best == frozenset({"s4", "s5", "s6", "s7"})


def test_trials_are_bounded_and_never_repeated() -> None:
    seen: list[frozenset[str]] = []

    def time(chosen: frozenset[str]) -> float:
        seen.append(chosen)
        return 1.0

    best_subset({f"s{i}": 1 + i / 10 for i in range(64)}, time, 10)
    assert len(seen) == len(set(seen))
    assert len(seen) <= 10 + 6
