from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsecc
from sparsecc.errors import UsageError
from sparsecc.ir import Model

LINEAR = """g (float[B,64] x) => (float[B,32] y) <float[64,32] w, float[32] b, float[64,64] v>
  { [first] h = MatMul(x, v) [second] z = MatMul(h, w) y = Add(z, b) }"""
RNG = np.random.default_rng(0)
WEIGHTS = {
    name: RNG.standard_normal(shape).astype(np.float32)
    for name, shape in {"w": (64, 32), "b": (32,), "v": (64, 64)}.items()
}


@pytest.fixture
def linear(model):
    return model(LINEAR, **WEIGHTS)


def leftovers(folder):
    return sorted(path.name for path in Path(folder).iterdir() if path.name.startswith("."))


def values(model):
    return {name: v.const_value.numpy() for name, v in model.onnx.graph.initializers.items()}


@pytest.mark.parametrize("external", [False, True])
def test_round_trip_and_equal_bytes(linear, tmp_path, run, external):
    paths = [tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"]
    for path in paths:
        path.parent.mkdir()
        linear.save(path, external_data=external)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    again = Model.load(paths[0])
    assert all(np.array_equal(values(again)[name], array) for name, array in WEIGHTS.items())
    x = RNG.random((3, 64), np.float32)
    assert np.array_equal(run(linear, {"x": x})[0], run(paths[0], {"x": x})[0])
    assert sorted(os.listdir(paths[0].parent)) == ["m.onnx", "m.onnx.data"][: 1 + external]
    again.save(paths[1])  # default: as it was loaded
    assert paths[1].read_bytes() == paths[0].read_bytes()


def test_external_layout_is_sorted_aligned_and_relative(linear, tmp_path):
    linear.save(tmp_path / "m.onnx", external_data=True)
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    assert entries["b"] == {}  # small ones stay inside
    assert {entries[name]["location"] for name in "wv"} == {"m.onnx.data"}
    assert int(entries["v"]["offset"]) == 0
    assert int(entries["w"]["offset"]) == 64 * 64 * 4
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)


def test_large_tensors_start_a_page(model, tmp_path):
    sizes = {"a": (1000,), "b": (200, 100), "c": (300,)}
    weights = {name: np.ones(shape, np.float32) for name, shape in sizes.items()}
    text = "g (float[1] x) => (float[1] y) { p = Size(a) q = Size(b) r = Size(c) y = Identity(x) }"
    model(text, **weights).save(tmp_path / "m.onnx", external_data=True)
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    offsets = {t.name: int(t.external_data[1].value) for t in proto.graph.initializer}
    assert offsets == {"a": 0, "b": 4096, "c": 4096 + 80000}


def test_saving_over_the_files_it_was_loaded_from(linear, tmp_path):
    path = tmp_path / "m.onnx"
    linear.save(path, external_data=True)
    model = Model.load(path)
    site = model.sites("second")[0]
    site.replace(np.zeros(site.shape))  # v, w: w changes, v stays mapped from the old file
    for _ in range(2):
        model.save(path)
        again = values(Model.load(path))
        assert np.array_equal(again["v"], WEIGHTS["v"])
        assert not again["w"].any()
    assert np.array_equal(values(model)["v"], WEIGHTS["v"])


def test_a_changed_layout_over_the_mapped_file(linear, tmp_path, model):
    """Weights not looked at before the save must still come from the old file."""
    path = tmp_path / "m.onnx"
    linear.save(path, external_data=True)
    mapped = Model.load(path)
    model(LINEAR, w=WEIGHTS["w"] * 2, b=WEIGHTS["b"], v=WEIGHTS["v"] * 2).save(path, external_data=True)
    assert np.array_equal(values(mapped)["v"], WEIGHTS["v"])


