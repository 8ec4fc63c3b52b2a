"""Loops of one phase of a nest as TVMScript: the text that ``tvm_codegen`` compiles. Needs no TVM itself.

A kernel goes through a range of parts. Each part walks its own ranges of positions, from its row of the split table
alone: coordinates on the path that it starts inside are entered again, but not counted. Operands that are walked
together are merged, those that are looked up are searched. All sizes are arguments, so one kernel serves all shapes.

Names in the text are made from numbers: nothing of an expression's own names gets into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparsecc.algebra.tvm_products import Places
from sparsecc.algebra.tvm_text import Parameter, Signature, Source, State

__all__ = ["kernel_source"]

#: Threads of a block on a GPU.
_BLOCK = 64


def kernel_source(signature: Signature) -> Source:
    """Return the kernel for one phase of a nest in which products end."""
    writer = _Kernel(signature)
    writer.part()
    return writer.source()


class _Kernel(Places):
    """Writes one kernel, from the outermost loop inwards."""

    def part(self) -> None:
        """All of a part."""
        if not self.signature.gpu:
            with self.block("for part in T.serial(first, last)"):
                self.inside_part()
            return
        self.line(f'block = T.launch_thread("blockIdx.x", (last - first + {_BLOCK - 1}) // {_BLOCK})')
        self.line(f'thread = T.launch_thread("threadIdx.x", {_BLOCK})')
        self.opening = len(self.lines)
        self.variable("part", f'first + T.Cast("int64", block) * {_BLOCK} + T.Cast("int64", thread)')
        with self.block("if part < last"):
            self.inside_part()

    def inside_part(self) -> None:
        """A part, whose number is known."""
        cuts, columns = self.scalar("cuts"), len(self.levels)
        for operand, loops in self.walks.items():
            for level in range(self.later, self.later + len(loops)):
                place = f"{cuts} * {level} + part" if level else "part"
                self.variable(f"low{operand}_{level}", self.load("cursor", place, operand))
                self.variable(f"high{operand}_{level}", self.load("cursor", f"{place} + 1", operand))
        for level in range(columns - 1):  # the last loop enters nothing again
            self.variable(f"path{level}", self.load("path", f"part * {columns} + {level}"))
        if self.signature.mode == "dense" and self.scope is not None:
            for at in range(len(self.outputs)):
                self.variable(f"before{at}", self.load("place", f"part * {len(self.outputs)} + {at}"))
        if self.signature.mode != "dense":
            first = self.load("begin", "part") if self.signature.mode == "fill" else "T.int64(0)"
            self.changing("entries", first)
        if self.scope == -1:
            self.begin_place()
        if self.later:
            self.survivors()
        else:
            root = {operand: "T.int64(0)" for operand in range(len(self.nest.operands))}
            self.level(0, State(root, frozenset(), "True"))
        if self.scope == -1:
            self.end_place()
        if self.signature.mode == "count":
            counts = self.argument(Parameter("counts", dtype="int64"))
            self.line(f"{counts}[part] = {self.at('entries')}")

    def survivors(self) -> None:
        """The loop over what is left of the phases before."""
        first = next(iter(self.walks))
        start, stop = self.load("cursor", "part", first), self.load("cursor", "part + 1", first)
        self.variable("start", f"T.if_then_else(path0 >= T.int64(0), path0, {start})")
        with self.steps("s", "start", stop):
            self.variable("opened0", "s == path0")
            for loop in range(self.signature.loops[0]):
                index = self.nest.loops[loop].index
                self.variable(self.coordinate(index), self.load("outer", "s", loop))
            nodes = {
                operand: self.variable(f"node{operand}", self.load("node", "s", operand))
                for operand in range(len(self.nest.operands))
            }
            for operand, loops in self.walks.items():
                for level in range(1, 1 + len(loops)):
                    shift = self.variable(f"shift{operand}_{level}", self.load("shift", "s", operand, level))
                    for border in ("low", "high"):
                        self.variable(f"{border}{operand}_{level}s", f"{border}{operand}_{level} - {shift}")
            if self.scope == 0:
                self.begin_place()
            self.level(1, State(nodes, frozenset(nodes), "opened0"))
            if self.scope == 0:
                self.end_place()

    def level(self, level: int, outside: State) -> None:
        """One loop and all inside."""
        loop = self.nest.loops[self.levels[level]]
        walked = [operand for operand in self.walks if operand in loop.walked]
        starts = {operand: self.range_of(operand, level, outside) for operand in walked}
        own = self.coordinate(loop.index)
        if len(walked) == 1:
            operand = walked[0]
            position = f"q{operand}_{level}"
            with self.steps(position, starts[operand], f"e{operand}_{level}"):
                self.variable(own, self.stored(operand, level, position))
                present = {**outside.nodes, operand: position}
                self.inside(level, replace(outside, nodes=present, missing=outside.missing - {operand}))
            return
        for operand, start in starts.items():
            self.changing(f"p{operand}_{level}", start)
        with self.block(f"while {self.goes_on(walked, level)}"):
            nodes = {**outside.nodes, **self.merge(walked, level, own)}
            self.inside(level, replace(outside, nodes=nodes, missing=outside.missing | set(walked)))

    def goes_on(self, walked: Sequence[int], level: int) -> str:
        """Whether anything is left: one that all products need, or any."""
        loop = self.levels[level]
        terms = [term for term in self.nest.terms if len(term.indices) > loop]
        needed = [operand for operand in walked if all(operand in term.operands for term in terms)]
        word = " and " if needed else " or "
        return word.join(
            f"{self.at(f'p{operand}_{level}')} < e{operand}_{level}" for operand in needed or walked
        )

    def tree_level(self, operand: int, level: int) -> int:
        """The level of an operand's tree that a loop walks or looks up."""
        return self.nest.operands[operand].indices.index(self.nest.loops[self.levels[level]].index)

    def children(self, operand: int, level: int, outside: State, start: str, stop: str) -> None:
        """Where the children of an operand's node begin and end."""
        node, at = outside.nodes[operand], self.tree_level(operand, level)
        types = self.signature.coordinates[operand][at]
        size = self.size(self.nest.loops[self.levels[level]].index)
        for name, number in ((start, node), (stop, f"({node} + 1)")):
            border = (
                f"{number} * {size}" if types is None else self.load("pos", number, operand, at, types[0])
            )
            self.variable(name, self.if_there(operand, outside, border, "T.int64(0)"))

    def if_there(self, operand: int, state: State, value: str, other: str) -> str:
        """A value that is only known where an operand has a node."""
        if operand not in state.missing:
            return value
        return f"T.if_then_else({state.nodes[operand]} >= T.int64(0), {value}, {other})"

    def stored(self, operand: int, level: int, position: str) -> str:
        """The coordinate at a position of the children that are gone through."""
        at = self.tree_level(operand, level)
        types = self.signature.coordinates[operand][at]
        if types is None:
            return f"{position} - f{operand}_{level}"
        return self.load("crd", position, operand, at, types[1])

    def range_of(self, operand: int, level: int, outside: State) -> str:
        """The children of an operand's node that are the part's, and the one on the path that it starts inside."""
        name = f"{operand}_{level}"
        suffix = "s" if self.later else ""
        self.children(operand, level, outside, f"f{name}", f"g{name}")
        start = self.variable(f"a{name}", f"T.max(f{name}, low{name}{suffix})")
        self.variable(f"e{name}", f"T.min(g{name}, high{name}{suffix})")
        if level == len(self.levels) - 1:
            return start
        before = self.variable(f"b{name}", f"low{name}{suffix} - 1")
        known = [f"path{level} >= T.int64(0)", f"{before} >= f{name}", f"{before} < g{name}"]
        if outside.opened != "True":
            known.insert(0, str(outside.opened))
        again = f"T.if_then_else({self.stored(operand, level, before)} == path{level}, {before}, {start})"
        return self.variable(f"r{name}", f"T.if_then_else({' and '.join(known)}, {again}, {start})")

    def merge(self, walked: Sequence[int], level: int, own: str) -> dict[int, str]:
        """Take the next coordinate of several operands; the position of each in which it is, else -1."""
        for operand in walked:
            name = f"{operand}_{level}"
            position = self.at(f"p{name}")
            stored = self.stored(operand, level, position)
            self.variable(f"x{name}", f"T.if_then_else({position} < e{name}, {stored}, T.int64({2**63 - 1}))")
        least = f"x{walked[0]}_{level}"
        for operand in walked[1:]:
            least = f"T.min({least}, x{operand}_{level})"
        self.variable(own, least)
        found = {}
        for operand in walked:
            name = f"{operand}_{level}"
            position = self.at(f"p{name}")
            found[operand] = self.variable(
                f"q{name}", f"T.if_then_else(x{name} == {own}, {position}, T.int64(-1))"
            )
            with self.block(f"if x{name} == {own}"):
                self.line(f"{position} = {position} + 1")
        return found

    def inside(self, level: int, state: State) -> None:
        """What is done at a coordinate: look up, add products that end here, go on inwards."""
        number = self.levels[level]
        own = self.coordinate(self.nest.loops[number].index)
        last = level == len(self.levels) - 1
        opened = None
        if not last:
            outer = f" and {state.opened}" if state.opened != "True" else ""
            opened = self.variable(f"opened_{level}", f"{own} == path{level}{outer}")
        for operand in self.nest.loops[number].located:
            state = self.look_up(operand, level, state, own)
        state = replace(state, opened=opened)
        if self.scope == level:
            self.begin_place()
        for term in self.nest.terms:
            if len(term.indices) - 1 == number:
                conditions = [
                    f"{state.nodes[at]} >= T.int64(0)" for at in term.operands if at in state.missing
                ]
                conditions += [f"not {opened}"] if opened else []
                if conditions:
                    with self.block(f"if {' and '.join(conditions)}"):
                        self.product(term, state)
                else:
                    self.product(term, state)
        if not last:
            self.level(level + 1, state)
        if self.scope == level:
            self.end_place()

    def look_up(self, operand: int, level: int, state: State, own: str) -> State:
        """The node of an operand at a coordinate."""
        found, at = f"n{operand}_{level}", self.tree_level(operand, level)
        types, node = self.signature.coordinates[operand][at], state.nodes[operand]
        if types is None:
            size = self.size(self.nest.loops[self.levels[level]].index)
            self.variable(found, self.if_there(operand, state, f"{node} * {size} + {own}", "T.int64(-1)"))
            return replace(state, nodes={**state.nodes, operand: found})
        first, end, middle = (self.temporary() for _ in range(3))
        self.children(operand, level, state, first, end)
        low, high = (self.changing(self.temporary(), border) for border in (first, end))
        with self.block(f"while {low} < {high}"):
            self.variable(middle, f"({low} + {high}) >> 1")
            with self.block(f"if {self.load('crd', middle, operand, at, types[1])} < {own}"):
                self.line(f"{low} = {middle} + 1")
            with self.block("else"):
                self.line(f"{high} = {middle}")
        same = f"T.if_then_else({self.load('crd', low, operand, at, types[1])} == {own}, {low}, T.int64(-1))"
        self.variable(found, f"T.if_then_else({low} < {end}, {same}, T.int64(-1))")
        return replace(state, nodes={**state.nodes, operand: found}, missing=state.missing | {operand})
