"""The command line's verb that runs a grid and writes its tables."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg

from zsq.cli.output import print_rows
from zsq.comparison.compare import compare, estimate
from zsq.comparison.estimate import Estimate
from zsq.comparison.tables import main_table
from zsq.errors import InputError, ZsqError
from zsq.models.options import option
from zsq.reports.text_tables import fitting
from zsq.runs.console import clock


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Run a grid of networks, methods, quantizers, widths and seeds, and write its table.

    Examples:
      zsq compare recipes/digits.toml --out runs/digits
      zsq compare recipes/digits.toml --out runs/digits --resume
      zsq compare recipes/digits.toml --dry-run --only '*/qat-4/*' --out runs/digits
      zsq compare recipes/table2_cores2.toml --data-root data --out runs/table2
      zsq compare recipes/table1a.toml --out runs/table1a --jobs 8
    """

    recipe: Annotated[Positional[Path], arg(metavar="FILE")]
    """TOML file of the comparison; docs/guides/comparing.md says what it holds."""
    out: Annotated[Path, option("DIR", required=True)]
    """Folder of cells.jsonl, table.md, table.csv, table.tex and the files of each cell."""
    only: Annotated[str, arg(metavar="GLOB")] = "*"
    """Run the cells whose names match, such as 'digits/zscgan/*'."""
    data_root: Annotated[Path | None, option("DIR")] = None
    """Folder below which the recipe's relative paths lie."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where to compute."""
    jobs: Annotated[int, arg(metavar="N")] = 1
    """Jobs at a time: on SLURM where there is one, else processes of this machine; needs zsq[cluster]."""
    job_set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """A parameter of the jobs, such as slurm_partition=gpu (submitit names them); may be repeated."""
    log: Annotated[Literal["csv", "tensorboard"] | None, option("csv|tensorboard")] = None
    """Write losses, learning rates and pictures of samples for another tool while cells run."""
    resume: bool = False
    """Continue the comparison that --out holds: run the cells that are missing, were skipped or have changed."""
    overwrite: bool = False
    """Discard the comparison that --out holds."""
    dry_run: bool = False
    """List the cells, and count cells, fits, time and disk; what is missing is told. Nothing is run."""
    json: bool = False
    """Print one JSON object: the lines of the cells, and the claims."""

    def run(self, console: Console) -> None:
        """Do it and print the table."""
        if self.dry_run:
            for line in _told(estimate(self.recipe, self.only, self.data_root, self.device)):
                console.print(line, soft_wrap=True)
            return
        done = compare(
            self.recipe,
            out=self.out,
            only=self.only,
            resume=self.resume,
            overwrite=self.overwrite,
            data_root=self.data_root,
            device=self.device,
            jobs=self.jobs,
            job_options=_job_options(self.job_set),
            log=self.log,
        )
        if self.json:
            print(json.dumps(done.as_dict()))
        else:
            if done.recipe.quantizers:
                console.print(fitting(main_table(done.outcomes), done.recipe.title, console.width))
            paths = {"all tables": done.layout.document, "folder": done.folder, "report": done.layout.report}
            print_rows(console, ((name, str(path)) for name, path in paths.items()))
        if failed := done.failed(self.only):
            raise ZsqError(
                f"{len(failed)} of {len(done.lines)} cells failed, such as {failed[0].cell}: "
                f"{failed[0].reason.rstrip('.')}. --resume tries them again."
            )


def _told(found: Estimate) -> Iterator[str]:
    """Yield the lines of a dry run."""
    for cell in found.cells:
        reason = cell.reason or found.lacking.get(cell.name, "")
        yield f"{cell.name}{': skipped: ' if reason else ''}{reason}"
    yield from found.reasons
    run = sum(not cell.reason and cell.name not in found.lacking for cell in found.cells)
    yield (
        f"{run} of {len(found.cells)} cells, {len(found.fits)} fits that they share, about {clock(found.seconds)} "
        f"and {found.bytes / 1e6:.1f} MB"
    )


def _job_options(assignments: tuple[str, ...]) -> dict[str, str | int]:
    options: dict[str, str | int] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--job-set takes KEY=VALUE, such as slurm_partition=gpu; got '{text}'.")
        options[key] = int(value) if value.isdecimal() else value
    return options
