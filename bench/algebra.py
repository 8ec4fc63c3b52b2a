"""Sparse tensor algebra: the operator library against MKL and SciPy, and the time that splitting takes.

    python bench/algebra.py --data FOLDER --json bench/results/algebra.json

MKL is called through sparse_dot_mkl, which is no dependency: where it cannot be imported the figures against it are
left out, and the result says so. All that is compared runs by turns in one process; a figure is a ratio of medians,
theirs over ours. With one thread the CPU time of the calling thread counts, with two the time on the clock. Matrices:
those of `matrices/` in the data folder, and random ones with even rows, rows by a power law, and one giant row. All
float32 with 32-bit coordinates. MKL has no sampled product: what it offers is the dense product, of which the entries
are taken.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy.sparse
from dlmc import read_smtx

from sparsecc.algebra import Dense, Tensor, Walk, even_targets, read_tensor
from sparsecc.plan import machine_facts
from sparsecc.runtime.capi_algebra import (
    NativeTensor,
    Threads,
    find_splits,
    native_add,
    native_matmul,
    native_mttkrp,
    native_multiply,
    native_sddmm,
    native_spmm,
    native_spmv,
)

try:
    import sparse_dot_mkl as mkl
except ImportError as error:
    mkl, MKL_ABSENT = None, str(error).splitlines()[0]

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 64  # of dense operands
INNER = 64
Csr = scipy.sparse.csr_array


def median_times(
    contestants: Mapping[str, Callable[[], Any]], threads: int, rounds: int = 7, least: float = 2e-3
) -> dict[str, float]:
    """Median seconds of one call of each, taking turns; calls are repeated until a turn takes ``least`` seconds."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    repeats, spent = {}, {name: [] for name in contestants}
    for name, function in contestants.items():
        function()
        began = clock()
        function()
        repeats[name] = max(1, int(least / max(clock() - began, 1e-7)))
    for _ in range(rounds):
        for name, function in contestants.items():
            began = clock()
            for _ in range(repeats[name]):
                function()
            spent[name].append((clock() - began) / repeats[name])
    return {name: float(np.median(times)) for name, times in spent.items()}


def ratios(times: Mapping[str, float], ours: str = "ours") -> dict[str, Any]:
    """Milliseconds, and theirs over ours."""
    return {
        "ms": {name: round(seconds * 1e3, 4) for name, seconds in times.items()},
        **{
            f"{name} / {ours}": round(seconds / times[ours], 3)
            for name, seconds in times.items()
            if name != ours
        },
    }


def geometric_mean(values: Sequence[float]) -> float | None:
    return round(float(np.exp(np.mean(np.log(values)))), 3) if values else None


def random_csr(rows: int, columns: int, entries: int, share: np.ndarray | None, seed: int) -> Csr:
    """Entries in rows by ``share``, each in a random column; those that coincide are one."""
    rng = np.random.default_rng(seed)
    chosen = (
        rng.integers(0, rows, entries) if share is None else rng.choice(rows, entries, p=share / share.sum())
    )
    if share is not None:
        chosen = rng.permutation(rows)[chosen]
    return prepared(
        scipy.sparse.coo_array(
            (rng.standard_normal(entries, np.float32), (chosen, rng.integers(0, columns, entries))),
            (rows, columns),
        )
    )


def prepared(matrix: Any) -> Csr:
    found = scipy.sparse.csr_array(matrix, dtype=np.float32)
    found.sum_duplicates()
    found.indptr, found.indices = found.indptr.astype(np.int32), found.indices.astype(np.int32)
    return found


def skewed(seed: int) -> dict[str, Csr]:
    """Matrices of about a million entries whose rows differ much."""
    order = np.arange(1, 10_001, dtype=float)
    giant = np.full(20_000, 0.1 / 20_000)
    giant[7] = 0.9
    return {
        "power law 1.5": random_csr(10_000, 1_000_000, 1_200_000, order**-1.5, seed),
        "power law 2.5": random_csr(10_000, 1_000_000, 1_500_000, order**-2.5, seed),
        "one giant row": random_csr(20_000, 2_000_000, 1_300_000, giant, seed),
    }


