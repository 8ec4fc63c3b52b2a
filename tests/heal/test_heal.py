"""Healing: what it must keep, when it stops, how it resumes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from sparsecc.calib import Calibration, open_session
from sparsecc.errors import MissingExtraError, SpecError, UnsupportedModelError, UsageError
from sparsecc.ir import Model
from sparsecc.passes.recover.heal import Heal
from sparsecc.pm import PassContext, Pipeline


def normal(*shape: int, seed: int = 0, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def mlp(dtype=np.float32) -> Model:
    kind = {np.float32: "float", np.float16: "float16"}[dtype]
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g ({kind}[B,24] x) => ({kind}[B,6] y) {{
            [up] h = Gemm<transB=1>(x, w1, b1)
            a = Relu(h)
            [middle] m = MatMul(a, w2)
            c = Relu(m)
            [down] y = MatMul(c, w3)
        }}"""
    )
    arrays = {"w1": normal(32, 24, seed=1), "b1": normal(32, seed=2), "w2": normal(32, 32, seed=3),
              "w3": normal(32, 6, seed=4)}  # fmt: skip
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array((0.2 * array).astype(dtype), name))
    return Model.from_proto(proto)


def samples(count: int = 12, dtype=np.float32) -> list[dict[str, np.ndarray]]:
    mix = normal(24, 24, seed=5)
    return [{"x": (normal(16, 24, seed=10 + number) @ mix).astype(dtype)} for number in range(count)]


def healed(
    spec: str,
    model: Model | None = None,
    batches=None,
    prune: str = "prune-magnitude{sparsity=0.6}",
    **context,
):
    model = model or mlp()
    calibration = Calibration.from_batches(batches or samples(), model, threads=1)
    reports = Pipeline.parse(f"{prune},{spec}" if prune else spec).run(
        model, PassContext(calibration=calibration, threads=1, **context)
    )
    return model, reports[-1]


def pruned() -> Model:
    model = mlp()
    Pipeline.parse("prune-magnitude{sparsity=0.6}").run(model)
    return model


def error(model: Model, inputs) -> float:
    dense, found = (open_session(item).run(inputs)["y"].astype(np.float64) for item in (mlp(), model))
    return float(np.square(found - dense).sum() / np.square(dense).sum())


def weights(model: Model) -> dict[str, np.ndarray]:
    return {site.name: site.numpy() for site in model.sites()}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="healing needs PyTorch: pip install 'sparsecc[heal]'")


def test_a_model_whose_weights_reach_no_output_is_refused(torch):
    text = "g (float[B,24] x) => (float[B,24] y) { y = Relu(x) h = MatMul(x, w) }"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(24, 64), "w"))
    with pytest.raises(UsageError, match="no weight reaches"):
        healed("heal{steps=2}", Model.from_proto(proto))


@pytest.mark.parametrize("options", ["", " gradual=0.4", " kl=0.1", " precision=bfloat16"])
def test_halves_the_error_on_unseen_inputs_and_keeps_the_zeros(torch, options):
    fresh = {"x": normal(64, 24, seed=99) @ normal(24, 24, seed=5)}
    model, report = healed(f"heal{{steps=150 learning-rate=0.01{options}}}")
    assert error(model, fresh) < 0.5 * error(pruned(), fresh)
    for name, before in weights(pruned()).items():
        np.testing.assert_array_equal(weights(model)[name] != 0, before != 0)
    numbers = report.changed[0].numbers
    assert numbers["error_after"] < numbers["error_before"]
    assert numbers["density_after"] == numbers["density_before"]


