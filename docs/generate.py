"""Write the documentation that is made from code and from measurements. A test holds it up to date."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsecc import emit
from sparsecc.pm import get_pass, list_passes

DOCS = Path(__file__).resolve().parent
CURVES = DOCS.parent / "bench" / "results" / "pruning_curves.json"

#: Titles of the models of the comparison of pruning methods, and the drop at which their panels end.
PANELS = {"minilm_l6_v2": ("MiniLM-L6", 0.08), "resnet20_cifar10": ("ResNet-20", 0.20)}

#: Colours that can be told apart on white, also by the colour-blind (Okabe and Ito).
COLOURS = {
    "magnitude": "#777777", "Wanda": "#e69f00", "Wanda + OLS": "#009e73", "SparseGPT": "#56b4e9",
    "ALPS": "#0072b2", "ExactOBS": "#d55e00",
}  # fmt: skip


def passes_page() -> str:
    """The page of all built-in passes with their options."""
    lines = ["# Passes", "", "Made by `make docs` from the passes themselves.", ""]
    for info in list_passes():
        if info.origin != "sparsecc":
            continue
        pass_type = get_pass(info.name)
        lines += [f"## `{info.name}`", "", inspect.getdoc(pass_type) or "", ""]
        kind = "lossless" if pass_type.lossless else "changes what the model computes"
        needs = "; needs calibration data" if pass_type.requires_calibration else ""
        lines += [f"*{kind}{needs}*", "", "| option | type | default |", "|---|---|---|"]
        for option in pass_type.option_infos():
            default = (
                "required" if option.default is None else f"`{option.default}`" if option.default else "empty"
            )
            lines.append(f"| `{option.name}` | {option.type.replace('|', 'or')} | {default} |")
        lines.append("")
    return "\n".join(lines)


def pruning_page() -> str:
    """The comparison of pruning methods: its text as it is, the tables from what was measured."""
    models = json.loads(CURVES.read_text())["models"]
    tables = "\n\n".join(_table(name, models[name]) for name in PANELS)
    text = (DOCS / "pruning.md").read_text()
    return re.sub(
        r"(<!-- measured -->\n).*(\n<!-- end -->)", lambda m: m[1] + tables + m[2], text, flags=re.DOTALL
    )


def _table(name: str, model: Mapping[str, Any]) -> str:
    rows = model["variants"]
    patterns = list(rows["magnitude"])
    dense = rows["dense"][""]
    lines = [
        f"**{PANELS[name][0]}**: {model['metric']} on {dense['samples']} samples, dense {dense['value']:.4f}, "
        f"{model['calibration_samples']} samples to calibrate",
        "",
        "| | " + " | ".join(patterns) + " | CPU seconds |",
        "|---" * (len(patterns) + 2) + "|",
    ]
    for method, found in rows.items():
        if method == "dense" or not found:
            continue
        best = {p: max(other[p]["value"] for other in rows.values() if p in other) for p in patterns}
        cells = [_cell(found[p], best[p]) if p in found else "-" for p in patterns]
        seconds = sorted(item["prune_cpu_seconds"] for item in found.values())[len(found) // 2]
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {seconds:.1f} |")
    return "\n".join(lines)


def _cell(found: Mapping[str, Any], best: float) -> str:
    """The figure, bold where it is the best, in italics where biases were left alone."""
    text = f"{found['value']:.3f}"
    text = f"**{text}**" if found["value"] == best else text
    return f"*{text}*" if _without_biases(found) else text


def _without_biases(found: Mapping[str, Any]) -> bool:
    return "bias=false" in found["pipeline"]


def pruning_plot() -> str:
    """What each method loses over sparsities and patterns, as SVG on a white ground."""
    models = json.loads(CURVES.read_text())["models"]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="860" height="400" viewBox="0 0 860 400" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="12" fill="#222">',
        '<rect width="860" height="400" rx="6" fill="#fff"/>',
    ]
    for number, (method, colour) in enumerate(COLOURS.items()):
        x = 60 + number * 130
        parts.append(
            f'<circle cx="{x}" cy="24" r="5" fill="{colour}"/><text x="{x + 10}" y="28">{method}</text>'
        )
    for number, name in enumerate(PANELS):
        parts += _panel(60 + number * 425, *PANELS[name], models[name])
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: int, title: str, most: float, model: Mapping[str, Any]) -> list[str]:
    """One model: sparsities as lines, then other patterns as points; what lies beyond the top is a triangle there."""
    top, bottom, width, step = 76, 350, 360, 50
    rows = model["variants"]
    patterns, dense = list(rows["magnitude"]), rows["dense"][""]["value"]
    lines = sum(":" not in p and "x" not in p for p in patterns)

    def height(value: float) -> float:
        return round(bottom - (bottom - top) * min(max((dense - value) / most, -0.02), 1.0), 1)

    xs = [left + 25 + step * at + (15 if at >= lines else 0) for at in range(len(patterns))]
    parts = [
        f'<text x="{left}" y="60" font-weight="bold">{title}: {model["metric"]} lost, dense {dense:.3f}</text>'
    ]
    for tick in range(5):
        drop, y = most * tick / 4, height(dense - most * tick / 4)
        parts.append(f'<path d="M{left} {y}h{width}" stroke="#ccc" stroke-width="{1 if tick else 2}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{drop:.2f}</text>')
    for x, pattern in zip(xs, patterns, strict=True):
        for line, text in enumerate(pattern.split(" ", 1) if "x" in pattern else [pattern]):
            parts.append(f'<text x="{x}" y="{bottom + 20 + 15 * line}" text-anchor="middle">{text}</text>')
    middle = (xs[0] + xs[lines - 1]) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 35}" text-anchor="middle">unstructured</text>')
    for number, (method, colour) in enumerate(COLOURS.items()):
        known = [(at, rows.get(method, {}).get(pattern)) for at, pattern in enumerate(patterns)]
        points = [(at, height(found["value"]), _without_biases(found)) for at, found in known if found]
        for alone in (False, True):  # lines join what was measured alike
            drawn = [
                f"{xs[at]},{y}" for at, y, hollow in points if at < lines and y > top and hollow is alone
            ]
            dashes = ' stroke-dasharray="3 4"' if alone else ""
            parts.append(
                f'<polyline points="{" ".join(drawn)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
            )
        for at, y, hollow in points:
            # Patterns stand side by side, so that equal points do not cover one another.
            x = xs[at] + (5 * number - 12 if at >= lines or y <= top else 0)
            shape = (
                f"M{x - 5} {top + 4}h10l-5 -9z" if y <= top else f"M{x - 4} {y}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"
            )
            fill = "#fff" if hollow else colour
            parts.append(f'<path d="{shape}" fill="{fill}" stroke="{colour}" stroke-width="1.5"/>')
    return parts


PAGES = {
    "passes.md": passes_page,
    "operators.md": emit.operators_markdown,
    "pruning.md": pruning_page,
    "pruning.svg": pruning_plot,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(name)
