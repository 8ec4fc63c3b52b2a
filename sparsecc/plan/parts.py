"""Sites that take one form together, taken out of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import onnx_ir

from sparsecc.ir import Model, Site
from sparsecc.ir.axes import AxisGraph
from sparsecc.ir.quantized import data_input
from sparsecc.passes.lower.linear_form import Borders, borders
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.plan.alone import part_model

__all__ = ["Part", "find_parts"]

#: Most layers coupled through units that are one part: gate, up and down, or the convolutions of a bottleneck.
_MOST_COUPLED = 3


@dataclass(frozen=True, eq=False)
class Part:
    """Sites that begin with one value and take one form together.

    Attributes:
        sites: in the order of the graph.
        model: where they are.
        ends: begin and end of what is timed: with the activations behind the sites.
        plain: the same for what is compared: without them.
        reason: why nothing can be chosen for it; None if something can.
    """

    sites: tuple[Site, ...]
    model: Model
    ends: tuple[Borders, ...] = ()
    plain: tuple[Borders, ...] = ()
    reason: str | None = None

    @property
    def name(self) -> str:
        """Of the first site."""
        return self.sites[0].name

    @property
    def names(self) -> tuple[str, ...]:
        """Of all sites."""
        return tuple(site.name for site in self.sites)

    @property
    def source(self) -> onnx_ir.Value:
        """The value that it begins with."""
        return self.ends[0].source

    @property
    def nested(self) -> bool:
        """Whether some of its sites read what others compute."""
        return any(data_input(site.node) is not self.source for site in self.sites)

    def timed(self, shape: tuple[int, ...]) -> Model:
        """Return it as a model whose inputs have this shape, activations included. Sites keep their names."""
        return self._alone(self.ends, shape)

    def compared(self, shape: tuple[int, ...]) -> Model:
        """Return it as a model whose inputs have this shape and whose outputs are those of its last sites.

        Sites keep their names.
        """
        return self._alone(self.plain, shape)

    def _alone(self, ends: Sequence[Borders], shape: tuple[int, ...]) -> Model:
        alone = part_model(ends, shape, self.model)
        known = {id(site.weight.const_value): site.name for site in self.sites}
        for site in alone.sites():
            site.node.name = known.get(id(site.weight.const_value), site.node.name)
        for (
            value
        ) in alone.onnx.graph.initializers.values():  # names of shared tensors would change with theirs
            tensor = value.const_value
            assert tensor is not None, "initializers have values"
            value.const_value = onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=value.name)
        for number in range(1, len(self.sites[0].nodes)):  # a weight that several nodes read stays one
            _read_again(alone, number)
        alone.infer_shapes()
        return alone


def _read_again(alone: Model, number: int) -> None:
    """Give the one site of ``alone`` one more reader, with an input and an output of its own."""
    graph, (site,) = alone.onnx.graph, alone.sites()
    first = graph.inputs[0]
    x = onnx_ir.Value(name=f"{first.name}_{number}", shape=first.shape, type=first.type)
    graph.inputs.append(x)
    inputs = [x if value is first else value for value in site.node.inputs]
    node = onnx_ir.Node(
        site.node.domain, site.node.op_type, inputs, list(site.node.attributes.values()),
        name=f"{site.node.name}_{number}",
    )  # fmt: skip
    graph.append(node)
    node.outputs[0].type = graph.outputs[0].type
    graph.outputs.append(node.outputs[0])


def find_parts(model: Model, *, coupled: bool = True) -> list[Part]:
    """Return all sites of ``model``, in parts.

    One part are products that read the same value and, with ``coupled``, up to three layers that have hidden units in
    common, where all between them depends on one value only. A site that several nodes share is one part.

    Args:
        model: tidied.
        coupled: whether layers with common units are one part, so that units can be removed.
    """
    order = {site.name: number for number, site in enumerate(model.sites())}
    sites = {site.name: site for site in model.sites()}
    suited = {name: site for name, site in sites.items() if _refusal(site) is None}
    together = nx.utils.UnionFind(sites)
    readers: dict[onnx_ir.Value | None, list[str]] = {}
    for name, site in suited.items():
        if site.op != "Conv" and len(site.nodes) == 1:
            readers.setdefault(data_input(site.node), []).append(name)
    for names in readers.values():
        together.union(*names)
    if coupled:
        for names in _coupled(model, suited):
            _unite(model, together, names, suited)
    groups: dict[str, list[Site]] = {}
    for name in sites:
        groups.setdefault(together[name], []).append(sites[name])
    found = [_part(model, group) for group in groups.values()]
    return sorted(found, key=lambda part: order[part.name])


def _refusal(site: Site) -> str | None:
    """Why nothing can be chosen for ``site``."""
    if site.quantization is not None:
        return "it is quantised already"
    if site.op not in ("MatMul", "Gemm", "Conv"):
        return f"no site that can be taken out of the model: {site.op}"
    if not site.in_main_graph:
        return "inside a body or a function"
    return None


def _part(model: Model, sites: Sequence[Site]) -> Part:
    reasons = [reason for site in sites if (reason := _refusal(site)) is not None]
    if reasons:
        return Part(tuple(sites), model, reason=reasons[0])
    found = _ends(model, sites)
    if found is None:
        return Part(tuple(sites), model, reason="what follows it depends on more than its input")
    return Part(tuple(sites), model, *found)


def _unite(
    model: Model, together: nx.utils.UnionFind, names: Sequence[str], suited: Mapping[str, Site]
) -> None:
    """Make ``names`` one group if what it grows to can be taken out of the model."""
    roots = {together[name] for name in names}
    grown = [suited[name] for name in suited if together[name] in roots]
    if len(grown) <= _MOST_COUPLED and _ends(model, grown) is not None:
        together.union(*names)


def _coupled(model: Model, suited: Mapping[str, Site]) -> Iterable[list[str]]:
    """Names of sites that have units in common which can be removed."""
    by_weight = {site.weight: name for name, site in suited.items()}
    for orbit in AxisGraph(model).orbits("removal"):
        names = list(dict.fromkeys(by_weight[part.value] for part in orbit.parts if part.value in by_weight))
        held = {part.value for part in orbit.parts if part.role != "vector"}
        if orbit.reason is None and held <= set(by_weight) and 1 < len(names) <= _MOST_COUPLED:
            yield names


def _ends(model: Model, sites: Sequence[Site]) -> tuple[tuple[Borders, ...], tuple[Borders, ...]] | None:
    """Borders of a part with and without activations; None if it depends on more than one value."""
    source = data_input(sites[0].node)
    found = [borders(site.node) for site in sites]
    if source is None or any(item is None for item in found):
        return None
    ends = [item._replace(source=source) for item in found if item is not None]
    plain = [Borders(source, _before_activation(model, site), end.source_type, end.output_type)
             for site, end in zip(sites, ends, strict=True)]  # fmt: skip
    inner = [_behind(item.output, source) for item in plain]
    if any(nodes is None for nodes in inner):
        return None
    last = [
        number
        for number, site in enumerate(sites)
        if not any(site.node in (nodes or ()) for other, nodes in enumerate(inner) if other != number)
    ]
    if len(last) < len(sites) and not _private(inner, [plain[number].output for number in last]):
        return None
    timed = []
    for number in last:
        nodes = _behind(ends[number].output, source)
        whole = nodes is not None and plain[number].output.producer() in nodes
        timed.append(ends[number] if whole else plain[number])
    return tuple(timed), tuple(plain[number] for number in last)


def _before_activation(model: Model, site: Site) -> onnx_ir.Value:
    """What a site gives, with its bias."""
    bias = site_bias(model, site, add=False)
    return bias.node.outputs[0] if isinstance(bias, SiteBias) else site.node.outputs[0]


def _behind(output: onnx_ir.Value, source: onnx_ir.Value) -> set[onnx_ir.Node] | None:
    """The nodes between ``source`` and ``output``; None if these depend on something else that is no constant."""
    nodes: set[onnx_ir.Node] = set()
    waiting = [output]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value is source or value.const_value is not None:
            continue
        if node is None or any(
            attribute.type in (onnx_ir.AttributeType.GRAPH, onnx_ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            return None
        if node not in nodes:
            nodes.add(node)
            waiting += [item for item in node.inputs if item is not None]
    return nodes


def _private(inner: Sequence[set[onnx_ir.Node] | None], outputs: Sequence[onnx_ir.Value]) -> bool:
    """Whether nothing outside reads what the nodes compute, but for ``outputs``."""
    nodes = set().union(*(item or () for item in inner))
    values = [value for node in nodes for value in node.outputs if value not in outputs]
    return not any(
        value.is_graph_output() or any(reader not in nodes for reader in value.consumers())
        for value in values
    )
