"""Which passes of TVM's turn the imported module into code."""

from __future__ import annotations

from typing import Any

__all__ = ["schedule"]


def schedule(target: Any) -> Any:
    """Return the passes for a target of TVM's: operators become loops, neighbours are fused, memory is planned.

    What is heavy calls our kernels by then.
    """
    import tvm
    from tvm.relax.backend.cpu_generic import pipeline as cpu_generic

    steps = [
        *cpu_generic.library_dispatch_passes(target),
        *cpu_generic.legalize_passes(target),
        *cpu_generic.dataflow_lower_passes(target),
        *cpu_generic.finalize_passes(target),
    ]

    @tvm.transform.module_pass(opt_level=0)  # type: ignore[untyped-decorator]
    def passes(module: Any, _: Any) -> Any:
        with target:
            return tvm.transform.Sequential(steps)(module)

    return passes
