from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import onnx.parser
import pytest

from sparsecc import verify
from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.verify.timing import _order

QUICK = {"rounds": 4, "warmup": 0, "slice_seconds": 0.0, "max_seconds": 5.0}


def small(repeats: int = 1) -> Model:
    body = " ".join(f"h{i + 1} = Relu(h{i})" for i in range(repeats))
    return Model.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["": 17]>
            g (float[B, 4] x) => (float[B, 4] h{repeats}) {{ h0 = Neg(x) {body} }}"""
        )
    )


def test_counts_and_shape_of_the_result() -> None:
    x = {"x": np.ones((1, 4), np.float32)}
    result = verify.benchmark([small(), small(3)], x, library=False, **QUICK)
    assert len(result.models) == len(result.ratio_to_first) == 2
    assert result.ratio_to_first[0] == 1
    assert result.rounds == 4
    for timing in result.models:
        assert 0 < timing.min_ms <= timing.median_ms
        spread = timing.spread
        assert timing.min_ms == spread.min <= spread.q1 <= spread.median <= spread.q3 <= spread.max
        assert timing.median_ms == spread.median
        assert timing.iterations % 4 == 0
        assert timing.iterations > 0
    document = result.to_json()
    assert set(document) == {"models", "ratio_to_first", "threads", "rounds", "clock"}
    assert set(document["models"][0]) == {"path", "median_ms", "min_ms", "iterations", "spread"}


@pytest.mark.parametrize(("threads", "clock"), [(1, "cpu"), (2, "wall"), (None, "wall")])
def test_clock(threads: int | None, clock: str) -> None:
    x = {"x": np.ones((1, 4), np.float32)}
    result = verify.benchmark([small()], x, library=False, threads=threads, **QUICK)
    assert result.clock == clock
    assert result.threads == (threads or 0)


def test_ratio_is_first_over_own(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [[4.0, 6.0, 8.0], [2.0, 2.0, 2.0]]
    monkeypatch.setattr(verify.timing, "time_interleaved", lambda calls, **_: (times, [1, 1]))
    x = {"x": np.ones((1, 4), np.float32)}
    result = verify.benchmark([small(), small()], x, library=False)
    assert result.ratio_to_first == (1, 3)
    assert [timing.median_ms for timing in result.models] == [6000, 2000]
    assert result.models[0].spread == verify.Spread(4000, 5000, 6000, 7000, 8000)
    assert verify.Spread.of([0.002]) == verify.Spread(2, 2, 2, 2, 2)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no model"):
        verify.benchmark([], {})
    with pytest.raises(UsageError, match="do not fit"):
        verify.benchmark([small()], {"x": np.ones((1, 5), np.float32)}, library=False, **QUICK)
    with pytest.raises(UsageError, match="no array for input x"):
        verify.benchmark([small()], {}, library=False, **QUICK)


def test_deadline_leaves_the_least_number_of_rounds() -> None:
    times, repeats = verify.time_interleaved(
        [lambda: None, lambda: None], rounds=50, min_rounds=2, max_seconds=0, slice_seconds=0.0
    )
    assert [len(row) for row in times] == [2, 2]
    assert all(repeat >= 1 for repeat in repeats)


def test_garbage_collector_is_off_only_while_timing() -> None:
    seen = []
    verify.time_interleaved([lambda: seen.append(gc.isenabled())], rounds=2, warmup=0, slice_seconds=0.0)
    assert not seen[-1]
    assert gc.isenabled()


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_model_takes_every_place_equally_often(count: int) -> None:
    orders = [_order(count, number) for number in range(2 * count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    for place in (0, -1):
        assert set(Counter(order[place] for order in orders).values()) == {2}
