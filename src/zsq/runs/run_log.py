"""The log of a run for another tool (`--log`), through the loggers of Lightning Fabric, while the run goes on."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from zsq.errors import MissingExtraError
from zsq.reports.pictures import as_grid, as_rows, images_in_rows, write_picture
from zsq.runs.losses import Losses
from zsq.runtime import distributed
from zsq.training.log import Log, NoLog
from zsq.types import ImageSpec, SampleSource

if TYPE_CHECKING:
    from lightning_fabric.loggers import CSVLogger, TensorBoardLogger

Kind = Literal["csv", "tensorboard"]

LOG = "log"
"""Folder in that of the run, with a folder for each phase."""

LOG_FILES = ("*/metrics.csv", "*/events.out.tfevents.*", "samples/*.png")
"""What lies in it."""

PICTURES = 10
"""Pictures of samples a phase."""

COLUMNS, SEARCHED = 5, 200
"""Samples of a class in a picture, and through how many to look where a source cannot be asked for a class."""


def open_log(kind: Kind | None, folder: Path, spec: ImageSpec) -> Log:
    """Return the log of a run, of which the first process alone writes one."""
    return RunLog(kind, folder, spec) if kind is not None and distributed.is_main() else NoLog()


def require_log(kind: Kind | None) -> None:
    """Return if the package is installed that writes such a log.

    Raises:
        MissingExtraError: it is not; the text says how to install it.
    """
    if kind == "tensorboard" and find_spec("tensorboard") is None:
        raise MissingExtraError(
            "log tensorboard is written by TensorBoard, which is not installed: pip install 'zsq[tensorboard]'"
        )


def clear_log(folder: Path) -> None:
    """Delete the log in a run's folder; other files stay."""
    for pattern in LOG_FILES:
        for path in (folder / LOG).glob(pattern):
            path.unlink(missing_ok=True)


class RunLog:
    """The rows of `metrics.jsonl` and pictures of samples, in the form of CSV files and PNGs, or of TensorBoard.

    Args:
        kind: of the files.
        folder: of the run, whose `metrics.jsonl` has the rows of steps that were taken before the run was resumed.
        spec: what samples are.
    """

    def __init__(self, kind: Kind, folder: Path, spec: ImageSpec) -> None:
        self.kind, self.folder, self.spec = kind, folder, spec
        self.logger: Any = None
        """Of the phase that runs."""

    def begin(self, phase: str, step: int, steps: int) -> None:
        """Open the log of a phase, which holds what was told of its first `step` steps and nothing of later ones."""
        self.phase, self.every = phase, -(-steps // PICTURES)
        self.next_picture = step + self.every - step % self.every
        begun = any((self.folder / LOG / phase).glob("events.out.tfevents.*"))
        self.logger = self._csv_logger() if self.kind == "csv" else self._tensorboard_logger(step)
        if self.kind == "csv" or not begun:
            for done, values in self._rows_before().items():
                self.logger.log_metrics(values, done)
            self.logger.save()

    def _csv_logger(self) -> "CSVLogger":
        from lightning_fabric.loggers import CSVLogger

        (self.folder / LOG / self.phase / "metrics.csv").unlink(missing_ok=True)
        return CSVLogger(self.folder / LOG, name="", version=self.phase)

    def _tensorboard_logger(self, step: int) -> "TensorBoardLogger":
        from lightning_fabric.loggers import TensorBoardLogger

        return TensorBoardLogger(self.folder / LOG, name="", version=self.phase, purge_step=step + 1)

    def _rows_before(self) -> dict[int, dict[str, float]]:
        """Return the rows of the phase in `metrics.jsonl` by step."""
        rows: dict[int, dict[str, float]] = {}
        for name, points in Losses(self.folder).get(self.phase, {}).items():
            for step, value in points:
                rows.setdefault(step, {})[name] = value
        return rows

    def add(self, step: int, values: dict[str, float]) -> None:
        """Write the losses and learning rates after `step` steps."""
        self.logger.log_metrics(values, step)
        self.logger.save()

    @torch.no_grad()
    def show(self, step: int, source: SampleSource) -> None:
        """Write a picture of samples, a row a class, after each tenth of the steps; the run is the same without it."""
        if step < self.next_picture:
            return
        self.next_picture = step + self.every - step % self.every
        images, known = images_in_rows(source, self.spec, columns=COLUMNS, searched=SEARCHED)
        picture = as_grid(as_rows(images, known, self.spec, COLUMNS).numpy())
        if self.kind == "csv":
            place = self.folder / LOG / "samples"
            place.mkdir(exist_ok=True)
            write_picture(picture, place / f"{self.phase}-{step:06}.png")
        else:
            self.logger.experiment.add_image("samples", picture, step, dataformats="HWC")

    def end(self) -> None:
        """Close the log of the phase."""
        self.logger.finalize("")
