"""Sites that take one form together, taken out of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import networkx as nx
import onnx_ir

from sparsecc.ir import Model, Site
from sparsecc.ir.axes import AxisGraph
from sparsecc.ir.quantized import data_input
from sparsecc.passes.lower.linear_form import Borders, Refusal, borders
from sparsecc.passes.lower.recurrent import RecurrentForm, is_recurrent, recurrent_form, weight_pair
from sparsecc.passes.recover.biases import SiteBias, site_bias
from sparsecc.plan.alone import part_model, recurrent_model

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
        recurrent: of the two weights of an LSTM or GRU, which are one part, instead of borders.
        reason: why nothing can be chosen for it; None if something can.
    """

    sites: tuple[Site, ...]
    model: Model
    ends: tuple[Borders, ...] = ()
    plain: tuple[Borders, ...] = ()
    recurrent: RecurrentForm | None = None
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
        value = data_input(self.sites[0].node)
        assert value is not None, "parts without a reason begin with a value"
        return value

    @property
    def samples_axis(self) -> int | None:
        """The axis of what it reads that counts samples: pictures, sequences; None where all rows are alike."""
        return 0 if self.sites[0].op == "Conv" else None if self.recurrent is None else 1

    @property
    def joined_axis(self) -> int:
        """The axis along which what it reads in several runs is put together.

        Of an LSTM or GRU that is given the states it begins with that is time: by itself it begins with zeros.
        """
        if self.samples_axis is None:
            return -2
        return 0 if self.recurrent is not None and self.recurrent.initial else self.samples_axis

    @property
    def nested(self) -> bool:
        """Whether some of its sites read what others compute."""
        return any(data_input(site.node) is not self.source for site in self.sites)

    def timed(self, shape: tuple[int, ...]) -> Model:
        """Return it as a model whose inputs have this shape, activations included. Sites keep their names.

        An LSTM or GRU begins with states of zero, and all its sequences are of the whole length.
        """
        return self._alone(self.ends, shape) if self.recurrent is None else self._sequence(shape)

    def compared(self, shape: tuple[int, ...]) -> Model:
        """Return it as a model whose inputs have this shape and whose outputs are those of its last sites.

        Sites keep their names; see ``timed``.
        """
        return self._alone(self.plain, shape) if self.recurrent is None else self._sequence(shape)

    def _sequence(self, shape: tuple[int, ...]) -> Model:
        assert self.recurrent is not None
        form = replace(self.recurrent, lengths=None, initial=())
        alone = recurrent_model(form, shape, self.model.opset)
        (node,) = alone.onnx.graph
        node.name = self.name.removesuffix(".W")
        read = [bool(value.consumers()) or value.is_graph_output() for value in form.node.outputs]
        alone.onnx.graph.outputs[:] = [
            value for value, needed in zip(node.outputs, read, strict=False) if needed
        ]
        alone.infer_shapes()
        return alone

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

    One part are products that read the same value, the two weights of an LSTM or GRU and, with ``coupled``, up to three
    layers that have hidden units in common, where all between them depends on one value only. A site that several
    nodes share is one part.

    Args:
        model: tidied.
        coupled: whether layers with common units are one part, so that units can be removed.
    """
    order = {site.name: number for number, site in enumerate(model.sites())}
    sites = {site.name: site for site in model.sites()}
    suited = {name: site for name, site in sites.items() if _refusal(site) is None}
    together = nx.utils.UnionFind(sites)
    readers: dict[tuple[onnx_ir.Value | None, int], list[str]] = {}
    for name, site in suited.items():
        if is_recurrent(site):
            with suppress(Refusal):
                together.union(*(weight.name for weight in weight_pair(model, site)))
        elif site.op != "Conv" and len(site.nodes) == 1:  # branches of one If do not run together
            readers.setdefault((data_input(site.node), id(site.node.graph)), []).append(name)
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
    if site.scope == "function":
        return "inside a function: inline it first"
    if not is_recurrent(site) and any(node.graph is not site.node.graph for node in site.nodes):
        return "its weight is read in several bodies"
    return None


def _part(model: Model, sites: Sequence[Site]) -> Part:
    reasons = [reason for site in sites if (reason := _refusal(site)) is not None]
    if reasons:
        return Part(tuple(sites), model, reason=reasons[0])
    if is_recurrent(sites[0]):
        return _recurrent_part(model, sites)
    found = _ends(model, sites)
    if found is None:
        return Part(tuple(sites), model, reason="what follows it depends on more than its input")
    return Part(tuple(sites), model, *found)


def _recurrent_part(model: Model, sites: Sequence[Site]) -> Part:
    """The part of an LSTM or GRU, which takes no other form than sparse weights."""
    try:
        pair = weight_pair(model, sites[0])
        nodes = pair[0].nodes
        if len({node.graph for node in nodes}) < len(nodes):  # in branches only one of them runs
            raise Refusal(f"{len(nodes)} nodes share its weights")
        forms = [recurrent_form(model, pair, node) for node in nodes]
        return Part(pair, model, recurrent=forms[0])
    except Refusal as refusal:
        return Part(tuple(sites), model, reason=str(refusal))


def _unite(
    model: Model, together: nx.utils.UnionFind, names: Sequence[str], suited: Mapping[str, Site]
) -> None:
    """Make ``names`` one group if what it grows to can be taken out of the model."""
    roots = {together[name] for name in names}
    grown = [suited[name] for name in suited if together[name] in roots]
    if (
        len(grown) <= _MOST_COUPLED
        and (ends := _ends(model, grown)) is not None
        and _takes_any_batch(ends[1])
    ):
        together.union(*names)


def _takes_any_batch(ends: Sequence[Borders]) -> bool:
    """Whether what lies between these borders runs on many samples at once, as fits do."""
    nodes: set[onnx_ir.Node] = set().union(*(_behind(end.output, end.source) or () for end in ends))
    shapes = [
        node.inputs[1].const_value for node in nodes
        if node.op_type == "Reshape" and len(node.inputs) > 1 and node.inputs[1] is not None
    ]  # fmt: skip
    return not any(shape is not None and shape.size > 1 and int(shape.numpy()[0]) > 0 for shape in shapes)


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