def even(seed: int) -> dict[str, Csr]:
    return {
        "even rows of 10": random_csr(100_000, 100_000, 1_010_000, None, seed),
        "even rows of 100": random_csr(10_000, 100_000, 1_010_000, None, seed),
    }


def real(folder: Path) -> dict[str, Csr]:
    """Matrices of the data folder; of patterns of pruned networks the values are random."""
    found = {}
    for path in sorted(folder.glob("*.mtx")):
        tensor = read_tensor(path)
        found[path.stem] = prepared(
            scipy.sparse.coo_array((tensor.values, tensor.coordinates().T), tensor.shape)
        )
    for number, path in enumerate(sorted(folder.rglob("*.smtx"))):
        mask = read_smtx(path)
        values = np.random.default_rng(number).standard_normal(mask.shape, np.float32)
        found[str(path.relative_to(folder).with_suffix(""))] = prepared(mask * values)
    return found


def native(matrix: Csr) -> NativeTensor:
    return NativeTensor.of(Tensor.from_scipy(matrix))


def dense_products(matrix: Csr, threads: Threads) -> dict[str, Any]:
    """SpMV, SpMM and SDDMM against MKL and SciPy, on two threads."""
    rng, own = np.random.default_rng(1), native(matrix)
    x = rng.standard_normal(matrix.shape[1], np.float32)
    wide = rng.standard_normal((matrix.shape[1], COLUMNS), np.float32)
    u, v = (rng.standard_normal((size, INNER), np.float32) for size in matrix.shape)
    sets: dict[str, dict[str, Callable[[], Any]]] = {
        "spmv": {"ours": lambda: native_spmv(own, x, threads=threads), "scipy": lambda: matrix @ x},
        "spmm": {"ours": lambda: native_spmm(own, wide, threads=threads), "scipy": lambda: matrix @ wide},
        "sddmm": {"ours": lambda: native_sddmm(own, u, v, threads=threads)},
    }
    if mkl is not None:
        sets["spmv"]["mkl"] = lambda: mkl.dot_product_mkl(matrix, x)
        sets["spmm"]["mkl"] = lambda: mkl.dot_product_mkl(matrix, wide)
        if matrix.shape[0] * matrix.shape[1] <= 1 << 24:
            rows, columns = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)), matrix.indices
            turned = np.ascontiguousarray(v.T)
            sets["sddmm"]["mkl"] = lambda: matrix.data * mkl.dot_product_mkl(u, turned)[rows, columns]
    return {name: ratios(median_times(functions, 2)) for name, functions in sets.items()}


def joins(pair: tuple[Csr, Csr], threads: Threads) -> dict[str, Any]:
    """Sum and element-wise product against SciPy on one thread, and two threads against one."""
    a, b = pair
    own = [native(a), native(b)]
    found: dict[str, Any] = {}
    theirs = {"add": lambda: a + b, "multiply": lambda: a.multiply(b)}
    for name, join in (("add", native_add), ("multiply", native_multiply)):
        mine, lent = partial(join, own), partial(join, own, threads=threads)
        alone = median_times({"ours": mine, "scipy": theirs[name]}, 1)
        both = median_times({"ours": mine, "ours, 2 threads": lent}, 2)
        found[name] = {
            **ratios(alone),
            "1 thread / 2 threads": round(both["ours"] / both["ours, 2 threads"], 3),
            "ms, on the clock": ratios(both)["ms"],
        }
    return found


