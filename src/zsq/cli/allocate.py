"""The command line's verb that chooses a width for each weight."""

from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import OmitArgPrefixes, arg

from zsq.cli.output import prints_to_stderr
from zsq.reports.text_tables import table
from zsq.runs.allocate import Allocated, allocate_request
from zsq.runs.request import AllocateRequest
from zsq.runtime import distributed

SHOWN = 12
"""Points of the frontier that are printed."""


@dataclass(frozen=True, kw_only=True)
class Allocate:
    """Choose a width for each weight: the least sensitive ones that fit a size (ZeroQ's mixed precision).

    Writes bits.toml, which `zsq quantize --bits` takes, frontier.csv, and frontier.png with zsq[plots].

    Examples:
      zsq allocate digits --from runs/digits --average 4 --out mixed
      zsq allocate digits --widths 2,3,4,6,8 --size 16KB --budget 1m --out small
    """

    request: Annotated[AllocateRequest, arg(name=""), OmitArgPrefixes]

    def run(self, console: Console) -> None:
        """Do it and print the frontier, the chosen point marked."""
        with prints_to_stderr():
            result = allocate_request(self.request)
        if not distributed.is_main():
            return
        columns = ("", "bits a weight", "packed KB", "sensitivity, nats")
        console.print(table(f"frontier of {len(result.frontier)} allocations", columns, _rows(result)))
        for path in result.files:
            console.print(str(path), soft_wrap=True)


def _rows(result: Allocated) -> list[list[str]]:
    """Return points of the frontier spread over its sizes, and for comparison the same width for all weights."""
    frontier = result.frontier
    low, high = int(frontier.bits[0]), int(frontier.bits[-1])
    points = {frontier.within(low + (high - low) * step / (SHOWN - 1)) for step in range(SHOWN)}
    rows = [
        (int(frontier.bits[i]), float(frontier.sensitivity[i]), "-> chosen" if i == result.chosen else "")
        for i in points | {result.chosen}
    ]
    for width in next(iter(result.sensitivities.values())):
        cost = sum(costs[width] for costs in result.sensitivities.values())
        rows.append((width * frontier.num_weights, cost, f"all {width} bits"))
    return [
        [name, f"{bits / frontier.num_weights:.3f}", f"{bits / 8000:.1f}", f"{cost:.4g}"]
        for bits, cost, name in sorted(rows)
    ]
