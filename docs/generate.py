"""Write the documentation that is made from code and from measurements. A test holds it up to date."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsecc import emit
from sparsecc.pm import get_pass, list_passes

DOCS = Path(__file__).resolve().parent
CURVES = DOCS.parent / "bench" / "results" / "pruning_curves.json"
FACTORS = DOCS.parent / "bench" / "results" / "factorisation.json"

#: Titles of the models of the comparison of factorisations.
FACTORED = {"minilm_l6_v2": "MiniLM-L6", "stories260K": "stories260K", "text_lm": "text_lm (ours)"}

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
        if pass_type.search:
            tried = "; ".join(f"`{str(item).replace('|', ', ') or 'as it is'}`" for item in pass_type.search)
            lines += [f"Search range: {tried}", ""]
    return "\n".join(lines)


def pruning_page() -> str:
    """The comparison of pruning methods: its text as it is, the tables from what was measured."""
    models = json.loads(CURVES.read_text())["models"]
    tables = "\n\n".join(_table(name, models[name]) for name in PANELS)
    text = (DOCS / "pruning.md").read_text()
    return _filled(text, "measured", tables)


def _filled(text: str, marker: str, tables: str) -> str:
    """The text with what stands between this marker and the next end replaced."""
    pattern = rf"(<!-- {marker} -->\n).*?(\n<!-- end -->)"
    return re.sub(pattern, lambda m: m[1] + tables + m[2], text, flags=re.DOTALL)


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


def factorisation_page() -> str:
    """The comparison of factorisations: its text as it is, the tables from what was measured."""
    results = json.loads(FACTORS.read_text())["models"]
    text = (DOCS / "factorisation.md").read_text()
    tables = "\n\n".join(_factor_table(name, results[name]) for name in FACTORED)
    text = _filled(text, "measured", tables)
    return _filled(
        text,
        "speed",
        _speed_table(results["speed"], results["fit_seconds_768x3072"], results["minilm_l6_v2_speed"]),
    )


def _factor_table(name: str, model: Mapping[str, Any]) -> str:
    rows = model["variants"]
    dense = rows["dense"][""]
    ratios = list(rows["SVD"])
    most = max(item.get("sites", 0) for found in rows.values() for item in found.values())
    lines = [
        f"**{FACTORED[name]}**: {model['metric']} on {dense['samples']} samples, dense {dense['value']:.4f}, "
        f"{model['calibration_samples']} samples to calibrate",
        "",
        "| | " + " | ".join(f"{ratio}: {model['metric']}" for ratio in ratios)
        + " | " + " | ".join(f"{ratio}: output error" for ratio in ratios) + " | CPU seconds |",
        "|---" * (2 * len(ratios) + 2) + "|",
    ]  # fmt: skip
    for method, found in rows.items():
        if method == "dense":
            continue
        values = [_factor_cell(found.get(ratio), float(ratio), most) for ratio in ratios]
        errors = [f"{found[ratio]['output_error']:.3g}" if ratio in found else "-" for ratio in ratios]
        seconds = sorted(item["cpu_seconds"] for item in found.values())[len(found) // 2]
        lines.append(f"| {method} | " + " | ".join(values + errors) + f" | {seconds:.0f} |")
    return "\n".join(lines)


def _factor_cell(found: Mapping[str, Any] | None, ratio: float, sites: int) -> str:
    """The figure; what the form holds in truth or leaves alone where that differs."""
    if found is None:
        return "-"
    notes = [f"{found['parameters']:.2f} stay"] if abs(found["parameters"] - ratio) > 0.05 else []
    notes += [f"{found['sites']} of {sites} layers"] if found["sites"] < sites else []
    return f"{found['value']:.4g}" + (f" ({', '.join(notes)})" if notes else "")


def _speed_table(layers: Mapping[str, Any], seconds: Mapping[str, float], whole: Mapping[str, Any]) -> str:
    """Speed of each form at each budget over the layers, of a whole model, and seconds of the fit."""
    shares = [key for key, value in whole.items() if isinstance(value, dict) and key != "1"]
    columns = [(layer, rows) for layer, found in layers.items() for rows in found]
    lines = ["| | " + " | ".join(f"{layer}, M={rows}" for layer, rows in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    forms = [name for name in next(iter(next(iter(layers.values())).values())) if name != "dense_ms"]
    for form in forms:
        cells = [layers[layer][rows].get(form) for layer, rows in columns]
        lines.append(
            f"| {form} | " + " | ".join("-" if cell is None else f"{cell:.2f}" for cell in cells) + " |"
        )
    fits = ", ".join(f"{method} {value:.2g} s" for method, value in seconds.items())
    small = [
        f"{whole[ratio]['speed']:.2f}x and {whole[ratio]['bytes'] / 1e6:.0f} MB at {ratio}"
        for ratio in shares
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"MiniLM, a sentence of {whole['tokens']} tokens, all layers of low rank: {', '.join(small)}; "
            f"dense {whole['1']['bytes'] / 1e6:.0f} MB.",
            "",
            f"Time to fit a 768x3072 layer at 0.7, one thread: {fits}.",
        ]
    )


def factorisation_plot() -> str:
    """Spectra of layers, plain and whitened, and what each form costs, as SVG on a white ground."""
    results = json.loads(FACTORS.read_text())["models"]
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="400" viewBox="0 0 900 400" '
            'font-family="DejaVu Sans, Verdana, sans-serif" font-size="12" fill="#222">',
            '<rect width="900" height="400" rx="6" fill="#fff"/>',
            *_spectra_panel(results["spectra"]),
            *_forms_panel(results["minilm_l6_v2"]),
            "</svg>",
            "",
        ]
    )


def _spectra_panel(spectra: Mapping[str, Any]) -> list[str]:
    left, top, width, height = 70, 60, 330, 280
    parts = [f'<text x="{left}" y="24" font-weight="bold">Missed by the best weight of a rank</text>']
    parts.append(f'<text x="{left}" y="42">share of the squares; dashed: weights, solid: outputs</text>')
    decades = 3

    def y(share: float) -> float:
        return round(top + height * min(-math.log10(max(share, 10.0**-decades)) / decades, 1.0), 1)

    for power in range(decades + 1):
        at = y(10.0**-power)
        parts.append(f'<path d="M{left} {at}h{width}" stroke="#ccc"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4}" text-anchor="end">{10.0**-power:g}</text>')
    for quarter in range(5):
        x = left + width * quarter / 4
        parts.append(f'<text x="{x}" y="{top + height + 20}" text-anchor="middle">{25 * quarter} %</text>')
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">of the full rank</text>'
    )
    for number, (kind, found) in enumerate(spectra.items()):
        colour = list(COLOURS.values())[number + 1]
        for name, dashes in (("plain", ' stroke-dasharray="4 4"'), ("whitened", "")):
            values = found[name]
            points = [
                f"{left + width * at / (len(values) - 1):.1f},{y(value)}" for at, value in enumerate(values)
            ]
            parts.append(
                f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>'
            )
        label = f"{kind} {found['shape'][0]}x{found['shape'][1]}"
        parts.append(
            f'<text x="{left + 12}" y="{top + height - 62 + 16 * number}" fill="{colour}">{label}</text>'
        )
    return parts


def _forms_panel(model: Mapping[str, Any]) -> list[str]:
    """Each form on a line, a point per budget; the worst stand at the border of the panel."""
    left, top, width, most = 560, 60, 300, 0.06
    dense, metric = model["variants"]["dense"][""]["value"], model["metric"]
    rows = {name: found for name, found in model["variants"].items() if name != "dense" and "0.7" in found}
    ordered = sorted(rows, key=lambda name: -rows[name]["0.7"]["value"])
    shades = {"0.8": "#9ecae1", "0.7": "#3182bd", "0.6": "#08306b"}
    parts = [
        f'<text x="{left - 100}" y="24" font-weight="bold">MiniLM-L6: {metric} lost, dense {dense:.3f}</text>'
    ]
    for number, (ratio, colour) in enumerate(shades.items()):
        x = left - 94 + 130 * number
        parts.append(
            f'<circle cx="{x}" cy="38" r="5" fill="{colour}"/><text x="{x + 10}" y="42">{ratio} stays</text>'
        )
    step = 280 / max(1, len(ordered))
    for tick in range(5):
        x = left + width * tick / 4
        parts.append(f'<path d="M{x} {top}v280" stroke="#ccc"/>')
        parts.append(f'<text x="{x}" y="{top + 300}" text-anchor="middle">{most * tick / 4:g}</text>')
    for number, name in enumerate(ordered):
        y = round(top + step * (number + 0.5), 1)
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{name}</text>')
        for ratio, colour in shades.items():
            found = rows[name].get(ratio)
            if found is not None:
                lost = min(max((dense - found["value"]) / most, -0.02), 1.03)
                parts.append(f'<circle cx="{left + width * lost:.1f}" cy="{y}" r="5" fill="{colour}"/>')
    return parts


PAGES = {
    "passes.md": passes_page,
    "operators.md": emit.operators_markdown,
    "pruning.md": pruning_page,
    "pruning.svg": pruning_plot,
    "factorisation.md": factorisation_page,
    "factorisation.svg": factorisation_plot,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(name)
