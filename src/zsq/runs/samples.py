"""The samples that a run shows: `samples.png`, and beside it which classes they are of and what the network sees."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from zsq.errors import InputError
from zsq.methods.labels import class_logits, map_shape
from zsq.models.teacher import Teacher
from zsq.reports.pictures import GRID_COLUMNS, as_rows, grid_labels, images_in_rows, write_grid
from zsq.runtime.files import replacing
from zsq.types import SampleSource

SAMPLES, SAMPLES_SEEN = "samples.png", "samples.json"

SEEN_COLUMNS, SEEN_COLUMNS_LARGE = GRID_COLUMNS, 5
"""Images a row that the network is asked about: large ones take it long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleGrid:
    """What the places of `samples.png` are."""

    rows: int
    """Of the picture."""
    columns: int
    """Of the picture."""
    labels: tuple[int, ...] = ()
    """Class of each row; empty where images are of no class in particular."""
    seen: tuple[tuple[int | None, ...], ...] = ()
    """Class that the float network sees in each of a row's first images, None where there is no image; empty where it
    does not give one class an image."""
    names: dict[int, str] = field(default_factory=dict)
    """Names of the classes in both, where they are known."""

    def __post_init__(self) -> None:
        rows = [len(row) for row in self.seen]
        fits = self.rows > 0 and self.columns > 0 and len(self.labels) in (0, self.rows)
        if not fits or len(rows) not in (0, self.rows) or (rows and not 0 < min(rows) == max(rows)):
            raise ValueError("rows, labels and what is seen do not fit together")

    @classmethod
    def read(cls, folder: Path) -> "SampleGrid | None":
        """Read what lies in a run's folder; None where nothing does.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / SAMPLES_SEEN
        try:
            return _GRID.validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise InputError(f"{path} cannot be read; the classes of the samples are not shown.") from error


@torch.no_grad()
def keep_samples(source: SampleSource, teacher: Teacher, folder: Path) -> None:
    """Write `samples.png`, a row a class where images were asked for by class, and `samples.json`, what the float
    network sees in it.

    Args:
        source: of the images.
        teacher: the float network.
        folder: the run's.
    """
    spec = teacher.spec
    images, known = images_in_rows(source, spec)
    pictures = as_rows(images, known, spec)
    rows, columns = pictures.shape[:2]
    write_grid(pictures.numpy(), folder / SAMPLES)
    labels = tuple(grid_labels(spec.classes).tolist()) if source.asks_labels else ()
    seen: tuple[tuple[int | None, ...], ...] = ()
    if spec.classes and not map_shape(spec):
        asked = min(columns, SEEN_COLUMNS_LARGE if spec.is_large else SEEN_COLUMNS)
        shown = images.view(rows, columns, *images.shape[1:])[:, :asked].flatten(0, 1)
        answers = torch.cat([teacher.network(part).cpu() for part in shown.split(spec.images_at_once)])
        logits = class_logits(spec, answers)
        assert logits is not None
        there = known.view(rows, columns)[:, :asked].tolist()
        found = logits.argmax(1).view(rows, asked).tolist()
        seen = tuple(
            tuple(label if here else None for label, here in zip(*row, strict=True))
            for row in zip(found, there, strict=True)
        )
    named = {*labels, *(label for row in seen for label in row if label is not None)}
    names = (
        {label: teacher.class_names[label] for label in sorted(named)}
        if len(teacher.class_names) == spec.classes
        else {}
    )
    grid = SampleGrid(rows=rows, columns=columns, labels=labels, seen=seen, names=names)
    with replacing(folder / SAMPLES_SEEN) as temporary:
        temporary.write_text(json.dumps(asdict(grid)) + "\n", encoding="utf-8")


_GRID = TypeAdapter(SampleGrid)
