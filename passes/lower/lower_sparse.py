"""Rewrite marked sites to sparse operators with fused bias and activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir

from sparsecc.ir import Model, Site
from sparsecc.ir.names import value_names
from sparsecc.ir.sparse_ops import DOMAIN, DOMAIN_VERSION, sparse_op_node
from sparsecc.passes.lower.choose_layout import LAYOUT_KEY
from sparsecc.passes.lower.linear_form import LinearForm, Refusal, linear_form
from sparsecc.passes.lower.recurrent import is_recurrent, lower_recurrent, pack_floats, parse_pair
from sparsecc.passes.tidy.graph import remove_dead
from sparsecc.pm import Pass, PassContext, PassReport, select_sites
from sparsecc.sparse import Layout, QuantizedTensor, SparseTensor

__all__ = ["LowerSparse", "lower_node"]


def check_layout(site: Site, layout: Layout) -> None:
    """Raise :class:`Refusal` where the operators cannot hold ``layout`` for ``site``."""
    pattern = layout.pattern
    if not layout.sparse:
        raise Refusal(f"{layout} was chosen")
    if pattern.kind == "block" and site.groups > 1 and (site.shape[0] // site.groups) % pattern.rows:
        raise Refusal(
            f"blocks of {pattern.rows} outputs cross its groups of {site.shape[0] // site.groups} outputs"
        )


def pack(form: LinearForm, layout: Layout) -> SparseTensor | QuantizedTensor:
    """Return the weight of ``form`` in ``layout``.

    Raises:
        Refusal: it is not quantised, and the layout says so; or its values do not fit the layout's type.
    """
    if not layout.int8:
        return pack_floats(form.weight, layout)
    if form.int8 is None:
        raise Refusal(f"it is not quantised, so there is no {layout} of it")
    return QuantizedTensor.from_codes(form.int8.codes, form.int8.scales, layout.pattern)


def lower_node(
    site: Site,
    form: LinearForm,
    packed: SparseTensor | QuantizedTensor,
    taken: set[str],
    share: onnx_ir.Node | None = None,
) -> onnx_ir.Node:
    """Replace ``form`` in its graph by one sparse operator and return it.

    ``taken`` holds the value names of the whole model and grows; ``share`` lends its packed weight.
    """
    node, graph = form.node, form.node.graph
    assert graph is not None
    source, scale, zero_point = form.source, None, None
    if form.dequantize is not None and not isinstance(packed, QuantizedTensor):
        real = node.inputs[0]
        assert real is not None  # what form.dequantize makes
        source = real
    elif form.dequantize is not None:
        scale, zero_point = form.dequantize.inputs[1:3]
        source.type = onnx_ir.TensorType(onnx_ir.DataType.UINT8)
    sparse = sparse_op_node(
        graph,
        source,
        packed,
        bias=form.bias,
        activation=form.activation.suffix,
        parameters=dict(form.activation.parameters),
        weight_shape=None if form.conv is None else site.weight_shape,
        conv=form.conv,
        residual=form.residual,
        name=node.name or (site.name if share is None else str(form.output.name)),
        share=share,
        taken=taken,
        x_scale=scale,
        x_zero_point=zero_point,
    )
    # What is added may be computed later than this node was.
    onnx_ir.convenience.replace_nodes_and_values(
        graph, form.adder or node, [node, *form.absorbed], [sparse], [form.output], sparse.outputs
    )
    return sparse


def _twin(form: LinearForm, done: list[LinearForm], nodes: list[onnx_ir.Node]) -> onnx_ir.Node | None:
    """The node already lowered in the same graph with the same weight (Gemm's alpha may make a tied one differ)."""
    for other, node in zip(done, nodes, strict=True):
        if node.graph is form.node.graph and np.array_equal(other.weight, form.weight):
            return node
    return None


@dataclass(frozen=True)
class LowerSparse(Pass):
    """Replace every site marked by ``choose-layout`` with a sparse operator, bias and activation fused.

    Changes: MatMul, Gemm and Conv nodes with the Add and the activation behind them become one ``ai.sparsecc``
    node, convolutions with the Add of a shortcut too, LSTM and GRU nodes as they are; the dense weight goes when
    nothing reads it any more.
    Skips: unmarked sites, and sites whose layout the operators cannot hold, with the reason.

    Sample: ``lower-sparse{match=re:.*mlp.*}``

    Attributes:
        match: which sites: a glob on the name, or ``re:`` and a regular expression.
    """

    name: ClassVar[str] = "lower-sparse"
    lossless: ClassVar[bool] = True

    match: str = "*"

    def run(self, model: Model, ctx: PassContext) -> PassReport:
        """Rewrite the marked sites among the matching ones."""
        report = PassReport(self.name)
        if any(LAYOUT_KEY in site.node.metadata_props and site.op == "Conv" for site in model.sites()):
            model.infer_shapes()  # tells whether a sum is one of equal shapes; unknown shapes are left alone
        taken = value_names(model.onnx)
        sites = select_sites(model, self.match, report)
        if any(LAYOUT_KEY in site.nodes[0].metadata_props for site in sites):
            model.infer_shapes()  # the new operators take the shapes over; nobody can infer them afterwards
        for site in sites:
            layout = site.nodes[0].metadata_props.get(LAYOUT_KEY)
            if layout is None:
                report.skip(site.name, "no sparse layout was chosen")
                continue
            try:
                if is_recurrent(site):
                    self._lower_pair(model, site, layout, taken, report)
                else:
                    self._lower(model, site, Layout.parse(layout), taken, report)
            except Refusal as refusal:
                report.skip(site.name, str(refusal))
        if report.changed:
            model.onnx.opset_imports[DOMAIN] = DOMAIN_VERSION
            remove_dead(model.onnx)
        return report

    def _lower_pair(self, model: Model, site: Site, layout: str, taken: set[str], report: PassReport) -> None:
        if site.node.graph is None:
            report.change(site.name, "lowered with the other weight of its node")
            return
        lowered, before, after = lower_recurrent(model, site, parse_pair(layout), taken)
        report.change(site.name, f"{lowered[0].op_type} {layout}", dense_bytes=before, packed_bytes=after)

    def _lower(self, model: Model, site: Site, layout: Layout, taken: set[str], report: PassReport) -> None:
        adds = len(site.nodes) == 1  # two nodes with one weight could want the same Add
        forms = [linear_form(model, site, node, adds=adds) for node in site.nodes]
        check_layout(site, layout)
        lowered: list[onnx_ir.Node] = []
        for form in forms:
            twin = _twin(form, forms[: len(lowered)], lowered)
            packed = pack(form, layout)
            lowered.append(lower_node(site, form, packed, taken, twin))
        fused = ", ".join(
            sorted(
                {form.activation.suffix for form in forms if form.activation.suffix}
                | {"Add" for form in forms if form.adder is not None}
            )
        )
        report.change(
            site.name,
            f"{lowered[0].op_type} {layout.pattern if layout.int8 else layout}"
            + (f" with {fused} fused" if fused else ""),
            dense_bytes=forms[0].weight.nbytes,
            packed_bytes=packed.nbytes,
        )
