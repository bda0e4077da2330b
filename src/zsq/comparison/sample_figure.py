"""Pictures of a comparison: samples of chosen classes with the classes' names."""

import difflib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from zsq.comparison.recipe import Figure, below
from zsq.errors import InputError, unknown_name
from zsq.reports.pictures import grid_labels, rows_of_images
from zsq.runtime.files import replacing
from zsq.types import ImageSpec, SampleSource

TILE = 112
"""Pixels a side of the smallest tile: wide enough for most names."""

MARGIN, FONT_SIZE = 4, 12
NAMES_SHOWN = 5


def class_names(figure: Figure, classes: int, root: Path | None) -> list[str]:
    """Return the name of each class; its number where the recipe gives none.

    Raises:
        InputError: the file is missing, or does not hold one name a class.
    """
    names: Any = figure.names
    if names is None:
        return [str(label) for label in range(classes)]
    if isinstance(names, str):
        path = Path(below(root, names))
        try:
            names = json.loads(path.read_text())
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}.") from error
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(names, list | tuple) or len(names) != classes:
        count = len(names) if isinstance(names, list | tuple) else "no list of"
        raise InputError(f"figure.names holds {count} names; the teacher knows {classes} classes.")
    return [str(name) for name in names]


def shown_labels(figure: Figure, names: list[str]) -> list[int]:
    """Return the classes that a figure shows: those named, else up to ten spread evenly.

    Raises:
        InputError: a name or number is none of the classes.
    """
    found = []
    for wanted in figure.show:
        if isinstance(wanted, int):
            if not 0 <= wanted < len(names):
                raise InputError(f"figure.show has class {wanted}; the teacher knows 0..{len(names) - 1}.")
            found.append(wanted)
        elif wanted in names:
            found.append(names.index(wanted))
        else:
            near = difflib.get_close_matches(wanted, names, n=NAMES_SHOWN, cutoff=0.3)
            raise unknown_name("class of figure.show", wanted, near or names[:NAMES_SHOWN])
    return found or grid_labels(len(names)).tolist()


def save_figure(source: SampleSource, spec: ImageSpec, figure: Figure, names: list[str], path: Path) -> None:
    """Write a PNG: `figure.rows` samples of each shown class below its name, `figure.columns` classes a line."""
    labels = shown_labels(figure, names)
    images = rows_of_images(source, spec, torch.tensor(labels), figure.rows).numpy()
    if images.shape[-1] != 3:
        images = images[..., :1].repeat(3, axis=-1)
    write_figure(images, [names[label] for label in labels], figure.columns, path)


def write_figure(images: np.ndarray, captions: list[str], columns: int, path: Path) -> None:
    """Write uint8 [classes, rows, H, W, 3] with one caption a class, `columns` classes beside each other."""
    factor = max(1, -(-TILE // images.shape[3]))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    count, rows, height, width, _ = images.shape
    font = ImageFont.load_default(FONT_SIZE)
    caption = FONT_SIZE + 2 * MARGIN
    columns = min(columns, count)
    lines = -(-count // columns)
    step_x, step_y = width + MARGIN, caption + rows * (height + MARGIN)
    canvas = Image.new("RGB", (columns * step_x + MARGIN, lines * step_y + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for index in range(count):
        left, top = MARGIN + index % columns * step_x, index // columns * step_y
        text = captions[index]
        while draw.textlength(text, font=font) > width and len(text) > 1:
            text = text[:-2] + "…" if text.endswith("…") else text[:-1] + "…"
        draw.text((left, top + MARGIN), text, fill="black", font=font)
        for row in range(rows):
            canvas.paste(Image.fromarray(images[index, row]), (left, top + caption + row * (height + MARGIN)))
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG")
