"""Sparse operands in graphs: a layer of a graph network, and attention whose mask hides keys, against dense ones.

    python bench/sparse_graphs.py --data FOLDER --json bench/results/sparse_graphs.json

`layers`: relu(A x W + b) with A a real matrix of FOLDER/matrices (default of FOLDER: SPARSECC_TEST_DATA, else
../shared/data) or a generated power-law graph, as one model built by `emit.gnn_layer_model`: with the library, without
it (function body), the same with a dense A, and in SciPy. Nodes of the power-law graph are too many for a dense A.

`attention`: a dense model with a constant mask, as exporters write it; what `sparsify-attention` makes of it, with the
library and without; and the three operators that `emit.sparse_attention_model` builds for the same pattern.

All times are taken in turns in one process; ratios are medians over the rounds; one thread is its CPU time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import scipy.sparse as sp
from onnx import TensorProto, helper, numpy_helper

from sparsecc import emit
from sparsecc.algebra import read_matrix_market
from sparsecc.cli.output import print_table
from sparsecc.ir import Model
from sparsecc.plan import machine_facts
from sparsecc.pm import PassContext, Pipeline
from sparsecc.verify import benchmark, session, time_interleaved, worst_rel_l2
from sparsecc.verify.compare import compare_arrays

ROOT = Path(__file__).resolve().parents[1]
MATRICES = ("jagmesh7", "bcsstk13", "cryg2500")
POWER_LAW_NODES = 50_000
FEATURES = 64
HEADS, SIZE = 8, 64
WINDOWS = ((1024, 128), (1024, 256), (4096, 128), (4096, 256))
_DENSE_MOST = 5000  # nodes

Array = np.ndarray[Any, np.dtype[Any]]


def floats(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def normalised(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Each row of the pattern, with itself, as weights of a mean: what graph networks aggregate by."""
    pattern = sp.csr_matrix((np.ones(matrix.nnz), matrix.indices, matrix.indptr), matrix.shape) + sp.eye(
        matrix.shape[0]
    )
    mean = sp.diags(1 / np.asarray(pattern.sum(1)).ravel()) @ (pattern > 0).astype(np.float32)
    mean = sp.csr_matrix(mean, dtype=np.float32)
    mean.sort_indices()
    return mean


def power_law(nodes: int) -> sp.csr_matrix:
    """A directed graph whose longest row has about a tenth of the nodes."""
    rng = np.random.default_rng(0)
    degrees = np.minimum(rng.zipf(1.8, nodes), nodes // 10)
    rows = np.repeat(np.arange(nodes), degrees)
    graph = sp.csr_matrix((np.ones(len(rows)), (rows, rng.integers(0, nodes, len(rows)))), (nodes, nodes))
    graph.sum_duplicates()
    return graph


def graphs(data: Path) -> Iterator[tuple[str, sp.csr_matrix]]:
    for name in MATRICES:
        tensor = read_matrix_market(data / "matrices" / f"{name}.mtx").converted("csr")
        rows = tensor.levels[1]
        yield name, sp.csr_matrix((tensor.values, rows.crd, rows.pos), tensor.shape)  # type: ignore[union-attr]
    yield "power law", power_law(POWER_LAW_NODES)


def dense_layer(adjacency: Array, weight: Array, bias: Array) -> Model:
    nodes, features = len(adjacency), len(weight)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["a", "h"], ["p"]),
         helper.make_node("Add", ["p", "b"], ["s"]), helper.make_node("Relu", ["s"], ["y"])],
        "dense", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [nodes, features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [nodes, weight.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in (("a", adjacency), ("w", weight), ("b", bias))],
    )  # fmt: skip
    return Model.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    )


def ratios(calls: list[Callable[[], object]], threads: int) -> tuple[list[float], list[float]]:
    """Median milliseconds, and time of the last / time of each."""
    times, _ = time_interleaved(calls, clock="cpu" if threads == 1 else "wall", rounds=15, max_seconds=15)
    columns = np.array(times)
    return (np.median(columns, 1) * 1e3).tolist(), np.median(columns[-1] / columns, 1).tolist()


def measure_layer(name: str, graph: sp.csr_matrix, threads: int) -> dict[str, Any]:
    adjacency = normalised(graph)
    nodes = adjacency.shape[0]
    x, weight, bias = floats(nodes, FEATURES), floats(FEATURES, FEATURES), floats(FEATURES)
    model = emit.gnn_layer_model(adjacency, weight, bias)
    variants = {"sparse": (model, True), "body": (model, False)}
    if nodes <= _DENSE_MOST:
        variants["dense"] = (dense_layer(adjacency.toarray(), weight, bias), False)

    def in_scipy() -> Array:
        return np.maximum(adjacency @ (x @ weight) + bias, 0)

    runs = {key: session(item, library=library, threads=threads) for key, (item, library) in variants.items()}
    expected = in_scipy()
    for run in runs.values():
        assert worst_rel_l2([compare_arrays("y", expected, run.run({"x": x})["y"])]) < 1e-4, name
    calls = [lambda run=run: run.run({"x": x}) for run in runs.values()]  # type: ignore[misc]
    times, faster = ratios([*calls, in_scipy], threads)
    row: dict[str, Any] = {"graph": name, "nodes": nodes, "entries": int(adjacency.nnz), "threads": threads,
                           "longest_row": int(np.diff(adjacency.indptr).max()), "features": FEATURES}  # fmt: skip
    for at, key in enumerate((*runs, "scipy")):
        row[f"{key}_ms"] = times[at]
    row["over_scipy"] = faster[0]
    if "dense" in runs:
        measured = benchmark([variants["dense"][0], model, model], {"x": x}, threads=threads,
                             library=[False, True, False], max_seconds=15)  # fmt: skip
        row["over_dense"], row["body_over_dense"] = measured.ratio_to_first[1:]
    return row


