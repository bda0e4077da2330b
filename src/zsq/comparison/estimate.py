"""What a comparison would take, found out before it starts: cells, fits that they share, time and disk."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zsq.comparison.recipe import Cell
from zsq.comparison.teachers import Teachers
from zsq.errors import ZsqError
from zsq.runs.budget import Costs, measured, rest_seconds
from zsq.training.loop import Run

logger = logging.getLogger(__name__)

MEASURING_SECONDS = 20.0
"""Budget for which a step is timed: one percent of it."""

PREDICTED = 8
"""Bytes of an image's predicted and true class."""


@dataclass(slots=True)
class Estimate:
    """What the cells of a comparison take."""

    cells: list[Cell]
    seconds: float = 0.0
    """All cells that can be run, each fit once, one after the other."""
    bytes: int = 0
    """Files of cells and fits, to a few percent."""
    fits: set[str] = field(default_factory=set)
    """Names of the fits that cells share."""
    lacking: dict[str, str] = field(default_factory=dict)
    """Why cells cannot be run, such as weights that are missing, by their names."""

    @property
    def reasons(self) -> list[str]:
        """Each reason once, with the number of its cells."""
        found = list(self.lacking.values())
        return [f"{found.count(reason)} cells lack something: {reason}" for reason in dict.fromkeys(found)]


def estimated(chosen: Sequence[Cell], teachers: Teachers, show: Callable[[int, int], None]) -> Estimate:
    """Return what cells take, of a few steps each; what is missing is noted, and the others go on.

    Args:
        chosen: the cells.
        teachers: their networks and images.
        show: is told how many cells of how many have been looked at.
    """
    result = Estimate(list(chosen))
    known: dict[tuple[str, str, str], Costs] = {}
    for index, cell in enumerate(chosen):
        if not cell.reason:
            try:
                _add(result, cell, teachers, known)
            except ZsqError as error:
                result.lacking[cell.name] = " ".join(str(error).split())
        show(index + 1, len(chosen))
    return result


def _add(result: Estimate, cell: Cell, teachers: Teachers, known: dict[tuple[str, str, str], Costs]) -> None:
    """Add what a cell takes, and its fit where it is the first that shares it."""
    teachers.check([cell])
    loaded, settings = teachers.of(cell), teachers.located(cell.settings)
    key = cell.teacher.label, cell.method.label, cell.quantizer.label if cell.quantizer else ""
    if key not in known:
        run = Run(seed=cell.seed, device=teachers.device)
        known[key] = measured(settings, loaded.teacher, run, MEASURING_SECONDS, fitted=False)
    costs = known[key]
    weights = sum(parameter.numel() for parameter in loaded.teacher.network.parameters())
    if cell.fit_name not in result.fits:
        result.fits.add(cell.fit_name)
        result.seconds += costs.fit_step * settings.method.steps
        result.bytes += costs.fitted_bytes
    if cell.quantizer is None:
        return
    images = loaded.images.num_images
    result.seconds += costs.distill_step * settings.distill_steps + rest_seconds(costs, settings, images)
    result.bytes += weights + PREDICTED * images
