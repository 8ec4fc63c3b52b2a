"""What a device does, run on the emulated machine: open a model with the operator library and compare its outputs.

Arguments: model, file of inputs and of the outputs elsewhere (``.npz``, names ``input`` and ``output``), and the
largest allowed difference relative to the largest output.
"""

from __future__ import annotations

import sys

import numpy as np

from sparsecc import runtime


def main(model: str, examples: str, tolerance: str) -> None:
    with np.load(examples) as arrays:
        x, expected = arrays["input"], arrays["output"]
    session = runtime.load(model, threads=1)
    (name,) = (item.name for item in session.get_inputs())
    y = session.run(None, {name: x})[0]
    difference = float(np.abs(y - expected).max() / np.abs(expected).max())
    same = float((y.argmax(1) == expected.argmax(1)).mean())
    print(f"largest difference {difference:.1e}, same class {same:.2%}")
    for package in ("onnx", "onnx_ir", "click", "networkx", "sparsecc.passes", "sparsecc.emit"):
        assert package not in sys.modules, f"a device would need {package}"
    assert difference <= float(tolerance)


if __name__ == "__main__":
    main(*sys.argv[1:])
