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
from sparsecc.plan.costs import CostTable
from sparsecc.pm import PassContext
from sparsecc.sparse import Pattern

__all__ = ["MeasuredCosts", "input_shapes_of_sites", "lowered_copy"]

Inputs = Mapping[str, npt.NDArray[np.generic]]

#: Most seconds spent on timing one site, and on timing one whole model against dense.
_SITE_SECONDS = 0.4
_MODEL_SECONDS = 6.0


def lowered_copy(model: Model, sites: Iterable[str]) -> Model:
    """A copy of ``model`` in which only the marked sites named in ``sites`` are lowered and ready to run."""
    wanted = set(sites)
    copy = model.copy()
    for site in copy.sites():
        if site.name not in wanted:
            unmark(site)
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

    def site_times_ms(self, model: Model, site: Site, patterns: Sequence[Pattern]) -> dict[str, float]:
        """Median ms of the site alone: ``"dense"`` (onnxruntime) and each of ``patterns`` by its text.

        Raises:
            MeasurementError: the shape of the site's input is not known, or it cannot run alone.
        """
        if self._shapes is None:
            self._shapes = input_shapes_of_sites(model, self._inputs)
        if site.name not in self._shapes:
            raise MeasurementError("not timed: the shape of its input is not known (inside a subgraph)")
        form = linear_form(model, site, site.nodes[0])
        shape = self._shapes[site.name]
        names = ["dense", *(str(pattern) for pattern in patterns)]
        key = self._site_key(site, form, shape)
        return self.table.get_or_measure(key, names, lambda: self._time_site(form, shape, patterns))

    def _site_key(self, site: Site, form: LinearForm, shape: tuple[int, ...]) -> str:
        zeros = _digest(np.packbits(form.weight != 0).tobytes())
        geometry = "" if form.conv is None else f" {form.conv}"
        return (
            f"{site.op} x{list(shape)} w{list(site.weight_shape)}{geometry} act={form.activation.suffix or 'none'} "
            f"threads={self._threads} zeros={zeros}"
        )

    def _time_site(
        self, form: LinearForm, shape: tuple[int, ...], patterns: Sequence[Pattern]
    ) -> dict[str, float]:
        dense = _site_model(form, shape)
        name = dense.onnx.graph.inputs[0].name
        assert name is not None
        x = np.random.default_rng(self._seed).standard_normal(shape, dtype=np.float32)
        variants = [dense]
        for pattern in patterns:
            marked = dense.copy()
            (site,) = marked.sites()
            mark(site, str(pattern), 1.0)
            variants.append(lowered_copy(marked, [site.name]))
        try:
            result = verify.benchmark(
                variants, {name: x}, threads=self._threads, max_seconds=_SITE_SECONDS * len(variants)
            )
        except SparseccError as error:
            raise MeasurementError(f"not timed: {error}") from error
        times = [timing.median_ms for timing in result.models]
        return dict(zip(["dense", *map(str, patterns)], times, strict=True))

    def relative_time(self, model: Model, sites: frozenset[str]) -> float:
        """Time of the whole model with ``sites`` lowered / time of the same model with none lowered."""
        if not sites:
            return 1.0
        marks = {site.name: site.nodes[0].metadata_props.get(LAYOUT_KEY, "") for site in model.sites()}
        chosen = json.dumps(sorted((name, marks[name]) for name in sites))
        shapes = json.dumps({name: list(array.shape) for name, array in sorted(self._inputs.items())})
        digest = _digest(model.fingerprint().encode(), chosen.encode(), shapes.encode())
        key = f"model {digest} sites={len(sites)} threads={self._threads}"
        return self.table.get_or_measure(key, ["relative"], lambda: self._time_model(model, sites))[
            "relative"
        ]

    def _time_model(self, model: Model, sites: frozenset[str]) -> dict[str, float]:
        result = verify.benchmark(
            [lowered_copy(model, ()), lowered_copy(model, sites)],
            self._inputs,
            threads=self._threads,
            max_seconds=_MODEL_SECONDS,
        )
        return {"relative": 1 / result.ratio_to_first[1]}


def _site_model(form: LinearForm, shape: tuple[int, ...]) -> Model:
    """The site with its bias and activation as a model of its own, input of static ``shape``."""
    graph = form.node.graph
    assert isinstance(graph, onnx_ir.Graph)
    source = form.node.inputs[0]
    assert source is not None
    part = onnx_ir.convenience.extract(graph, [source], [form.output])
    part.inputs[0].shape = onnx_ir.Shape(shape)
    part.inputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    part.outputs[0].shape = None
    part.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    part.opset_imports.update(graph.opset_imports)
    for value in part.initializers.values():  # a constant that is also an input would be a second graph input
        assert value.const_value is not None
    return Model(onnx_ir.Model(part, ir_version=8))
