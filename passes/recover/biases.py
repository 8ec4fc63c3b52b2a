"""The bias of a site: found, or added as zeros so that it can be set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir
from numpy.typing import NDArray

from sparsecc.ir import Model, Site
from sparsecc.ir.names import free_name, graph_names
from sparsecc.passes.recover.outputs import Tap
from sparsecc.passes.tidy.graph import (
    add_constant,
    constant_of,
    float_attribute,
    float_constant,
    only_consumer,
    set_constant,
)

__all__ = ["SiteBias", "site_bias"]


@dataclass(frozen=True, eq=False)
class SiteBias:
    """Where the outputs of a site get their bias.

    Attributes:
        site: the site, of one node.
        node: that adds the bias: the site's own, or the Add behind a MatMul.
        position: of the bias among its inputs.
    """

    site: Site
    node: onnx_ir.Node
    position: int

    @property
    def tap(self) -> Tap:
        """The outputs with their bias."""
        axis = 1 if self.site.op == "Conv" else -1
        return Tap(str(self.node.outputs[0].name), axis, (self.site.node, self.node))

    def numpy(self) -> NDArray[np.float64]:
        """The bias ``[N]``, as it is added to the outputs."""
        held = float_constant(self.node.inputs[self.position])
        assert held is not None  # site_bias
        return np.broadcast_to(held.reshape(-1) * self.factor, self.site.shape[:1]).copy()

    def replace(self, bias: NDArray[np.float64]) -> None:
        """Store ``bias`` ``[N]``, as it is added to the outputs, in a constant that no other node reads."""
        value = self.node.inputs[self.position]
        held = constant_of(value)
        assert value is not None  # site_bias
        assert held is not None
        whole = held.size == bias.size
        array = (bias / self.factor).astype(held.dtype.numpy())
        array = array.reshape(held.shape.numpy()) if whole else array
        if whole and len(value.uses()) == 1:
            set_constant(value, array)
        else:
            own = _constant(self.node, f"{value.name}_own", array)
            self.node.replace_input_with(self.position, own)

    @property
    def factor(self) -> float:
        """What the operator multiplies the stored bias with."""
        return float_attribute(self.node, "beta", 1.0) if self.node.op_type == "Gemm" else 1.0


def site_bias(model: Model, site: Site, *, add: bool) -> SiteBias | str:
    """Return where the bias of ``site`` is, or why it has none that can be set.

    With ``add`` a site without one gets zeros, by the same names in every model of the same nodes.
    """
    if site.op in ("LSTM", "GRU"):
        return "recurrent: its bias acts on gates, not on outputs"
    if not site.in_main_graph or len(site.nodes) > 1:
        return "in a body, or shared by several nodes: its outputs have no one bias"
    if site.quantization is not None:
        return "it is quantised: recover before quantize"
    node, found = site.node, None
    if site.op in ("Conv", "Gemm"):
        found = SiteBias(site, node, 2)
        if len(node.inputs) < 3 or node.inputs[2] is None:
            if not add:
                return "it has no bias (add=false)"
            _give_input(node, site)
    else:
        found = _behind(site)
        if found is None and not add:
            return "it has no bias (add=false)"
        found = found or _added(site)
    held = float_constant(found.node.inputs[found.position])
    if held is None or held.size not in (1, site.shape[0]) or held.shape[-1:] not in ((), (held.size,)):
        return "its bias is no constant vector"
    return found if found.factor else "its bias is multiplied with zero"


def _behind(site: Site) -> SiteBias | None:
    """The Add of a constant vector that alone reads the outputs of a MatMul."""
    output = site.node.outputs[0]
    add = only_consumer(output)
    if add is None or add.op_type != "Add":
        return None
    position = 1 if add.inputs[0] is output else 0
    held = float_constant(add.inputs[position])
    fits = held is not None and held.ndim > 0 and held.shape[-1] == held.size == site.shape[0]
    return SiteBias(site, add, position) if fits else None


def _give_input(node: onnx_ir.Node, site: Site) -> None:
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, _constant(node, f"{node.outputs[0].name}_bias", _zeros(site)))


def _added(site: Site) -> SiteBias:
    """An Add of zeros behind the MatMul, which hands on the name of the outputs."""
    node, output = site.node, site.node.outputs[0]
    name = str(output.name)
    bias = _constant(node, f"{name}_bias", _zeros(site))
    add = onnx_ir.node("Add", [output, bias], name=f"{node.name or name}/bias")
    result = add.outputs[0]
    result.type, result.shape = output.type, output.shape
    onnx_ir.convenience.replace_all_uses_with(output, result, replace_graph_outputs=True)
    add.replace_input_with(0, output)
    graph = node.graph
    assert isinstance(graph, onnx_ir.Graph)  # in the main graph
    taken = graph_names(graph)
    node.name = node.name or name  # a site is called after its output where it has no name
    output.name, result.name = free_name(f"{name}_unbiased", taken), name
    graph.insert_after(node, add)
    return SiteBias(site, add, 1)


def _zeros(site: Site) -> NDArray[Any]:
    return np.zeros(site.shape[0], site.dtype)


def _constant(node: onnx_ir.Node, name: str, array: NDArray[Any]) -> onnx_ir.Value:
    graph = node.graph
    assert isinstance(graph, onnx_ir.Graph)  # in the main graph
    return add_constant(graph, name, array, graph_names(graph))
