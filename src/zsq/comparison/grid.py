"""The cells of a comparison that are done, and what runs the missing ones one after the other."""

import itertools
import json
import logging
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from zsq.comparison.analysis import FINISHED, SKIPPED, Outcomes
from zsq.comparison.cell import Bench, Fit, digest
from zsq.comparison.recipe import Cell, Recipe, cells
from zsq.errors import ZsqError
from zsq.reports.text_tables import to_csv, to_latex
from zsq.runtime.files import replacing

logger = logging.getLogger(__name__)

LINES = "cells.jsonl"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a comparison gave."""

    folder: Path
    recipe: Recipe
    lines: dict[str, dict[str, Any]]
    """The latest valid line of each cell, by the cell's name."""

    @property
    def outcomes(self) -> Outcomes:
        """Tables, intervals and verdicts."""
        return Outcomes(self.recipe, self.lines, self.folder)

    def failed(self, only: str = "*") -> list[dict[str, Any]]:
        """Return the lines of the cells with such names that could be run by their recipe, and failed."""
        possible = {cell.name for cell in cells(self.recipe) if not cell.reason and fnmatchcase(cell.name, only)}
        return [line for name, line in self.lines.items() if line["status"] == SKIPPED and name in possible]

    def as_dict(self) -> dict[str, Any]:
        """Return lines, claims and table as plain values."""
        outcomes = self.outcomes
        claims = [
            {
                "claim": verdict.claim.label,
                **{"above": verdict.claim.above, "below": verdict.claim.below, "margin": verdict.claim.margin},
                **{"network": verdict.teacher.label, "bits": verdict.bits, "num_seeds": verdict.num_seeds},
                **{
                    "difference": verdict.difference.mean,
                    "interval": [verdict.difference.low, verdict.difference.high],
                },
                "verdict": verdict.word,
            }
            for verdict in outcomes.verdicts()
        ]
        return {"folder": str(self.folder), "cells": list(self.lines.values()), "claims": claims}


def read_lines(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the latest line of each cell; one that a kill cut short does not count."""
    path = folder / LINES
    found: dict[str, dict[str, Any]] = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            found[line["cell"]] = line
        except (ValueError, LookupError, TypeError):
            continue
    return found


@dataclass(slots=True)
class Grid:
    """Keeps the lines of the cells while the bench runs them."""

    bench: Bench
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def comparison(self) -> Comparison:
        """Return the lines that count: those of what the recipe asks for now."""
        valid = {}
        for cell in cells(self.bench.recipe):
            line = self.lines.get(cell.name)
            if (
                line is not None
                and line["digest"] == digest(cell)
                and (line["status"] == SKIPPED or self.is_done(cell))
            ):
                valid[cell.name] = line
        return Comparison(self.bench.folder, self.bench.recipe, valid)

    def is_done(self, cell: Cell) -> bool:
        """Whether the cell is finished, by the settings that the recipe has now, and its result is there."""
        line = self.lines.get(cell.name)
        if line is None or line["status"] != FINISHED or line["digest"] != digest(cell):
            return False
        loaded = self.bench.teachers.get(cell.teacher.label)
        if loaded is not None and loaded.teacher.weights_sha256 != line["weights_sha256"]:
            return False
        return self.bench.result(cell).exists()

    def missing(self, chosen: list[Cell]) -> list[Cell]:
        """Return the cells that are not done."""
        return [cell for cell in chosen if not self.is_done(cell)]

    def run(self, chosen: list[Cell]) -> None:
        """Run the cells that are missing, and write the tables even if that is interrupted."""
        missing = self.missing(chosen)
        if len(missing) < len(chosen):
            logger.info(f"{len(chosen) - len(missing)} of {len(chosen)} cells are finished")
        begin, done = time.monotonic(), 0
        try:
            for _, sharing in itertools.groupby(missing, key=lambda cell: cell.fit_name):
                fit: Fit | ZsqError | None = None
                for cell in sharing:
                    seconds = (time.monotonic() - begin) / max(done, 1) * (len(missing) - done)
                    left = f", about {seconds:.0f} s left" if done else ""
                    logger.info(f"== cell {done + 1} of {len(missing)}: {cell.name}{left}")
                    fit = self._one(cell, fit)
                    done += 1
        finally:
            write_tables(self.comparison())

    def _one(self, cell: Cell, fit: Fit | ZsqError | None) -> Fit | ZsqError | None:
        """Run or skip a cell; return the fit that the next ones share, or why there is none."""
        facts: dict[str, Any] = {}
        reason = cell.reason
        if not reason:
            try:
                fit = self.bench.fit(cell) if fit is None else fit
            except ZsqError as error:
                fit = error
            try:
                if isinstance(fit, ZsqError):
                    raise fit
                facts = self.bench.run(cell, fit)
            except ZsqError as error:
                reason = " ".join(str(error).split())
        if reason:
            logger.info(f"skipped {cell.name}: {reason}")
        self._write(cell, {"status": SKIPPED, "reason": reason} if reason else {"status": FINISHED, **facts})
        return fit

    def _write(self, cell: Cell, facts: dict[str, Any]) -> None:
        line = {
            "cell": cell.name,
            "teacher": cell.teacher.label,
            "method": cell.method.label,
            "quantizer": cell.quantizer.label if cell.quantizer else None,
            "bits": cell.bits or None,
            "seed": cell.seed,
            "digest": digest(cell),
            **facts,
        }
        path = self.bench.folder / LINES
        cut_short = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with open(path, "a") as file:
            file.write("\n" * cut_short + json.dumps(line) + "\n")
        self.lines[cell.name] = line


def write_tables(comparison: Comparison) -> None:
    """Write `table.md`, and where something is quantized `table.csv`, `table.tex` and `figures.csv`."""
    outcomes, folder = comparison.outcomes, comparison.folder
    texts = {"table.md": outcomes.document()}
    if comparison.recipe.quantizers:
        table = outcomes.table()
        texts |= {"table.csv": to_csv(table), "table.tex": to_latex(table, comparison.recipe.title)}
        texts |= {"figures.csv": to_csv(outcomes.figures())}
    for name, text in texts.items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text)
