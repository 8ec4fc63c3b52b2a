"""What planning is predicted to take, and how predictions follow what it took."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from sparsecc.ir import Model
from sparsecc.plan.outlook import Effort, Outlook, Pace, duration, outlook_of, peak_bytes
from sparsecc.plan.parts import Part, find_parts
from sparsecc.plan.pricing import Family
from sparsecc.plan.results import Results

FAMILIES = [Family((("prune-magnitude",), ("prune-wanda",)))]
PREDICTED = Outlook(3, 2, 10, 8.0, 2.0, 1000)


def parts(width: int, count: int) -> list[Part]:
    """Layers of equal shapes one after another."""
    names = "".join(f", float[{width},{width}] w{at}" for at in range(count)).removeprefix(", ")
    values = ["x", *(f"h{at}" for at in range(count - 1)), "y"]
    lines = "\n".join(
        f"{values[at + 1]}r = MatMul({values[at]}, w{at})\n{values[at + 1]} = Relu({values[at + 1]}r)"
        for at in range(count)
    )
    ends = f"(float[4,{width}] x) => (float[4,{width}] y)"
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> m {ends} <{names}> {{ {lines} }}'
    )
    for at in range(count):
        proto.graph.initializer.append(numpy_helper.from_array(np.eye(width, dtype=np.float32), f"w{at}"))
    return find_parts(Model.from_proto(proto), coupled=False)


def outlook(width: int, count: int, known: int = 0) -> Outlook:
    own = parts(width, count)
    shapes = {part.name: (4, width) for part in own}
    return outlook_of(own, FAMILIES, shapes, {part.name for part in own[:known]})


def test_larger_and_more_takes_longer() -> None:
    small, more, wider = outlook(16, 1), outlook(16, 4), outlook(512, 4)
    assert (small.parts, more.parts, more.forms) == (1, 4, 2)
    assert small.seconds < more.seconds < wider.seconds
    assert more.seconds < 4 * small.seconds, "equal shapes are timed once"
    assert small.bytes <= more.bytes < wider.bytes
    assert wider.model_seconds > small.model_seconds


def test_what_is_known_takes_nothing() -> None:
    whole, half, done = (outlook(64, 4, known) for known in (0, 2, 4))
    assert whole.seconds > half.seconds > done.seconds == 0
    assert (half.new, done.new) == (2, 0)


def test_predictions_follow_what_it_took() -> None:
    results = Results(None)
    pace = Pace(results, {"cpu": "one"})
    for _ in range(12):
        pace.learn("planning", pace.of(PREDICTED).seconds, 24.0)
    assert pace.of(PREDICTED).seconds == pytest.approx(24.0, rel=0.01)
    assert pace.of(PREDICTED).model_seconds == 2.0
    assert Pace(results, {"cpu": "other"}).of(PREDICTED) == PREDICTED


@pytest.mark.parametrize(
    "kept", [{"planning": "fast"}, {"planning": -1}, {"planning": float("nan")}, {}, None]
)
def test_a_damaged_file_counts_as_missing(kept: dict[str, object] | None) -> None:
    results = Results(None)
    pace = Pace(results, {})
    if kept is not None:
        pace.learn("making", 2.0, 4.0)
        results.put("pace", pace._key, kept)
    assert pace.get("planning") == 1.0


def test_a_short_run_teaches_nothing() -> None:
    pace = Pace(Results(None), {})
    pace.learn("planning", 0.2, 0.9)
    assert pace.get("planning") == 1.0


def test_effort_as_plain_values() -> None:
    told = Effort(PREDICTED, 9.0, 5.0, 2).to_json()
    assert (told["planning_seconds"], told["planning_predicted"]) == (9.0, 8.0)
    assert (told["making_seconds"], told["model_predicted"], told["models"]) == (5.0, 2.0, 2)
    assert told["bytes"] == pytest.approx(peak_bytes(), rel=0.2)
    assert Effort().to_json()["making_seconds"] is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (42.4, "42 s"), (600, "10 minutes"), (7200, "2.0 hours")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
