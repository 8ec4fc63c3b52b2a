"""A picture of cuts over a matrix: who works on what, and how much everybody has. SVG, NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from sparsecc.algebra.levels import Dense
from sparsecc.algebra.splitter import Int64, SplitTable, Walk

__all__ = ["cuts_svg"]

#: Neighbours differ, also for the colour-blind (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")

_CELLS = 128  # of the picture's longer side
_MOST_LINES = 64  # cuts that can be told apart
_SIDE, _LEFT, _TOP = 480, 60, 56
_BARS_LEFT, _BARS_WIDTH, _BARS_HEIGHT = 600, 280, 130


def cuts_svg(
    walks: Sequence[Walk], table: SplitTable, others: Sequence[tuple[str, Int64]], title: str
) -> str:
    """Draw the entries of all walks over their two outermost loops, coloured by the part that has them.

    Args:
        walks: what was cut.
        table: where.
        others: names of other ways to cut, and the work of each part there, drawn beside ours.
        title: printed on top.
    """
    rows, columns = _sizes(walks)
    height, width = _grid(rows, columns)
    cell = _SIDE / max(height, width)
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="920" height="580" viewBox="0 0 920 580" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="12" fill="#222">',
        '<rect width="920" height="580" rx="6" fill="#fff"/>',
        f'<text x="{_LEFT}" y="26" font-weight="bold">{escape(title)}</text>',
        f'<text x="{_LEFT}" y="44">{rows} x {columns}, {table.parts} parts, work {table.work}</text>',
    ]
    parts += _cells(walks, table, (rows, columns), (height, width), cell)
    if table.parts <= _MOST_LINES:
        parts += _lines(table, (rows, columns), (height * cell, width * cell))
    parts.append(
        f'<rect x="{_LEFT}" y="{_TOP}" width="{width * cell:.1f}" height="{height * cell:.1f}" fill="none" '
        'stroke="#888"/>'
    )
    ways = [("balanced parts", table.part_work()), *others]
    most = max(int(work.max()) for _, work in ways) or 1
    for number, (name, work) in enumerate(ways):
        parts += _bars(name, work, most, _TOP + 20 + number * (_BARS_HEIGHT + 44))
    return "\n".join([*parts, "</svg>", ""])


def _sizes(walks: Sequence[Walk]) -> tuple[int, int]:
    """Of the two outermost loops; 1 for one that is not there."""
    sizes = [level.size for level in max((walk.levels for walk in walks), key=len, default=())[:2]]
    rows, columns = (*sizes, 1, 1)[:2]
    return max(rows, 1), max(columns, 1)


def _grid(rows: int, columns: int) -> tuple[int, int]:
    """Cells of the picture: of the shape of the matrix, but no narrower than can be seen."""
    longest = max(rows, columns)
    height, width = (max(_CELLS // 4, round(_CELLS * size / longest)) for size in (rows, columns))
    return min(height, rows), min(width, columns)


def _cells(
    walks: Sequence[Walk], table: SplitTable, sizes: tuple[int, int], grid: tuple[int, int], cell: float
) -> list[str]:
    """One rectangle for each run of cells of one colour and shade."""
    found = [_owned(walk, cursor, sizes, grid) for walk, cursor in zip(walks, table.cursors, strict=True)]
    flat, part, work = (np.concatenate(column) for column in zip(*found, strict=True))
    count = np.bincount(flat, work, grid[0] * grid[1]).reshape(grid)
    pairs, index = np.unique(np.stack([flat, part], 1), axis=0, return_inverse=True)
    weights = np.bincount(index.reshape(-1), work, len(pairs))
    rising = np.argsort(weights, kind="stable")
    owner = np.full(count.size, -1, np.int64)
    owner[pairs[rising, 0]] = pairs[rising, 1]  # the heaviest of a cell is written last
    owner = owner.reshape(grid)
    shade = np.zeros(grid)
    if count.any():
        shade = np.where(count > 0, 0.35 + 0.65 * np.sqrt(count / count.max()), 0)
    drawn = []
    for y in range(grid[0]):
        x = 0
        while x < grid[1]:
            start, same = x, (owner[y, x], round(float(shade[y, x]), 1))
            while x < grid[1] and (owner[y, x], round(float(shade[y, x]), 1)) == same:
                x += 1
            if same[0] >= 0:
                drawn.append(
                    f'<rect x="{_LEFT + start * cell:.1f}" y="{_TOP + y * cell:.1f}" '
                    f'width="{(x - start) * cell:.1f}" height="{cell:.1f}" '
                    f'fill="{_COLOURS[int(same[0]) % len(_COLOURS)]}" opacity="{same[1]}"/>'
                )
    return drawn


def _owned(
    walk: Walk, cursor: Int64, sizes: tuple[int, int], grid: tuple[int, int]
) -> tuple[Int64, Int64, Int64]:
    """Of each node of the second level: cell of the picture, part, and entries below it."""
    places, work = _entries(walk)
    level = min(len(walk.levels), 2) - 1
    part = np.searchsorted(cursor[level], np.arange(len(work)), side="right") - 1
    at = [places[:, axis] * grid[axis] // sizes[axis] for axis in range(2)]
    return at[0] * grid[1] + at[1], part, work


def _entries(walk: Walk) -> tuple[Int64, Int64]:
    """Places ``[n, 2]`` of the nodes of the second level, or of the only one, and how many entries each has."""
    depth = min(len(walk.levels), 2)
    nodes = np.arange(walk.nodes[depth - 1]) if depth else np.zeros(0, np.int64)
    places = np.zeros((len(nodes), 2), np.int64)
    borders = np.arange(len(nodes) + 1)
    below = walk.descend(depth - 1, borders)
    work = np.diff(below[-1] if below else borders)
    for at in range(depth - 1, -1, -1):
        level = walk.levels[at]
        if isinstance(level, Dense):
            places[:, at], nodes = nodes % level.size, nodes // level.size
        else:
            places[:, at] = level.crd[nodes]
            nodes = np.searchsorted(level.pos, nodes, side="right") - 1
    return places, work


def _lines(table: SplitTable, sizes: tuple[int, int], extent: tuple[float, float]) -> list[str]:
    """The cuts as steps: left of the step belongs to the part above."""
    drawn = []
    for path in table.paths[1:-1]:
        row = int(path[0])
        column = int(path[1]) + 1 if len(path) > 1 else sizes[1]
        top, bottom = (_TOP + extent[0] * place / sizes[0] for place in (row, row + 1))
        middle = _LEFT + extent[1] * column / sizes[1]
        drawn.append(
            f'<path d="M{_LEFT} {bottom:.1f}H{middle:.1f}V{top:.1f}H{_LEFT + extent[1]:.1f}" fill="none" '
            'stroke="#000" stroke-width="0.8"/>'
        )
    return drawn


def _bars(name: str, work: Int64, most: int, top: float) -> list[str]:
    """Work of each part, or the most of each run of parts where they are many, and the mean as a line."""
    mean = float(work.mean())
    balance = float(work.max()) / mean if mean else 1.0
    shown = min(len(work), 140)
    borders = [part * len(work) // shown for part in range(shown + 1)]
    step = _BARS_WIDTH / shown
    drawn = [f'<text x="{_BARS_LEFT}" y="{top:.0f}">{escape(name)}: largest {balance:.2f} x mean</text>']
    base = top + 10 + _BARS_HEIGHT
    for number in range(shown):
        first, last = borders[number], borders[number + 1]
        tall = _BARS_HEIGHT * int(work[first:last].max()) / most
        drawn.append(
            f'<rect x="{_BARS_LEFT + number * step:.2f}" y="{base - tall:.2f}" width="{max(step * 0.9, 0.6):.2f}" '
            f'height="{tall:.2f}" fill="{_COLOURS[number % len(_COLOURS)]}"/>'
        )
    line = base - _BARS_HEIGHT * mean / most
    drawn.append(
        f'<path d="M{_BARS_LEFT - 4} {line:.2f}h{_BARS_WIDTH + 8}" stroke="#000" stroke-dasharray="3 3"/>'
        f'<path d="M{_BARS_LEFT} {base:.2f}h{_BARS_WIDTH}" stroke="#888"/>'
    )
    return drawn
