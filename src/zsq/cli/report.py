"""The verb that makes a report again from the records."""

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from zsq.cli.output import print_rows
from zsq.comparison.layout import Layout
from zsq.comparison.report import write_comparison_report
from zsq.runs.report import write_report


@dataclass(frozen=True, kw_only=True)
class Report:
    """Make report.html of a run or a comparison again, from its records alone.

    Examples:
      zsq report runs/digits
      zsq report runs/comparison --open
    """

    folder: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder of a run, finished or not, or of a comparison."""
    open: bool = False
    """Show it in the browser."""

    def run(self, console: Console) -> None:
        """Do it and print the path."""
        write = write_comparison_report if Layout(self.folder).recipe.exists() else write_report
        path = write(self.folder)
        print_rows(console, [("report", str(path))])
        if self.open and not webbrowser.open(path.absolute().as_uri()):
            console.print("no browser could be opened here", soft_wrap=True)
