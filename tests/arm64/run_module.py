"""Run modules of TVM on arrays and compare: ``run_module.py TOLERANCE (MODULE ARRAYS)...``."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sparsecc.runtime.tvm_module import TvmModule


def main() -> int:
    tolerance = float(sys.argv[1])
    worst = 0.0
    for path, arrays in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        with np.load(arrays) as stored:
            named = {name: stored[name] for name in stored.files}
        module = TvmModule(path)
        found = module.run({name.removeprefix("in "): array for name, array in named.items()})
        for name, y in found.items():
            wanted = named[f"out {name}"].astype(np.float64)
            distance = float(np.linalg.norm(y - wanted) / np.linalg.norm(wanted))
            print(f"module {Path(path).stem}, {name}: relative L2 {distance:.1e}", flush=True)
            worst = max(worst, distance)
    return 0 if worst <= tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
