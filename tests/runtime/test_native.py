"""Finding and loading the library, and its C interface from Python."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

import sparsecc
from sparsecc import emit, runtime
from sparsecc.errors import ModelError, RuntimeMissingError, UsageError
from sparsecc.runtime import native


def test_importing_the_package_imports_no_onnx() -> None:
    code = (
        "import sys, sparsecc, sparsecc.runtime; assert sparsecc.__version__; "
        "bad = {'onnx', 'onnxruntime', 'onnx_ir', 'networkx'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_resolve() -> None:
    for name in sparsecc.__all__:
        assert getattr(sparsecc, name) is not None
    assert set(sparsecc.__all__) <= set(dir(sparsecc))
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        sparsecc.optimise  # noqa: B018


def test_library_is_found_and_is_of_this_release() -> None:
    assert runtime.get_library_path().endswith("libsparsecc_ops.so")
    assert runtime.library_version() == sparsecc.__version__
    assert runtime.isas()[-1] == "generic"


def test_explicit_path_comes_first(tmp_path, monkeypatch) -> None:
    mine, theirs = tmp_path / "mine.so", tmp_path / "theirs.so"
    mine.touch()
    theirs.touch()
    monkeypatch.setenv("SPARSECC_OPS_LIBRARY", str(theirs))
    assert runtime.get_library_path() == str(theirs)
    assert runtime.get_library_path(path=mine) == str(mine)


def test_variable_that_names_no_file_is_an_error_not_a_fallback(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SPARSECC_OPS_LIBRARY", str(tmp_path / "gone.so"))
    with pytest.raises(
        RuntimeMissingError, match=r"named by SPARSECC_OPS_LIBRARY does not exist: .*gone\.so"
    ):
        runtime.get_library_path()
    with pytest.raises(RuntimeMissingError, match="named by path does not exist"):
        runtime.get_library_path(path=tmp_path / "other.so")


def test_nothing_built_says_how_to_build(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("SPARSECC_OPS_LIBRARY", raising=False)
    monkeypatch.setattr(native, "_package_folders", lambda: iter([tmp_path]))
    with pytest.raises(RuntimeMissingError, match="make build"):
        runtime.get_library_path()


def test_library_of_another_machine_is_found_beside_or_told_how_to_build(tmp_path, monkeypatch) -> None:
    if runtime.triple_of("cpu") == "aarch64-linux":
        pytest.skip("this machine is that one")
    monkeypatch.setenv("SPARSECC_OPS_LIBRARY", runtime.get_library_path())
    monkeypatch.setattr(native, "_package_folders", lambda: iter([tmp_path]))
    with pytest.raises(RuntimeMissingError, match=r"for aarch64-linux is not built .* `make arm64`"):
        runtime.get_library_path("arm64")
    built = tmp_path / "aarch64-linux" / "lib" / "libsparsecc_ops.so"
    built.parent.mkdir(parents=True)
    built.touch()
    assert runtime.get_library_path("arm64") == str(built)


def test_unknown_target() -> None:
    with pytest.raises(UsageError, match="target 'tpu': known targets are cpu"):
        runtime.get_library_path("tpu")


def test_file_that_is_no_library(tmp_path, monkeypatch) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    with pytest.raises(RuntimeMissingError, match="cannot be registered"):
        runtime.register(onnxruntime.SessionOptions(), broken)
    monkeypatch.setenv("SPARSECC_OPS_LIBRARY", str(broken))
    with pytest.raises(RuntimeMissingError, match="cannot be loaded"):
        runtime.isas()


def test_onnxruntime_too_old(monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.16.3")
    with pytest.raises(RuntimeMissingError, match=r"onnxruntime 1\.16\.3 .* install onnxruntime 1\.17"):
        runtime.register(onnxruntime.SessionOptions())


def test_register_tells_the_library_how_many_threads_there_are() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 3
    runtime.register(options)
    assert options.get_session_config_entry("sparsecc.threads") == "3"


@pytest.mark.parametrize("text", ["", "many", "-4", "999999999999999", "3" * 1000])
def test_nonsense_about_threads_is_no_harm(tmp_path, packed, text: str) -> None:
    file = tmp_path / "m.onnx"
    emit.single_op_model(packed((16, 24), "16x1"), ["B", 24]).save(file)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("sparsecc.threads", text)
    session = runtime.load(file, session_options=options)
    assert session.run(None, {"x": np.ones((2, 24), np.float32)})[0].shape == (2, 16)


def test_load_runs_a_file(tmp_path, packed) -> None:
    weight = packed((16, 24), "16x1")
    file = tmp_path / "m.onnx"
    emit.single_op_model(weight, ["B", 24]).save(file)
    x = np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32)
    registered = onnxruntime.SessionOptions()
    runtime.register(registered)
    runtime.register(registered)
    for options in (None, onnxruntime.SessionOptions(), registered):
        session = runtime.load(file, threads=1, session_options=options)
        assert session.get_session_options().intra_op_num_threads == 1
        np.testing.assert_allclose(
            session.run(None, {"x": x})[0], x @ weight.decode().T, rtol=1e-4, atol=1e-5
        )


def test_load_of_a_bad_file_is_one_line(tmp_path) -> None:
    for content in (None, b"", b"text, no model\n"):
        file = tmp_path / "bad.onnx"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ModelError, match=r"bad\.onnx") as caught:
            runtime.load(file)
        assert "\n" not in str(caught.value)


def test_self_test_runs_the_library() -> None:
    assert emit.self_test() <= 1e-5


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "16x1", "16x4"])
@pytest.mark.parametrize("activation", ["", "Clip", "Silu"])
def test_matmul_through_the_c_interface(packed, pattern: str, activation: str) -> None:
    weight = packed((21, 34), pattern)
    bias = np.random.default_rng(1).standard_normal(21).astype(np.float32)
    x = np.random.default_rng(2).standard_normal((2, 3, 34)).astype(np.float32)
    z = x @ weight.decode().T + bias
    expected = {"": z, "Clip": np.clip(z, -0.5, 0.5), "Silu": z / (1 + np.exp(-z))}[activation]
    for isa in runtime.isas():
        with runtime.NativeMatMul(
            pattern, (21, 34), weight.values, weight.indices,
            bias=bias, activation=activation, alpha=-0.5, beta=0.5, isa=isa,
        ) as op:  # fmt: skip
            np.testing.assert_allclose(op(x), expected, rtol=1e-4, atol=1e-5)
            assert op(x[:, :0]).shape == (2, 0, 21)
            assert op.kernel(3)
            with pytest.raises(UsageError, match="last dimension of 34"):
                op(x[..., 1:])
        op.close()  # a second time does nothing


def test_conv_through_the_c_interface(packed) -> None:
    weight = packed((16, 3, 3, 3), "16x1")
    geometry = runtime.ConvGeometry((3, 3), stride=(2, 1), pad_begin=(1, 1), pad_end=(1, 1))
    x = np.random.default_rng(2).standard_normal((2, 3, 9, 8)).astype(np.float32)
    (expected,) = emit.operators()["BlockSparseConv"].reference(
        [x, weight.values, weight.indices, np.array([16, 3, 3, 3]), np.zeros(16)],
        {"layout": "16x1", "layout_version": 1, "strides": [2, 1], "pads": [1] * 4, "dilations": [1, 1],
         "group": 1},
    )  # fmt: skip
    with runtime.NativeConv("16x1", (16, 27), weight.values, weight.indices, geometry) as op:
        assert op.kernel
        np.testing.assert_allclose(op(x), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(UsageError, match=r"expected \[B,3,H,W\]"):
            op(x[:, :2])


def test_library_refuses_with_a_model_error(packed) -> None:
    weight = packed((8, 16), "unstructured")
    with pytest.raises(ModelError, match="stored values"):
        runtime.NativeMatMul("unstructured", (8, 16), weight.values[1:], weight.indices)
    with pytest.raises(ModelError, match="version"):
        runtime.NativeMatMul("unstructured", (8, 16), weight.values, weight.indices, layout_version=9)
    with pytest.raises(UsageError, match="bias"):
        runtime.NativeMatMul(
            "unstructured", (8, 16), weight.values, weight.indices, bias=np.zeros(7, np.float32)
        )
    with pytest.raises(ModelError, match="avx9000"):
        runtime.NativeMatMul("unstructured", (8, 16), weight.values, weight.indices, isa="avx9000")


def test_unknown_instruction_set_is_told_at_once(monkeypatch) -> None:
    monkeypatch.setenv("SPARSECC_ISA", "mmx")
    for use in (
        runtime.isas,
        lambda: runtime.register(onnxruntime.SessionOptions()),
        lambda: runtime.NativeMatMul("unstructured", (1, 1), np.ones(1, np.float32), np.zeros(1, np.uint8)),
    ):
        with pytest.raises(UsageError, match=r"SPARSECC_ISA is 'mmx', usable here: .*generic"):
            use()
    monkeypatch.setenv("SPARSECC_ISA", "")
    assert "generic" in runtime.isas()


def test_a_scalar_is_no_row_of_inputs(packed) -> None:
    weight = packed((4, 1), "unstructured", 0.0)
    matmul = runtime.NativeMatMul("unstructured", (4, 1), weight.values, weight.indices)
    with matmul, pytest.raises(UsageError, match="last dimension of 1"):
        matmul(np.float32(3))


def test_a_library_of_another_release_is_named() -> None:
    from sparsecc.runtime.capi import declare, open_library

    library = open_library(runtime.get_library_path())
    with pytest.raises(
        RuntimeMissingError, match=r"libsparsecc_ops.so is older .* no sparsecc_of_tomorrow: rebuild"
    ):
        declare(library, {"sparsecc_of_tomorrow": (None, ())})
