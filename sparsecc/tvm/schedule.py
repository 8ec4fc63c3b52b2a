"""Which passes of TVM's turn the imported module into code, and how its loops are ordered for a processor.

What is heavy calls our kernels by then. Left are neighbours of these, depthwise convolutions, which have no kernel, and
products of two computed tensors outside of attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["schedule"]

#: Numbers in a vector of a loop, the longest first that divides its length; rows up to ``_WHOLE`` are one vector.
_LANES = (16, 8, 4)
_WHOLE = 32

#: Rows of a product that share what they read of the other operand, the most first that divide their number.
_ROWS = (4, 2)

#: Most points of a window that are written out one by one.
_MOST_UNROLLED = 49


def schedule(target: Any) -> Any:
    """Return the passes for a target of TVM's: operators become loops, neighbours are fused, memory is planned.

    For GPUs they are TVM's own, with its schedules.
    """
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline

    if target.kind.name == "cuda":
        return tvm.relax.get_default_pipeline(target)

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def loops(module: Any, _: Any) -> Any:
        for name, function in module.functions.items():
            if isinstance(function, tvm.tirx.PrimFunc):
                module.update_func(name, _ordered(function))
        return module

    steps = [
        *pipeline.library_dispatch_passes(target),
        *pipeline.legalize_passes(target),
        loops,
        *pipeline.dataflow_lower_passes(target),
        *pipeline.finalize_passes(target),
    ]

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def passes(module: Any, _: Any) -> Any:
        with target:
            return tvm.transform.Sequential(steps)(module)

    return passes


def _ordered(function: Any) -> Any:
    """The function with its loops ordered; as it was where they are of another form."""
    import tvm
    from tvm.s_tir import Schedule, ScheduleError

    work = Schedule(tvm.IRModule({"main": function}))
    try:
        _inline(work)
        for kind in (_window, _product):
            for block in work.get_child_blocks(work.get_sblock("root")):
                kind(work, work.get(block).name_hint)
    except (ScheduleError, RuntimeError, TypeError, ValueError):
        return function  # TVM's own order is slower, and right
    return work.mod["main"]


def _inline(work: Any) -> None:
    """Compute what is one expression of its operands where it is read, but for what windows and products read."""
    from tvm.s_tir import ScheduleError

    for block in work.get_child_blocks(work.get_sblock("root")):
        consumers = work.get_consumers(block)
        if not consumers or _reduces(work, block) or any(_reduces(work, reader) for reader in consumers):
            continue
        try:
            work.compute_inline(block)
        except ScheduleError:
            continue


def _reduces(work: Any, block: Any) -> bool:
    from tvm.tirx import IterVar

    return any(axis.iter_type == IterVar.CommReduce for axis in work.get(block).iter_vars)


def _loops(work: Any, name: str, kinds: str) -> list[Any] | None:
    """The loops of a block by itself, if they are of these kinds (S: of results, R: of sums)."""
    from tvm.tirx import IterVar

    block = work.get_sblock(name)
    found = "".join(
        "R" if axis.iter_type == IterVar.CommReduce else "S" for axis in work.get(block).iter_vars
    )
    loops: list[Any] = work.get_loops(block)
    return loops if found == kinds and len(loops) == len(kinds) else None


def _extents(work: Any, loops: Sequence[Any]) -> list[int]:
    return [int(work.get(loop).extent) for loop in loops]


def _vector(extent: int) -> int:
    """Numbers in a vector of a loop of that length."""
    if extent <= _WHOLE:
        return extent
    return next((lanes for lanes in _LANES if extent % lanes == 0), 1)


def _window(work: Any, name: str) -> None:
    """Convolutions: vectors of neighbouring pixels, the points of the window written out, padding plane by plane."""
    loops = _loops(work, name, "SSSSRRR") if "conv" in name else None
    if loops is None:
        return
    image, channel, row, pixel, inner, high, wide = loops
    points = math.prod(_extents(work, [high, wide]))
    lanes = _vector(_extents(work, [pixel])[0])
    if points > _MOST_UNROLLED or lanes == 1:
        return
    block = work.get_sblock(name)
    outer, vector = work.split(pixel, [None, lanes])
    work.reorder(image, channel, row, outer, inner, high, wide, vector)
    work.unroll(high)
    work.unroll(wide)
    work.vectorize(vector)
    for producer in work.get_producers(block):
        work.compute_at(producer, channel if _extents(work, [inner])[0] == 1 else image)
    _finish(work, block, row)
    work.decompose_reduction(block, inner)


def _product(work: Any, name: str) -> None:
    """Products of matrices: a few rows by one vector of columns at a time."""
    kinds = [f"{'S' * rank}R" for rank in range(2, 6)]
    loops = (
        next(filter(None, (_loops(work, name, kind) for kind in kinds)), None) if "matmul" in name else None
    )
    if loops is None:
        return
    *_, row, column, inner = loops
    rows, columns, _ = _extents(work, [row, column, inner])
    lanes = _vector(columns)
    if lanes == 1:
        return
    block = work.get_sblock(name)
    some = next((some for some in _ROWS if rows % some == 0), 1)
    row, some_rows = work.split(row, [None, some])
    column, vector = work.split(column, [None, lanes])
    work.reorder(row, column, inner, some_rows, vector)
    work.unroll(some_rows)
    work.vectorize(vector)
    _finish(work, block, row)
    work.decompose_reduction(block, inner)


def _finish(work: Any, block: Any, loop: Any) -> None:
    """Compute what follows, such as bias and activation, while the results are in the cache."""
    consumers = work.get_consumers(block)
    if len(consumers) == 1:
        work.reverse_compute_at(consumers[0], loop)
