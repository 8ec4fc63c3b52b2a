"""Fewer experts in a mixture: those that the router treats alike become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.calib.collect import Tapped
from sparsecc.errors import SpecError
from sparsecc.ir import Model, Site, name_matches
from sparsecc.ir.names import free_name, value_names
from sparsecc.passes.structure.blocks import count_before
from sparsecc.passes.structure.clusters import Merge, after, coactivation, distances, merges
from sparsecc.passes.structure.expert_axes import Column, ExpertAxes, NotUnderstoodError, array_in
from sparsecc.passes.tidy.graph import add_constant, bypass, only_consumer, remove_dead
from sparsecc.pm import Pass, PassContext, PassReport
from sparsecc.pm.sites import refuse_unmatched

__all__ = ["Mixture", "PruneExperts", "mixture_of"]

#: Key of the metadata, before the router's name, under which the number of experts before the first run is kept.
_BEFORE = "sparsecc.experts"
#: Operators behind a router, besides those that shape its numbers: what makes a linear layer one.
_CHOOSES = frozenset({"TopK", "Softmax", "LogSoftmax", "Sigmoid", "MoE"})
_SHAPES = frozenset({"Add", "Cast", "Identity", "Reshape", "Mul", "Div"})
#: Nodes between the number of one expert and the product with its output.
_HANDS_ON = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Mixture:
    """A router, what has an entry for each of its experts, their router rows, and how many there once were."""

    site: Site
    axes: ExpertAxes
    rows: NDArray[np.float64]
    before: int

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.rows)

    @property
    def scores(self) -> onnx_ir.Value:
        """What the router gives."""
        return self.site.node.outputs[0]

    @property
    def dense(self) -> bool:
        """Every token takes all experts, each by its share."""
        return not self.axes.most and self.axes.normalised


@dataclass(frozen=True)
class PruneExperts(Pass):
    """Merge the experts of mixture-of-experts layers that their router treats alike.

    The first stage of STUN (Lee et al., "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", 2024):
    experts whose router rows are close, and that are chosen for the same tokens, are clustered, closest first, where
    a cluster is as far from another as its most distant members. One expert per cluster stays. Where shares of all
    experts add up to 1 and every token takes all, the logarithm of a cluster's size is added to its number, so
    that the expert that stays gets the shares of all: merging equal experts then changes nothing. Prune the rest
    with another pass.

    Changes: constants with an entry per expert (weights, biases, router) are cut; branches of single experts go.
    Understood: stacked weights in MatMul, Einsum or looked up by Gather; TopK, OneHot, ScatterElements, GatherElements;
    one branch per expert whose output is weighted and added; ``com.microsoft.MoE``. Run ``tidy`` first.
    Skips with the reason: routers around which anything else reads numbers or indices of experts.

    Sample: ``prune-experts{keep=0.5}``

    Attributes:
        keep: share of the experts to keep, in (0, 1), of those before the first such pass.
        experts: experts to keep per layer, instead of a share.
        match: which routers: a glob on the name, or ``re:`` and a regular expression.
        scope: count per ``layer``, or over the ``model``: then layers whose experts are more alike lose more.
        coactivation: what being chosen together counts against the distance of router rows, both in their means; used
            where there is calibration data.
        representative: ``nearest``: the expert nearest to the mean of its cluster, and its router row; ``average``: the
            means of weights and router rows, where weights are stacked.
    """

    name: ClassVar[str] = "prune-experts"

    keep: float = 0.75
    experts: int | None = None
    match: str = "*"
    scope: Literal["layer", "model"] = "layer"
    coactivation: float = 1.0
    representative: Literal["nearest", "average"] = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep < 1:
            raise SpecError(f"{self.name}: keep must be in (0, 1), got {self.keep:g}")
        self.require_at_least(experts=1)
        if not 0 <= self.coactivation <= 10:
            raise SpecError(f"{self.name}: coactivation must be in [0, 10], got {self.coactivation:g}")

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Find the mixtures, cluster their experts and cut."""
        report = PassReport(self.name)
        declared = [(v, v.shape, v.type) for graph in model.graphs() for node in graph for v in node.outputs]
        model.infer_shapes()
        mixtures = []
        sites = model.sites()
        refuse_unmatched(self.match, [site.name for site in sites], "match")
        for site in (site for site in sites if name_matches(self.match, site.name)):
            found = mixture_of(site, count_before(model, f"{_BEFORE}.{site.name}"))
            if isinstance(found, str):
                report.skip(site.name, found)
            else:
                mixtures.append(found)
        chosen = self._chosen(mixtures, [self._merges(model, item, ctx, report) for item in mixtures])
        for mixture, merged in zip(mixtures, chosen, strict=True):
            if not merged:
                report.skip(mixture.site.name, f"nothing to merge: it keeps all {mixture.count} experts")
                continue
            clusters = after(merged, mixture.count)
            error = _Cutter(model, mixture, clusters, self.representative == "average").cut()
            model.metadata[f"{_BEFORE}.{mixture.site.name}"] = str(mixture.before)
            report.change(
                mixture.site.name,
                f"{mixture.count} experts -> {len(clusters)}",
                density_before=1.0,
                density_after=len(clusters) / mixture.count,
                relative_error=error,
                experts_before=mixture.count,
                experts_after=len(clusters),
                largest_cluster=max(map(len, clusters)),
                distance=max(item[2] for item in merged),
            )
        if report.changed:
            remove_dead(model.onnx)
        else:
            for value, shape, kind in declared:
                value.shape, value.type = shape, kind
            report.note("no mixture of experts was cut")
        return report

    def _merges(self, model: Model, mixture: Mixture, ctx: PassContext, report: PassReport) -> list[Merge]:
        """Return all merges of a mixture, closest first."""
        together = None
        if ctx.calibration is not None and self.coactivation and mixture.axes.most > 1:
            tapped = Tapped(model, [str(mixture.scores.name)], ctx.threads)
            together = np.zeros((mixture.count, mixture.count))
            for batch in ctx.calibration:
                (scores,) = tapped.run(dict(batch)).values()
                rows = scores.reshape(-1, mixture.count).astype(np.float64)
                if not np.isfinite(rows).all():
                    report.note(
                        f"{mixture.site.name}: NaN or infinite on the calibration data, which is not used"
                    )
                    together = None
                    break
                together += coactivation(rows, mixture.axes.most)
        return merges(distances(mixture.rows, together, self.coactivation))

    def _chosen(self, mixtures: Sequence[Mixture], found: Sequence[list[Merge]]) -> list[list[Merge]]:
        """Return the merges to make in each mixture, so many that the number of experts is reached."""
        room = [item.count - max(1, item.axes.most) for item in mixtures]
        if self.scope == "layer" or self.experts is not None:
            wanted = [item.count - (self.experts or round(self.keep * item.before)) for item in mixtures]
            return [merged[: max(0, min(*pair))] for merged, *pair in zip(found, wanted, room, strict=True)]
        excess = sum(item.count for item in mixtures) - round(
            self.keep * sum(item.before for item in mixtures)
        )
        ranked = sorted(
            (height, layer, number)
            for layer, merged in enumerate(found)
            for number, (_, _, height) in enumerate(merged[: room[layer]])
        )
        taken = [layer for _, layer, _ in ranked[: max(0, excess)]]
        return [merged[: taken.count(layer)] for layer, merged in enumerate(found)]


