"""Each verb does what its help says, for people and for programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from sparsecc.cli.main import EXIT_CODES
from sparsecc.ir import Model

Run = Callable[..., "object"]
VERBS = (
    "optimize",
    "plan",
    "analyze",
    "resize",
    "inspect",
    "diff",
    "report",
    "recipe",
    "verify",
    "benchmark",
    "passes",
    "targets",
    "ops",
    "doctor",
    "cache",
    "cache show",
    "cache clear",
)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(sparsecc: Run, verb: str) -> None:
    result = sparsecc(*verb.split(), "--help")
    assert result.code == 0
    assert "Example: sparsecc" in result.out


def test_exit_codes_are_documented(root: Path) -> None:
    text = (root / "docs" / "concepts.md").read_text()
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in text


def test_help_needs_no_onnxruntime(root: Path) -> None:
    import subprocess
    import sys

    heavy = {"onnx", "onnxruntime", "onnx_ir"}
    code = f"import sys, sparsecc.cli.main as m; m.run(['--help']); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_optimize_prunes_lowers_and_reports(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    pipeline = "tidy,prune-magnitude{pattern=16x1 sparsity=0.75},choose-layout{layout=16x1},lower-sparse"
    result = sparsecc("optimize", mlp, "-o", out, "--pipeline", pipeline, "--keep-slower", "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert [site["layout"] for site in document["sites"]] == ["16x1", "16x1"]
    assert all(site["density"] == 0.25 for site in document["sites"])
    assert document["max_rel_l2"] <= 1e-5
    assert document["bytes_after"] < document["bytes_before"]
    model = onnx.load(out)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {"ai.sparsecc"}
    assert model.graph.node[0].op_type == "BlockSparseMatMulRelu"
    assert [i.name for i in model.graph.input] == ["x"]
    assert [o.name for o in model.graph.output] == ["y"]


def test_optimize_asked_for_nothing_keeps_the_weights(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = sparsecc("optimize", mlp, "-o", out)
    assert result.code == 0, result.err
    assert "too few zeros to gain from: density 1.000" in result.out
    before, after = Model.load(mlp), Model.load(out)
    for a, b in zip(before.sites(), after.sites(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_optimize_table_gives_a_reason_per_site(sparsecc: Run, sparse_mlp: Path, tmp_path: Path) -> None:
    result = sparsecc("optimize", sparse_mlp, "-o", tmp_path / "out.onnx", "--threads", 1)
    assert result.code == 0, result.err
    for name in ("fc1", "fc2"):
        (line,) = [line for line in result.out.splitlines() if line.startswith(name)]
        assert re.search(r"\d(x| ms)", line)
    assert "verified with and without the operator library" in result.out


def test_optimize_twice_gives_the_same_bytes(sparsecc: Run, sparse_mlp: Path, tmp_path: Path) -> None:
    outputs = []
    for name in ("a.onnx", "b.onnx"):
        assert sparsecc("optimize", sparse_mlp, "-o", tmp_path / name, "--seed", 3).code == 0
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]


def test_exported_costs_decide_again(
    sparsecc: Run, sparse_mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = tmp_path / "costs.json"
    assert sparsecc("optimize", sparse_mlp, "-o", tmp_path / "a.onnx").code == 0
    assert sparsecc("targets", "--export-costs", costs).code == 0
    table = json.loads(costs.read_text())
    assert table["times_ms"]
    for row in table["times_ms"].values():  # a table that says dense wins by far
        row.update(
            {
                name: (0.001 if name == "dense" else 9.0)
                for name in row
                if name in ("dense", "16x1", "unstructured", "32x1")
            }
        )
    costs.write_text(json.dumps(table))
    monkeypatch.setenv("SPARSECC_CACHE_DIR", str(tmp_path / "other"))
    result = sparsecc("optimize", sparse_mlp, "-o", tmp_path / "b.onnx", "--costs", costs, "--json")
    assert result.code == 0, result.err
    assert {site["layout"] for site in json.loads(result.out)["sites"]} == {"dense"}


def test_standard_ops_only_emits_no_custom_operator(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    result = sparsecc("optimize", mlp, "-o", out, "--pattern", "2:4", "--standard-ops-only")
    assert result.code == 0, result.err
    assert {node.domain for node in onnx.load(out).graph.node} == {""}
    inspected = json.loads(sparsecc("inspect", out, "--json").out)
    assert [site["density"] for site in inspected["sites"]] == [0.5, 0.5]


def test_default_output_lies_beside_the_input(sparsecc: Run, mlp: Path) -> None:
    before = mlp.read_bytes()
    assert sparsecc("optimize", mlp).code == 0
    assert (mlp.parent / "mlp.sparse.onnx").exists()
    assert mlp.read_bytes() == before


def test_provenance(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert sparsecc("optimize", mlp, "-o", out, "--sparsity", "0.5", "--seed", 7).code == 0
    metadata = Model.load(out).metadata
    assert metadata["sparsecc.seed"] == "7"
    assert metadata["sparsecc.pipeline"].startswith("tidy,prune-magnitude")
    assert len(metadata["sparsecc.input_sha256"]) == 64
    assert str(tmp_path) not in str(metadata)


def test_recipe_with_override(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'pipeline = ["tidy", "prune-magnitude{sparsity=0.75}"]\n[[override]]\nmatch = "fc2"\npattern = "2:4"\n'
    )
    result = sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", "--recipe", recipe, "--json")
    assert result.code == 0, result.err
    assert [site["density"] for site in json.loads(result.out)["sites"]] == [0.25, 0.5]


def test_dump_and_stop(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump"
    arguments = (
        "--pattern",
        "2:4",
        "--stop-after",
        "prune-magnitude",
        "--dump-between-passes",
        dump,
        "--verify-each",
        "--time-passes",
    )
    result = sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", *arguments)
    assert result.code == 0, result.err
    assert "prune-magnitude{pattern=2:4}" in result.out
    assert {path.suffix for path in dump.iterdir()} == {".onnx"}
    assert any("prune-magnitude" in path.name for path in dump.iterdir())


def test_quantised_convolutions_say_how_they_are_stored(sparsecc: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((0.2 * rng.standard_normal(shape)).astype(np.float32), name)
        for name, shape in (("w1", (16, 16, 3, 3)), ("w2", (64, 16, 1, 1)))
    ]
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 16, 8, 8] x) => (float[1, 64, 8, 8] y) {
            a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1)
            b = Relu (a)
            y = Conv <kernel_shape = [1, 1]> (b, w2)
        }"""
    )
    model.graph.initializer.extend(weights)
    onnx.save(model, tmp_path / "cnn.onnx")
    np.savez(tmp_path / "data.npz", x=rng.standard_normal((1, 16, 8, 8)).astype(np.float32))
    out = tmp_path / "out.onnx"
    result = sparsecc("optimize", tmp_path / "cnn.onnx", "-o", out, "--quantize", "int8", "--activations", "static",
                      "--calibration-data", tmp_path / "data.npz", "--pattern", "8x4", "--sparsity", 0.5,
                      "--keep-slower", "--json")  # fmt: skip
    assert result.code == 0, result.err
    sites = json.loads(result.out)["sites"]
    assert [site["layout"] for site in sites] == ["int8 8x4", "int8 8x4"]
    assert all("already" not in site["reason"] for site in sites)
    inspected = json.loads(sparsecc("inspect", out, "--json").out)["sites"]
    assert [(site["layout"], site["pattern"]) for site in inspected] == [("int8 8x4", "8x4")] * 2


