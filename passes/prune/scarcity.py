"""Says where calibration data is too little for a fit."""

from __future__ import annotations

from sparsecc.ir import Site
from sparsecc.pm import MomentsLike, PassReport

__all__ = ["Scarcity"]


class Scarcity:
    """Sites that calibration gives fewer rows than they have inputs: a fit of weights can follow the rows alone."""

    def __init__(self) -> None:
        self._found: list[tuple[float, str, int, int]] = []

    def count(self, site: Site, moments: MomentsLike) -> None:
        """Remember ``site`` if its ``moments`` were taken over fewer rows than it has inputs."""
        inputs = site.shape[1]
        if moments.rows < inputs:
            self._found.append((moments.rows / inputs, site.name, moments.rows, inputs))

    def tell(self, report: PassReport) -> None:
        """Add a note about what was remembered, if anything was."""
        if self._found:
            _, name, rows, inputs = min(self._found)
            report.note(
                f"{len(self._found)} sites are fitted to fewer rows of calibration data than they have inputs "
                f"(as {name}: {rows} rows, {inputs} inputs), which may not hold on other data: give more samples"
            )
