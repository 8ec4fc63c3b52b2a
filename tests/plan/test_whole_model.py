"""Times of models from those of their sites."""

from __future__ import annotations

import pytest

from sparsecc.errors import MeasurementError
from sparsecc.plan.items import Candidate, Choice, Estimate, Item
from sparsecc.plan.whole_model import ModelFit, predict_model, sum_of


def item(name: str, dense: float, sparse: float) -> Item:
    times = Estimate(dense, "measured", 0.1), Estimate(sparse, "interpolated", 0.2)
    return Item(name, (name,), tuple(Candidate((), 0.0, time, 0) for time in times))


ITEMS = [item("a", 4.0, 1.0), item("b", 2.0, 1.5), item("c", 1.0, 3.0)]


def choice(*numbers: int) -> Choice:
    return Choice(dict(zip("abc", numbers, strict=True)), 0.0, 0, 0.0)


def test_what_sites_gain_alone_the_model_gains() -> None:
    assert predict_model(10.0, ITEMS, choice(0, 0, 0)) == Estimate(10.0, "measured")
    found = predict_model(10.0, ITEMS, choice(1, 0, 1))
    assert found.ms == pytest.approx(10 - 3 + 2)
    assert found.source == "interpolated"
    assert found.spread == pytest.approx((0.4 + 0.2 + 0.1 + 0.6) / found.ms)
    assert (sum_of(ITEMS), sum_of(ITEMS, choice(1, 1, 0))) == (7.0, 3.5)


def test_sites_that_take_longer_alone_share_the_time_of_the_model() -> None:
    assert predict_model(3.5, ITEMS, choice(1, 0, 0)).ms == pytest.approx(3.5 - 2.0 + 1.0)
    assert predict_model(3.5, ITEMS, choice(1, 1, 1)).ms == pytest.approx(1.0 + 1.5 + 3.0)


def test_no_model_is_faster_than_what_is_in_it() -> None:
    assert predict_model(8.0, ITEMS, choice(1, 1, 1), ModelFit(-6.0, 2.0)).ms == pytest.approx(2 * 5.5)


def test_the_share_is_found_from_measured_models() -> None:
    fit = ModelFit.of([(7.0, 10.0), (4.0, 10 - 0.8 * 3), (3.5, 10 - 0.8 * 3.5)])
    assert (fit.rest, fit.share) == (pytest.approx(10 - 5.6), pytest.approx(0.8))
    assert predict_model(10.0, ITEMS, choice(1, 1, 1), fit).ms == pytest.approx(10 - 0.8 * 1.5)


def test_models_that_only_got_slower_give_no_negative_share() -> None:
    fit = ModelFit.of([(7.0, 10.0), (4.0, 11.0)])
    assert (fit.rest, fit.share) == (10.0, 0.0)
    assert ModelFit.of([(7.0, 10.0), (7.0, 11.0)]) == ModelFit(3.0, 1.0)


@pytest.mark.parametrize("points", [[], [(1.0, 0.0)], [(1.0, 2.0), (float("nan"), 1.0)]])
def test_times_that_are_none_are_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(MeasurementError, match="no times to fit"):
        ModelFit.of(points)
