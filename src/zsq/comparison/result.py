"""What a comparison gave: its lines, and the statistics that follow from them."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from zsq.comparison.layout import Layout
from zsq.comparison.lines import CellLine
from zsq.comparison.recipe import Recipe, cells
from zsq.comparison.statistics import Outcomes


@dataclass(frozen=True)
class Comparison:
    """What a comparison gave."""

    layout: Layout
    recipe: Recipe
    lines: dict[str, CellLine]
    """The latest valid line of each cell, by the cell's name."""

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.layout.folder

    @cached_property
    def outcomes(self) -> Outcomes:
        """Means, intervals and verdicts."""
        return Outcomes(self.recipe, self.lines, self.layout)

    def failed(self, only: str = "*") -> list[CellLine]:
        """Return the lines of the cells with such names that could be run by their recipe, and failed."""
        possible = {cell.name for cell in cells(self.recipe) if not cell.reason and fnmatchcase(cell.name, only)}
        return [line for name, line in self.lines.items() if line.status == "skipped" and name in possible]

    def as_dict(self) -> dict[str, Any]:
        """Return folder, lines and claims as plain values."""
        return {
            "folder": str(self.folder),
            "cells": [line.as_dict() for line in self.lines.values()],
            "claims": [verdict.as_dict() for verdict in self.outcomes.verdicts()],
        }
