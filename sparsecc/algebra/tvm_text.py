"""The text of a kernel, its arguments and what it depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from sparsecc.algebra.nest import Nest

__all__ = ["Mode", "Parameter", "Signature", "Source", "State", "Writer"]

#: Variables in one array: larger ones would be put on the heap.
_ROW = 64

#: ``dense``: add to a dense result, or to the carry of a part; ``count``: how many entries each part has; ``fill``:
#: write the entries.
Mode = Literal["dense", "count", "fill"]


@dataclass(frozen=True)
class Signature:
    """What a kernel depends on.

    Attributes:
        nest: the loops.
        loops: numbers of those of the phase.
        dtypes: of the values of each input of the expression.
        coordinates: types of positions and coordinates of each level of each operand; None: dense.
        result: type of the result.
        mode: what it writes.
        gpu: one thread for each part.
    """

    nest: Nest
    loops: range
    dtypes: tuple[str, ...]
    coordinates: tuple[tuple[tuple[str, str] | None, ...], ...]
    result: str
    mode: Mode
    gpu: bool = False


@dataclass(frozen=True)
class Parameter:
    """An argument of a kernel.

    Attributes:
        kind: what it is, see ``tvm_codegen``.
        first, second: of which operand, level, index, loop or array; -1: there is one only.
        dtype: of the elements of an array; empty: an integer.
    """

    kind: str
    first: int = -1
    second: int = -1
    dtype: str = ""

    @property
    def name(self) -> str:
        """In the text."""
        return "_".join([self.kind, *(str(at) for at in (self.first, self.second) if at >= 0)])


@dataclass(frozen=True)
class Source:
    """A kernel as text.

    Attributes:
        text: in TVMScript, one function ``kernel``.
        parameters: its arguments after the first part and the one after the last.
    """

    text: str
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class State:
    """What is known inside some loops.

    Attributes:
        nodes: of each operand, as text.
        missing: operands that may have none.
        opened: text of a flag that all coordinates so far are on the path on which the part starts; None: no loop is
            left that could go on there.
    """

    nodes: Mapping[int, str]
    missing: frozenset[int]
    opened: str | None


@dataclass
class Writer:
    """Writes lines and collects arguments.

    Attributes:
        signature: what kernel it is to be.
        lines: of its body.
        parameters: its arguments by name.
        depth: of the line to come, in indents.
        temporaries: how many names of values have been given away.
        changes: how variables that change are written, by name.
        counts: the last number of such a variable, by type.
        opening: how many lines come before such variables are there.
    """

    signature: Signature
    lines: list[str] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    depth: int = 1
    temporaries: int = 0
    changes: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    opening: int = 0

    def __post_init__(self) -> None:
        nest, loops = self.signature.nest, self.signature.loops
        self.nest = nest
        self.later = loops[0] > 0
        self.levels = [*([-1] if self.later else []), *loops]
        walked = dict.fromkeys(operand for loop in loops for operand in nest.loops[loop].walked)
        self.walks = {
            operand: [loop for loop in loops if operand in nest.loops[loop].walked] for operand in walked
        }
        self.numbers = {index: at for at, index in enumerate((*nest.order, *nest.tail))}
        self.outputs = nest.outputs
        self.tail = tuple(index for index in nest.assignment.output.indices if index in nest.tail)
        known = len(self.outputs) - 1
        #: Level of the phase inside which one place of the result is added up; None: each product is by itself.
        self.scope: int | None = None
        if nest.in_order:
            self.scope = -1 if known < 0 else 0 if known < loops[0] else self.levels.index(known)

    def line(self, text: str) -> None:
        """Write one line."""
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Write lines inside ``header:``."""
        self.line(f"{header}:")
        self.depth += 1
        yield
        self.depth -= 1

    @contextmanager
    def steps(self, name: str, start: str, stop: str) -> Iterator[None]:
        """Write a loop over numbers.

        It counts from 0: of other bounds TVM's code generator for LLVM (0.27) puts in what variables are bound to, and
        so reads elements of arrays that have changed since.
        """
        number = self.temporary()
        count = self.variable(f"{number}_n", f"{stop} - {start}")
        with self.block(f"for {number} in T.serial({count})"):
            self.variable(name, f"{start} + {number}")
            yield

    def variable(self, name: str, value: str) -> str:
        """Bind a name to a value for good; return it.

        Conditions are stored first: TVM (0.27) simplifies bound values together, without end where they are chains.
        """
        if any(word in value for word in ("if_then_else", "T.min", "T.max")):
            value = self.changing(f"{name}=", value)
        self.line(f"{name}: T.let = {value}")
        return name

    def changing(self, name: str, value: str, dtype: str = "int64") -> str:
        """Set a variable that changes later; return how it is written, as ``at`` does.

        All of them are elements of an array for each type, on the stack: TVM (0.27) puts variables of its own on the
        heap.
        """
        if name not in self.changes:
            number = self.counts[dtype] = self.counts.get(dtype, -1) + 1
            self.changes[name] = f"{dtype}_{number // _ROW}[{number % _ROW}]"
        self.line(f"{self.changes[name]} = {value}")
        return self.changes[name]

    def at(self, name: str) -> str:
        """Return how a variable is written."""
        return self.changes.get(name, name)

    def temporary(self) -> str:
        """Return a name that nothing else has."""
        self.temporaries += 1
        return f"t{self.temporaries}"

    def scalar(self, kind: str, first: int = -1) -> str:
        """Return an integer argument."""
        return self.argument(Parameter(kind, first))

    def load(self, kind: str, at: str, first: int = -1, second: int = -1, dtype: str = "int64") -> str:
        """Return an element of an array of integers, as int64."""
        name = self.argument(Parameter(kind, first, second, dtype))
        return f"{name}[{at}]" if dtype == "int64" else f'T.Cast("int64", {name}[{at}])'

    def value(self, kind: str, at: str, first: int, dtype: str) -> str:
        """Return an element of an array of values, as the result's type."""
        name = self.argument(Parameter(kind, first, dtype=dtype))
        wanted = self.signature.result
        return f"{name}[{at}]" if dtype == wanted else f'T.Cast("{wanted}", {name}[{at}])'

    def argument(self, parameter: Parameter) -> str:
        """Return an argument by its name, which the kernel has from now on."""
        self.parameters[parameter.name] = parameter
        return parameter.name

    def size(self, index: str) -> str:
        """Return the size of an index."""
        return self.scalar("size", self.numbers[index])

    def coordinate(self, index: str) -> str:
        """Return the variable of an index."""
        return f"c{self.numbers[index]}"

    def address(self, indices: Sequence[str]) -> str:
        """Return that of an element of a row-major array with these indices."""
        found = "T.int64(0)"
        for at, index in enumerate(indices):
            found = (
                f"({found}) * {self.size(index)} + {self.coordinate(index)}" if at else self.coordinate(index)
            )
        return found

    def source(self) -> Source:
        """Return all that was written."""
        parameters = tuple(self.parameters.values())
        arguments = ["first: T.int64", "last: T.int64"]
        arguments += [f"{item.name}{'_h: T.handle' if item.dtype else ': T.int64'}" for item in parameters]
        head = ["@T.prim_func", f"def kernel({', '.join(arguments)}):"]
        head.append('    T.func_attr({"global_symbol": "kernel", "tirx.noalias": True})')
        for item in parameters:
            if item.dtype:
                head.append(f"    {item.name}_n = T.int64()")
                head.append(
                    f'    {item.name} = T.match_buffer({item.name}_h, ({item.name}_n,), "{item.dtype}", align=1)'
                )
        # TVM asks for these words: in registers of a thread, on the stack
        scope = "local" if self.signature.gpu else "global"
        arrays = [
            f'    {dtype}_{row} = T.alloc_buffer(({_ROW},), "{dtype}", scope="{scope}")'
            for dtype, count in self.counts.items()
            for row in range(count // _ROW + 1)
        ]
        body = [*self.lines[: self.opening], *arrays, *self.lines[self.opening :]]
        return Source("\n".join([*head, *body, ""]), parameters)
