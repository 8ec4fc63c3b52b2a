from __future__ import annotations

import os

import numpy as np
import onnx
import pytest

from sparsecc.errors import ModelError, UnsafeModelError, UnsupportedModelError, UsageError
from sparsecc.ir import Model

LINEAR = "g (float[B,64] x) => (float[B,32] y) <float[64,32] w> { y = MatMul(x, w) }"
WEIGHT = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
BYTES = WEIGHT.tobytes()


@pytest.fixture
def linear(proto, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(proto(LINEAR, w=WEIGHT), path)
    return path


def refused(path, kind, *words):
    with pytest.raises(ModelError) as caught:
        Model.load(path)
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_files_that_are_no_models(tmp_path, linear):
    refused(tmp_path / "missing.onnx", ModelError, "no such")
    refused(tmp_path, ModelError, "folder")
    cases = {
        "empty": (b"", "empty"),
        "text": (b"hello, world\n" * 9, "text file"),
        "junk": (b"\x93\x00\xff" * 99, ""),
    }
    for name, (data, word) in cases.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, ModelError, word)


def test_any_truncation_is_refused(tmp_path, linear):
    data = linear.read_bytes()
    part = tmp_path / "part.onnx"
    for end in (*range(1, 60), *range(60, len(data) - 1, 97), len(data) - 1):
        part.write_bytes(data[:end])
        refused(part, ModelError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(linear):
    linear.chmod(0)
    refused(linear, ModelError, "cannot read")


def test_versions(proto, tmp_path):
    path = tmp_path / "m.onnx"

    def saved(**changes):
        changed = proto(LINEAR, w=WEIGHT)
        changed.ir_version = changes.get("ir", 10)
        changed.opset_import[0].version = changes.get("opset", 17)
        path.write_bytes(changed.SerializeToString())
        return path

    refused(saved(ir=99), UnsupportedModelError, "99", "upgrade")
    refused(saved(opset=999), UnsupportedModelError, "999")
    refused(saved(opset=3), UnsupportedModelError, "opset 3")
    refused(saved(ir=0), ModelError, "IR version")
    assert Model.load(saved(opset=11)).opset == 11


def test_invalid_graphs_are_one_line(proto, tmp_path):
    path = tmp_path / "m.onnx"
    for text, word in {
        "g (float[2] x) => (float[2] y) { y = Relu(nowhere) }": "nowhere",
        "g (float[2] x) => (float[2] y) { y = Relu(x) y = Relu(x) }": "y",
        "g (float[2] x) => (float[2] y) { y = NoSuchOp(x) }": "NoSuchOp",
        "g (float[2] x) => (float[2] z) { y = Relu(x) }": "z",
    }.items():
        path.write_bytes(proto(text).SerializeToString())
        refused(path, ModelError, word)


def test_tensors_that_lie_about_their_size(proto, tmp_path):
    path = tmp_path / "m.onnx"
    for change in (
        lambda t: setattr(t, "raw_data", t.raw_data[:-4]),
        lambda t: t.dims.__setitem__(0, 1 << 60),
        lambda t: t.dims.__setitem__(0, -64),
        lambda t: setattr(t, "data_type", 0),
        lambda t: (t.ClearField("raw_data"), t.float_data.extend([1.0] * 7)),
    ):
        changed = proto(LINEAR, w=WEIGHT)
        change(changed.graph.initializer[0])
        path.write_bytes(changed.SerializeToString())
        refused(path, ModelError, "'w'")
    changed.graph.initializer[0].data_type = 77
    path.write_bytes(changed.SerializeToString())
    refused(path, UnsupportedModelError, "77")


def test_random_damage_is_refused_or_harmless(proto, tmp_path):
    """Whatever the bytes: a one-line error of ours, or a model that can be worked with."""
    data = proto(LINEAR, w=WEIGHT[:2]).SerializeToString()
    path = tmp_path / "m.onnx"
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(data)
        for at in rng.integers(0, min(200, len(data)), rng.integers(1, 4)):
            damaged[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path.write_bytes(damaged)
        try:
            model = Model.load(path)
        except ModelError as error:
            text = str(error)
        else:
            model.infer_shapes()
            text = " ".join(str(site.numpy().shape) for site in model.copy().sites())
        assert "\n" not in text


def test_text_attributes_must_be_utf8(proto):
    changed = proto("g (float[2] x) => (float[2] y) { y = Cast <to: int = 1> (x) }")
    changed.graph.node[0].attribute.append(onnx.helper.make_attribute("auto_pad", b"\xff\xfe"))
    with pytest.raises(ModelError):
        Model.from_proto(changed)


def test_custom_operators_are_kept(model):
    header = '<ir_version: 10, opset_import: ["": 17, "other.vendor": 3]>'
    kept = model("g (float[2] x) => (float[2] y) { y = other.vendor.Strange <k: int = 2> (x) }", header)
    assert next(iter(kept.onnx.graph)).op_type == "Strange"


def test_old_models_have_their_weights_taken_off_the_inputs(proto):
    text = "g (float[B,64] x, float[64,32] w) => (float[B,32] y) { y = MatMul(x, w) }"
    for version in (3, 4, 8):
        old = proto(text, f'<ir_version: {version}, opset_import: ["": 8]>', w=WEIGHT)
        model = Model.from_proto(old)
        assert [spec.name for spec in model.input_specs()] == ["x"]
        assert [site.name for site in model.sites()] == ["y"]
        assert model.onnx.ir_version == max(version, 4)
        model.check()


# ------------------------------------------------------------------------------------- external data


@pytest.fixture
def external(tmp_path, proto):
    """Save a model whose weight has the given external entries; return its path."""

    def save(entries, data=BYTES):
        folder = tmp_path / "box"
        folder.mkdir(exist_ok=True)
        (folder / "w.bin").write_bytes(data)
        changed = proto(LINEAR, w=WEIGHT)
        tensor = changed.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "w.bin", **entries}.items():
            tensor.external_data.add(key=key, value=str(value))
        path = folder / "m.onnx"
        path.write_bytes(changed.SerializeToString())
        return path

    return save


@pytest.mark.parametrize("entries", [{}, {"offset": 0}, {"length": WEIGHT.nbytes}])
def test_external_weights_are_mapped(external, entries):
    weight = Model.load(external(entries)).sites()[0]
    assert np.array_equal(weight.numpy(), WEIGHT.T)
    array = weight.weight.const_value.numpy()
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_external_offset(external):
    data = b"abc" + WEIGHT.tobytes()
    assert np.array_equal(Model.load(external({"offset": 3}, data)).sites()[0].numpy(), WEIGHT.T)


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../w.bin"},
        {"location": "/etc/passwd"},
        {"location": "sub/../../w.bin"},
        {"location": ""},
        {"location": "link.bin"},
        {"location": "folder/w.bin"},
        {"offset": 4},
        {"offset": -4},
        {"length": 8},
        {"length": WEIGHT.nbytes * 2},
        {"offset": 1 << 62},
    ],
)
def test_external_lies_and_escapes(external, entries, tmp_path):
    path = external(entries)
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    (path.parent / "link.bin").symlink_to(tmp_path / "w.bin")
    (path.parent / "folder").symlink_to(tmp_path)
    refused(path, UnsafeModelError, "'w'")