def matrix_product(a: Csr, b: Csr, threads: Threads) -> dict[str, Any]:
    """Against SciPy on one thread and MKL on two; both leave the columns unsorted, ours are sorted."""
    left, right = native(a), native(b)
    found = {
        "one thread": ratios(
            median_times({"ours": lambda: native_matmul(left, right), "scipy": lambda: a @ b}, 1, 5)
        )
    }
    if mkl is not None:
        found["two threads"] = ratios(
            median_times(
                {
                    "ours": lambda: native_matmul(left, right, threads=threads),
                    "mkl": lambda: mkl.dot_product_mkl(a, b),
                    "mkl, sorted": lambda: mkl.dot_product_mkl(a, b, reorder_output=True),
                },
                2,
                5,
            )
        )
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    """Real tensors, and random ones in which one slice has nearly all entries or sizes of slices follow a power law."""
    rng = np.random.default_rng(5)
    found = {path.stem: read_tensor(path).converted("csf") for path in sorted(folder.glob("*.tns"))}
    for name, first in (
        ("one giant slice", np.where(rng.random(600_000) < 0.95, 3, rng.integers(0, 1000, 600_000))),
        ("power law 2", np.minimum(rng.zipf(2.0, 600_000), 1000) - 1),
    ):
        entries = np.stack([first, rng.integers(0, 2000, 600_000), rng.integers(0, 3000, 600_000)], axis=1)
        entries = np.unique(entries, axis=0)
        found[name] = Tensor.from_coordinates(
            entries, rng.standard_normal(len(entries)), (1000, 2000, 3000), "csf"
        )
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def row_blocks(tensor: Tensor, blocks: int) -> list[Tensor]:
    """The tensor cut into equally many coordinates of its first mode."""
    entries, size = tensor.coordinates(), -(-tensor.shape[0] // blocks)
    found = []
    for block in range(blocks):
        mine = entries[:, 0] // size == block
        shift = np.array([block * size, *[0] * (entries.shape[1] - 1)])
        shape = (size, *tensor.shape[1:])
        found.append(Tensor.from_coordinates(entries[mine] - shift, tensor.values[mine], shape, "csf"))
    return found


def tensor_times_factors(tensor: Tensor, threads: Threads, columns: int = 32) -> dict[str, Any]:
    """Against the same kernel on as many blocks of equally many slices as there are threads, one each."""
    rng, own = np.random.default_rng(2), NativeTensor.of(tensor, np.int32)
    factors = [rng.standard_normal((size, columns), np.float32) for size in tensor.shape[1:]]
    blocks = [NativeTensor.of(block, np.int32) for block in row_blocks(tensor, threads.count)]
    with ThreadPoolExecutor(threads.count) as pool:
        times = median_times(
            {
                "ours": lambda: native_mttkrp(own, factors, threads=threads),
                "row-parallel": lambda: list(pool.map(lambda block: native_mttkrp(block, factors), blocks)),
            },
            2,
        )
    return ratios(times)


def splitting(matrix: Csr, threads: Threads) -> dict[str, Any]:
    """Time of a split into 64 parts, of that of the kernels that it is for; one thread each."""
    own, tensor = native(matrix), Tensor.from_scipy(matrix)
    walk = Walk.of(tensor)
    targets, both = even_targets(walk.work, 64), even_targets(2 * walk.work, 64)
    rng = np.random.default_rng(3)
    x = rng.standard_normal(matrix.shape[1], np.float32)
    wide = rng.standard_normal((matrix.shape[1], COLUMNS), np.float32)
    times = median_times(
        {
            "split": lambda: find_splits([walk], targets),
            "split of two": lambda: find_splits([walk, walk], both),
            "call of nothing": lambda: find_splits([Walk((Dense(1),), (1,))], np.zeros(1, np.int64)),
            "spmv": lambda: native_spmv(own, x),
            "spmm": lambda: native_spmm(own, wide),
            "add": lambda: native_add([own, own]),
        },
        1,
    )
    alone = times["split"] - times["call of nothing"]
    return {
        "entries": int(matrix.nnz),
        "ms": {name: round(seconds * 1e3, 4) for name, seconds in times.items()},
        "share of spmv": round(alone / times["spmv"], 4),
        "share of spmm": round(alone / times["spmm"], 5),
        "share of add": round((times["split of two"] - times["call of nothing"]) / times["add"], 4),
    }


def summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures in one place."""
    found: dict[str, Any] = {}
    for group in ("real", "skewed"):
        for name in ("spmv", "spmm", "sddmm"):
            found[f"{name}, {group}: mkl / ours"] = geometric_mean(
                [
                    row[name]["mkl / ours"]
                    for row in figures["dense"][group].values()
                    if "mkl / ours" in row[name]
                ]
            )
    for name in ("add", "multiply"):
        rows = [row[name] for row in figures["joins"].values()]
        found[f"{name}: scipy / ours"] = geometric_mean([row["scipy / ours"] for row in rows])
        found[f"{name}: 1 thread / 2 threads"] = geometric_mean([row["1 thread / 2 threads"] for row in rows])
    products = figures["spgemm"].values()
    found["spgemm: scipy / ours"] = geometric_mean([row["one thread"]["scipy / ours"] for row in products])
    for name in ("mkl", "mkl, sorted"):
        found[f"spgemm: {name} / ours"] = geometric_mean(
            [row["two threads"][f"{name} / ours"] for row in products if "two threads" in row]
        )
    for name, row in figures["mttkrp"].items():
        found[f"mttkrp, {name}: row-parallel / ours"] = row["row-parallel / ours"]
    found["splitting: largest share of spmv"] = max(
        row["share of spmv"] for row in figures["splitting"].values()
    )
    return found


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path), help="Folder with matrices (default: SPARSECC_TEST_DATA)."
)
@click.option("--only", multiple=True, type=click.Choice(["dense", "joins", "spgemm", "mttkrp", "splitting"]))
@click.option("--json", "output", type=click.Path(path_type=Path), help="Where the figures go.")
def main(data: Path | None, only: tuple[str, ...], output: Path | None) -> None:
    folder = (
        data or Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))
    ) / "matrices"
    chosen = only or ("dense", "joins", "spgemm", "mttkrp", "splitting")
    figures: dict[str, Any] = {
        "machine": machine_facts(),
        "mkl": "absent: " + MKL_ABSENT if mkl is None else "2 threads",
    }
    first, second = {**even(1), **skewed(1)}, {**even(2), **skewed(2)}
    with Threads(2) as threads:
        if mkl is not None:
            mkl.mkl_set_num_threads(2)
        if "dense" in chosen:
            groups = {"real": real(folder), "even": even(1), "skewed": skewed(1)}
            figures["dense"] = {
                group: {
                    name: shown(name, dense_products(matrix, threads)) for name, matrix in matrices.items()
                }
                for group, matrices in groups.items()
            }
        if "joins" in chosen:
            figures["joins"] = {
                name: shown(name, joins((first[name], second[name]), threads)) for name in first
            }
        if "spgemm" in chosen:
            squares = {
                name: matrix for name, matrix in real(folder).items()
                if matrix.shape[0] == matrix.shape[1] and matrix.nnz > 1000
            }  # fmt: skip
            squares["even rows of 8"] = random_csr(50_000, 50_000, 400_000, None, 4)
            squares["power law 1"] = random_csr(30_000, 30_000, 200_000, np.arange(1, 30_001.0) ** -1.0, 4)
            figures["spgemm"] = {
                name: shown(name, matrix_product(m, m, threads)) for name, m in squares.items()
            }
        if "mttkrp" in chosen:
            figures["mttkrp"] = {
                name: shown(name, tensor_times_factors(tensor, threads))
                for name, tensor in tensors(folder).items()
            }
        if "splitting" in chosen:
            figures["splitting"] = {
                name: shown(name, splitting(matrix, threads)) for name, matrix in first.items()
            }
    if not only:
        figures["summary"] = shown("summary", summary(figures))
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


def shown(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    click.echo(f"{name}: {json.dumps(figures)}")
    return figures


if __name__ == "__main__":
    main()
