"""Budgets as text."""

from __future__ import annotations

import pytest

from sparsecc.errors import UsageError
from sparsecc.plan.budget import Amount, parse_drop, parse_latency, parse_size


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.5x", Amount(0.5, True)), ("5ms", Amount(5.0, False)), ("1.5 s", Amount(1500.0, False)),
        ("800us", Amount(0.8, False)), (".5X", Amount(0.5, True)), ("2e-1x", Amount(0.2, True)),
    ],
)  # fmt: skip
def test_latency(text: str, found: Amount) -> None:
    assert parse_latency(text).relative == found.relative
    assert parse_latency(text).value == pytest.approx(found.value)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("20MB", 20e6), ("8MiB", 8 << 20), ("4096", 4096.0), ("1.5gb", 1.5e9), ("0.25x", 25.0)],
)
def test_size_of_a_model_of_100_bytes(text: str, bytes_: float) -> None:
    assert parse_size(text).of(100.0) == pytest.approx(bytes_)


def test_drop_is_a_share_of_the_score_or_in_its_unit() -> None:
    assert parse_drop("1%").of(-0.8) == pytest.approx(0.008)
    assert parse_drop("0.01").of(0.8) == 0.01
    assert parse_drop("0").of(0.8) == 0.0


@pytest.mark.parametrize("text", ["", "x", "-1ms", "0ms", "nanms", "5", "5 apples", "1e999ms", "5ms ms"])
def test_latency_of_another_form(text: str) -> None:
    with pytest.raises(UsageError, match=r"--budget-latency .*"):
        parse_latency(text)


@pytest.mark.parametrize("text", ["", "-1%", "one", "1e999", "1 %%"])
def test_drop_of_another_form(text: str) -> None:
    with pytest.raises(UsageError, match=r"--max-drop .*: expected 1%"):
        parse_drop(text)
