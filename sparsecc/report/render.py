"""From a run document to a page: Jinja2 with autoescape, inline styles and script under a content policy."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsecc.errors import MissingExtraError, UsageError
from sparsecc.report.page import view
from sparsecc.report.reading import parse_document
from sparsecc.report.schema import RunDocument
from sparsecc.report.svg import Html, breakable

__all__ = ["check_report", "render", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"


def render(document: RunDocument | Mapping[str, Any]) -> str:
    """Return the HTML page of a run; the same document gives the same bytes.

    Args:
        document: what ``optimize --json`` prints, or the same already read.

    Raises:
        UsageError: it is no run document, or a part of it is malformed.
        MissingExtraError: Jinja2 is not installed.
    """
    read = document if isinstance(document, RunDocument) else parse_document(document)
    jinja2 = _jinja2()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = breakable
    style, script = (Html((_TEMPLATES / name).read_text("utf-8")) for name in ("style.css", "sort.js"))
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    page = environment.get_template("page.html.j2")
    return str(page.render(**view(read), style=style, script=script, policy=policy))


def check_report(path: Path, inputs: Sequence[str | os.PathLike[str] | None] = ()) -> None:
    """Raise now what ``write_report`` would raise at the end of a long run.

    Raises:
        MissingExtraError: Jinja2 is not installed.
        UsageError: nothing can be written to ``path``, or it is one of ``inputs``.
    """
    from sparsecc.ir.outputs import check_output  # imports onnx, which help texts do without

    _jinja2()
    check_output(path, inputs)


def _jinja2() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("reports need Jinja2: pip install 'sparsecc[report]'") from error
    return jinja2


def write_report(document: RunDocument | Mapping[str, Any], path: Path) -> None:
    """Write the page of a run to ``path``, whole or not at all.

    Raises:
        UsageError: as for :func:`render`, or ``path`` is a folder or a device.
        MissingExtraError: as for :func:`render`.
        OSError: it cannot be written.
    """
    from sparsecc.ir.replacing import replacing  # imports onnx, which help texts do without

    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file and is not replaced; give a file name with -o")
    page = render(document).encode()
    with replacing(path) as stream:
        stream.write(page)


def _hash(text: str) -> str:
    """The source expression that allows exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
