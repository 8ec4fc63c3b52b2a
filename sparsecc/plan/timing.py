"""Measured times of sites and of whole models, for the passes that decide (``PassContext.costs``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir

from sparsecc import emit, verify
from sparsecc.errors import MeasurementError, SparseccError
from sparsecc.ir import Model, Site
from sparsecc.passes.lower.choose_layout import LAYOUT_KEY, mark, unmark
from sparsecc.passes.lower.linear_form import LinearForm, linear_form
from sparsecc.passes.lower.lower_sparse import LowerSparse
from sparsecc.passes.lower.restore_dense import marks_of, quantized_where_marked
from sparsecc.plan.costs import CostTable
from sparsecc.pm import PassContext, Requantizer
from sparsecc.sparse import INT8_DENSE, Layout

__all__ = ["MeasuredCosts", "input_shapes_of_sites", "lowered_copy", "site_model"]

Inputs = Mapping[str, npt.NDArray[np.generic]]

#: Most seconds spent on timing one site, and on timing one whole model against dense.
_SITE_SECONDS = 0.4
_MODEL_SECONDS = 6.0


def lowered_copy(model: Model, sites: Iterable[str], quantization: Requantizer | None = None) -> Model:
    """A copy of ``model`` in which only the marked sites named in ``sites`` are lowered and ready to run.

    With ``quantization``, which made ``model``, only those of them that are marked as int8 are quantised.
    """
    wanted = set(sites)
    if quantization is None:
        copy = model.copy()
        for site in copy.sites():
            if site.name not in wanted:
                unmark(site)
    else:
        marks = {name: found for name, found in marks_of(model).items() if name in wanted}
        copy = quantized_where_marked(quantization, marks)
    LowerSparse().run(copy, PassContext())
    emit.finalize(copy)
    return copy


def input_shapes_of_sites(model: Model, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """The concrete shape that each site of the main graph reads when the model is fed ``inputs``.

    The model is run once with the sites' inputs as extra outputs; only shapes are kept.
    """
    sites = [site for site in model.sites() if site.in_main_graph and site.input_name]
    names = sorted({site.input_name for site in sites if site.input_name})
    shapes = verify.tensor_shapes(model, names, inputs)
    return {site.name: shapes[site.input_name] for site in sites if site.input_name in shapes}


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


class MeasuredCosts:
    """Times from interleaved runs on this machine, kept in a cost table.

    Args:
        table: where known times come from and new ones go.
        inputs: inputs of the whole model; their shapes decide the shapes sites are timed at.
        threads: threads of every timed session.
        seed: of the random activations that single sites are fed.
    """

    def __init__(
        self,
        table: CostTable,
        inputs: Inputs,
        threads: int,
        seed: int = 0,
    ) -> None:
        self.table = table
        self._inputs = inputs
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._threads = threads
        self._seed = seed

    def site_times_ms(
        self, model: Model, site: Site, layouts: Sequence[Layout], base: Model | None = None
    ) -> dict[str, float]:
        """Median ms of the site alone: ``"dense"`` (onnxruntime) and each of ``layouts`` by its text.

        With ``base``, the model before it was quantised, ``"dense"`` and all that is not int8 are of its site.

        Raises:
            MeasurementError: the shape of the site's input is not known, or it cannot run alone.
        """
        if self._shapes is None:
            self._shapes = input_shapes_of_sites(model, self._inputs)
        if site.name not in self._shapes:
            raise MeasurementError("not timed: the shape of its input is not known (inside a subgraph)")
        form = linear_form(model, site, site.nodes[0])
        shape = self._shapes[site.name]
        plain = None if base is None else _form_before(base, site.name)
        names = ["dense", *(str(layout) for layout in layouts)]
        key = self._site_key(site, form, shape, plain)
        return self.table.get_or_measure(key, names, lambda: self._time_site(form, shape, layouts, plain))

    def _site_key(
        self, site: Site, form: LinearForm, shape: tuple[int, ...], plain: LinearForm | None
    ) -> str:
        zeros = _digest(np.packbits(form.weight != 0).tobytes())
        geometry = "" if form.conv is None else f" {form.conv}"
        dtype = "float32" if form.int8 is None else "int8" if plain is None else "int8/float32"
        if plain is not None:
            zeros += _digest(np.packbits(plain.weight != 0).tobytes())
        return (
            f"{site.op} {dtype} x{list(shape)} w{list(site.weight_shape)}{geometry} "
            f"act={form.activation.suffix or 'none'} threads={self._threads} zeros={zeros}"
        )

    def _time_site(
        self,
        form: LinearForm,
        shape: tuple[int, ...],
        layouts: Sequence[Layout],
        plain: LinearForm | None,
    ) -> dict[str, float]:
        own = site_model(form, shape)
        before = own if plain is None else site_model(plain, shape)
        name = own.onnx.graph.inputs[0].name
        assert name is not None
        x = np.random.default_rng(self._seed).standard_normal(shape, dtype=np.float32)
        variants = [before]
        for layout in layouts:
            if layout == INT8_DENSE:
                variants.append(own)
                continue
            marked = (own if layout.int8 else before).copy()
            (site,) = marked.sites()
            mark(site, str(layout), 1.0)
            variants.append(lowered_copy(marked, [site.name]))
        try:
            result = verify.benchmark(
                variants, {name: x}, threads=self._threads, max_seconds=_SITE_SECONDS * len(variants)
            )
        except SparseccError as error:
            raise MeasurementError(f"not timed: {error}") from error
        times = [timing.median_ms for timing in result.models]
        return dict(zip(["dense", *map(str, layouts)], times, strict=True))

    def relative_time(
        self, model: Model, sites: frozenset[str], quantization: Requantizer | None = None
    ) -> float:
        """Time of the whole model with ``sites`` lowered / time of the same model with none lowered.

        With ``quantization``, which made ``model``, none lowered means none quantised either.
        """
        if not sites:
            return 1.0
        marks = {site.name: site.nodes[0].metadata_props.get(LAYOUT_KEY, "") for site in model.sites()}
        chosen = json.dumps(sorted((name, marks[name]) for name in sites))
        shapes = json.dumps({name: list(array.shape) for name, array in sorted(self._inputs.items())})
        digest = _digest(model.fingerprint().encode(), chosen.encode(), shapes.encode())
        key = f"model {digest} sites={len(sites)} threads={self._threads}"
        return self.table.get_or_measure(
            key, ["relative"], lambda: self._time_model(model, sites, quantization)
        )["relative"]

    def _time_model(
        self, model: Model, sites: frozenset[str], quantization: Requantizer | None
    ) -> dict[str, float]:
        result = verify.benchmark(
            [lowered_copy(model, (), quantization), lowered_copy(model, sites, quantization)],
            self._inputs,
            threads=self._threads,
            max_seconds=_MODEL_SECONDS,
        )
        return {"relative": 1 / result.ratio_to_first[1]}


def _form_before(base: Model, name: str) -> LinearForm | None:
    """The form of the site in the model before it was quantised; None where that did not quantise it."""
    site = next((site for site in base.sites() if site.name == name), None)
    return None if site is None or site.quantization is not None else linear_form(base, site, site.nodes[0])


def site_model(form: LinearForm, shape: tuple[int, ...]) -> Model:
    """The site with its bias and activation as a model of its own, input of static ``shape``."""
    graph = form.node.graph
    assert isinstance(graph, onnx_ir.Graph)
    part = onnx_ir.convenience.extract(graph, [form.source], [form.output])
    part.inputs[0].shape = onnx_ir.Shape(shape)
    part.inputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    part.outputs[0].shape = None
    part.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    part.opset_imports.update(graph.opset_imports)
    for value in part.initializers.values():  # a constant that is also an input would be a second graph input
        assert value.const_value is not None
    return Model(onnx_ir.Model(part, ir_version=8))
