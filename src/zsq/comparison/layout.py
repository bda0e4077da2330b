"""The folder of a comparison: which files and folders are its own, and where each cell's lie."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from zsq.comparison.recipe import Cell
from zsq.errors import ZIP_FAULTS, InputError
from zsq.reports.html import REPORT
from zsq.runs.stages import FLOAT, PREDICTIONS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    """How well networks do on each image of a cell's data set, [N] each, from 0 to 1, by measure."""

    file: dict[str, np.ndarray]
    """Those of the file."""
    floats: dict[str, np.ndarray]
    """Those of the float network; empty in older folders."""


def read_scores(path: Path) -> Scores:
    """Return how well a file and the float network do on each image; a zip's checksums vouch for it.

    Of a classifier it is `top-1`, whether the image was recognised.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with path.open("rb") as stream, np.load(stream) as arrays:  # np.load leaves a damaged file of its own open
            found = dict(arrays)
    except ZIP_FAULTS as error:
        raise InputError(f"{path} is damaged: {str(error) or type(error).__name__}.") from error
    shapes = [values.shape for values in found.values()]
    if len(set(shapes)) != 1 or len(shapes[0]) != 1:
        raise InputError(f"{path} is damaged: it holds arrays of {', '.join(str(list(shape)) for shape in shapes)}.")
    if {"predictions", "labels"} <= found.keys():
        named = {"file": found["predictions"], "floats": found.get("float_predictions")}
        return Scores(**{who: {} if v is None else {"top-1": v == found["labels"]} for who, v in named.items()})
    floats = {name.removeprefix(FLOAT): values for name, values in found.items() if name.startswith(FLOAT)}
    return Scores({name: values for name, values in found.items() if not name.startswith(FLOAT)}, floats)


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
        return self.folder / "cells.jsonl"

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

    @property
    def report(self) -> Path:
        """All of it as a page."""
        return self.folder / REPORT

    @property
    def cells(self) -> Path:
        """Folder of the folders of cells."""
        return self.folder / "cells"

    @property
    def fits(self) -> Path:
        """Folder of the folders of fits."""
        return self.folder / "fits"

    @property
    def pictures(self) -> Path:
        """Folder of the pictures of samples."""
        return self.folder / "figures"

    @property
    def jobs(self) -> Path:
        """Folder of the logs of jobs."""
        return self.folder / "jobs"

    def cell(self, cell: Cell) -> Path:
        """Return the folder of a cell's files."""
        return self.cells / cell.name

    def predictions(self, cell: Cell) -> Path:
        """Return the file of predicted and true classes, or of scores, that a quantized cell leaves."""
        return self.cell(cell) / PREDICTIONS

    def picture(self, cell: Cell) -> Path:
        """Return the file that a cell that draws samples leaves."""
        return self.pictures / f"{cell.fit_name.replace('/', '-')}.png"

    def result(self, cell: Cell) -> Path:
        """Return the file without which a cell does not count as finished."""
        return self.picture(cell) if cell.quantizer is None else self.predictions(cell)

    def is_whole(self, cell: Cell) -> bool:
        """Whether the file is there and, where it is no picture, can be read; warns where it is damaged."""
        path = self.result(cell)
        if cell.quantizer is None or not path.exists():
            return path.exists()
        try:
            read_scores(path)
        except InputError as error:
            logger.warning(f"{error} The cell is run again.")
            return False
        return True

    def fit(self, cell: Cell) -> Path:
        """Return the folder of the fit that a cell shares."""
        return self.fits / cell.fit_name

    def discard(self) -> None:
        """Delete what a comparison writes; other files stay, and the recipe for the next one to replace."""
        for folder in (self.cells, self.fits, self.pictures, self.jobs):
            shutil.rmtree(folder, ignore_errors=True)
        for path in (self.lines, self.document, self.table_csv, self.table_latex, self.figures_csv, self.report):
            path.unlink(missing_ok=True)
