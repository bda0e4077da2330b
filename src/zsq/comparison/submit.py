"""Comparisons spread over processes of this machine or over a cluster, by submitit (extra `cluster`)."""

import contextlib
import importlib.util
import itertools
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zsq.comparison.grid import Grid
from zsq.comparison.layout import Layout
from zsq.comparison.lines import read_lines
from zsq.comparison.recipe import Cell, cells, read_recipe
from zsq.comparison.teachers import Teachers
from zsq.errors import InputError, ZsqError
from zsq.runs.console import lines_on
from zsq.runs.run_log import Kind
from zsq.runtime.observer import Silent

logger = logging.getLogger(__name__)

POLL_SECONDS = 2.0
SAFE_PATH = "PYTHONSAFEPATH"
WEEK_MINUTES = 7 * 24 * 60
"""Time that a job may take unless an option says otherwise."""


def available() -> bool:
    """Whether submitit is installed."""
    return importlib.util.find_spec("submitit") is not None


def share_out(grid: Sequence[Cell], count: int) -> list[list[Cell]]:
    """Divide cells into at most `count` lists; cells that share a fit stay together, the longest groups first."""
    groups = [list(group) for _, group in itertools.groupby(grid, key=lambda cell: cell.fit_name)]
    shares: list[list[Cell]] = [[] for _ in range(min(count, len(groups)))]
    for group in sorted(groups, key=len, reverse=True):
        min(shares, key=len).extend(group)
    return shares


def run_share(
    names: Sequence[str],
    folder: Path,
    root: Path | None,
    device: str,
    threads: int,
    log: Kind | None = None,
    gpu: str | None = None,
) -> None:
    """Run some cells of the comparison that a folder holds, as one job, which sees the GPU of that name only."""
    torch.set_num_threads(threads)
    if gpu is not None:  # submitit hides them from jobs on this machine
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    layout = Layout(folder)
    recipe = read_recipe(layout.recipe)
    wanted = set(names)
    chosen = [cell for cell in cells(recipe) if cell.name in wanted]
    teachers = Teachers(root, torch.device(device), recipe.figure)
    with lines_on(sys.stdout):
        teachers.check(chosen)
        Grid.open(recipe, layout, teachers, Silent(), log).run(chosen)


def visible_gpus() -> list[str]:
    """Return the names by which this process sees its GPUs, as CUDA_VISIBLE_DEVICES has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name.strip() for name in named.split(",") if name.strip()] or [
        str(number) for number in range(torch.cuda.device_count())
    ]


@contextlib.contextmanager
def _safe_path() -> Iterator[None]:
    """Let the Python of jobs import nothing from the current folder by itself."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        del os.environ[SAFE_PATH]
        if before is not None:
            os.environ[SAFE_PATH] = before


def last_words(fault: str, log: str | None) -> str:
    """Return the line that tells most of why a job failed: its fault's last, or its log's where it left none."""
    text = log or fault if "not produced any output" in fault else fault
    lines = [line.strip() for line in text.splitlines() if not line.startswith(("srun:", "slurmstepd:"))]
    return next((line for line in reversed(lines) if line), "")


def run_jobs(grid: Grid, missing: Sequence[Cell], *, count: int, options: Mapping[str, Any]) -> None:
    """Run cells in `count` jobs and wait for them: on a SLURM cluster where there is one, else in processes here.

    Args:
        grid: of the comparison, whose recipe is written to its folder. Logs go there, too.
        missing: the cells.
        count: jobs at a time.
        options: parameters of submitit's executor, such as `slurm_partition`.

    Raises:
        InputError: an option is not known to submitit.
        ZsqError: a job ended otherwise than by an expected fault; the text names its log.
    """
    import submitit

    layout, teachers = grid.layout, grid.teachers
    executor = submitit.AutoExecutor(folder=layout.jobs)
    here = executor.cluster in ("local", "debug")
    try:
        executor.update_parameters(**{"timeout_min": WEEK_MINUTES, "name": "zsq", **options})
    except (NameError, TypeError, ValueError) as error:
        raise InputError(f"--job-set: {str(error).splitlines()[0]}") from error
    shares = share_out(missing, count)
    threads = max(1, (os.cpu_count() or 1) // len(shares)) if here else torch.get_num_threads()
    logger.info(f"{len(missing)} cells in {len(shares)} jobs on {executor.cluster}, logs in {layout.jobs}")
    gpus = itertools.cycle(visible_gpus() if here and teachers.device.type == "cuda" else [None])
    place = (layout.folder.resolve(), teachers.root, teachers.device.type, threads, grid.log)
    with _safe_path():
        jobs = [
            executor.submit(run_share, [cell.name for cell in share], *place, gpu)
            for share, gpu in zip(shares, gpus, strict=False)
        ]
    try:
        while not all(job.done() for job in jobs):
            lines = read_lines(layout.lines)
            grid.observer.update("compare", sum(cell.name in lines for cell in missing), len(missing), {})
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel()
        raise
    for job in jobs:
        fault = job.exception()
        if fault is not None:
            last = last_words(str(fault), job.stderr()) or type(fault).__name__
            raise ZsqError(f"job {job.job_id} failed: {last[:200]} Log: {job.paths.stderr}; --resume continues.")
