"""What runs the cells of a comparison that are missing, one after the other, and keeps their lines."""

import itertools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from zsq.comparison.cell import CellRunner, Fit, computes_otherwise
from zsq.comparison.digests import digest
from zsq.comparison.document import write_tables
from zsq.comparison.layout import Layout
from zsq.comparison.lines import CellLine, Drawn, Quantized, Skipped, append_line, read_lines
from zsq.comparison.recipe import Cell, Recipe, cells
from zsq.comparison.result import Comparison
from zsq.comparison.teachers import Teachers
from zsq.errors import ZsqError
from zsq.runs.run_log import Kind
from zsq.runtime.observer import Observer

logger = logging.getLogger(__name__)


class _Clock:
    """Time left of cells, of which those that share a fit wait for it once."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.names = [cell.fit_name for cell in cells]
        self.begin = time.monotonic()
        self.fitting = 0.0

    def add(self, fit_seconds: float) -> None:
        """Take note of a cell that is done, and of what its fit took where it was the first to need it."""
        self.fitting += fit_seconds

    def left(self, done: int) -> float:
        """Return the seconds that the cells behind the first `done` take, as those did."""
        before, behind = set(self.names[:done]), set(self.names[done:])
        rest = max(0.0, time.monotonic() - self.begin - self.fitting) / done
        return self.fitting / len(before) * len(behind - before) + rest * (len(self.names) - done)


@dataclass(slots=True)
class Grid:
    """The cells of a comparison and what its folder says of them."""

    recipe: Recipe
    layout: Layout
    teachers: Teachers
    observer: Observer
    lines: dict[str, CellLine]
    """The latest line of each cell, by its name, whether or not it counts."""
    log: Kind | None
    """Form in which fits and cells write their losses for another tool."""

    @classmethod
    def open(
        cls, recipe: Recipe, layout: Layout, teachers: Teachers, observer: Observer, log: Kind | None = None
    ) -> "Grid":
        """Return the grid of a comparison's folder."""
        return cls(recipe, layout, teachers, observer, read_lines(layout.lines), log)

    def comparison(self) -> Comparison:
        """Return the lines that count: those of what the recipe asks for now."""
        found = {cell.name: line for cell in cells(self.recipe) if (line := self._valid(cell)) is not None}
        return Comparison(self.layout, self.recipe, found)

    def _valid(self, cell: Cell) -> CellLine | None:
        """Return a cell's line if it is of the settings that the recipe has now, and its result is there."""
        line = self.lines.get(cell.name)
        if line is None or line.digest != digest(cell):
            return None
        if isinstance(line.outcome, Skipped):
            return line
        loaded = self.teachers.loaded.get(cell.teacher.label)
        if loaded is not None and (
            loaded.teacher.weights_sha256 != line.outcome.weights_sha256
            or computes_otherwise(self.layout.cell(cell), loaded.teacher)
        ):
            return None
        return line if self.layout.is_whole(cell) else None

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell is finished, by the settings that the recipe has now, and its result is there."""
        line = self._valid(cell)
        return line is not None and line.status == "finished"

    def missing(self, chosen: Sequence[Cell]) -> list[Cell]:
        """Return the cells that are not done."""
        return [cell for cell in chosen if not self.is_done(cell)]

    def run(self, chosen: Sequence[Cell]) -> None:
        """Run the cells that are missing, and write the tables even if that is interrupted."""
        missing = self.missing(chosen)
        if len(missing) < len(chosen):
            logger.info(f"{len(chosen) - len(missing)} of {len(chosen)} cells are finished")
        runner = CellRunner(self.layout, self.teachers, self.observer, self.log)
        done, clock = 0, _Clock(missing)
        try:
            for _, sharing in itertools.groupby(missing, key=lambda cell: cell.fit_name):
                fit: Fit | ZsqError | None = None
                for cell in sharing:
                    left = f", about {clock.left(done):.0f} s left" if done else ""
                    logger.info(f"== cell {done + 1} of {len(missing)}: {cell.name}{left}")
                    first = fit is None and not cell.reason
                    fit = self._one(runner, cell, fit)
                    clock.add(fit.seconds if first and isinstance(fit, Fit) else 0.0)
                    done += 1
        finally:
            write_tables(self.comparison())

    def _one(self, runner: CellRunner, cell: Cell, fit: Fit | ZsqError | None) -> Fit | ZsqError | None:
        """Run or skip a cell; return the fit that the next ones share, or why there is none."""
        outcome: Quantized | Drawn | Skipped
        if cell.reason:
            outcome = Skipped(reason=cell.reason)
        else:
            try:
                fit = runner.fit(cell) if fit is None else fit
            except ZsqError as error:
                fit = error
            try:
                if isinstance(fit, ZsqError):
                    raise fit
                outcome = runner.run(cell, fit)
            except ZsqError as error:
                outcome = Skipped(reason=" ".join(str(error).split()))
        if isinstance(outcome, Skipped):
            logger.info(f"skipped {cell.name}: {outcome.reason}")
        line = CellLine.of(cell, outcome)
        append_line(self.layout.lines, line)
        self.lines[cell.name] = line
        return fit