def test_everything_else_is_kept(tmp_path):
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 17, "local": 1], producer_name: "someone", model_version: 7,
            doc_string: "about", metadata_props: ["b": "2", "a": "1"]>
        g (float[B,4] x) => (float[B,4] y) <float[B,4] h>
        { [n1] h = Relu(x) [n2] y = local.f <k: int = 3> (h) }
        <domain: "local", opset_import: ["": 17]> f <k> (a) => (b) { [in] b = Softmax <axis: int = 1> (a) }"""
    )
    proto.graph.doc_string = "graph"
    proto.graph.node[0].doc_string = "node"
    proto.graph.node[0].metadata_props.add(key="who", value="me")
    note = proto.graph.quantization_annotation.add(tensor_name="h")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    path = tmp_path / "m.onnx"
    Model.from_proto(proto).save(path)
    again = onnx.load(path)
    proto.metadata_props.sort(key=lambda entry: entry.key)
    for node in (proto.graph.node[0], proto.functions[0].node[0]):
        node.ClearField("domain")  # the parser writes the empty text out
    assert again.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    copied = Model.load(path).copy().to_proto()
    assert copied.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    assert Model.load(path).metadata == {"a": "1", "b": "2"}


# ------------------------------------------------------------------------------------------ failures


def save_error(model, path, external):
    try:
        model.save(path, external_data=external)
    except UsageError as error:
        return str(error)
    return None


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failure_at_any_step_leaves_the_old_files(
    linear, model, tmp_path, monkeypatch, external, old, call
):
    path = tmp_path / "m.onnx"
    if old:
        linear.save(path, external_data=external)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = model(LINEAR, **{name: array * 3 for name, array in WEIGHTS.items()})
    real, calls = getattr(os, call), []
    for step in range(20):
        calls.clear()

        def failing(*args, step=step):
            calls.append(args)
            if len(calls) == step + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            error = save_error(other, path, external)
        if error is None:
            break
        assert "No space left" in error
        assert "\n" not in error
        # The last sync, of the folder, comes after the rename: then the new files are complete.
        if call == "replace" or len(calls) <= 1 + external:
            assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert step >= 1
    assert leftovers(tmp_path) == []
    assert np.array_equal(values(Model.load(path))["v"], WEIGHTS["v"] * 3)


def test_a_short_write(linear, tmp_path):
    """A limit on file size fails the write itself, in the middle of the weights."""
    path = tmp_path / "m.onnx"
    linear.save(path, external_data=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    script = """
        import resource, signal, sys
        from sparsecc.errors import UsageError
        from sparsecc.ir import Model
        model = Model.load(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        for external in (True, False):
            try:
                model.save(sys.argv[1], external_data=external)
            except UsageError as error:
                assert "cannot write" in str(error), error
            else:
                sys.exit("saved")
    """
    assert subprocess_run(script, path).returncode == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("step", [1, 2])
def test_a_killed_process_leaves_the_old_model(linear, tmp_path, step):
    path = tmp_path / "m.onnx"
    linear.save(path, external_data=True)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    script = f"""
        import os, signal, sys
        from sparsecc.ir import Model
        model = Model.load(sys.argv[1])
        model.metadata["changed"] = "yes"
        calls = []
        def fsync(handle):
            calls.append(handle)
            if len(calls) == {step}:
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = fsync
        model.save(sys.argv[1])
    """
    assert subprocess_run(script, path).returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == step
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name[0] != "."} == before
    Model.load(path).save(path)
    assert leftovers(tmp_path) == []


def subprocess_run(script, path):
    root = str(Path(sparsecc.__path__[0]).parent)
    env = {**os.environ, "PYTHONPATH": root}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], env=env, check=False)


def test_places_that_cannot_be_written(linear, tmp_path):
    for path, word in ((tmp_path, "folder"), (tmp_path / "none" / "m.onnx", "No such file")):
        with pytest.raises(UsageError, match=word):
            linear.save(path)


def test_never_more_than_the_limit_in_one_protobuf(linear, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsecc.ir.write.INLINE_LIMIT", 20_000)
    linear.save(tmp_path / "m.onnx")  # the default goes external by itself
    assert (tmp_path / "m.onnx.data").stat().st_size == linear.nbytes - 32 * 4
    with pytest.raises(UsageError, match="external"):
        linear.save(tmp_path / "n.onnx", external_data=False)
    assert leftovers(tmp_path) == []


def test_more_than_two_gigabytes(proto, tmp_path):
    """The file is a hole, so nothing is read; one copy of it into a protobuf would fail."""
    size = 3 << 30
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(size)
    changed = proto("g (float[B,32768] x) => (float[B,24576] y) { y = MatMul(x, w) }")
    tensor = changed.graph.initializer.add(name="w", data_type=1, dims=[32768, 24576])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    path = tmp_path / "m.onnx"
    path.write_bytes(changed.SerializeToString())
    model = Model.load(path).copy()
    assert model.nbytes == size
    assert model.sites()[0].shape == (24576, 32768)
    assert model.infer_shapes() is None
    model.check()
    with pytest.raises(UsageError, match="external"):
        model.save(path, external_data=False)
    with pytest.raises(UsageError, match="external"):
        model.to_proto()


def test_fingerprint(linear, tmp_path):
    first = linear.fingerprint()
    linear.metadata["sparsecc.input"] = first
    assert linear.copy().fingerprint() == first
    for external in (False, True):
        linear.save(tmp_path / "m.onnx", external_data=external)
        assert Model.load(tmp_path / "m.onnx").fingerprint() == first
    changed = linear.copy()
    changed.sites()[0].replace(np.zeros((64, 64)))
    assert changed.fingerprint() != first
    assert linear.fingerprint() == first


def test_a_device_is_not_replaced_by_a_file(linear, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="a pipe, a socket or a device"):
        linear.save(tmp_path / "pipe")
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()
