"""The networks and data sets of a comparison: loaded once, and checked before the first cell runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from zsq.comparison.recipe import Cell, Claim, Figure, TeacherEntry, below
from zsq.comparison.sample_figure import class_names, shown_labels
from zsq.data.datasets import DataSet, open_dataset
from zsq.errors import InputError, unknown_name
from zsq.evaluation.accuracy import Evaluation, evaluate
from zsq.evaluation.measures import BY_IMAGE, Decoder, scores_of
from zsq.graph.fold import fold
from zsq.models.teacher import Teacher
from zsq.quantization.prepare import check_weight_names
from zsq.runs.boxes import tried_decoder
from zsq.runs.settings import Settings


@dataclass(slots=True)
class Loaded:
    """A teacher and its images."""

    teacher: Teacher
    data: DataSet | None
    decoder: Decoder | None
    """Reads boxes from the outputs, where the data say which there are."""
    measure: str
    """What is compared; empty where nothing is measured."""
    _results: Evaluation | None = field(default=None, init=False, repr=False)

    @property
    def images(self) -> DataSet:
        """Those on which accuracy is measured; a recipe that quantizes names them for each teacher."""
        assert self.data is not None
        return self.data

    def evaluated(self) -> Evaluation:
        """Return how good the teacher is on its images, measured once for all of its cells."""
        if self._results is None:
            network, outputs = self.teacher.network, self.teacher.spec.outputs
            against = network if outputs else None
            self._results = evaluate(network, self.images, teacher=against, outputs=outputs, decoder=self.decoder)
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
        if entry.data is None:
            data, decoder, measure = None, None, ""
        else:
            boxes = entry.decode is not None
            data = open_dataset(below(self.root, entry.data), teacher.spec, boxes=boxes)
            decoder = tried_decoder(below(self.root, entry.decode), teacher, data) if entry.decode else None
            measure = _measure(entry, teacher, data)
        return Loaded(teacher.to(self.device) if self.device.type != "cpu" else teacher, data, decoder, measure)

    def figure_of(self, teacher: Teacher) -> tuple[Figure, list[str]]:
        """Return the figure that the recipe asks for, and the names of the teacher's classes.

        Raises:
            InputError: the teacher does not name one class an image.
        """
        assert self.figure is not None
        if teacher.spec.outputs:
            raise InputError(
                f"[figure] shows images by their class, and '{teacher.name}' does not name one an image; each fit has "
                "its images in samples.png."
            )
        names = teacher.class_names if self.figure.names is None else ()
        return self.figure, list(names) or class_names(self.figure, teacher.spec.classes, self.root)

    def check_claims(self, claims: Sequence[Claim]) -> None:
        """Check that claims are about what can be compared image by image.

        Raises:
            InputError: the measure of a loaded teacher cannot be.
        """
        for label, loaded in self.loaded.items() if claims else ():
            if loaded.measure and loaded.measure not in BY_IMAGE:
                boxes = loaded.decoder is not None
                names = scores_of(loaded.teacher.spec.outputs, known=loaded.images.labelled, boxes=boxes)
                usable = " or ".join(f'"{name}"' for name in names if name in BY_IMAGE)
                raise InputError(
                    f"claims compare image by image, and {loaded.measure} of teacher '{label}' is one figure of all "
                    f"images; its measure = {usable} is one of each."
                )

    def located(self, settings: Settings) -> Settings:
        """Return settings with the files that a method reads as they lie on this machine."""
        return replace(settings, method=settings.method.with_paths(lambda path: below(self.root, path)))


def _measure(entry: TeacherEntry, teacher: Teacher, data: DataSet) -> str:
    """Return what is compared of a network's files.

    Raises:
        InputError: the images tell no such measure.
    """
    names = scores_of(teacher.spec.outputs, known=data.labelled, boxes=entry.decode is not None)
    if not names:
        raise InputError(f"data set '{data.name}' has no labels; a comparison measures accuracy, which needs them.")
    if entry.measure not in (None, *names):
        raise unknown_name(f"measure of teacher '{entry.label}' on {data.name}", str(entry.measure), names)
    return entry.measure or names[0]
