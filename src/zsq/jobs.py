"""Comparisons spread over processes of this machine or over a cluster, by submitit (extra `cluster`)."""

import importlib.util
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zsq.cells import Bench
from zsq.errors import InputError, ZsqError
from zsq.grid import Grid, read_lines
from zsq.recipes import Cell, cells, read_recipe
from zsq.training import Progress, Say, Silent

POLL_SECONDS = 2.0
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


def run_share(folder: Path, names: Sequence[str], root: Path | None, device: str, threads: int) -> None:
    """Run some cells of the comparison that a folder holds, as one job."""
    torch.set_num_threads(threads)
    recipe = read_recipe(folder / "recipe.toml")
    chosen = [cell for cell in cells(recipe) if cell.name in set(names)]
    bench = Bench(recipe, folder, root, torch.device(device), None, print)
    bench.load([cell for cell in chosen if not cell.reason])
    Grid(bench, print, read_lines(folder)).run(chosen)


def run_jobs(
    folder: Path,
    missing: Sequence[Cell],
    *,
    count: int,
    root: Path | None,
    device: torch.device,
    options: Mapping[str, Any],
    progress: Progress | None,
    say: Say,
) -> None:
    """Run cells in `count` jobs and wait for them: on a SLURM cluster where there is one, else in processes here.

    Args:
        folder: of the comparison; its `recipe.toml` is written. Logs go to `jobs/` in it.
        missing: the cells.
        count: jobs at a time.
        root: folder of the data.
        device: where each job computes.
        options: parameters of submitit's executor, such as `slurm_partition`.
        progress, say: of the caller.

    Raises:
        InputError: an option is not known to submitit.
        ZsqError: a job ended otherwise than by an expected fault; the text names its log.
    """
    import submitit

    executor = submitit.AutoExecutor(folder=folder / "jobs")
    here = executor.cluster in ("local", "debug")
    try:
        executor.update_parameters(**{"timeout_min": WEEK_MINUTES, "name": "zsq", **options})
    except (NameError, TypeError, ValueError) as error:
        raise InputError(f"--job-set: {str(error).splitlines()[0]}") from error
    shares = share_out(missing, count)
    threads = max(1, (os.cpu_count() or 1) // len(shares)) if here else torch.get_num_threads()
    say(f"{len(missing)} cells in {len(shares)} jobs on {executor.cluster}, logs in {folder / 'jobs'}")
    jobs = [
        executor.submit(run_share, folder.resolve(), [cell.name for cell in share], root, device.type, threads)
        for share in shares
    ]
    shown = progress or Silent()
    try:
        while not all(job.done() for job in jobs):
            lines = read_lines(folder)
            shown.update("compare", sum(cell.name in lines for cell in missing), len(missing), {})
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        for job in jobs:
            job.cancel()
        raise
    for job in jobs:
        fault = job.exception()
        if fault is not None:
            said = [line for line in (job.stderr() or str(fault)).splitlines() if line.strip()]
            last = said[-1].strip() if said else type(fault).__name__
            raise ZsqError(f"job {job.job_id} failed: {last[:200]} Log: {job.paths.stderr}; --resume continues.")
