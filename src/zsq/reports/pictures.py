"""Pictures of samples; nothing here runs a network but a generator."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from zsq.runtime.files import replacing
from zsq.types import Batch, ImageSpec

GRID_ROWS, GRID_COLUMNS = 10, 10
SMALLEST_TILE, LARGEST_TILE = 48, 112
"""Pixels a side of a tile: smaller images are enlarged by a whole factor, larger ones averaged over whole blocks."""

SHOWN_LINES, LINE_HEIGHT = 4, 28
"""Channels of a signal that are drawn, and the height of each in pixels."""

FINER = 4
"""Factor by which a line is drawn larger, to be smooth."""

SEARCHED = 2000
"""Images looked through for those of the wanted labels, where a source cannot be asked for a label."""


class _Sampler(Protocol):
    @property
    def asks_labels(self) -> bool: ...

    def sample(self, count: int, batch_size: int = 100) -> Iterator[Batch]: ...

    def sample_labels(self, labels: Tensor) -> Tensor | None: ...


def grid_labels(classes: int) -> Tensor:
    """Return the labels of a grid's rows: all of them up to ten, else ten spread evenly."""
    rows = min(classes, GRID_ROWS)
    return (torch.arange(rows) * classes) // rows


def rows_of_images(
    source: _Sampler, spec: ImageSpec, labels: Tensor | None = None, columns: int = GRID_COLUMNS
) -> Tensor:
    """Return pictures of images, uint8 [rows, columns, H, W, C], one row a label; places without one are black.

    Args:
        source: of the images; asked for labels where it can be.
        spec: what the images are.
        labels: of the rows, int64 [rows], each once; None takes those of `grid_labels`.
        columns: images a row.
    """
    return as_rows(*images_in_rows(source, spec, labels, columns), spec, columns)


def images_in_rows(
    source: _Sampler,
    spec: ImageSpec,
    labels: Tensor | None = None,
    columns: int = GRID_COLUMNS,
    searched: int = SEARCHED,
) -> tuple[Tensor, Tensor]:
    """Return a network's inputs [rows x columns, C, ...], one row a label, and which places have one, bool; arguments
    as of `rows_of_images`, and through how many images to look where a source cannot be asked for a label.

    Without labels, images that are of no class in particular come as they are drawn.
    """
    if labels is None and not (spec.classes and source.asks_labels):
        return _any_images(source, spec, columns)
    labels = grid_labels(spec.classes) if labels is None else labels
    asked = source.sample_labels(labels.repeat_interleave(columns))
    if asked is not None:
        return asked, torch.ones(len(asked), dtype=torch.bool)
    images = torch.zeros(len(labels) * columns, *spec.shape)
    known = torch.zeros(len(images), dtype=torch.bool)
    filled = [0] * len(labels)
    row_of = {int(label): row for row, label in enumerate(labels)}
    for batch in source.sample(searched, spec.images_at_once):
        images = images.to(batch.images.device)
        shown = batch.labels if batch.labels.dim() == 1 else batch.labels.flatten(1).mode(1).values
        for image, label in zip(batch.images, shown.tolist(), strict=True):
            row = row_of.get(label)
            if row is not None and filled[row] < columns:
                place = row * columns + filled[row]
                images[place], known[place] = image, True
                filled[row] += 1
        if min(filled) == columns:
            break
    return images, known


def _any_images(source: _Sampler, spec: ImageSpec, columns: int) -> tuple[Tensor, Tensor]:
    """Return inputs of a network without classes as they come, [rows x columns, C, ...], and that all are there."""
    shown = columns * columns // 2
    found = torch.cat([batch.images for batch in source.sample(shown, spec.images_at_once)])[:shown]
    images = found[: max(1, len(found) // columns) * columns]
    return images, torch.ones(len(images), dtype=torch.bool)


def as_rows(images: Tensor, known: Tensor, spec: ImageSpec, columns: int = GRID_COLUMNS) -> Tensor:
    """Return inputs [rows x columns, C, ...] as pictures, uint8 [rows, columns, H, W, C]; black where none is known."""
    pictures = torch.cat([as_pictures(part, spec) for part in images.cpu().split(spec.images_at_once)])
    pictures[~known] = 0
    return pictures.view(-1, min(columns, len(pictures)), *pictures.shape[1:])


def as_pictures(images: Tensor, spec: ImageSpec) -> Tensor:
    """Return network inputs [N, C, ...] as they are shown, uint8 [N, H, W, c]: images as they are, a line for each
    channel of a signal, and four slices of a volume's first channel."""
    if spec.is_image:
        return spec.to_pixels(images)
    draw = _plotted if spec.axes == 1 else _sliced
    return torch.from_numpy(np.stack([draw(image) for image in images.float().numpy()]))


def _plotted(signal: np.ndarray) -> np.ndarray:
    """Return the first channels of a signal [C, L], each over its own range, as lines: uint8 [H, W, 1]."""
    lines = signal[:SHOWN_LINES]
    height = max(SMALLEST_TILE, LINE_HEIGHT * len(lines))
    canvas = Image.new("L", (LARGEST_TILE * FINER, height * FINER), 255)
    draw, band = ImageDraw.Draw(canvas), height * FINER / len(lines)
    across = np.linspace(0, canvas.width - 1, signal.shape[1])
    for row, values in enumerate(lines):
        low, high = float(values.min()), float(values.max())
        share = (values - low) / max(high - low, 1e-12)
        down = (row + 0.95 - 0.9 * share) * band
        draw.line(list(zip(across.tolist(), down.tolist(), strict=True)), fill=0, width=FINER)
    small = canvas.resize((LARGEST_TILE, height), Image.Resampling.BOX)
    return np.asarray(small)[..., None]


def _sliced(volume: np.ndarray) -> np.ndarray:
    """Return four slices of a volume's [C, D, H, W] first channel, over its own range: uint8 [2H, 2W, 1]."""
    slices = volume[0][np.linspace(0, volume.shape[1] - 1, 6).round().astype(int)[1:5]]
    low, high = float(slices.min()), float(slices.max())
    grey = ((slices - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8)
    return np.block([[grey[0], grey[1]], [grey[2], grey[3]]])[..., None]


def as_grid(images: np.ndarray) -> np.ndarray:
    """Return uint8 [rows, columns, H, W, C] as one picture, [H', W', 3]; other than 3 channels show the first, grey."""
    if images.shape[-1] != 3:
        images = images[..., :1].repeat(3, axis=-1)
    block = min(-(-max(images.shape[2:4]) // LARGEST_TILE), *images.shape[2:4])
    if block > 1:
        rows, columns, height, width = (
            side // block if axis > 1 else side for axis, side in enumerate(images.shape[:4])
        )
        whole = images[:, :, : height * block, : width * block]
        images = whole.reshape(rows, columns, height, block, width, block, 3).mean((3, 5)).round().astype(np.uint8)
    factor = max(1, SMALLEST_TILE // min(images.shape[2:4]))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    images = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    rows, columns, height, width, channels = images.shape
    return images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)


def write_grid(images: np.ndarray, path: Path) -> None:
    """Write `as_grid` of images as a PNG."""
    write_picture(as_grid(images), path)


def write_picture(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, 3] as a PNG."""
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")
