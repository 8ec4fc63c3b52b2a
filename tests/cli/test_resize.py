"""``sparsecc resize`` and what ``inspect`` says of models it can take smaller ones from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import sparsecc as package
from sparsecc.cli.main import run

Run = Callable[..., "object"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers as stacks of planes."""
    folder = tmp_path_factory.mktemp("stack")
    rng = np.random.default_rng(0)
    text = """<ir_version: 8, opset_import: ["" : 17]>
        mlp (float[batch, 64] x) => (float[batch, 32] y) {
            [fc1] h = MatMul(x, w1) [a] g = Relu(h) [fc2] y = MatMul(g, w2)
        }"""
    proto = onnx.parser.parse_model(text)
    for name, shape in (("w1", (64, 128)), ("w2", (128, 32))):
        array = rng.standard_normal(shape, dtype=np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, folder / "mlp.onnx")
    np.savez(folder / "x.npz", x=rng.standard_normal((64, 64), dtype=np.float32))
    flags = ["--method", "bitstack", "--keep-slower", "--standard-ops-only", "--threads", "1"]
    files = [folder / "mlp.onnx", "-o", folder / "stack.onnx", "--calibration-data", folder / "x.npz"]
    assert run(["optimize", *map(str, files), *flags]) == 0
    return folder / "stack.onnx"


def test_every_size_between_the_bounds_can_be_taken(sparsecc: Run, stack: Path, tmp_path: Path) -> None:
    sizes = json.loads(sparsecc("inspect", stack, "--json").out)["resizable"]
    assert sizes["sites"] == 2
    least, most = sizes["smallest_nbytes"], sizes["nbytes"]
    assert most == stack.stat().st_size
    assert f"{least} to {most}" in sparsecc("inspect", stack).out
    planes = []
    for wanted in np.linspace(least, most, 5).astype(int):
        out = tmp_path / f"{wanted}.onnx"
        result = sparsecc("resize", stack, "--bytes", wanted, "-o", out, "--json")
        assert result.code == 0, result.err
        document = json.loads(result.out)
        assert document["bytes_after"] == out.stat().st_size <= wanted
        planes.append(document["planes"])
        onnx.checker.check_model(out, full_check=True)
        assert sparsecc("verify", stack, out, "--tolerance", 10).code == 0
        again = json.loads(sparsecc("inspect", out, "--json").out)["resizable"]
        assert again["planes"] == document["planes"]
    assert planes == sorted(planes)
    assert planes[0] == 2
    assert (
        f"{planes[-1]} of {sizes['planes']} planes"
        in sparsecc("resize", stack, "--bytes", most, "-o", tmp_path / "most.onnx").out
    )


def test_a_model_in_memory_needs_no_file(stack: Path) -> None:
    nbytes = stack.stat().st_size * 3 // 4
    result = package.resize(stack, nbytes=nbytes)
    assert result.output is None
    assert len(result.model.to_proto().SerializeToString()) <= result.bytes_after <= nbytes
    assert result.planes < result.planes_before


def refused(result: object, code: int, *words: str) -> None:
    assert result.code == code, result.err
    (line,) = result.err.strip().splitlines()
    for word in ("sparsecc: error: ", *words):
        assert word in line


def test_what_cannot_be_resized_is_told_in_one_line(
    sparsecc: Run, stack: Path, mlp: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.onnx"
    refused(sparsecc("resize", mlp, "--bytes", 9999, "-o", out), 3, "has no planes", "--method bitstack")
    least = json.loads(sparsecc("inspect", stack, "--json").out)["resizable"]["smallest_nbytes"]
    refused(sparsecc("resize", stack, "--bytes", least - 1, "-o", out), 5, f"takes {least} bytes")
    refused(sparsecc("resize", stack, "--bytes", least, "-o", stack), 2, "is the input")
    refused(sparsecc("resize", stack, "-o", out), 2, "--bytes")
    refused(sparsecc("resize", stack, "--bytes", 0, "-o", out), 2, "--bytes")
    proto = onnx.load(stack)
    for item in proto.metadata_props:
        if item.key == "sparsecc.planes":
            item.value = "["
    onnx.save(proto, tmp_path / "bad.onnx")
    refused(sparsecc("resize", tmp_path / "bad.onnx", "--bytes", least, "-o", out), 3, "sparsecc.planes")
    refused(sparsecc("inspect", tmp_path / "bad.onnx"), 3, "sparsecc.planes")
    assert json.loads(sparsecc("inspect", mlp, "--json").out)["resizable"] is None
    assert not out.exists()


def test_data_files_of_the_model_are_not_replaced(sparsecc: Run, stack: Path, tmp_path: Path) -> None:
    package.load(stack).save(tmp_path / "ext.onnx", external_data=True)
    before = (tmp_path / "ext.onnx.data").read_bytes()
    for name in ("ext.onnx.data", "ext.onnx"):
        refused(
            sparsecc("resize", tmp_path / "ext.onnx", "--bytes", 10**6, "-o", tmp_path / name),
            2,
            "is the input",
        )
    assert (tmp_path / "ext.onnx.data").read_bytes() == before


def test_planes_that_something_else_reads_or_in_another_order_are_refused(
    sparsecc: Run, stack: Path, tmp_path: Path
) -> None:
    def check(change: Callable[[onnx.ModelProto], None], *words: str) -> None:
        proto = onnx.load(stack)
        change(proto)
        onnx.save(proto, tmp_path / "bad.onnx")
        refused(
            sparsecc("resize", tmp_path / "bad.onnx", "--bytes", 10**6, "-o", tmp_path / "out.onnx"),
            3,
            *words,
        )

    def make_result(proto: onnx.ModelProto) -> None:
        (plane,) = (item for item in proto.graph.initializer if item.name == "plane.000003.left")
        proto.graph.output.append(onnx.helper.make_tensor_value_info(plane.name, plane.data_type, plane.dims))

    def turn_round(proto: onnx.ModelProto) -> None:
        concat = next(node for node in proto.graph.node if node.op_type == "Concat")
        concat.input[:] = reversed(concat.input)

    def cut(proto: onnx.ModelProto) -> None:
        (item,) = (item for item in proto.metadata_props if item.key == "sparsecc.planes")
        planes = json.loads(item.value)
        item.value = json.dumps(planes | {"order": planes["order"][:-1]})

    def swap(proto: onnx.ModelProto) -> None:
        (item,) = (item for item in proto.metadata_props if item.key == "sparsecc.planes")
        planes = json.loads(item.value)
        order = planes["order"]
        order[0], order[1] = order[1], order[0]
        item.value = json.dumps(planes)

    check(make_result, "plane.000003.left", "is not where")
    check(turn_round, "reads other planes")
    check(cut, "reads other planes")
    check(swap, "is not with the others")
