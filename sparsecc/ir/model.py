"""A model: the onnx-ir graph, where it came from, and its sites."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir

from sparsecc.ir import read, shapes, slots, write
from sparsecc.ir.external import ExternalFiles
from sparsecc.ir.shapes import TensorSpec
from sparsecc.ir.sites import Site, find_sites, name_matches

__all__ = ["Model"]


class Model:
    """An ONNX model. ``onnx`` is the onnx-ir model itself, free to be changed; files are dealt with here.

    External weights are memory-mapped read-only and stay valid when their file is replaced by a rename.

    Attributes:
        onnx: the onnx-ir model.
        path: the file it was loaded from, or None.
    """

    def __init__(
        self, onnx: onnx_ir.Model, *, path: Path | None = None, had_external_data: bool = False
    ) -> None:
        self.onnx = onnx
        self.path = path
        self._had_external_data = had_external_data

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Model:
        """Return the model in the file, checked by onnx.checker, sparse constants made dense.

        Raises:
            ModelError: missing, a folder, empty, text, truncated, or not a valid model.
            UnsafeModelError: external data outside the model's folder, or shorter than claimed.
            UnsupportedModelError: IR version or opset newer than the installed onnx, or opset below 7.
        """
        path = Path(path)
        files = ExternalFiles(path.parent)
        model = read.adopt_proto(read.read_proto(path), files)
        return cls(model, path=path, had_external_data=files.used)

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto, *, base_dir: str | os.PathLike[str] | None = None) -> Model:
        """Return the model of a protobuf, which is copied; ``base_dir`` is where external weights are.

        Raises:
            ModelError: as for ``load``.
        """
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        files = ExternalFiles(Path(base_dir) if base_dir is not None else None)
        model = read.adopt_proto(copy, files)
        return cls(model, had_external_data=files.used)

    def to_proto(self) -> onnx.ModelProto:
        """Return the protobuf with all weights inside.

        Raises:
            UsageError: the weights are more than 1.5 GB.
        """
        return write.to_proto(self.onnx)

    def skeleton(self) -> onnx.ModelProto:
        """Return the protobuf with tensors above 4 KiB cut short: small, good for shape inference."""
        return write.to_skeleton(self.onnx)

    def check(self) -> None:
        """Raise ``ModelError`` with one line unless onnx.checker accepts the graph; weights are not read."""
        read.check_structure(self.onnx)

    def copy(self) -> Model:
        """Return a model of its own that shares the weights; replacing one does not show in the other."""
        return Model(self.onnx.clone(), path=self.path, had_external_data=self._had_external_data)

    def save(self, path: str | os.PathLike[str], *, external_data: bool | None = None) -> None:
        """Write the model: either complete or not at all. Equal models give equal bytes.

        Args:
            path: target file; may be the one this model's weights are mapped from.
            external_data: put weights of 1 KiB or more into ``<name>.data`` beside it (``m.onnx.data`` for
                ``m.onnx``). Default: if the loaded model had external data, or the weights exceed 1.5 GB.

        Raises:
            UsageError: not writable, disk full, or too large for one file.
        """
        if external_data is None:
            external_data = self.external_data
        write.write_model(self.onnx, Path(path), external_data)

    @property
    def external_data(self) -> bool:
        """Whether ``save`` puts weights into a data file unless it is told otherwise."""
        return self._had_external_data or self.nbytes > write.INLINE_LIMIT

    def written_nbytes(self, path: str | os.PathLike[str]) -> int:
        """Return the bytes of the files that ``save(path)`` would write; at most a few per tensor too many."""
        return write.written_nbytes(self.onnx, Path(path), self.external_data)

    @property
    def opset(self) -> int:
        """Version of the default domain's operator set."""
        imports = self.onnx.opset_imports
        return imports.get("", imports.get("ai.onnx", 1))

    @property
    def metadata(self) -> dict[str, str]:
        """The model's ``metadata_props``, to read and to write."""
        return self.onnx.metadata_props

    @property
    def frozen_inputs(self) -> tuple[str, ...]:
        """Inputs with a default that loading made constants: a caller cannot override them any more."""
        return tuple(self.onnx.meta.get(read.FROZEN_INPUTS, ()))

    @property
    def nbytes(self) -> int:
        """Bytes of all constants, shared ones once."""
        return write.weight_nbytes(self.onnx)

    def graphs(self) -> Iterator[onnx_ir.Graph]:
        """Yield the main graph and function bodies, each followed by the bodies of its If, Loop and Scan."""
        return slots.all_graphs(self.onnx)

    def sites(self, match: str = "*") -> list[Site]:
        """Return the sites whose name ``match`` selects: a glob, or ``re:`` and a regular expression.

        Raises:
            SpecError: the regular expression does not compile.
        """
        return [site for site in find_sites(self.onnx)[0] if name_matches(match, site.name)]

    def unsupported_sites(self) -> list[tuple[str, str]]:
        """Return (name, reason) for every linear operator that is no site."""
        return find_sites(self.onnx)[1]

    def infer_shapes(self) -> str | None:
        """Fill in missing types and shapes; return the reason if that failed, the model being unchanged."""
        return shapes.infer_shapes(self.onnx)

    def input_specs(self) -> list[TensorSpec]:
        """Return name, type and shape of the inputs a caller must give (initializers left out)."""
        return shapes.tensor_specs(v for v in self.onnx.graph.inputs if not v.is_initializer())

    def output_specs(self) -> list[TensorSpec]:
        """Return name, type and shape of the outputs."""
        return shapes.tensor_specs(self.onnx.graph.outputs)

    def fingerprint(self) -> str:
        """Return a sha256 (hex) of graph and weights; the same for inline and external storage.

        The model's own ``metadata_props`` do not count.
        """
        return write.fingerprint(self.onnx)