def test_inspect_shows_packed_sites(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert sparsecc("optimize", mlp, "-o", out, "--pattern", "2:4", "--keep-slower").code == 0
    document = json.loads(sparsecc("inspect", out, "--json").out)
    assert [site["layout"] for site in document["sites"]] == ["2:4", "2:4"]
    assert document["totals"]["density"] == 0.5
    assert document["totals"]["file_nbytes"] == out.stat().st_size
    assert "SparseMatMulRelu" in sparsecc("inspect", out).out


def test_verify_passes_and_fails(sparsecc: Run, mlp: Path, sparse_mlp: Path) -> None:
    good = sparsecc("verify", mlp, mlp, "--json")
    assert good.code == 0
    assert json.loads(good.out)["outputs"][0]["rel_l2"] == 0
    bad = sparsecc("verify", mlp, sparse_mlp, "--json")
    assert bad.code == 4
    assert not json.loads(bad.out)["passed"]
    assert "FAILED" in sparsecc("verify", mlp, sparse_mlp).out


def test_benchmark_json(sparsecc: Run, mlp: Path, sparse_mlp: Path) -> None:
    result = sparsecc(
        "benchmark", mlp, sparse_mlp, "--threads", 1, "--seconds", "0.2", "--input-shapes", "x:8,64", "--json"
    )
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert document["threads"] == 1
    assert document["ratio_to_first"][0] == 1
    assert [entry["path"] for entry in document["models"]] == [str(mlp), str(sparse_mlp)]
    assert all(
        entry["median_ms"] >= entry["min_ms"] > 0 and entry["iterations"] > 0 for entry in document["models"]
    )


def test_passes(sparsecc: Run) -> None:
    names = {entry["name"] for entry in json.loads(sparsecc("passes", "--json").out)}
    assert {
        "tidy",
        "prune-magnitude",
        "prune-wanda",
        "choose-layout",
        "confirm-layout",
        "lower-sparse",
    } <= names
    shown = json.loads(sparsecc("passes", "prune-wanda", "--json").out)
    assert shown["requires_calibration"]
    assert {"pattern", "sparsity", "match"} <= {option["name"] for option in shown["options"]}
    assert sparsecc("passes", "prune-wonda").code == 2


def test_targets_and_ops_and_doctor(sparsecc: Run) -> None:
    targets = json.loads(sparsecc("targets", "--json").out)
    assert {entry["name"]: entry["available"] for entry in targets["targets"]}["cpu"]
    ops = json.loads(sparsecc("ops", "--json").out)
    assert "generic" in ops["isas"]
    assert "generic" in ops["int8_isas"]
    assert Path(sparsecc("ops", "path").out.strip()).exists()
    assert (Path(sparsecc("ops", "path", "--cmake").out.strip()) / "sparsecc-config.cmake").exists()
    sizes = json.loads(sparsecc("ops", "size", "--json").out)["files"]
    assert all(0 < file["stripped_nbytes"] < file["nbytes"] for file in sizes)
    for arguments, code, message in (
        (("path", "--target", "cuda"), 6, "no operator library for cuda"),
        (("path", "--target", "tpu"), 2, "known targets are cpu, arm64, cuda"),
        (("size", "--runner"), 2, "go with path"),
        (("path", "--runner", "--cmake"), 2, "exclude each other"),
    ):
        result = sparsecc("ops", *arguments)
        assert (result.code, result.out) == (code, "")
        assert message in result.err
    doctor = json.loads(sparsecc("doctor", "--json").out)
    assert doctor["ok"]


def test_underscores_are_accepted(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    result = sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", "--pattern", "2:4", "--standard_ops_only")
    assert result.code == 0, result.err


def test_sites_that_cannot_be_pruned_say_so(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    result = sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", "--sparsity", "0.999999", "--json")
    assert result.code == 0, result.err
    for site in json.loads(result.out)["sites"]:
        assert site["reason"].startswith("not pruned: ")


def test_optimized_model_can_be_optimized_again(sparsecc: Run, mlp: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    assert sparsecc("optimize", mlp, "-o", first, "--pattern", "2:4", "--keep-slower").code == 0
    result = sparsecc("optimize", first, "-o", second, "--json")
    assert result.code == 0, result.err
    document = json.loads(result.out)
    assert [(site["layout"], site["reason"]) for site in document["sites"]] == [
        ("2:4", "it was sparse already")
    ] * 2
    assert sparsecc("verify", first, second).code == 0


def test_cache_that_cannot_be_written_is_a_note(
    sparsecc: Run, mlp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("SPARSECC_CACHE_DIR", str(blocked / "cache"))
    result = sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx", "--pattern", "2:4")
    assert result.code == 0, result.err
    assert "could not be kept" in result.out
    assert (tmp_path / "out.onnx").exists()


def test_half_precision_model_is_optimized(sparsecc: Run, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float16[n, 8, 12, 12] x) => (float16[n, 32, 12, 12] y) {
        [conv] c = Conv<pads = [1, 1, 1, 1]>(x, w) b = BatchNormalization(c, s, s, s, s) y = Relu(b) }"""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("w", (32, 8, 3, 3)), ("s", (32,))):
        array = (rng.random(shape) + 0.5).astype(np.float16)
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "half.onnx")
    result = sparsecc(
        "optimize", tmp_path / "half.onnx", "-o", tmp_path / "out.onnx", "--pattern", "2:4", "--json"
    )
    assert result.code == 0, result.err
    assert "float32 only" in json.loads(result.out)["sites"][0]["reason"]


def test_nothing_is_written_outside_the_cache_folder(mlp: Path, tmp_path: Path, root: Path) -> None:
    """onnxruntime would leave an identifier and a store of events in the home folder."""
    import os
    import subprocess
    import sys

    home, cache = tmp_path / "home", tmp_path / "cache"
    home.mkdir()
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY")
    }
    done = subprocess.run(
        [sys.executable, "-m", "sparsecc", "verify", str(mlp), str(mlp)],
        cwd=root, capture_output=True, text=True, check=False,
        env={**kept, "HOME": str(home), "SPARSECC_CACHE_DIR": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []


def test_inputs_with_a_default_become_constants_and_the_user_is_told(
    sparsecc: Run, mlp: Path, tmp_path: Path
) -> None:
    proto = onnx.load(mlp)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("b1", onnx.TensorProto.FLOAT, [128]))
    onnx.save(proto, mlp)
    result = sparsecc("optimize", mlp, "-o", tmp_path / "out.onnx")
    assert result.code == 0, result.err
    assert "cannot be overridden any more: b1" in result.out
    assert [value.name for value in onnx.load(tmp_path / "out.onnx").graph.input] == ["x"]
