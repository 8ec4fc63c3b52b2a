"""``python -m sparsecc``."""

from __future__ import annotations

from sparsecc.cli.main import main

main()
