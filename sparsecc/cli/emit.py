"""What ``optimize --emit`` writes: the ONNX file, or a module of TVM made from it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparsecc.cli.output import format_bytes
from sparsecc.errors import UsageError

if TYPE_CHECKING:
    from sparsecc.api import OptimizeResult

__all__ = ["Emission", "emission", "emit_option"]

emit_option = click.option(
    "--emit",
    type=click.Choice(["onnx", "tvm"]),
    default="onnx",
    show_default=True,
    help="Write an ONNX file, or a shared library that needs only TVM's runtime.",
)


class Emission:
    """Where ``optimize`` writes its ONNX file, and what is made of that.

    Attributes:
        onnx: the file to write; None for the default beside the model.
    """

    def __init__(self, onnx: str | None) -> None:
        self.onnx = onnx

    def finish(self, result: OptimizeResult, shapes: Mapping[str, Sequence[int]] | None) -> OptimizeResult:
        """Return what there is to tell after the rest of the work, which is done here."""
        return result


class _Tvm(Emission):
    def __init__(self, onnx: str, output: Path, target: str) -> None:
        super().__init__(onnx)
        self._output, self._target = output, target

    def finish(self, result: OptimizeResult, shapes: Mapping[str, Sequence[int]] | None) -> OptimizeResult:
        from sparsecc.ir import Model
        from sparsecc.tvm import compile_model

        made = compile_model(
            Model.load(result.output), self._output, target=self._target, input_shapes=shapes, seed=0
        )
        files = [path for path in (made.path, made.weights) if path is not None]
        sizes = " and ".join(f"{path.name} ({format_bytes(path.stat().st_size)})" for path in files)
        fixed = ", ".join(f"{name} {list(shape)}" for name, shape in made.shapes.items())
        notes = [
            *result.notes,
            f"module of TVM: {sizes}, {made.kernels} nodes on our kernels, relative L2 {made.rel_l2:.1e} to the ONNX "
            f"file{'' if self._target == 'cpu' else ' when compiled for this machine'}",
            f"the module takes these shapes only: {fixed}",
            "times are those of the ONNX file; `sparsecc benchmark` compares it with a module",
        ]
        return replace(
            result, output=made.path, bytes_after=sum(path.stat().st_size for path in files), notes=notes
        )


@contextmanager
def emission(emit: str, model: str, output: str | None, target: str) -> Iterator[Emission]:
    """Yield where the ONNX file goes; for TVM that is a folder that goes away.

    Raises:
        MissingExtraError, RuntimeMissingError, UsageError: found before the slow part.
    """
    if emit == "onnx":
        yield Emission(output)
        return
    from sparsecc.tvm import check_target

    path = Path(output) if output is not None else Path(model).with_suffix(".sparse.so")
    check_target(target, path)
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sparsecc") as folder:
        yield _Tvm(str(Path(folder) / f"{path.stem}.onnx"), path, target)