def mixture_of(site: Site, before: int) -> Mixture | str:
    """Return the mixture that ``site`` is the router of, once of ``before`` experts, or why none can be cut."""
    count, node = site.shape[0], site.node
    if site.op not in ("MatMul", "Gemm") or not site.in_main_graph or count < 2:
        return "no router of experts"
    if not _chooses(node.outputs[0]):
        return "no router of experts: nothing chooses between its outputs"
    if len(site.nodes) > 1 or node.inputs[1] is not site.weight or site.quantization is not None:
        return "its weight is shared, transposed or quantised in the graph: run tidy first"
    rows = site.numpy().astype(np.float64)
    if not np.isfinite(rows).all():
        return "its weight is NaN or infinite"
    try:
        axes = ExpertAxes(node.outputs[0], count)
        if axes.columns:
            _contributions(axes.columns, count)
    except NotUnderstoodError as reason:
        return f"no mixture that is understood: {reason}"
    except (IndexError, ValueError):  # of axes and equations that do not fit the shapes
        return "no mixture that is understood: its shapes contradict one another"
    if not axes.columns and not any(-cut.axis > 1 for cut in axes.cuts):
        return "no router of experts: no constant has a weight for each of its outputs"
    return Mixture(site, axes, rows, max(before, count))


def _chooses(value: onnx_ir.Value) -> bool:
    """Whether what a linear layer gives is turned into shares or a choice, reshaped and biased at most before."""
    for node, _ in value.uses():
        if node.op_type in _CHOOSES or (node.op_type in _SHAPES and _chooses(node.outputs[0])):
            return True
    return False


def _contributions(columns: Sequence[Column], count: int) -> dict[int, onnx_ir.Node]:
    """Return by expert the Mul that weights its output, which a sum alone reads.

    Raises:
        NotUnderstoodError: of another form.
    """
    found: dict[int, onnx_ir.Node] = {}
    for column in columns:
        node: onnx_ir.Node | None = column.node
        while node is not None and (node is column.node or node.op_type in _HANDS_ON):
            node = only_consumer(node.outputs[0])
        reader = None if node is None else only_consumer(node.outputs[0])
        if node is None or node.op_type != "Mul" or reader is None or reader.op_type not in ("Add", "Sum"):
            raise NotUnderstoodError(f"what expert {column.expert} gives is not weighted once and added")
        if column.expert in found:
            raise NotUnderstoodError(f"the number of expert {column.expert} is taken twice")
        found[column.expert] = node
    if sorted(found) != list(range(count)):
        raise NotUnderstoodError(f"numbers of {len(found)} of {count} experts are taken one by one")
    return found


