"""Reports: the run document as one HTML page that needs nothing else.

``sparsecc.report.schema`` says what a document holds, ``sparsecc.report.measured`` and ``planned`` make parts of it.
"""

from __future__ import annotations

from sparsecc.report.reading import parse_document, read_document
from sparsecc.report.render import check_report, render, write_report
from sparsecc.report.schema import RunDocument

__all__ = ["RunDocument", "check_report", "parse_document", "read_document", "render", "write_report"]
