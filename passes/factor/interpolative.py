"""Some of a site's inputs and a smaller weight in the place of it: Gather and one product."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Site
from sparsecc.passes.factor.base import CalibratedFactorPass
from sparsecc.passes.factor.chain import Chain
from sparsecc.passes.factor.forms import Form
from sparsecc.passes.factor.interpolative_fit import UnitSelection, kept_units, transfer, unit_columns
from sparsecc.passes.prune.gram import Matrix, Quadratic

__all__ = ["FactorInterpolative", "Interpolative"]

#: Bytes of one index.
_INDEX = 4


@dataclass(frozen=True)
class Interpolative(Form):
    """A weight that reads some of its inputs, runs of neighbours at a time.

    Attributes:
        transfer: ``[N, count * width]``.
        kept: runs that are read, int32 ``[count]``, ascending.
        runs: how many there are.
        length: inputs in a run; 1 for a convolution, whose inputs are channels.
    """

    transfer: Matrix
    kept: NDArray[np.int32]
    runs: int
    length: int

    @property
    def width(self) -> int:
        """Columns of the weight per run: its inputs, or the entries of a convolution's kernel."""
        return int(self.transfer.shape[1]) // len(self.kept)

    def dense(self) -> Matrix:
        """Return the weight with zeros for the inputs that are not read."""
        whole = np.zeros((len(self.transfer), self.runs * self.width))
        whole[:, unit_columns(whole.shape[1], self.width)[self.kept].ravel()] = self.transfer
        return whole

    def bytes(self, itemsize: int, *, custom_ops: bool) -> int:
        """Bytes of the smaller weight and of the indices."""
        return self.transfer.size * itemsize + self.kept.size * _INDEX

    @property
    def macs(self) -> int:
        """Multiplications per row; picking has none."""
        return self.transfer.size

    def describe(self) -> str:
        """How many inputs are read."""
        return f"reads {len(self.kept) * self.length} of {self.runs * self.length} inputs"

    def emit(self, chain: Chain) -> None:
        """Add Gather along the inputs, of a convolution along its channels, and the product with what it gives."""
        if chain.site.op == "Conv":
            picked = chain.node(
                "Gather", [chain.source, chain.constant(self.kept, "kept")], "pick", {"axis": 1}
            )
            weight = self.transfer.reshape(len(self.transfer), -1, *chain.site.weight_shape[2:])
            chain.finish(chain.conv(picked, weight, "transfer", chain.geometry))
        else:
            chain.finish(chain.matmul(self._picked(chain), self.transfer, "transfer"))

    def _picked(self, chain: Chain) -> onnx_ir.Value:
        """Gather runs of a view ``[..., runs, length]``: onnxruntime copies a run at a time."""
        shape = chain.source.shape
        if self.length == 1 or shape is None:
            inputs = unit_columns(self.runs * self.length, self.length)[self.kept].ravel().astype(np.int32)
            return chain.node("Gather", [chain.source, chain.constant(inputs, "kept")], "pick", {"axis": -1})
        leading = [0] * (len(shape) - 1)  # as they are
        cut = chain.constant(np.array([*leading, self.runs, self.length], np.int64), "runs")
        flat = chain.constant(np.array([*leading, len(self.kept) * self.length], np.int64), "flat")
        view = chain.node("Reshape", [chain.source, cut], "cut")
        picked = chain.node(
            "Gather", [view, chain.constant(self.kept, "kept")], "pick", {"axis": len(leading)}
        )
        return chain.node("Reshape", [picked, flat], "join")


@dataclass(frozen=True)
class FactorInterpolative(CalibratedFactorPass):
    """Let sites read the inputs that the others follow from, and make up for the others by least squares.

    The interpolative decomposition of what a site does: inputs J are chosen, and ``y = T x[J]`` with the T that comes
    closest to the outputs. Numbers and multiplications fall alike, and one product stays one product. Where whatever
    produces the inputs can be made narrower itself, ``prune-structured`` saves that too and needs no Gather: this
    pass is for inputs that others read as well, such as the stream of a residual network.

    Changes: ``y = MatMul(Gather(x, J), T)``; of a convolution whole input channels are picked. Picking single numbers
    costs about what it saves, so that runs of neighbours are picked (through Reshape, which copies nothing). Standard
    operators only; the product is a site of its own.
    Skips with the reason: sites whose bytes or measured time would not fall, weights shared by nodes, quantised,
    grouped, recurrent or tiny ones, NaN or infinite weights or statistics, sites that calibration does not reach.

    Sample: ``factor-interpolative{param-ratio=0.6}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        param_ratio: share of the numbers of each weight that the smaller one may hold, in (0, 1].
        multiple: numbers of inputs are multiples of it.
        min_elements: smaller weights stay dense.
        keep_slower: rewrite also where bytes or the measured time do not fall.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already factorised, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        selection: ``greedy``: remove the inputs whose loss, made up for by the others, costs the outputs least;
            ``deim`` and ``leverage``: as for ``factor-cur``, quicker and a little worse.
        run_length: how many neighbouring inputs are picked together, not of convolutions; where that does not divide
            the inputs, what both can be divided by. 1 loses least and gains least time.
        steps: in how many steps ``greedy`` would remove all inputs; several leave per step where there are more.
    """

    name: ClassVar[str] = "factor-interpolative"

    selection: UnitSelection = "greedy"
    run_length: int = 8
    steps: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least(run_length=1, steps=1)

    def outline(self, site: Site, numbers: int, rng: np.random.Generator) -> Interpolative | str:
        """Return random inputs and weights, as many as ``numbers`` allow."""
        rows, columns = site.shape
        length = 1 if site.op == "Conv" else math.gcd(self.run_length, columns)
        width = length * site.kernel_size
        multiple = max(1, self.multiple // length)
        count = numbers // (rows * width + 1) // multiple * multiple
        if not count:
            return f"{numbers} numbers do not hold {multiple * length} inputs of {rows} x {columns} weights"
        runs = columns // width
        kept = np.sort(rng.choice(runs, count, replace=False)).astype(np.int32)
        return Interpolative(rng.standard_normal((rows, count * width)), kept, runs, length)

    def fit(self, problem: Quadratic, outline: Form, rng: np.random.Generator) -> Interpolative:
        """Choose as many runs of inputs as ``outline`` has, then solve for the weights on them."""
        assert isinstance(outline, Interpolative), "made by outline"
        target, gram, width = problem.target, problem.gram, outline.width
        kept = kept_units(
            target, gram, problem.energy, len(outline.kept), self.selection, width=width, steps=self.steps
        )
        return replace(
            outline, transfer=transfer(target, gram, kept, width=width), kept=kept.astype(np.int32)
        )
