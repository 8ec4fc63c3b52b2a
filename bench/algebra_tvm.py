"""Loops compiled by TVM against vectorised NumPy, the operator library and SciPy: one thread.

    python bench/algebra_tvm.py --json bench/results/algebra_tvm.json

Where TVM is not installed (`pip install 'sparsecc[tvm]'`) it says so and measures the others. Everything runs by turns
in one process; times are the CPU time of the calling thread, of a whole call of `einsum` on the same operands, so with
recognising the expression, cutting it into parts and packing the result. The library's row of `(A+B)*C` is NumPy's: it
has no such kernel. Figures are ratios of medians: what others take over what the loops by TVM take.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from algebra import median_times, random_csr

from sparsecc.algebra import Tensor, einsum
from sparsecc.algebra.tvm_codegen import TvmBackend
from sparsecc.errors import MissingExtraError
from sparsecc.plan import machine_facts
from sparsecc.runtime.algebra_backend import NativeBackend

#: Expression and format of the result.
EXPRESSIONS = {
    "SpMV": ("y(i) = A(i,j) * x(j)", None),
    "SpMM": ("Y(i,n) = A(i,j) * X(j,n)", None),
    "SDDMM": ("S(i,j) = A(i,j) * U(i,n) * X(j,n)", "csr"),
    "sum of two": ("S(i,j) = A(i,j) + B(i,j)", "csr"),
    "sum of three": ("S(i,j) = A(i,j) + B(i,j) + C(i,j)", "csr"),
    "(A+B)*C": ("S(i,j) = (A(i,j) + B(i,j)) * C(i,j)", "csr"),
    "MTTKRP": ("Y(i,n) = T(i,j,k) * V(j,n) * W(k,n)", None),
    "TTV": ("S(i,j) = T(i,j,k) * c(k)", "csf"),
    "inner product": ("a = T(i,j,k) * R(i,j,k)", None),
}


def operands(entries: int) -> dict[str, Any]:
    """Matrices of 20,000 x 20,000 and tensors of 500 x 600 x 700 with about so many entries, float32; 64 columns."""
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {
        name: random_csr(20_000, 20_000, entries, None, at) for at, name in enumerate("ABC")
    }
    for name in "TR":
        places = np.unique(rng.integers(0, (500, 600, 700), (entries, 3)), axis=0)
        values = rng.standard_normal(len(places), np.float32)
        found[name] = Tensor.from_coordinates(places, values, (500, 600, 700), "csf")
    sizes = {"x": 20_000, "c": 700, "X": (20_000, 64), "U": (20_000, 64), "V": (600, 32), "W": (700, 32)}
    return found | {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}


def scipy_calls(given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The same in SciPy, where it has it."""
    a, b, c = (given[name] for name in "ABC")
    return {
        "SpMV": lambda: a @ given["x"],
        "SpMM": lambda: a @ given["X"],
        "sum of two": lambda: a + b,
        "sum of three": lambda: a + b + c,
        "(A+B)*C": lambda: (a + b).multiply(c),
    }


def agree(results: dict[str, Any]) -> None:
    """See that all computed the same."""
    first, *others = (item.to_scipy() if isinstance(item, Tensor) else item for item in results.values())
    for name, other in zip(list(results)[1:], others, strict=True):
        assert abs(other - first).max() <= 1e-4 * abs(first).max(), name


@click.command()
@click.option("--entries", type=click.IntRange(min=1000), default=200_000, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Where the figures go.")
def main(entries: int, output: Path | None) -> None:
    given = operands(entries)
    figures: dict[str, Any] = {"machine": machine_facts(), "threads": 1, "entries": entries}
    try:
        compiled = TvmBackend(strict=True)
    except MissingExtraError as error:
        compiled, figures["tvm"] = None, f"absent: {error}"
        click.echo(figures["tvm"])
    others = scipy_calls(given)
    with NativeBackend() as library:
        for name, (text, form) in EXPRESSIONS.items():
            used = {key: item for key, item in given.items() if f"{key}(" in text.partition("=")[2]}

            def run(backend: Any, text: str = text, form: str | None = form, used: Any = used) -> Any:
                return einsum(text, used, format=form, backend=backend)

            calls = {"numpy": lambda run=run: run(None), "library": lambda run=run: run(library)}
            if compiled is not None:
                calls["tvm"] = lambda run=run: run(compiled)
            if name in others:
                calls["scipy"] = others[name]
            agree({key: call() for key, call in calls.items()})
            times = median_times(calls, 1, rounds=3)
            figures[name] = {"ms": {key: round(1e3 * seconds, 3) for key, seconds in times.items()}}
            if "tvm" in times:
                figures[name] |= {
                    f"{key} / tvm": round(seconds / times["tvm"], 3)
                    for key, seconds in times.items()
                    if key != "tvm"
                }
            click.echo(f"{name}: {json.dumps(figures[name])}")
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