class _Cutter:
    """Leaves one expert per cluster."""

    def __init__(self, model: Model, mixture: Mixture, clusters: Sequence[list[int]], average: bool) -> None:
        self._mixture = mixture
        self._clusters = clusters
        self._average = average and not mixture.axes.columns
        self._used = value_names(model.onnx)
        graph = mixture.site.node.graph
        assert isinstance(graph, onnx_ir.Graph)
        self._graph = graph
        self._kept = [self._representative(cluster) for cluster in clusters]
        self._lost = self._total = 0.0

    def cut(self) -> float:
        """Change constants and nodes; return how far they are from what they stand for, relative to these."""
        site, axes = self._mixture.site, self._mixture.axes
        router = site.node
        self._replace(router, 1, 1 if site.transposed else 0)
        bias = array_in(router.inputs[2]) if len(router.inputs) > 2 else None
        if bias is not None and bias.ndim and bias.shape[-1] == self._mixture.count:
            self._replace(router, 2, bias.ndim - 1)
        for cut in axes.cuts:
            array = array_in(cut.node.inputs[cut.index])
            assert array is not None
            self._replace(cut.node, cut.index, array.ndim + cut.axis)
        for node, index in axes.counts:
            old = array_in(node.inputs[index])
            assert old is not None
            self._put(node, index, np.full(old.shape, len(self._kept), old.dtype))
        if axes.columns:
            self._drop_branches(axes.columns)
        if self._mixture.dense and any(len(cluster) > 1 for cluster in self._clusters):
            self._add_counts()
        for value in axes.values:
            value.shape = None  # sizes that were known before no longer hold
        return float(np.sqrt(self._lost / self._total)) if self._total else 0.0

    def _representative(self, cluster: list[int]) -> int:
        """The member nearest to the mean of its cluster: by all weights, by router rows where there are no stacks."""
        if len(cluster) == 1:
            return cluster[0]
        away = np.zeros(len(cluster))
        stacks = [cut for cut in self._mixture.axes.cuts if -cut.axis > 1]
        for cut in stacks:
            array = array_in(cut.node.inputs[cut.index])
            assert array is not None
            members = np.take(array, cluster, array.ndim + cut.axis).astype(np.float64)
            members = np.moveaxis(members, array.ndim + cut.axis, 0).reshape(len(cluster), -1)
            away += np.square(members - members.mean(0)).sum(1)
        if not stacks:
            rows = self._mixture.rows[cluster]
            away = np.square(rows - rows.mean(0)).sum(1)
        return cluster[int(away.argmin())]

    def _replace(self, node: onnx_ir.Node, index: int, axis: int) -> None:
        array = array_in(node.inputs[index])
        assert array is not None
        if self._average:
            parts = [np.take(array, c, axis).astype(np.float64).mean(axis) for c in self._clusters]
            cut = np.stack(parts, axis).astype(array.dtype)
        else:
            cut = np.take(array, self._kept, axis)
        for number, cluster in enumerate(self._clusters):
            members = np.take(array, cluster, axis).astype(np.float64)
            self._lost += float(np.square(members - np.take(cut, [number], axis)).sum())
            self._total += float(np.square(members).sum())
        self._put(node, index, cut)

    def _put(self, node: onnx_ir.Node, index: int, array: NDArray[np.generic]) -> None:
        old = node.inputs[index]
        assert old is not None
        node.replace_input_with(index, add_constant(self._graph, f"{old.name}.experts", array, self._used))

    def _drop_branches(self, columns: Sequence[Column]) -> None:
        products = _contributions(columns, self._mixture.count)
        for column in columns:
            if column.expert in self._kept:
                old = array_in(column.node.inputs[1])
                assert old is not None
                self._put(column.node, 1, np.full(old.shape, self._kept.index(column.expert), old.dtype))
                continue
            product = products[column.expert].outputs[0]
            reader = only_consumer(product)
            assert reader is not None
            others = [value for value in reader.inputs if value is not product and value is not None]
            if len(others) == 1:
                bypass(reader, others[0])
            else:
                total = onnx_ir.node("Sum", others, name=reader.name)
                total.outputs[0].name = reader.outputs[0].name
                onnx_ir.convenience.replace_nodes_and_values(
                    self._graph, reader, [reader], [total], reader.outputs, total.outputs
                )

    def _add_counts(self) -> None:
        """Give the expert that stays the shares of its cluster: ``m exp(s) = exp(s + log m)``."""
        scores = self._mixture.scores
        dtype = self._mixture.site.dtype
        logs = np.log([len(cluster) for cluster in self._clusters]).astype(dtype)
        bias = add_constant(self._graph, f"{scores.name}.members", logs, self._used)
        name = free_name(f"{scores.name}.with_members", self._used)
        add = onnx_ir.node("Add", [scores, bias], name=name)
        result = add.outputs[0]
        result.name = name
        result.type = scores.type
        onnx_ir.convenience.replace_all_uses_with(scores, result)
        add.replace_input_with(0, scores)
        self._graph.insert_after(self._mixture.site.node, add)
