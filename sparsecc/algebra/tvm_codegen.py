"""Compiled loops for any expression, with TVM, on processors (LLVM) and on CUDA. The extra ``sparsecc[tvm]``.

Each phase of a nest in which products end becomes a kernel, see ``tvm_source``. The plan, its parts and what earlier
phases leave come from ``work``; ``execute`` puts results together, as it does with those of NumPy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sparsecc.algebra.entries import ordered
from sparsecc.algebra.execute import execute, result_dtype
from sparsecc.algebra.joins import Entries
from sparsecc.algebra.levels import Compressed, Dense, Tensor
from sparsecc.algebra.nest import Nest
from sparsecc.algebra.splitter import Int64
from sparsecc.algebra.tvm_source import kernel_source
from sparsecc.algebra.tvm_text import Mode, Parameter, Signature, Source
from sparsecc.algebra.visit import Phase
from sparsecc.algebra.work import Plan
from sparsecc.errors import MissingExtraError, SpecError

__all__ = ["TvmBackend", "cuda_code", "processor", "signature"]

Target = Literal["llvm", "cuda"]

#: Types of values that kernels compute with.
_VALUES = frozenset({"float32", "float64", "int32", "int64"})

#: Copies of a dense result to which parts add in no order: each for some parts, one after the other.
_LANES = 8

#: Numbers in all of these copies.
_MOST_COPIED = 1 << 27

#: Entries of a sparse result that are written at a time.
_MOST_ENTRIES = 1 << 24

#: Name under which TVM knows our passes.
_PIPELINE = "sparsecc.algebra"

#: What kernels write.
_RESULTS = frozenset({"out", "carry", "counts", "keys", "entry"})


class TvmBackend:
    """A backend of ``sparsecc.algebra.einsum`` that compiles every expression.

    Kernels are kept as long as the process lives, by expression, formats and types; sizes are arguments of theirs.

    Attributes:
        target: ``llvm`` or ``cuda``.
        strict: refuse what there is no kernel for, instead of leaving it to NumPy.
    """

    def __init__(self, target: Target = "llvm", *, strict: bool = False) -> None:
        """Make one.

        Raises:
            MissingExtraError: TVM is not installed.
            SpecError: the target is another one, or there is no CUDA device.
        """
        if target not in ("llvm", "cuda"):
            raise SpecError(f"unknown target '{target}'; known: llvm, cuda")
        tvm = _tvm()
        if target == "cuda" and not tvm.cuda(0).exist:
            raise SpecError("no CUDA device is there: take target='llvm'")
        self.target: Target = target
        self.strict = strict

    def execute(self, plan: Plan, format: str | None, threads: int) -> Tensor | NDArray[Any] | None:
        """Compute a plan; None if there is no kernel for it and ``strict`` is false.

        Raises:
            SpecError: there is no kernel for it and ``strict`` is true, or as ``execute.execute``.
        """
        reason = self._refusal(plan, format)
        if reason is None:
            return execute(plan, format, threads, self)
        if self.strict:
            raise SpecError(f"{plan.assignment}: no kernel by TVM: {reason}; strict=False leaves it to NumPy")
        return None

    def add_to(self, out: NDArray[Any], plan: Plan, nest: Nest, phase: Phase, threads: int) -> None:
        """Add what the parts of a phase compute to a dense result.

        Where results follow the loops a part shares at most its first place with those before it: its carry. They are
        added in the order of the parts. Elsewhere parts add to copies of the result.
        """
        run = _Run(self.target, plan, nest, phase, "dense")
        parts = phase.table.parts
        if nest.in_order:
            carry = np.zeros((parts, run.width), out.dtype)
            run.all_parts(threads, out=out, carry=carry)
            _add_carries(out, carry, plan, nest, _places(nest, phase))
        elif self.target == "cuda":
            copies = np.zeros((parts, *out.shape), out.dtype)
            run.all_parts(1, out=copies)
            out += copies.sum(0)
        else:
            count = min(parts, _LANES) if out.size * _LANES <= _MOST_COPIED else 1
            copies = np.zeros((count, *out.shape), out.dtype)
            ends = [lane * parts // count for lane in range(count + 1)]
            _map(lambda at: run(ends[at], ends[at + 1], out=copies[at]), count, threads)
            out += copies.sum(0)

    def entries(self, plan: Plan, nest: Nest, phase: Phase, threads: int) -> Iterator[Entries]:
        """Yield what the parts of a phase compute, some parts at a time: entries are counted, then written."""
        counts = np.zeros(phase.table.parts, np.int64)
        _Run(self.target, plan, nest, phase, "count").all_parts(threads, counts=counts)
        before = np.concatenate([[0], np.cumsum(counts)])
        run = _Run(self.target, plan, nest, phase, "fill")
        tail = tuple(index for index in plan.assignment.output.indices if index in nest.tail)
        first, limit = 0, max(_MOST_ENTRIES // max(run.width, 1), 1)
        while first < len(counts):
            last = int(np.searchsorted(before, before[first] + limit, side="right")) - 1
            last = max(last, first + 1)
            number = int(before[last] - before[first])
            keys = np.zeros((number, len(nest.outputs)), np.int64)
            values = np.zeros((number, *(plan.sizes[index] for index in tail)), result_dtype(plan))
            run.some_parts(first, last, threads, begin=before[:-1] - before[first], keys=keys, entry=values)
            if not nest.in_order:
                keys, values = ordered(keys, values)
            yield Entries(nest.outputs, keys, tail, values)
            first = last

    def _refusal(self, plan: Plan, format: str | None) -> str | None:
        """Why there is no kernel for a plan."""
        types = [item.values.dtype if isinstance(item, Tensor) else item.dtype for item in plan.inputs]
        for dtype in (*types, result_dtype(plan)):
            if dtype.name not in _VALUES:
                return f"values of type {dtype} (only {', '.join(sorted(_VALUES))})"
        if not all(math.isfinite(term.coefficient) for nest in plan.nests for term in nest.terms):
            return "a number that is not finite"
        scattered = [
            phases
            for nest, phases in zip(plan.nests, plan.phases, strict=True)
            if not nest.in_order and format is None and self.target == "cuda"
        ]
        copies = max((phase.table.parts for phases in scattered for phase in phases), default=0)
        if copies * math.prod(plan.shape) > _MOST_COPIED:
            return "parts add to a dense result in no order, and copies of it for all of them are too large"
        return None


def signature(plan: Plan, nest: Nest, phase: Phase, mode: Mode, target: Target = "llvm") -> Signature:
    """Return what the kernel of a phase depends on."""
    return Signature(
        nest,
        phase.loops,
        tuple(str((item.values if isinstance(item, Tensor) else item).dtype.name) for item in plan.inputs),
        tuple(
            tuple(
                None if isinstance(level, Dense) else (_integer(level.pos.dtype), _integer(level.crd.dtype))
                for level in tree
            )
            for tree in phase.trees
        ),
        result_dtype(plan).name,
        mode,
        target == "cuda",
    )


def cuda_code(sign: Signature, arch: str = "sm_80") -> str:
    """Return the CUDA code of a kernel; no GPU is needed.

    Raises:
        MissingExtraError: TVM is not installed.
    """
    built = _built(kernel_source(sign), _tvm().target.Target({"kind": "cuda", "arch": arch}))
    return str(built.mod.imports[0].inspect_source())


def _integer(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.name in ("int32", "int64") else "int64"


def _tvm() -> Any:
    try:
        import tvm
        import tvm.script
    except ImportError as error:
        raise MissingExtraError("kernels by TVM need it: pip install 'sparsecc[tvm]'") from error
    return tvm


def _lowering() -> Any:
    """The passes that such loops need.

    TVM's own pipelines are for other loops: their simplifier does not end on long chains of conditions (0.27). LLVM and
    nvcc optimise the rest.
    """
    passes = _tvm().tirx.transform
    sequence = _tvm().ir.transform.Sequential
    first = [
        passes.FlattenBuffer(),
        passes.AnnotateEntryFunc(),
        passes.SplitHostDevice(),
        passes.MakePackedAPI(),
    ]
    return (
        sequence(first),
        lambda: sequence([passes.LowerTVMBuiltin(), passes.LowerIntrin()]),
        lambda: sequence([passes.LowerIntrin()]),
    )


def _built(source: Source, target: Any) -> Any:
    tvm = _tvm()
    tvm.tirx.register_tir_pipeline(_PIPELINE, _lowering)
    return tvm.compile(tvm.script.from_source(source.text), target=target, tir_pipeline=_PIPELINE)


def processor() -> dict[str, Any]:
    """LLVM for this processor: with AVX2 where NumPy has found it. Sums over dense indices may be added in lanes."""
    known = np.show_config(mode="dicts")["SIMD Extensions"]
    names = {*known.get("baseline", ()), *known.get("found", ())}
    wide = "X86_V3" in names or {"AVX2", "FMA3"} <= names
    return {
        "kind": "llvm",
        **({"mcpu": "x86-64-v3"} if wide else {}),
        "fast-math-reassoc": True,
        "fast-math-contract": True,
    }


@functools.cache
def _compiled(sign: Signature) -> tuple[Callable[..., None], tuple[Parameter, ...]]:
    """The kernel and its arguments."""
    source = kernel_source(sign)
    return _built(source, "cuda" if sign.gpu else processor())["kernel"], source.parameters


class _Run:
    """A kernel with all its arguments but what it writes."""

    def __init__(self, target: Target, plan: Plan, nest: Nest, phase: Phase, mode: Mode) -> None:
        self._kernel, self._parameters = _compiled(signature(plan, nest, phase, mode, target))
        self._device = _tvm().cuda(0) if target == "cuda" else None
        self.parts = phase.table.parts
        tail = [index for index in plan.assignment.output.indices if index in nest.tail]
        self.width = math.prod(plan.sizes[index] for index in tail)
        given = _Arguments(plan, nest, phase, self.width)
        self._given = [
            None if item.kind in _RESULTS or item.kind == "begin" else self._taken(given.of(item))
            for item in self._parameters
        ]

    def __call__(self, first: int, last: int, **results: NDArray[Any]) -> None:
        """Run parts ``first`` to ``last``, without it."""
        taken = [
            self._taken(results[item.kind]) if given is None else given
            for item, given in zip(self._parameters, self._given, strict=True)
        ]
        self._kernel(first, last, *taken)
        if self._device is not None:
            for item, argument in zip(self._parameters, taken, strict=True):
                if item.kind in _RESULTS:
                    results[item.kind].reshape(-1)[:] = argument.numpy()[: results[item.kind].size]

    def all_parts(self, threads: int, **results: NDArray[Any]) -> None:
        """Run all of them on some threads."""
        self.some_parts(0, self.parts, threads, **results)

    def some_parts(self, first: int, last: int, threads: int, **results: NDArray[Any]) -> None:
        """Run some of them on some threads."""
        count = last - first
        pieces = 1 if self._device is not None or threads <= 1 else min(count, 8 * threads)
        ends = [first + at * count // pieces for at in range(pieces + 1)]
        _map(lambda at: self(ends[at], ends[at + 1], **results), pieces, threads)

    def _taken(self, argument: int | NDArray[Any]) -> Any:
        """As the kernel takes it: row-major and flat, of one element at least, writable or a copy."""
        if isinstance(argument, int):
            return argument
        flat = np.ascontiguousarray(argument).reshape(-1)
        if not flat.size:
            flat = np.zeros(1, flat.dtype)
        if self._device is not None:
            return _tvm().runtime.tensor(flat, self._device)
        return flat if flat.flags.writeable else flat.copy()


class _Arguments:
    """Arguments of the kernel of a phase."""

    def __init__(self, plan: Plan, nest: Nest, phase: Phase, width: int) -> None:
        self._plan, self._nest, self._phase, self._whole_width = plan, nest, phase, width

    def of(self, parameter: Parameter) -> int | NDArray[Any]:
        """Return one of them, in the type that the kernel has for it."""
        found = getattr(self, f"_{parameter.kind}")(parameter.first, parameter.second)
        if not parameter.dtype:
            return int(found)
        return np.asarray(found).astype(parameter.dtype, copy=False)

    def _cuts(self, _: int, __: int) -> int:
        return self._phase.table.parts + 1

    def _size(self, number: int, _: int) -> int:
        return self._plan.sizes[(*self._nest.order, *self._nest.tail)[number]]

    def _width(self, _: int, __: int) -> int:
        return self._whole_width

    def _span(self, _: int, __: int) -> int:
        return math.prod(self._plan.shape)

    def _pos(self, operand: int, level: int) -> Any:
        return self._compressed(operand, level).pos

    def _crd(self, operand: int, level: int) -> Any:
        return self._compressed(operand, level).crd

    def _compressed(self, operand: int, level: int) -> Compressed:
        found = self._phase.trees[operand][level]
        assert isinstance(found, Compressed)  # dense levels are computed
        return found

    def _val(self, operand: int, _: int) -> Any:
        access = self._nest.operands[operand].access
        assert access is not None  # only tensors have values
        tensor = self._plan.inputs[access]
        assert isinstance(tensor, Tensor)
        return tensor.values

    def _array(self, number: int, _: int) -> Any:
        return self._plan.inputs[number]

    def _cursor(self, operand: int, _: int) -> Int64:
        return self._phase.table.cursors[list(self._phase.walks).index(operand)]

    def _path(self, _: int, __: int) -> Int64:
        return self._phase.table.paths

    def _place(self, _: int, __: int) -> Int64:
        return _places(self._nest, self._phase)

    def _outer(self, loop: int, _: int) -> Int64:
        assert self._phase.survivors is not None  # only kernels of later phases ask
        return self._phase.survivors.places[:, loop]

    def _node(self, operand: int, _: int) -> Int64:
        assert self._phase.survivors is not None
        return self._phase.survivors.nodes[operand]

    def _shift(self, operand: int, level: int) -> Int64:
        """Positions in the walk of a later phase less those in the tree, by survivor."""
        view = self._phase.views[operand]
        assert self._phase.survivors is not None
        every = np.arange(len(self._phase.survivors.places))
        return view.children_before(level - 1, every) - view.start(level - 1, every)


def _places(nest: Nest, phase: Phase) -> Int64:
    """``[parts, outputs]`` place of the result that the event just before each part adds to; -1: there is none."""
    found = phase.table.paths[:-1]
    if phase.survivors is not None:
        outer = np.where(found[:, :1] >= 0, phase.survivors.places[np.maximum(found[:, 0], 0)], -1)
        found = np.concatenate([outer, found[:, 1:]], axis=1)
    return found[:, : len(nest.outputs)]


def _add_carries(out: NDArray[Any], carry: NDArray[Any], plan: Plan, nest: Nest, places: Int64) -> None:
    order = plan.assignment.output.indices
    tail = [index for index in order if index in nest.tail]
    view = out.transpose([order.index(index) for index in (*nest.outputs, *tail)])
    carry = carry.reshape(len(carry), *(plan.sizes[index] for index in tail))
    if not nest.outputs:
        view[...] += carry.sum(0)
        return
    there = (places >= 0).all(1)
    np.add.at(view, tuple(places[there].T), carry[there])


def _map(work: Callable[[int], None], count: int, threads: int) -> None:
    if threads <= 1 or count <= 1:
        for at in range(count):
            work(at)
        return
    with ThreadPoolExecutor(min(threads, count)) as pool:
        list(pool.map(work, range(count)))
