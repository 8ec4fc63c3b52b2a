"""Sparse tensor algebra: the operator library against MKL and SciPy, and the time that splitting takes.

    python bench/algebra.py --threads 1 --json bench/results/algebra.json
    python bench/algebra.py --threads 2 --json bench/results/algebra_two_threads.json

MKL is called through sparse_dot_mkl, which is no dependency: where it cannot be imported the figures against it are
left out, and the result says so. All that is compared runs by turns in one process; a figure is a ratio of medians,
theirs over ours. With one thread, all libraries on one, it is the CPU time of the calling thread, which other work on
the machine hardly changes; with two it is the time on the clock, which only means something on an idle machine.

Matrices: those of `matrices/` in the data folder, and random ones with even rows, rows by a power law, and one giant
row. All float32 with 32-bit coordinates. MKL has no sampled product: what it offers is the dense product, of which the
entries are taken; for large matrices that would be too much, so that skewed ones are small there.

MTTKRP is compared with the same kernel on blocks of equally many slices, on two threads, of which the ratio cannot be
more than 2. With one thread it is the critical path of 2, 8 and 64 parts: each part is timed alone, without what a call
takes, and the largest block of slices stands over the largest part that is cut by work. No thread runs for that: it
leaves out what threads cost, and that they share caches and memory.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, reduce
from pathlib import Path
from typing import Any

import click
import numpy as np
import scipy.sparse
from dlmc import read_smtx

from sparsecc.algebra import Tensor, Walk, even_targets, read_tensor
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
#: Seconds for which the threads of MKL hold their cores after a call, waiting for the next one (KMP_BLOCKTIME).
_MKL_WAITS = 0.25
#: Seconds of calls before those that are timed, with several threads.
_WARM = 0.02
INNER = 64
ENTRIES_PER_PART = 1000  # of parts that are timed alone
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
            _warm(function, threads)
            began = clock()
            for _ in range(repeats[name]):
                function()
            spent[name].append((clock() - began) / repeats[name])
            if threads > 1 and name.startswith("mkl"):
                time.sleep(_MKL_WAITS)
    return {name: float(np.median(times)) for name, times in spent.items()}


def _warm(function: Callable[[], Any], threads: int) -> None:
    """Call it until the threads have found their cores, which takes the system a while after a pause."""
    until = time.perf_counter() + (_WARM if threads > 1 else 0.0)
    while time.perf_counter() < until:
        function()


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


def skewed_small(seed: int) -> dict[str, Csr]:
    """The same for the sampled product, of which others compute all that a dense matrix has."""
    giant = np.full(1_000, 0.1 / 1_000)
    giant[7] = 0.9
    order = np.arange(1, 1_001, dtype=float)
    return {
        "small power law 1.5": random_csr(1_000, 16_000, 200_000, order**-1.5, seed),
        "small power law 2.5": random_csr(1_000, 16_000, 200_000, order**-2.5, seed),
        "small giant row": random_csr(1_000, 16_000, 100_000, giant, seed),
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


def sampled_product(matrix: Csr, count: int, threads: Threads | None) -> dict[str, Any]:
    """SDDMM against the dense product, where that is not too large."""
    rng, own = np.random.default_rng(1), native(matrix)
    u, v = (rng.standard_normal((size, INNER), np.float32) for size in matrix.shape)
    functions: dict[str, Callable[[], Any]] = {"ours": lambda: native_sddmm(own, u, v, threads=threads)}
    if mkl is not None and matrix.shape[0] * matrix.shape[1] <= 1 << 24:
        rows, columns = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)), matrix.indices
        turned = np.ascontiguousarray(v.T)
        functions["mkl"] = lambda: matrix.data * mkl.dot_product_mkl(u, turned)[rows, columns]
    return ratios(median_times(functions, count))


def dense_products(matrix: Csr, count: int, threads: Threads | None) -> dict[str, Any]:
    """SpMV, SpMM and SDDMM against MKL and SciPy."""
    rng, own = np.random.default_rng(1), native(matrix)
    x = rng.standard_normal(matrix.shape[1], np.float32)
    wide = rng.standard_normal((matrix.shape[1], COLUMNS), np.float32)
    sets: dict[str, dict[str, Callable[[], Any]]] = {
        "spmv": {"ours": lambda: native_spmv(own, x, threads=threads), "scipy": lambda: matrix @ x},
        "spmm": {"ours": lambda: native_spmm(own, wide, threads=threads), "scipy": lambda: matrix @ wide},
    }
    if mkl is not None:
        sets["spmv"]["mkl"] = lambda: mkl.dot_product_mkl(matrix, x)
        sets["spmm"]["mkl"] = lambda: mkl.dot_product_mkl(matrix, wide)
    return {
        **{name: ratios(median_times(functions, count)) for name, functions in sets.items()},
        "sddmm": sampled_product(matrix, count, threads),
    }


def joins(matrices: Sequence[Csr], count: int, threads: Threads | None) -> dict[str, Any]:
    """Sums and element-wise products of two and more against SciPy's, or two threads against one."""
    own, found = [native(matrix) for matrix in matrices], {}
    theirs: dict[str, Callable[[Csr, Csr], Csr]] = {
        "add": lambda a, b: a + b,
        "multiply": lambda a, b: a.multiply(b),
    }
    for name, join in (("add", native_add), ("multiply", native_multiply)):
        for operands in range(2, len(matrices) + 1):
            alone = partial(join, own[:operands])
            other = (
                {"scipy": partial(reduce, theirs[name], matrices[:operands])}
                if threads is None
                else {"one thread": alone}
            )
            found[name if operands == 2 else f"{name} of {operands}"] = ratios(
                median_times({"ours": partial(alone, threads=threads), **other}, count)
            )
    return found


