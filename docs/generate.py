"""Write the documentation pages that are made from code: passes and operators. A test holds them up to date."""

from __future__ import annotations

import inspect
from pathlib import Path

from sparsecc import emit
from sparsecc.pm import get_pass, list_passes

DOCS = Path(__file__).resolve().parent


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


PAGES = {"passes.md": passes_page, "operators.md": emit.operators_markdown}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(name)
