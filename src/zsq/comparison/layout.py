"""The folder of a comparison: which files and folders are its own, and where each cell's lie."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from zsq.comparison.recipe import Cell
from zsq.runs.pipeline import PREDICTIONS

FOLDERS = ("cells", "fits", "figures", "jobs")
LINES = "cells.jsonl"
TABLES = ("table.md", "table.csv", "table.tex", "figures.csv")
"""The document, the main table for programs and for LaTeX, and one row a group of seeds."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths below the folder of a comparison."""

    folder: Path

    @property
    def recipe(self) -> Path:
        """The recipe as it was last run: what makes a folder that of a comparison."""
        return self.folder / "recipe.toml"

    @property
    def lines(self) -> Path:
        """One JSON line for each cell that was run or skipped."""
        return self.folder / LINES

    @property
    def jobs(self) -> Path:
        """Folder of the logs of jobs."""
        return self.folder / "jobs"

    @property
    def document(self) -> Path:
        """All tables as Markdown."""
        return self.folder / "table.md"

    @property
    def table_csv(self) -> Path:
        """The main table for programs."""
        return self.folder / "table.csv"

    @property
    def table_latex(self) -> Path:
        """The main table for LaTeX."""
        return self.folder / "table.tex"

    @property
    def figures_csv(self) -> Path:
        """Plain numbers, one row a group of seeds."""
        return self.folder / "figures.csv"

    def cell(self, cell: Cell) -> Path:
        """Return the folder of a cell's files."""
        return self.folder / "cells" / cell.name

    def predictions(self, cell: Cell) -> Path:
        """Return the file of predicted and true classes that a quantized cell leaves."""
        return self.cell(cell) / PREDICTIONS

    def picture(self, cell: Cell) -> Path:
        """Return the file that a cell that draws samples leaves."""
        return self.folder / "figures" / f"{cell.fit_name.replace('/', '-')}.png"

    def result(self, cell: Cell) -> Path:
        """Return the file without which a cell does not count as finished."""
        return self.picture(cell) if cell.quantizer is None else self.predictions(cell)

    def fit(self, cell: Cell) -> Path:
        """Return the folder of the fit that a cell shares."""
        return self.folder / "fits" / cell.fit_name

    def discard(self) -> None:
        """Delete what a comparison writes; other files stay, and the recipe for the next one to replace."""
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in (LINES, *TABLES):
            (self.folder / name).unlink(missing_ok=True)