def matrix_product(a: Csr, b: Csr, count: int, threads: Threads | None) -> dict[str, Any]:
    """Against SciPy and MKL, which leave columns unsorted unless they are asked; ours are sorted."""
    functions = {
        "ours": partial(native_matmul, native(a), native(b), threads=threads),
        "scipy": lambda: a @ b,
    }
    if mkl is not None:
        functions["mkl"] = lambda: mkl.dot_product_mkl(a, b)
        functions["mkl, sorted"] = lambda: mkl.dot_product_mkl(a, b, reorder_output=True)
    return ratios(median_times(functions, count, 5))


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


def pieces(tensor: Tensor, number: np.ndarray) -> list[NativeTensor]:
    """The entries of the tensor dealt to pieces by the number that each has."""
    entries = tensor.coordinates()
    return [
        NativeTensor.of(
            Tensor.from_coordinates(
                entries[number == piece], tensor.values[number == piece], tensor.shape, "csf"
            ),
            np.int32,
        )
        for piece in np.unique(number)
    ]


def critical_path(tensor: Tensor, parts: int, factors: Sequence[np.ndarray]) -> dict[str, Any]:
    """The largest of so many parts of equal work against the largest of as many blocks of slices, each timed alone."""
    walk = Walk(tensor.levels, (0,) * (len(tensor.levels) - 2) + (8, 1))  # what the kernel counts
    (cursors,), _ = find_splits([walk], even_targets(walk.work, parts)[1:-1])
    empty = Tensor.from_coordinates(tensor.coordinates()[:0], tensor.values[:0], tensor.shape, "csf")
    named = {
        "ours": pieces(tensor, np.searchsorted(cursors[-1], np.arange(len(tensor.values)), side="right")),
        "row-parallel": pieces(tensor, tensor.coordinates()[:, 0] * parts // tensor.shape[0]),
        "call": [NativeTensor.of(empty, np.int32)],
    }
    times = median_times(
        {
            f"{name} {at}": partial(native_mttkrp, piece, factors)
            for name, found in named.items()
            for at, piece in enumerate(found)
        },
        1,
        rounds=21,
    )
    return ratios(
        {
            name: max(times[f"{name} {at}"] for at in range(len(named[name]))) - times["call 0"]
            for name in ("ours", "row-parallel")
        }
    )


def tensor_times_factors(tensor: Tensor, threads: Threads | None, columns: int = 32) -> dict[str, Any]:
    """Parts of equal work against blocks of equally many slices: on two threads, or the largest of each alone."""
    rng = np.random.default_rng(2)
    factors = [rng.standard_normal((size, columns), np.float32) for size in tensor.shape[1:]]
    if threads is None:
        return {
            f"critical path of {parts}": critical_path(tensor, parts, factors)
            for parts in (2, 8, 64)
            if len(tensor.values) >= ENTRIES_PER_PART * parts
        }
    blocks = pieces(tensor, tensor.coordinates()[:, 0] * threads.count // tensor.shape[0])
    own = NativeTensor.of(tensor, np.int32)
    with ThreadPoolExecutor(threads.count) as pool:
        times = median_times(
            {
                "ours": lambda: native_mttkrp(own, factors, threads=threads),
                "row-parallel": lambda: list(pool.map(lambda block: native_mttkrp(block, factors), blocks)),
            },
            2,
        )
    return {"two threads": ratios(times)}


def splitting(matrix: Csr) -> dict[str, Any]:
    """Time of a split into 64 parts, without that of a call, as a share of the kernels; one thread each."""
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
            "one cut": lambda: find_splits([walk], targets[:1]),
            "one cut of two": lambda: find_splits([walk, walk], targets[:1]),
            "spmv": lambda: native_spmv(own, x),
            "spmm": lambda: native_spmm(own, wide),
            "add": lambda: native_add([own, own]),
        },
        1,
        rounds=41,
    )
    alone, of_two = times["split"] - times["one cut"], times["split of two"] - times["one cut of two"]
    return {
        "entries": int(matrix.nnz),
        "ms": {name: round(seconds * 1e3, 4) for name, seconds in times.items()},
        "share of spmv": round(alone / times["spmv"], 4),
        "share of spmm": round(alone / times["spmm"], 5),
        "share of add": round(of_two / times["add"], 4),
    }


