"""Models compiled by TVM, with our kernels inside. The extra ``sparsecc[tvm]``."""

from __future__ import annotations

from sparsecc.tvm.compile import Compiled, check_target, compile_model

__all__ = ["Compiled", "check_target", "compile_model"]
