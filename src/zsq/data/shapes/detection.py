"""Boxes and the three maps of the detector: what it is trained to give, how boxes are read, how they are judged.

Source: Zhou, Wang, Kraehenbuehl, Objects as Points (CenterNet), sections 3 and 4.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def maps(boxes: Floats, labels: np.ndarray, classes: int, cells: int, stride: int) -> tuple[Floats, Floats, Floats]:
    """Return what the detector shall give for one image.

    Args:
        boxes: left, top, right, bottom in pixels, [M, 4].
        labels: class of each, [M]; below 0 there is none.
        classes: of the heat map.
        cells: of a map, a side.
        stride: pixels of a cell, a side.

    Returns:
        heat [classes, cells, cells], 1 in the cell of a box's middle and less around it; size [2, cells, cells], width
        and height of the box in cells, and offset [2, cells, cells], x and y of its middle past its cell's corner in
        cells: both 0 but in the cells of middles.
    """
    heat = np.zeros((classes, cells, cells), np.float32)
    size, offset = np.zeros((2, cells, cells), np.float32), np.zeros((2, cells, cells), np.float32)
    rows, columns = np.mgrid[:cells, :cells]
    for (left, top, right, bottom), label in zip(boxes / stride, labels, strict=True):
        if label < 0:
            continue
        x, y = (left + right) / 2, (top + bottom) / 2
        column, row = min(int(x), cells - 1), min(int(y), cells - 1)
        spread = max(right - left, bottom - top) / 6
        near = np.exp(-((columns - column) ** 2 + (rows - row) ** 2) / (2 * spread * spread))
        heat[label] = np.maximum(heat[label], near)
        size[:, row, column] = right - left, bottom - top
        offset[:, row, column] = x - column, y - row
    return heat, size, offset


def decode(
    heat: Floats, size: Floats, offset: Floats, *, stride: int = 4, most: int = 16, least_score: float = 0.05
) -> list[np.ndarray]:
    """Read boxes from the detector's maps: the cells whose heat is the highest of their class within one cell.

    Of neighbours that are equally hot, as whole numbers often are, the first one counts.

    Args:
        heat: logits, [N, classes, cells, cells].
        size: width and height in cells, [N, 2, cells, cells].
        offset: x and y of the middle past the cell's corner in cells, [N, 2, cells, cells].
        stride: pixels of a cell, a side.
        most: boxes of an image, the surest first.
        least_score: of a box.

    Returns:
        For each image, float32 [M, 6]: left, top, right, bottom in pixels, score in [0, 1], class.
    """
    scores = 1.0 / (1.0 + np.exp(-heat.astype(np.float64)))
    padded = np.pad(scores, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = heat.shape[2:]
    around = [padded[:, :, row : row + height, column : column + width] for row in range(3) for column in range(3)]
    before, behind = np.max(around[:4], axis=0), np.max(around[5:], axis=0)
    scores = np.where((scores > before) & (scores >= behind), scores, 0.0)
    found = []
    for image in range(len(heat)):
        order = np.argsort(-scores[image], axis=None, kind="stable")[:most]
        label, row, column = np.unravel_index(order, scores.shape[1:])
        score = scores[image, label, row, column]
        x, y = (np.stack([column, row]) + offset[image][:, row, column]) * stride
        wide, high = np.maximum(size[image][:, row, column], 0.0) * stride
        boxes = np.stack([x - wide / 2, y - high / 2, x + wide / 2, y + high / 2, score, label], axis=1)
        found.append(boxes[score >= least_score].astype(np.float32))
    return found


def overlaps(box: Floats, others: Floats) -> Floats:
    """Return intersection over union of a box [4] with others [M, 4], [M]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.prod(np.maximum(sides, 0.0), axis=1)
    area = np.prod(box[2:] - box[:2]) + np.prod(others[:, 2:] - others[:, :2], axis=1)
    result: Floats = shared / np.maximum(area - shared, 1e-9)
    return result


def average_precision(found: list[np.ndarray], boxes: np.ndarray, labels: np.ndarray, least: float = 0.5) -> float:
    """Return the mean over classes of the area under the precision-recall curve.

    Args:
        found: what `decode` gives for N images.
        boxes, labels: what there is, [N, M, 4] and [N, M], labels below 0 for none.
        least: overlap from which a box is found.

    Source: Everingham et al., The PASCAL VOC challenge; the area under the curve made monotone, as since 2010.
    """
    values = []
    for label in np.unique(labels[labels >= 0]):
        hits: list[tuple[float, bool]] = []
        for rows, there in zip(found, (boxes[i][labels[i] == label] for i in range(len(labels))), strict=True):
            hits += _matches(rows[rows[:, 5] == label], there, least)
        hits.sort(key=lambda hit: -hit[0])
        right = np.cumsum([hit for _, hit in hits])
        if not len(right):
            values.append(0.0)
            continue
        precision = right / np.arange(1, len(right) + 1)
        envelope = np.maximum.accumulate(precision[::-1])[::-1]
        recall = right / (labels == label).sum()
        values.append(float(np.sum(np.diff(recall, prepend=0.0) * envelope)))
    return float(np.mean(values))


def _matches(rows: np.ndarray, there: np.ndarray, least: float) -> list[tuple[float, bool]]:
    """Return score and whether it is right of each box of one class in one image, each true box once."""
    free, hits = np.ones(len(there), bool), []
    for row in rows[np.argsort(-rows[:, 4], kind="stable")]:
        overlap = np.where(free, overlaps(row[:4], there), 0.0) if len(there) else np.zeros(1)
        best = int(np.argmax(overlap))
        right = bool(overlap[best] >= least)
        if right:
            free[best] = False
        hits.append((float(row[4]), right))
    return hits
