"""The command line's verb that runs a grid and writes its tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, UseAppendAction, arg

from zsq.comparison.compare import check, compare
from zsq.errors import InputError, ZsqError
from zsq.models.options import option


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
    resume: bool = False
    """Continue the comparison that --out holds: run the cells that are missing, were skipped or have changed."""
    overwrite: bool = False
    """Discard the comparison that --out holds."""
    dry_run: bool = False
    """Check networks and data, list the cells, and run none."""
    json: bool = False
    """Print one JSON object: the lines of the cells, and the claims."""

    def run(self, console: Console) -> None:
        """Do it and print the table."""
        if self.dry_run:
            for cell in check(self.recipe, self.only, self.data_root):
                console.print(f"{cell.name}{': skipped: ' if cell.reason else ''}{cell.reason}", soft_wrap=True)
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
        )
        if self.json:
            print(json.dumps(done.as_dict()))
        else:
            console.print(done.layout.document.read_text(), soft_wrap=True)
            console.print(f"{'folder:':24} {done.folder}", soft_wrap=True)
            console.print(f"{'report:':24} {done.layout.report}", soft_wrap=True)
        if failed := done.failed(self.only):
            raise ZsqError(
                f"{len(failed)} of {len(done.lines)} cells failed, such as {failed[0].cell}: "
                f"{failed[0].reason.rstrip('.')}. --resume tries them again."
            )


def _job_options(assignments: tuple[str, ...]) -> dict[str, str | int]:
    options: dict[str, str | int] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"--job-set takes KEY=VALUE, such as slurm_partition=gpu; got '{text}'.")
        options[key] = int(value) if value.isdecimal() else value
    return options
