"""The losses of a run as Python and notebooks have them."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from zsq.reports.html import draw_loss
from zsq.training.checkpoints import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = list[tuple[int, float]]
"""Steps and values of one loss."""


class Losses(Mapping[str, dict[str, Points]]):
    """The losses of each phase, by name: `losses["fit"]["bns"]` is a list of (step, value). A notebook shows curves.

    Args:
        folder: of the run; without metrics there are no phases.

    Attributes:
        damaged: lines that cannot be read, and are left out.
    """

    def __init__(self, folder: Path) -> None:
        self._phases: dict[str, dict[str, Points]] = {}
        self.damaged = 0
        path = folder / METRICS
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
                phase, step = str(line.pop("phase")), int(line.pop("step"))
                values = {str(name): float(value) for name, value in line.items()}
            except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
                self.damaged += 1
                continue
            for name, value in values.items():
                self._phases.setdefault(phase, {}).setdefault(name, []).append((step, value))

    def __getitem__(self, phase: str) -> dict[str, Points]:
        return self._phases[phase]

    def __iter__(self) -> Iterator[str]:
        return iter(self._phases)

    def __len__(self) -> int:
        return len(self._phases)

    def __str__(self) -> str:
        lines = []
        for phase, terms in self.items():
            latest = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in terms.items())
            lines.append(f"{phase}: step {max(points[-1][0] for points in terms.values())}, {latest}")
        return "\n".join(lines) or "no losses"

    def figure(self) -> "Figure":
        """Return the curves as a matplotlib figure, one panel a loss and one row a phase."""
        from matplotlib.figure import Figure

        rows, columns = max(1, len(self)), max([1, *map(len, self.values())])
        figure = Figure(figsize=(2.8 * columns, 2.0 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
        for panel in panels.flat:
            panel.set_visible(False)
        for row, (phase, terms) in zip(panels, self.items(), strict=False):
            for panel, (name, points) in zip(row, terms.items(), strict=False):
                panel.set_visible(True)
                draw_loss(panel, *zip(*points, strict=True))
                panel.set_title(f"{phase}: {name}", fontsize=9, parse_math=False)
                panel.tick_params(labelsize=7)
        return figure

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.figure().savefig(file, format="png", dpi=110)
        return file.getvalue()
