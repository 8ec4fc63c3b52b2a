"""What single methods ask of `optimize`, and which ratio of each is the fastest that keeps the metric.

A method gives every site of a model the same ratio; what gains no time at a site is taken back there, as `optimize`
always does. Ratios go from the strongest to the mildest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["METHODS", "ORT", "Found", "Method", "fastest_ratio", "methods_for"]

Options = Mapping[str, Any]

_SPARSITIES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3)
_SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

#: Patterns of zeros; N:M have one sparsity.
_PATTERNS = ("unstructured", "16x1", "16x4", "4x1", "8x1", "2:4", "4:8")
_PRUNE = ("sparsegpt", "alps", "wanda", "magnitude")

#: Methods that put smaller operators in the place of weights, by what they work on. The first of a row takes the
#: time that all of it take: their forms are the same.
_LINEAR = (
    ("svd", "rrr", "whitened-svd", "asvd"),
    ("monarch",),
    ("btt",),
    ("blast",),
    ("blockdiag-lowrank",),
    ("kronecker",),
    ("tensor-train",),
    ("rocket", "compot", "cospadi"),
    ("cur",),
    ("interpolative",),
    ("modegpt",),
)
_CONVOLUTIONS = (
    ("svd", "rrr", "whitened-svd"),
    ("tucker",),
    ("spatial-svd",),
    ("cp",),
    ("separable",),
    ("best",),
)

#: What onnxruntime's own tool makes: dynamic, and static with uint8 or int8 activations.
ORT = ("ort int8 dynamic", "ort int8 static", "ort int8 static u8")


@dataclass(frozen=True)
class Method:
    """One method at several ratios.

    Attributes:
        name: of it.
        levels: ratios, from the strongest to the mildest; one that is empty where there is nothing to choose.
        fitted: what is asked of `optimize` at a ratio.
        timed: the same for a model that takes the same time and needs no long fit.
    """

    name: str
    levels: tuple[float | None, ...]
    fitted: Callable[[float | None], Options]
    timed: Callable[[float | None], Options]

    def label(self, level: float | None) -> str:
        """Name of it at a ratio."""
        return self.name if level is None else f"{self.name} {level:g}"


@dataclass(frozen=True)
class Found:
    """What was seen of a model.

    Attributes:
        speed: time of the dense model / its own.
        drop: what its metric lost; None where it was only timed.
    """

    speed: float
    drop: float | None = None


def fastest_ratio(
    method: Method,
    least: float,
    allowed: float,
    timed: Callable[[Method, float | None], Found | None],
    fitted: Callable[[Method, float | None], Found | None],
) -> tuple[Found | None, str]:
    """Find the strongest ratio that keeps the metric, as far as it can be faster than ``least``.

    Ratios are fitted from the mildest that is faster on: where that one loses too much, stronger ones do.

    Args:
        method: that is tried.
        least: speed of the best that is known.
        allowed: most that the metric may lose.
        timed: speed of a ratio; None where the method refuses the model.
        fitted: speed and drop of a ratio; None likewise.

    Returns:
        What was found, if anything, and what is said of the method.
    """
    faster: list[float | None] = []
    for level in method.levels:
        found = timed(method, level)
        if found is None or found.speed <= least:
            if not faster:
                return None, "refused" if found is None else f"{found.speed:.2f}x at most: not faster"
            break
        faster.append(level)
    best: Found | None = None
    said = ""
    for level in reversed(faster):
        found = fitted(method, level)
        if found is None:
            return best, said or "refused"
        assert found.drop is not None, "what was fitted was judged"
        if found.drop > allowed:
            return best, said or f"{method.label(level)}: {found.speed:.2f}x, loses {found.drop:.4f}"
        if best is None or found.speed > best.speed:
            best, said = found, f"{method.label(level)}: {found.speed:.2f}x, loses {found.drop:.4f}"
    return best, said


def _pruning(method: str, pattern: str) -> Method:
    fixed = ":" in pattern

    def options(name: str) -> Callable[[float | None], Options]:
        return lambda level: {"method": name, "pattern": pattern} | ({} if fixed else {"sparsity": level})

    return Method(
        f"{method} {pattern}", (None,) if fixed else _SPARSITIES, options(method), options("magnitude")
    )


def _amount(method: str, option: str, levels: tuple[float, ...], like: str | None = None) -> Method:
    return Method(
        method,
        levels,
        lambda level: {"method": method, option: level},
        lambda level: {"method": like or method, option: level},
    )


def _plain(name: str, **options: str) -> Method:
    return Method(name, (None,), lambda level: options, lambda level: options)


def _all() -> dict[str, tuple[Method, str]]:
    """Methods by name, each with what a model must have: MatMuls, convolutions, or anything."""
    found = [
        (_plain("int8 static", quantize="int8", activations="static"), ""),
        (_plain("int8 dynamic", quantize="int8", activations="dynamic"), ""),
        (_plain("fp16 values", values="fp16"), ""),
        (_plain("bf16 values", values="bf16"), ""),
        (_amount("structured", "flops_ratio", _SHARES), ""),
        (_amount("depth", "flops_ratio", (0.5, 0.6, 0.7, 0.8, 0.9)), ""),
        (_amount("sparse-lowrank", "param_ratio", _SHARES), "MatMul"),
        (_amount("tiles", "sparsity", (0.4, 0.3, 0.2)), "MatMul"),
    ]
    for kind, rows in (("MatMul", _LINEAR), ("Conv", _CONVOLUTIONS)):
        for row in rows:
            found += [(_amount(name, "param_ratio", _SHARES, row[0]), kind) for name in row]
    found += [(_pruning(method, pattern), "") for pattern in _PATTERNS for method in _PRUNE]
    by_name: dict[str, tuple[Method, str]] = {}
    for method, kind in found:  # what suits both kinds suits all
        by_name[method.name] = (method, "" if method.name in by_name else kind)
    return by_name


METHODS = _all()


def methods_for(ops: set[str]) -> list[Method]:
    """The methods that suit a model whose sites have these operators."""
    kinds = {"" if op == "" else "Conv" if op == "Conv" else "MatMul" for op in ops} | {""}
    return [method for method, kind in METHODS.values() if kind in kinds]
