"""An N:M core between two block-diagonal factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.errors import SpecError
from sparsecc.ir import Site
from sparsecc.passes.hybrid.armor_fit import fit_diagonal, fit_full, plain
from sparsecc.passes.hybrid.base import HybridPass, Solution
from sparsecc.passes.hybrid.rewriting import Rewriter
from sparsecc.passes.prune.base import Work
from sparsecc.passes.prune.gram import Matrix, quadratic_error
from sparsecc.passes.prune.gram_pass import Problem
from sparsecc.passes.prune.least_squares import refit_rows
from sparsecc.passes.tidy.graph import float_attribute, float_constant
from sparsecc.pm import PassContext, Range, SiteSettings
from sparsecc.sparse import Pattern

__all__ = ["PruneArmor"]


@dataclass(frozen=True)
class PruneArmor(HybridPass):
    """Replace a weight by an N:M core between two block-diagonal matrices, fitted to the calibration data.

    ARMOR (2025) by exact steps instead of gradients: on the weight with normalised rows and columns, starting from the
    N:M mask of NoWag, both block-diagonal factors and then every group of the core are solved in turns; the norms go
    into the factors, and core and factors are fitted once more with all second moments of the inputs. Every step
    lowers the error. The result is kept where it beats the same N:M mask fitted alone.

    Changes: ``y = A (S (B x))``: the node of the site keeps its name and holds S, an ordinary site; B and A become
    batched MatMul between Reshape and Transpose, or grouped 1x1 convolutions. Standard operators only.
    Skips with the reason: sides that are no multiples of the block, weights for which the factors hold more bytes
    than N:M saves, convolutions with larger kernels, weights shared by nodes or with protected entries, quantised,
    grouped or recurrent ones, inputs of unknown rank, sites that are as sparse already, NaN or infinite weights or
    statistics, sites that calibration does not reach.

    Sample: ``prune-armor{block=16}``

    Attributes:
        pattern: ``N:M`` of the core (N kept of every M inputs).
        sparsity: what N:M implies; leave it out.
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
        scope: no effect: N:M compares weights within groups.
        caps: not for N:M.
        min_elements: smaller weights stay dense.
        min_reduction: weights with fewer inputs per output stay dense.
        by_channel: no effect: sites with larger kernels stay dense.
        damping: added to the diagonal of the inputs' second moments, as a share of its mean.
        sequential: measure each site on what the sites before it, already rewritten, give; false measures all on
            the model as it is when the pass starts.
        correction: with ``sequential``, the share of the difference between the inputs now and then that weights
            make up for, in [0, 1]; none means 1 for convolutions, 0.5 for others.
        bias: fit the bias of a site that has one together with its weight.
        block: side of the blocks of both factors, a multiple of M.
        sweeps: most of the fit with inputs that count one by one, which finds the mask.
        rounds: most of the fit with all second moments after it.
    """

    name: ClassVar[str] = "prune-armor"
    search: ClassVar[tuple[Range, ...]] = ()

    pattern: Pattern = Pattern("nm", n=2, m=4)  # noqa: RUF009  a frozen value, safe to share
    block: int = 32
    sweeps: int = 5
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern.kind != "nm":
            raise SpecError(f"{self.name}: the pattern of the core is N:M, got {self.pattern}")
        if self.block < self.pattern.m or self.block % self.pattern.m:
            raise SpecError(f"{self.name}: block must be a multiple of {self.pattern.m}, got {self.block}")
        self.require_at_least(sweeps=1, rounds=0)

    def _refusal(self, site: Site, settings: SiteSettings) -> str | None:
        reason = super()._refusal(site, settings)
        if reason is not None:
            return reason
        pattern = settings.pattern
        if pattern is None or pattern.kind != "nm" or self.block % pattern.m:
            return f"the core is N:M with M a divisor of {self.block}, an override says {pattern}"
        rows, columns = site.shape
        if site.kernel_size > 1:
            return "its kernel is larger than one point: block-diagonal factors act on channels"
        if rows % self.block or columns % self.block:
            return f"{rows} x {columns} is no multiple of blocks of {self.block}"
        saved = (
            rows * columns * (1 - pattern.n / pattern.m) - _index_bytes(site, pattern) / site.dtype.itemsize
        )
        if self.block * (rows + columns) >= saved:
            return (
                f"factors with blocks of {self.block} hold {self.block * (rows + columns)} weights, "
                f"{pattern} saves only {max(0, int(saved))}"
            )
        return None

    def unsuited(self, site: Site) -> str | None:
        """Return why the factors cannot be put around ``site``."""
        source, node = site.input, site.node
        if site.op == "MatMul" and (source is None or source.shape is None or source.shape.rank() < 2):
            return "the rank of its input is not known to be 2 or more"
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if site.op == "Gemm" and bias is not None and float_constant(bias) is None:
            return "its bias is no constant"
        return None

    def solve(self, item: Work, problem: Problem, ctx: PassContext) -> Solution | str:
        """Fit factors and core, and compare with the core alone."""
        if problem.protected is not None:
            return "it has protected weights, which a core between factors cannot keep"
        target, gram, energy = problem.target, problem.gram, np.diag(problem.gram)
        pattern = item.selection.pattern
        unit, rows, columns = _normalised(target)
        mask = problem.choose(np.square(unit) * energy)
        start = plain(np.where(mask, unit, 0.0), self.block)
        found, losses = fit_diagonal(unit, energy, start, (pattern.n, pattern.m), self.sweeps)
        found, objectives = fit_full(target, gram, found.scaled(rows, columns), self.rounds)
        alone = quadratic_error(refit_rows(target, mask, gram) - target, gram)
        if objectives[-1] >= alone:
            return f"the factors gain nothing over {pattern} fitted alone"
        total = quadratic_error(target, gram) or 1.0
        factors = found.outer.size + found.inner.size
        return Solution(
            core=found.core,
            parts={"outer": found.outer, "inner": found.inner},
            total=found.total(),
            detail=f"{pattern} between factors of blocks of {self.block}",
            numbers={
                "output_error": objectives[-1] / total,
                "output_error_alone": alone / total,
                "diagonal_error_before": losses[0] / float(np.square(unit).sum(0) @ energy),
                "diagonal_error": losses[-1] / float(np.square(unit).sum(0) @ energy),
                "parameters": (np.count_nonzero(found.core) + factors) / target.size,
                "added_multiplications": factors,
                "added_bytes": factors * item.site.dtype.itemsize,
            },
        )

    def rewrite(self, rewriter: Rewriter, site: Site, parts: dict[str, NDArray[Any]]) -> None:
        """Put the factors before and behind the node."""
        node = rewriter.part(site)
        source = node.inputs[0]
        assert source is not None, "a site reads something"
        before = _factor(rewriter, node, source, parts["inner"], f"{node.name}.inner")
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        behind = _factor(rewriter, node, node.outputs[0], parts["outer"], f"{node.name}.outer")
        if bias is not None:
            node.replace_input_with(2, None)
            node.resize_inputs(2)
            behind += _biased(rewriter, node, behind[-1], bias)
        rewriter.replace(node, behind)
        assert node.graph is not None
        node.graph.insert_before(node, before)
        node.replace_input_with(0, before[-1].outputs[0])


def _factor(
    rewriter: Rewriter, node: onnx_ir.Node, source: onnx_ir.Value, blocks: NDArray[Any], name: str
) -> list[onnx_ir.Node]:
    """Return nodes that multiply the channels of ``source`` with a block-diagonal matrix ``[count, b, b]``."""
    count, block, _ = blocks.shape
    if node.op_type == "Conv":
        rank = len(node.inputs[1].shape) - 2  # type: ignore[arg-type, union-attr]  # a site's weight has a shape
        weight = rewriter.constant(node, f"{name}.weight", blocks.reshape(-1, block, *[1] * rank))
        return [rewriter.node(node, "Conv", [source, weight], name, {"group": count})]
    rank = _rank(node)
    swapped = [*range(rank - 2), rank - 1, rank - 2, rank]
    split = rewriter.constant(node, f"{name}.split", np.array([0] * (rank - 1) + [count, block], np.int64))
    joined = rewriter.constant(node, f"{name}.join", np.array([0] * (rank - 1) + [count * block], np.int64))
    weight = rewriter.constant(node, f"{name}.weight", np.ascontiguousarray(blocks.transpose(0, 2, 1)))
    steps: list[onnx_ir.Node] = []
    for op, second, attributes in (
        ("Reshape", split, {}),
        ("Transpose", None, {"perm": swapped}),
        ("MatMul", weight, {}),
        ("Transpose", None, {"perm": swapped}),
        ("Reshape", joined, {}),
    ):
        first = steps[-1].outputs[0] if steps else source
        inputs = [first] if second is None else [first, second]
        steps.append(rewriter.node(node, op, inputs, f"{name}.{len(steps)}", attributes))
    return steps


def _biased(
    rewriter: Rewriter, node: onnx_ir.Node, last: onnx_ir.Node, bias: onnx_ir.Value
) -> list[onnx_ir.Node]:
    """Give the bias that ``node`` had to what comes last: a Conv takes it, behind a MatMul it is added."""
    if last.op_type == "Conv":
        last.resize_inputs(3)
        last.replace_input_with(2, bias)
        return []
    array = float_constant(bias)
    assert array is not None, "refused before"
    dtype = bias.const_value.dtype.numpy()  # type: ignore[union-attr]  # as above
    scaled = (array * float_attribute(node, "beta", 1.0)).astype(dtype)
    constant = rewriter.constant(node, f"{node.name}.bias", scaled)
    return [rewriter.node(node, "Add", [last.outputs[0], constant], f"{node.name}.biased")]


def _rank(node: onnx_ir.Node) -> int:
    source = node.inputs[0]
    if node.op_type == "Gemm":
        return 2
    assert source is not None, "refused before"
    assert source.shape is not None, "refused before"
    return source.shape.rank()


def _normalised(weight: Matrix) -> tuple[Matrix, NDArray[np.float64], NDArray[np.float64]]:
    """Return the weight with unit columns and then unit rows, and the norms of rows and columns; zeros stay zero."""
    columns = np.linalg.norm(weight, axis=0)
    unit = weight / np.where(columns > 0, columns, 1.0)
    rows = np.linalg.norm(unit, axis=1)
    return unit / np.where(rows > 0, rows, 1.0)[:, None], rows, columns


def _index_bytes(site: Site, pattern: Pattern) -> float:
    """Bytes that say which weights of each group stay, at their least."""
    groups = site.shape[0] * site.shape[1] / pattern.m
    return groups * math.ceil(math.log2(math.comb(pattern.m, pattern.n))) / 8
