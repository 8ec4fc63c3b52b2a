"""Metrics that models are judged by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration
from sparsecc.errors import UsageError
from sparsecc.ir import Model
from sparsecc.plan.metric import METRICS, open_metric, read_labels

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 4)).astype(np.float32)


def linear(weight: np.ndarray) -> Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        f"g (float[n,4] x) => (float[n,{weight.shape[1]}] y) {{ [fc] y = MatMul(x, w) }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "w"))
    return Model.from_proto(proto)


WEIGHT = RNG.standard_normal((4, 3))
BATCHES = [{"x": X[:32]}, {"x": X[32:]}]


def test_output_error_is_the_relative_distance() -> None:
    metric = open_metric("output-error", linear(WEIGHT), BATCHES)
    other = WEIGHT + 0.1 * RNG.standard_normal(WEIGHT.shape)
    expected = np.linalg.norm(X @ (other - WEIGHT)) / np.linalg.norm(X @ WEIGHT)
    assert metric.score(linear(WEIGHT)) == 0
    assert metric.score(linear(other)) == pytest.approx(expected, rel=1e-4)
    assert metric.damage(0.0, expected) == expected


def test_cosine_does_not_see_length_and_spearman_only_order() -> None:
    cosine = open_metric("cosine", linear(WEIGHT), BATCHES)
    assert cosine.score(linear(3 * WEIGHT)) == pytest.approx(1)
    assert cosine.score(linear(-WEIGHT)) == pytest.approx(-1)
    spearman = open_metric("spearman", linear(WEIGHT[:, :1]), BATCHES)
    assert spearman.score(linear(5 * WEIGHT[:, :1])) == pytest.approx(1)
    assert spearman.damage(1.0, 0.9) == pytest.approx(0.1)


def test_spearman_with_scores_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    scores = np.round(RNG.standard_normal(40), 1)  # with ties
    metric = open_metric("spearman", linear(WEIGHT[:, :1]), BATCHES, labels=scores)
    expected = stats.spearmanr((X @ WEIGHT[:, :1]).ravel(), scores).statistic
    assert metric.score(linear(WEIGHT[:, :1])) == pytest.approx(expected, abs=1e-6)


def test_accuracy_counts_right_answers() -> None:
    labels = (X @ WEIGHT).argmax(1)
    labels[:10] = (labels[:10] + 1) % 3
    metric = open_metric("accuracy", linear(WEIGHT), BATCHES, labels=labels)
    assert metric.score(linear(WEIGHT)) == pytest.approx(0.75)
    assert metric.higher_is_better
    assert not metric.smooth
    with pytest.raises(UsageError, match="39 labels for 40 samples"):
        open_metric("accuracy", linear(WEIGHT), BATCHES, labels=labels[1:])
    with pytest.raises(UsageError, match="needs labels"):
        open_metric("accuracy", linear(WEIGHT), BATCHES)


def test_perplexity_is_that_of_the_next_token() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        "g (int64[b,t] input_ids, int64[b,t] attention_mask) => (float[b,t,5] y) { y = Gather(w, input_ids) }"
    )
    table = RNG.standard_normal((5, 5)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "w"))
    ids, mask = RNG.integers(0, 5, (3, 7)), np.ones((3, 7), np.int64)
    mask[1, 4:] = 0
    logs = table - np.log(np.exp(table.astype(float)).sum(1, keepdims=True))
    lost = [-logs[ids[b, t], ids[b, t + 1]] for b in range(3) for t in range(6) if mask[b, t + 1]]
    model = Model.from_proto(proto)
    metric = open_metric("perplexity", model, [{"input_ids": ids, "attention_mask": mask}])
    assert metric.score(model) == pytest.approx(np.exp(np.mean(lost)), rel=1e-5)
    assert metric.damage(10.0, 11.0) == 1.0


def test_a_function_of_the_user_is_called_with_a_session(tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text(
        "import numpy as np\n"
        "def evaluate(run):\n    return float(run({'x': np.ones((1, 4), np.float32)})['y'].sum())\n"
        "def loss(run, data):\n    return sum(len(batch['x']) for batch in data)\n"
        "loss.lower_is_better = True\n"
        "def bad(run):\n    raise ValueError('no\\nluck')\n"
        "def text(run):\n    return 'good'\n"
    )
    model = linear(WEIGHT)
    metric = open_metric(str(file), model, BATCHES)
    assert metric.score(model) == pytest.approx(WEIGHT.sum(), rel=1e-5)
    assert metric.damage(1.0, 0.5) == 0.5
    loss = open_metric(f"{file}:loss", model, BATCHES)
    assert (loss.score(model), loss.damage(1.0, 3.0)) == (40.0, 2.0)
    with pytest.raises(UsageError, match=r"judge.py:bad failed: ValueError: no luck; run it"):
        open_metric(f"{file}:bad", model, BATCHES).score(model)
    with pytest.raises(UsageError, match="returned 'good'; return one finite number"):
        open_metric(f"{file}:text", model, BATCHES).score(model)
    with pytest.raises(UsageError, match="no such function; define gone"):
        open_metric(f"{file}:gone", model, BATCHES)
    before = metric.digest()
    file.write_text(file.read_text() + "\n# changed\n")
    assert metric.digest() != before


def test_unknown_metrics_and_missing_inputs_are_refused() -> None:
    with pytest.raises(UsageError, match=f"known: {', '.join(METRICS)}"):
        open_metric("bleu", linear(WEIGHT), BATCHES)
    with pytest.raises(UsageError, match="--calibration-data"):
        open_metric("cosine", linear(WEIGHT), [])
    with pytest.raises(UsageError, match="does not exist"):
        open_metric("nowhere.py:f", linear(WEIGHT), BATCHES)


def test_labels_may_stand_beside_the_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=X, labels=np.arange(40))
    assert np.array_equal(read_labels(tmp_path / "data.npz"), np.arange(40))
    data = Calibration.from_path(str(tmp_path / "data.npz"), linear(WEIGHT))
    assert sum(len(batch["x"]) for batch in data) == 40
    assert read_labels(tmp_path / "data.py") is None


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("float('nan')", "nan"), ("np.array([0.5])", "array"), ("None", "None"), ("True", "True"),
        ("np.complex64(1)", "complex64"), ("10**400", "1000"), ("10**5000", "something of type int"),
        ("np.zeros((50, 50))", "..."), ("float('-inf')", "-inf"),
    ],
)  # fmt: skip
def test_only_one_finite_number_is_a_score(tmp_path: Path, value: str, shown: str) -> None:
    file = tmp_path / "judge.py"
    file.write_text(f"import numpy as np\ndef evaluate(run):\n    return {value}\n")
    model = linear(WEIGHT)
    with pytest.raises(UsageError, match="return one finite number") as caught:
        open_metric(str(file), model, BATCHES).score(model)
    assert shown in str(caught.value)
    assert len(str(caught.value)) < 150
    assert "\n" not in str(caught.value)