def summary(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Geometric means of the ratios."""
    found: dict[str, Any] = {}

    def collect(title: str, rows: Iterable[Mapping[str, Any]]) -> None:
        ratios_of: dict[str, list[float]] = {}
        for row in rows:
            for name, value in row.items():
                if name.endswith("/ ours"):
                    ratios_of.setdefault(name, []).append(value)
        found.update({f"{title}: {name}": geometric_mean(values) for name, values in ratios_of.items()})

    for group, rows in figures["dense"].items():
        for name in ("spmv", "spmm", "sddmm"):
            collect(f"{name}, {group}", [row[name] for row in rows.values() if name in row])
    for name in next(iter(figures["joins"].values())):
        collect(name, [row[name] for row in figures["joins"].values()])
    collect("spgemm", figures["spgemm"].values())
    for name, rows in figures["mttkrp"].items():
        for title, row in rows.items():
            collect(f"mttkrp, {name}, {title}", [row])
    for kernel in ("spmv", "spmm", "add"):
        shares = [row[f"share of {kernel}"] for row in figures["splitting"].values()]
        found[f"splitting: largest share of {kernel}"] = max(shares)
    return found


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path), help="Folder with matrices (default: SPARSECC_TEST_DATA)."
)
@click.option("--threads", "count", type=click.IntRange(1, 2), default=1, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Where the figures go.")
def main(data: Path | None, count: int, output: Path | None) -> None:
    folder = (
        data or Path(os.environ.get("SPARSECC_TEST_DATA", ROOT.parent / "shared" / "data"))
    ) / "matrices"
    figures: dict[str, Any] = {
        "machine": machine_facts(),
        "threads": count,
        "time": "CPU time of the calling thread" if count == 1 else "on the clock",
        "mkl": f"absent: {MKL_ABSENT}" if mkl is None else mkl.get_version_string(),
    }
    if mkl is not None:
        mkl.mkl_set_num_threads(count)
    alike = [{**even(seed), **skewed(seed)} for seed in (1, 2, 3, 4)]
    first = alike[0]
    products = {
        name: matrix for name, matrix in real(folder).items() if matrix.shape[0] == matrix.shape[1] > 500
    }
    products["even rows of 8"] = random_csr(50_000, 50_000, 400_000, None, 4)
    products["power law 1"] = random_csr(30_000, 30_000, 200_000, np.arange(1, 30_001.0) ** -1.0, 4)
    with Threads(count) as pool:
        threads = pool if count > 1 else None
        figures["dense"] = {
            group: {
                name: shown(name, dense_products(matrix, count, threads)) for name, matrix in matrices.items()
            }
            for group, matrices in (("real", real(folder)), ("even", even(1)), ("skewed", skewed(1)))
        }
        figures["dense"]["skewed"] |= {
            name: {"sddmm": shown(name, sampled_product(matrix, count, threads))}
            for name, matrix in skewed_small(1).items()
        }
        figures["joins"] = {
            name: shown(name, joins([matrices[name] for matrices in alike], count, threads)) for name in first
        }
        figures["spgemm"] = {
            name: shown(name, matrix_product(m, m, count, threads)) for name, m in products.items()
        }
        figures["mttkrp"] = {
            name: shown(name, tensor_times_factors(tensor, threads))
            for name, tensor in tensors(folder).items()
        }
        figures["splitting"] = {name: shown(name, splitting(matrix)) for name, matrix in first.items()}
    figures["summary"] = shown("summary", summary(figures))
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


def shown(name: str, figures: dict[str, Any]) -> dict[str, Any]:
    click.echo(f"{name}: {json.dumps(figures)}")
    return figures


if __name__ == "__main__":
    main()
