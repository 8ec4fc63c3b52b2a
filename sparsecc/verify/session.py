"""Sessions of onnxruntime with the native operators."""

from __future__ import annotations

from sparsecc.calib import ModelLike, Session, open_session

__all__ = ["session"]


def session(
    model: ModelLike,
    *,
    library: bool = False,
    threads: int | None = 1,
    optimization: str = "all",
) -> Session:
    """Return a CPU session of a model in memory or a file.

    Args:
        model: the model or its path.
        library: register the native operators, so that they run in place of their function bodies.
        threads: threads of the session's pool; ``None`` or 0 for onnxruntime's choice (all physical cores).
        optimization: ``all``, ``extended``, ``basic`` or ``disable``.

    Raises:
        ModelError: the file is missing or is not a model onnxruntime accepts.
        UnsupportedModelError: it uses an operator, opset or IR version onnxruntime does not know.
        RuntimeMissingError: ``library`` is set and the native library is not there.
        UsageError: ``optimization`` or ``threads`` is not a valid choice.
    """
    if not library:
        return open_session(model, threads=threads, optimization=optimization)
    from sparsecc import runtime

    return open_session(model, register=runtime.register, threads=threads, optimization=optimization)
