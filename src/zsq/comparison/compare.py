"""Comparisons: run the cells of a grid that are missing, and write one line a cell and the tables."""

import fnmatch
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zsq.comparison.document import write_tables
from zsq.comparison.estimate import Estimate, estimated
from zsq.comparison.grid import Grid
from zsq.comparison.layout import Layout
from zsq.comparison.lines import read_lines
from zsq.comparison.recipe import Cell, Recipe, cells, read_recipe
from zsq.comparison.report import write_comparison_report
from zsq.comparison.result import Comparison
from zsq.comparison.submit import available, run_jobs
from zsq.comparison.teachers import Teachers
from zsq.errors import InputError
from zsq.graph.plain import forgetting_sources
from zsq.runs.console import shown
from zsq.runs.folder import claimed
from zsq.runs.run_log import Kind, require_log
from zsq.runtime.device import pick_device
from zsq.runtime.files import replacing
from zsq.runtime.observer import Observer

logger = logging.getLogger(__name__)


def list_cells(recipe: Recipe, only: str = "*") -> list[Cell]:
    """Return the cells whose names match a pattern such as `digits/*/qat-4/*`.

    Raises:
        InputError: none does.
    """
    grid = cells(recipe)
    chosen = [cell for cell in grid if fnmatch.fnmatchcase(cell.name, only)]
    if not chosen:
        raise InputError(f"--only '{only}' matches none of {len(grid)} cells, which have names such as {grid[0].name}.")
    return chosen


def estimate(
    recipe: str | Path, only: str = "*", data_root: str | Path | None = None, device: str = "auto"
) -> Estimate:
    """Return what the cells with such names take, of a few steps each, and which lack weights or images.

    Raises:
        InputError: the recipe itself does not fit.
    """
    read = read_recipe(Path(recipe))
    chosen, root = list_cells(read, only), None if data_root is None else Path(data_root)
    with shown(None, quiet=False) as observer:

        def show(done: int, total: int) -> None:
            observer.update("estimate", done, total, {})

        return estimated(chosen, Teachers(root, pick_device(device), read.figure), show)


def compare(
    recipe: str | Path,
    *,
    out: str | Path,
    only: str = "*",
    resume: bool = False,
    overwrite: bool = False,
    data_root: str | Path | None = None,
    device: str = "auto",
    jobs: int = 1,
    job_options: Mapping[str, Any] | None = None,
    log: Kind | None = None,
    observer: Observer | None = None,
    quiet: bool = False,
) -> Comparison:
    """Run the cells of a recipe that are missing, and write `cells.jsonl`, `table.md`, `.csv` and `.tex` to a folder.

    Args:
        recipe: TOML file (see docs/guides/comparing.md).
        out: folder of the comparison.
        only: pattern of the names of the cells to run.
        resume: continue the comparison that `out` holds: its finished cells stay unless the recipe changed them.
        overwrite: discard the comparison that `out` holds.
        data_root: folder below which the recipe's relative paths lie, where they exist there.
        device: cpu, cuda or auto.
        jobs: at a time, on a SLURM cluster where there is one, else processes of this machine; needs submitit (extra
            `cluster`), without which cells run in order. Cells that share a fit stay in one job.
        job_options: parameters of submitit's executor, such as `slurm_partition`.
        log: write losses, learning rates and pictures of samples of each fit and cell to its folder while it runs,
            `csv` or for `tensorboard`.
        observer, quiet: as for `zsq.quantize`.

    Raises:
        InputError: recipe, folder, teacher or data set does not fit; nothing has been run or changed then.
    """
    if jobs < 1:
        raise InputError(f"--jobs is {jobs}; it must be at least 1.")
    require_log(log)
    read = read_recipe(Path(recipe))
    chosen = list_cells(read, only)
    layout, root = Layout(Path(out)), None if data_root is None else Path(data_root)
    text = Path(recipe).read_bytes()
    _check_folder(layout, resume=resume, overwrite=overwrite)
    with shown(observer, quiet=quiet) as watching, forgetting_sources(), claimed(layout.folder):
        teachers = Teachers(root, pick_device(device), read.figure)
        teachers.check(chosen)
        teachers.check_claims(read.claims)
        if overwrite:
            layout.discard()
        with replacing(layout.recipe) as temporary:
            temporary.write_bytes(text)
        try:
            return _run(Grid.open(read, layout, teachers, watching, log), chosen, jobs, job_options or {})
        finally:
            write_comparison_report(layout.folder)


def _run(grid: Grid, chosen: list[Cell], jobs: int, options: Mapping[str, Any]) -> Comparison:
    """Run the cells that are missing, here or as jobs."""
    if jobs > 1 and not available():
        logger.info("submitit is not installed (pip install 'zsq[cluster]'): the cells run in order")
    if jobs > 1 and available() and (missing := grid.missing(chosen)):
        run_jobs(grid, missing, count=jobs, options=options)
        grid.lines = read_lines(grid.layout.lines)
        write_tables(grid.comparison())
    else:
        grid.run(chosen)
    return grid.comparison()


def _check_folder(layout: Layout, *, resume: bool, overwrite: bool) -> None:
    folder = layout.folder
    if resume and overwrite:
        raise InputError("--resume continues a comparison and --overwrite discards it; give one of them.")
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise InputError(f"{folder} is a file or lies below one; --out takes a folder.")
    if layout.recipe.exists() and not resume and not overwrite:
        raise InputError(f"{folder} holds another comparison; --resume continues it, --overwrite discards it.")