def test_padding_has_no_say(torch):
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[B,T,24] x, int64[B,T] attention_mask) => (float[B,T,6] y) {
            h = MatMul(x, w1)  a = Relu(h)  y = MatMul(a, w2)
        }"""
    )
    for name, shape, seed in (("w1", (24, 32), 1), ("w2", (32, 6), 2)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(0.2 * normal(*shape, seed=seed), name))
    batches = []
    for number in range(6):
        mask = (np.arange(5) < np.array([[5], [3], [1], [4]])).astype(np.int64)
        batches.append({"x": normal(4, 5, 24, seed=10 + number), "attention_mask": mask})
    loud = [
        {**batch, "x": np.where(batch["attention_mask"][:, :, None], batch["x"], 1e3)} for batch in batches
    ]
    found = []
    for data in (batches, [{**batch, "x": batch["x"].astype(np.float32)} for batch in loud]):
        dense = Model.from_proto(proto)
        start = dense.copy()
        Pipeline.parse("prune-magnitude{sparsity=0.6 min-elements=1}").run(start)
        found.append(healed("heal{steps=30 learning-rate=0.01}", start, data, prune="", reference=dense)[0])
    assert weights(found[0]).keys() == weights(found[1]).keys()
    for name, array in weights(found[0]).items():
        np.testing.assert_allclose(array, weights(found[1])[name], rtol=1e-4, atol=1e-5)


def test_half_precision_weights_keep_their_type(torch):
    model, report = healed(
        "heal{steps=60 learning-rate=0.01}",
        mlp(np.float16),
        samples(dtype=np.float16),
        "prune-magnitude{sparsity=0.5}",
    )
    assert report.changed
    assert all(site.dtype == np.float16 for site in model.sites())


def test_the_model_stays_where_training_does_not_help(torch):
    before = pruned()
    model, report = healed("heal{steps=25 learning-rate=0.9}", before.copy(), prune="", reference=mlp())
    if report.changed:  # a lucky run: then it must really be better
        assert report.changed[0].numbers["error_after"] < report.changed[0].numbers["error_before"]
    else:
        assert model.fingerprint() == before.fingerprint()
        assert any("stays as it was" in note for note in report.notes)


def test_stops_early_when_patience_is_over(torch):
    _, report = healed("heal{steps=2500 learning-rate=0.5 patience=2}")
    steps = int(report.notes[0].split(" after ")[1].split()[0])
    assert steps < 2500


def test_a_dense_model_has_nothing_to_recover():
    _, report = healed("heal", prune="")
    assert not report.changed
    assert "nothing to recover" in report.notes[0]


def test_the_same_seed_gives_the_same_weights_and_resuming_changes_nothing(torch, tmp_path, monkeypatch):
    from sparsecc.heal import training

    spec = f"heal{{steps=40 learning-rate=0.01 gradual=0.3 checkpoint={tmp_path / 'run.ckpt'}}}"
    whole, _ = healed(spec.replace("run.ckpt", "whole.ckpt"))
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    original = training._Training._train_step

    def stop(self) -> None:
        if self.step == 23:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(training._Training, "_train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        healed(spec)
    monkeypatch.setattr(training._Training, "_train_step", original)
    resumed, _ = healed(spec)
    assert resumed.fingerprint() == whole.fingerprint()
    again, _ = healed(spec)  # a finished run is not trained again
    assert again.fingerprint() == whole.fingerprint()


def test_a_checkpoint_of_another_run_is_refused(torch, tmp_path):
    path = tmp_path / "run.ckpt"
    healed(f"heal{{steps=2 checkpoint={path}}}")
    with pytest.raises(UsageError, match="another model"):
        healed(f"heal{{steps=3 checkpoint={path}}}")
    path.write_bytes(b"no checkpoint")
    with pytest.raises(UsageError, match="not a checkpoint"):
        healed(f"heal{{steps=2 checkpoint={path}}}")


def test_bad_circumstances_are_told_in_one_line(torch, tmp_path):
    with pytest.raises(UsageError, match="2 calibration batches"):
        healed("heal", batches=samples(1))
    with pytest.raises(UsageError, match="no such folder"):
        healed(f"heal{{checkpoint={tmp_path / 'nowhere' / 'run.ckpt'}}}")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            healed("heal{device=cuda steps=2}")


@pytest.mark.parametrize("options", ["", " precision=bfloat16 gradual=0.3"])
def test_trains_on_a_gpu_and_resumes_there(torch, tmp_path, options):
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    fresh = {"x": normal(64, 24, seed=99) @ normal(24, 24, seed=5)}
    spec = f"heal{{device=cuda steps=150 learning-rate=0.01 checkpoint={tmp_path / 'run.ckpt'}{options}}}"
    model, _ = healed(spec)
    assert error(model, fresh) < 0.5 * error(pruned(), fresh)
    assert healed(spec)[0].fingerprint() == model.fingerprint()


def test_operators_without_a_differentiable_form_are_named(torch):
    proto = mlp().to_proto()
    proto.graph.node[1].op_type = "Hardmax"
    with pytest.raises(UnsupportedModelError, match="Hardmax"):
        healed("heal", Model.from_proto(proto))


def test_without_pytorch_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sparsecc\[heal\]'"):
        healed("heal")


@pytest.mark.parametrize(
    "options", ["steps=0", "learning-rate=0", "gradual=1", "holdout=0.9", "kl=-1", "patience=0"]
)
def test_options_are_checked(options):
    with pytest.raises(SpecError):
        Pipeline.parse(f"heal{{{options}}}")


def test_the_spec_reads_back():
    text = "heal{steps=7 learning-rate=0.01 gradual=0.2 checkpoint=a/b.ckpt device=cpu}"
    assert Pipeline.parse(str(Pipeline.parse(text))) == Pipeline.parse(text)
    assert str(Heal()) == "heal"