def test_a_link_inside_the_folder_is_fine(external):
    path = external({"location": "link.bin"})
    (path.parent / "link.bin").symlink_to("w.bin")
    assert Model.load(path).sites()


@pytest.mark.parametrize(
    ("entries", "kind", "word"),
    [
        ({"location": "none.bin"}, ModelError, "missing"),
        ({"location": "."}, ModelError, "cannot be read"),
        ({"offset": "seven"}, UnsafeModelError, "seven"),
        ({"location": "a\0b"}, UnsafeModelError, "leaves"),
    ],
)
def test_external_files_that_cannot_be_used(external, entries, kind, word):
    refused(external(entries), kind, word)


def test_external_file_cut_short(external):
    refused(external({}, WEIGHT.tobytes()[:-1]), UnsafeModelError, "truncated")
    refused(external({}, b""), UnsafeModelError, "truncated")


def test_a_protobuf_with_external_data_needs_its_folder(external):
    path = external({})
    proto = onnx.load(path, load_external_data=False)
    with pytest.raises(ModelError, match="no folder"):
        Model.from_proto(proto)
    assert Model.from_proto(proto, base_dir=path.parent).sites()
    assert proto.graph.initializer[0].data_location == onnx.TensorProto.EXTERNAL


def test_too_large_for_one_protobuf(model, monkeypatch):
    monkeypatch.setattr("sparsecc.ir.write.INLINE_LIMIT", 1000)
    large = model(LINEAR, w=WEIGHT)
    with pytest.raises(UsageError, match="external"):
        large.to_proto()
    assert len(large.skeleton().SerializeToString()) < 500


def test_pipes_and_devices_are_refused_not_waited_for(external, tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "zero.onnx").symlink_to("/dev/zero")
    for name in ("pipe.onnx", "zero.onnx"):
        refused(tmp_path / name, ModelError, "pipe", "device")
    path = external({"location": "pipe.bin"})
    os.mkfifo(path.parent / "pipe.bin")
    refused(path, ModelError, "'w'", "pipe")


def test_maps_are_not_supported_rather_than_invalid(proto, tmp_path):
    changed = proto("g (float[2] x) => (float[2] y) { y = Relu(x) }")
    element = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [])
    changed.graph.output[0].type.map_type.CopyFrom(
        onnx.TypeProto.Map(key_type=onnx.TensorProto.INT64, value_type=element)
    )
    onnx.save(changed, tmp_path / "map.onnx")
    refused(tmp_path / "map.onnx", UnsupportedModelError, "Map types are not supported", "export it without")
