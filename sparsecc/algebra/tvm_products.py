"""Where kernels put what they compute: a dense result and the carries of parts, or lists of entries."""

from __future__ import annotations

from collections.abc import Sequence

from sparsecc.algebra.nest import Term
from sparsecc.algebra.tvm_text import Parameter, State, Writer

__all__ = ["Places"]


class Places(Writer):
    """Writes what is done at the places of the result and with the products there."""

    def number(self, value: float) -> str:
        """A number of the result's type."""
        return f"T.{self.signature.result}({value if 'float' in self.signature.result else int(value)})"

    def begin_place(self) -> None:
        """One place of the result begins."""
        if self.signature.mode != "dense":
            self.changing("hit", "T.int64(0)")
        if self.signature.mode != "count" and not self.tail:
            self.changing("total", self.number(0), self.signature.result)
        if self.signature.mode == "dense" and self.outputs:
            here = [f"{self.coordinate(index)} == before{at}" for at, index in enumerate(self.outputs)]
            self.variable("shared", " and ".join(here))

    def end_place(self) -> None:
        """All of one place is added up."""
        if self.signature.mode == "dense":
            if not self.tail:
                self.add_to_dense(self.at("total"))
            return
        with self.block(f"if {self.at('hit')} == T.int64(1)"):
            if not self.tail and self.signature.mode == "fill":
                self.line(f"{self.result('entry')}[{self.at('entries')}] = {self.at('total')}")
            self.next_entry()

    def next_entry(self) -> None:
        """An entry of a sparse result is done."""
        entries = self.at("entries")
        if self.signature.mode == "fill":
            for at, index in enumerate(self.outputs):
                keys = self.argument(Parameter("keys", dtype="int64"))
                self.line(f"{keys}[{entries} * {len(self.outputs)} + {at}] = {self.coordinate(index)}")
        self.line(f"{entries} = {entries} + 1")

    def result(self, kind: str) -> str:
        """Return an array that values are written to."""
        return self.argument(Parameter(kind, dtype=self.signature.result))

    def add(self, buffer: str, address: str, value: str) -> None:
        """Add to an element."""
        self.line(f"{buffer}[{address}] = {buffer}[{address}] + {value}")

    def add_to_dense(self, value: str) -> None:
        """Add to the place in a dense result, or to the carry of the part if one before it has the place, too."""
        address = self.address(self.nest.assignment.output.indices)
        if self.scope is None:
            if self.signature.gpu:
                address = f"part * {self.scalar('span')} + {address}"
            self.add(self.result("out"), address, value)
            return
        carry = f"part * {self.scalar('width')} + {self.address(self.tail)}" if self.tail else "part"
        if not self.outputs:
            self.add(self.result("carry"), carry, value)
            return
        with self.block("if shared"):
            self.add(self.result("carry"), carry, value)
        with self.block("else"):
            self.add(self.result("out"), address, value)

    def product(self, term: Term, state: State) -> None:
        """Add a product: numbers, stored values, dense arrays; over the indices that only those have."""
        if self.signature.mode == "count":
            entries = self.at("entries")
            self.line(
                f"{entries} = {entries} + 1" if self.scope is None else f"{self.at('hit')} = T.int64(1)"
            )
            return
        inner = {index for access in term.arrays for index in access.indices if index in self.nest.tail}
        summed = [index for index in self.nest.tail if index in inner and index not in self.tail]
        factors = [self.number(term.coefficient)] if term.coefficient != 1 else []
        for operand in term.operands:
            access = self.nest.operands[operand].access
            if access is not None:
                factors.append(
                    self.value("val", state.nodes[operand], operand, self.signature.dtypes[access])
                )
        inputs = self.nest.assignment.inputs
        outside: list[str] = []
        inside: list[str] = []
        for access_ in term.arrays:
            number = inputs.index(access_)
            text = self.value("array", self.address(access_.indices), number, self.signature.dtypes[number])
            (inside if set(access_.indices) & inner else outside).append(text)
        value = self.variable(self.temporary(), " * ".join(factors + outside) or self.number(1))
        self.dense_loops(self.tail, summed, value, inside)
        if self.scope is None and self.signature.mode == "fill":
            self.next_entry()
        elif self.signature.mode == "fill":
            self.line(f"{self.at('hit')} = T.int64(1)")

    def dense_loops(
        self, kept: Sequence[str], summed: Sequence[str], value: str, factors: Sequence[str]
    ) -> None:
        """Loops over the indices that only dense arrays have."""
        if kept and not summed and self.signature.mode == "dense" and self.scope is not None:
            self.row(kept, value, factors)
            return
        if kept:
            with self.block(f"for {self.coordinate(kept[0])} in T.serial({self.size(kept[0])})"):
                self.dense_loops(kept[1:], summed, value, factors)
            return
        if summed:
            total = self.changing(self.temporary(), self.number(0), self.signature.result)
            self.sums(summed, total, factors)
            factors = [total]
        self.store(" * ".join([value, *factors]))

    def row(self, kept: Sequence[str], value: str, factors: Sequence[str]) -> None:
        """All of a row of a dense result, or of a carry: which of them is asked once."""
        output = self.nest.assignment.output.indices
        targets = [("if shared", "carry", f"part * {self.scalar('width')} + {self.address(self.tail)}")]
        if self.outputs:
            targets.append(("else", "out", self.address(output)))
        else:
            self.variable("shared", "T.bool(True)")
        for header, buffer, address in targets:
            with self.block(header):
                depth = self.depth
                for index in kept:
                    self.line(f"for {self.coordinate(index)} in T.serial({self.size(index)}):")
                    self.depth += 1
                self.add(self.result(buffer), address, " * ".join([value, *factors]))
                self.depth = depth

    def sums(self, summed: Sequence[str], total: str, factors: Sequence[str]) -> None:
        """Loops over indices that are summed over."""
        if not summed:
            self.line(f"{total} = {total} + {' * '.join(factors)}")
            return
        with self.block(f"for {self.coordinate(summed[0])} in T.serial({self.size(summed[0])})"):
            self.sums(summed[1:], total, factors)

    def store(self, value: str) -> None:
        """Add one value at the place where the loops are."""
        if self.signature.mode == "fill" and (self.tail or self.scope is None):
            address = self.at("entries")
            if self.tail:
                address = f"{address} * {self.scalar('width')} + {self.address(self.tail)}"
            self.add(self.result("entry"), address, value)
        elif self.tail or self.scope is None:
            self.add_to_dense(value)
        else:
            self.line(f"{self.at('total')} = {self.at('total')} + {value}")
