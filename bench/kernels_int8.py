"""Block-sparse int8 kernels and the engines of others against dense onnxruntime, one linear layer at a time.

Baselines are onnxruntime's ``DynamicQuantizeMatMul`` (int8 weights, one scale per output) and its fp32 MatMul.
All engines read float32 and write float32, so quantising x and scaling back is counted for every int8 one.

    python bench/kernels_int8.py --json bench/results/kernels_int8.json
    python bench/kernels_int8.py --shape 768x768 --rows 1 --rows 128 --pattern 16x4 --sparsity 0.9 --no-peers

See `kernels` for the options and the lines of the tables.
"""

from __future__ import annotations

import os
from typing import Any

import click
from kernels import compare
from layers import layer_options

PATTERNS = ("16x4", "16x1", "8x1", "4x1", "4x4", "1x4", "2:4", "1:4", "unstructured")
SPARSITIES = (0.5, 0.8, 0.9)


@click.command(context_settings={"show_default": True})
@layer_options(PATTERNS, SPARSITIES)
def main(isa: str | None, **options: Any) -> None:
    """Time the sparse int8 kernels and other engines against dense onnxruntime, int8 and fp32."""
    if isa is not None:
        os.environ["SPARSECC_ISA"] = isa  # read by the library whenever it makes an operator
    compare(("sparsecc int8",), ("int8", "fp32"), isa=isa, **options)


if __name__ == "__main__":
    main()