def window(n: int, width: int, kind: str) -> Array:
    """What each query sees: ``width`` keys about it, or up to it."""
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    return (distance >= 0) & (distance < width) if kind == "causal" else abs(distance) <= width // 2


def dense_attention(seen: Array) -> Model:
    n = len(seen)
    text = f"""<ir_version: 8, opset_import: ["": 18]>
    g (float[B,{HEADS},{n},{SIZE}] q, float[B,{HEADS},{n},{SIZE}] k, float[B,{HEADS},{n},{SIZE}] v)
        => (float[B,{HEADS},{n},{SIZE}] y) {{
        t = Transpose<perm=[0,1,3,2]>(k)
        s = MatMul(q, t)
        a = Mul(s, c)
        b = Add(a, m)
        w = Softmax<axis=-1>(b)
        y = MatMul(w, v)
    }}"""
    proto = onnx.parser.parse_model(text)
    mask = np.where(seen, 0, -np.inf).astype(np.float32)
    for name, array in (("m", mask), ("c", np.array(SIZE**-0.5, np.float32))):
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return Model.from_proto(proto)


def measure_attention(n: int, width: int, kind: str, threads: int) -> dict[str, Any]:
    seen = window(n, width, kind)
    dense = dense_attention(seen)
    fused = dense.copy()
    Pipeline.parse("sparsify-attention{min-gain=0}").run(fused, PassContext())
    emit.finalize(fused)
    steps = emit.sparse_attention_model(sp.csr_matrix(seen.astype(np.float32)), heads=HEADS, size=SIZE)
    inputs = {name: floats(1, HEADS, n, SIZE, seed=at) for at, name in enumerate("qkv")}
    expected = session(dense, library=False, threads=threads).run(inputs)["y"]
    for model in (fused, steps):
        found = session(model, library=True, threads=threads).run(inputs)["y"]
        assert worst_rel_l2([compare_arrays("y", expected, found)]) < 1e-5
    # The body of the three operators needs entries times size numbers per head: not timed.
    measured = benchmark([dense, fused, steps, fused], inputs, threads=threads, library=[False, True, True, False],
                         rounds=7, max_seconds=8)  # fmt: skip
    times = [item.median_ms for item in measured.models]
    return {
        "n": n, "window": width, "kind": kind, "heads": HEADS, "size": SIZE, "threads": threads,
        "density": float(seen.mean()), "dense_ms": times[0], "fused_ms": times[1], "steps_ms": times[2],
        "body_ms": times[3], "fused_over_dense": measured.ratio_to_first[1],
        "steps_over_dense": measured.ratio_to_first[2], "body_over_dense": measured.ratio_to_first[3],
        "bytes_dense": dense.nbytes, "bytes_fused": fused.nbytes,
    }  # fmt: skip


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="folder with matrices/")
@click.option("--threads", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--only", type=click.Choice(["layers", "attention"]), help="one of the two parts")
@click.option(
    "--json", "output", type=click.Path(path_type=Path), help="where the figures go; other parts stay"
)
def main(data: Path | None, threads: tuple[int, ...], only: str | None, output: Path | None) -> None:
    """Time both parts and print the tables."""
    data = data or Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))
    document: dict[str, Any] = {}
    if output is not None and output.exists():
        document = json.loads(output.read_text())
    document["machine"] = machine_facts()
    if only != "attention":
        document["layers"] = [measure_layer(*item, count) for item in graphs(data) for count in threads]
        print_table(
            ("graph", ">nodes", ">entries", ">threads", ">sparse ms", ">over dense", ">body over dense", ">over SciPy"),
            [(r["graph"], r["nodes"], r["entries"], r["threads"], f"{r['sparse_ms']:.2f}", shown(r.get("over_dense")),
              shown(r.get("body_over_dense")), shown(r["over_scipy"])) for r in document["layers"]],
        )  # fmt: skip
    if only != "layers":
        document["attention"] = [
            measure_attention(n, width, kind, count)
            for n, width in WINDOWS for kind in ("both sides", "causal") for count in threads
        ]  # fmt: skip
        print_table(
            ("window", ">n", ">threads", ">dense ms", ">fused", ">three operators", ">body", ">bytes"),
            [(f"{r['window']} {r['kind']}", r["n"], r["threads"], f"{r['dense_ms']:.1f}", shown(r["fused_over_dense"]),
              shown(r["steps_over_dense"]), shown(r["body_over_dense"]), f"{r['bytes_fused'] / r['bytes_dense']:.1%}")
             for r in document["attention"]],
        )  # fmt: skip
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n")


def shown(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


if __name__ == "__main__":
    main()
