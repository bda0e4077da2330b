"""The networks and data sets of a comparison: loaded once, and checked before the first cell runs."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from zsq.comparison.recipe import Cell, Figure, TeacherEntry, below
from zsq.comparison.sample_figure import class_names, shown_labels
from zsq.data.datasets import DataSet, open_dataset
from zsq.errors import InputError
from zsq.evaluation.accuracy import Evaluation, evaluate
from zsq.graph.fold import fold
from zsq.models.teacher import Teacher
from zsq.quantization.prepare import check_weight_names
from zsq.runs.settings import Settings


@dataclass(slots=True)
class Loaded:
    """A teacher and its images."""

    teacher: Teacher
    data: DataSet | None
    _results: Evaluation | None = field(default=None, init=False, repr=False)

    @property
    def images(self) -> DataSet:
        """Those on which accuracy is measured; a recipe that quantizes names them for each teacher."""
        assert self.data is not None
        return self.data

    def evaluated(self) -> Evaluation:
        """Return what the teacher recognises of its images, measured once for all of its cells."""
        if self._results is None:
            self._results = evaluate(self.teacher.network, self.images)
        return self._results


@dataclass(slots=True)
class Teachers:
    """Networks by the labels that the recipe gives them."""

    root: Path | None
    """Folder below which the recipe's relative paths lie, where they exist there."""
    device: torch.device
    """Where networks compute."""
    figure: Figure | None
    """Pictures of samples that the recipe asks for."""
    loaded: dict[str, Loaded] = field(default_factory=dict)

    def check(self, chosen: Iterable[Cell]) -> None:
        """Load teachers and open their images, so that what does not fit is known before the first cell runs.

        Cells that cannot be run are left out.

        Raises:
            InputError: a teacher, a data set, a name of a weight or a class of the figure does not fit.
        """
        opened = set()
        for cell in chosen:
            if cell.reason:
                continue
            teacher = self.of(cell).teacher
            if cell.quantizer is None:
                figure, names = self.figure_of(teacher)
                shown_labels(figure, names)
            elif cell.settings.quantizer.weight_bits:
                check_weight_names(fold(teacher.network)[0], cell.settings.quantizer.weight_bits)
            data = cell.settings.method.data_set
            if data and (cell.teacher.label, data) not in opened:
                opened.add((cell.teacher.label, data))
                open_dataset(below(self.root, data), teacher.spec)

    def of(self, cell: Cell) -> Loaded:
        """Return the teacher of a cell and its images."""
        label = cell.teacher.label
        if label not in self.loaded:
            self.loaded[label] = self._load(cell.teacher)
        return self.loaded[label]

    def _load(self, entry: TeacherEntry) -> Loaded:
        teacher = entry.load(self.root)
        if teacher.spec.outputs:
            given = ", ".join(f"{output.name} ({output.kind})" for output in teacher.spec.outputs)
            raise InputError(
                f"zsq compare counts classes of images; '{entry.title}' gives {given}. Quantize it with each method by "
                "zsq quantize, and measure the files with zsq evaluate."
            )
        data = None if entry.data is None else open_dataset(below(self.root, entry.data), teacher.spec)
        if data is not None and not data.labelled:
            raise InputError(f"data set '{data.name}' has no labels; a comparison measures accuracy, which needs them.")
        return Loaded(teacher.to(self.device) if self.device.type != "cpu" else teacher, data)

    def figure_of(self, teacher: Teacher) -> tuple[Figure, list[str]]:
        """Return the figure that the recipe asks for, and the names of the teacher's classes."""
        assert self.figure is not None
        return self.figure, class_names(self.figure, teacher.spec.classes, self.root)

    def located(self, settings: Settings) -> Settings:
        """Return settings with the files that a method reads as they lie on this machine."""
        return replace(settings, method=settings.method.with_paths(lambda path: below(self.root, path)))
