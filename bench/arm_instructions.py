"""Count the instructions of the ARM kernels' inner loops per multiply-add, beside those of XNNPACK's tiles.

    make arm64 && python bench/arm_instructions.py [build/arm64/library]

Reads the disassembly (``aarch64-linux-gnu-objdump``) of the compiled kernels: of every function the innermost loop with
most multiplications. XNNPACK's numbers are counted from what its tiles need: loads of operands, multiplications,
and the loop; its sources are not used. Neither says how long anything takes.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Instruction = tuple[int, str, str]

#: Kernel, object file, function, instructions that multiply, multiply-adds of each.
KERNELS = (
    ("block16, 6 rows", "neon", r"block_tileILi6ELi1E", ("fmla",), 4),
    ("block32, 3 rows", "neon", r"block_tileILi3ELi2E", ("fmla",), 4),
    ("block16, 1 row", "neon", r"block_tileILi1ELi1E", ("fmla",), 4),
    ("element, 64 lanes", "neon", r"element_wideILi1ELi4E", ("fmla",), 4),
    ("element4, 16 lanes", "neon", r"element_wideILi4ELi1E", ("fmla",), 4),
    ("slice_uniform, 2 rows", "neon", r"slice_rowsILi2ELi0E", ("fmla",), 4),
    (
        "quads int8, 4 rows",
        "int8_neon",
        r"quad_tileINS1_10NeighboursELi4E",
        ("smull", "smull2", "smlal", "smlal2"),
        8,
    ),
    ("quads int8, 6 rows", "int8_neon_dotprod", r"quad_tileINS1_10NeighboursELi6E", ("sdot",), 16),
    ("quads int8, 6 rows", "int8_neon_i8mm", r"quad_tileINS1_10NeighboursELi6E", ("usmmla",), 32),
    ("windows16 int8, 4 rows", "int8_neon_dotprod", r"WindowsILi16ELNS_5PicksE1EEELi4E", ("sdot",), 16),
    ("planes int8, 4 outputs", "planes_neon_dotprod", r"plane_tileILi8ELi4ELi1E", ("sdot",), 16),
    ("planes int8, 4 outputs", "planes_neon_i8mm", r"plane_tileILi8ELi4ELi1E", ("usdot",), 16),
)

#: XNNPACK's tile, instructions of a turn (multiplications + loads + loop), multiply-adds of a turn.
XNNPACK = (
    ("f32-gemm 6x8 neonfma, lanes, four inputs", 48 + 14 + 2, 192),
    ("f32-spmm 32x1 neonfma, one weight", 8 + 10 + 3, 32),
    ("qs8-gemm 4x16c4 neondot, eight inputs", 32 + 12 + 2, 512),
)


def functions(path: Path) -> dict[str, list[Instruction]]:
    """Instructions (address, name, operands) by function."""
    text = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(path)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in text.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:", line):
            body = found.setdefault(head[1], [])
        elif part := re.match(r"\s*([0-9a-f]+):\t(\S+)\s*(.*)", line):
            body.append((int(part[1], 16), part[2], part[3]))
    return found


def inner_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """Loops that hold no other."""
    at = {address: i for i, (address, _, _) in enumerate(body)}
    spans = []
    for i, (_, name, operands) in enumerate(body):
        target = re.search(r"\b([0-9a-f]+) <", operands)
        if target and re.match(r"b$|b\.|cbn?z|tbn?z", name) and at.get(int(target[1], 16), i + 1) <= i:
            spans.append((at[int(target[1], 16)], i))
    return [
        body[a : b + 1] for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)
    ]


def count(path: Path, function: str, multiply: tuple[str, ...]) -> tuple[int, int, int]:
    """Instructions, multiplications and accesses to the stack of the loop with most multiplications."""
    best = (0, 0, 0)
    for name, body in functions(path).items():
        if re.search(function, name):
            for loop in inner_loops(body):
                names = Counter(item[1] for item in loop)
                times = sum(names[item] for item in multiply)
                if times > best[1]:
                    best = (len(loop), times, sum("[sp" in item[2] for item in loop))
    return best


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "arm64" / "library"
    objects = folder / "CMakeFiles" / "sparsecc_ops_objects.dir" / "csrc" / "kernels"
    print(
        "| kernel | set | instructions | multiply-adds | per multiply-add | spills |\n|---|---|---|---|---|---|"
    )
    for label, file, function, multiply, each in KERNELS:
        total, times, stack = count(objects / f"{file}.cc.o", function, multiply)
        if not times:
            sys.exit(f"no loop of {label} found in {file}: was the kernel renamed?")
        isa = re.sub("^(int8|planes)_", "", file)
        row = (label, isa, total, times * each, f"{total / (times * each):.3f}", stack)
        print(f"| {' | '.join(map(str, row))} |")
    for label, total, macs in XNNPACK:
        print(f"| XNNPACK {label} |  | {total} | {macs} | {total / macs:.3f} | |")


if __name__ == "__main__":
    main()
