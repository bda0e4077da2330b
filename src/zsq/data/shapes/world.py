"""The drawn world: images with classes, masks, boxes and identities, each a function of seed and index."""

from typing import NamedTuple

import numpy as np

from zsq.data.shapes.drawing import Figure, Pose, figure, ground, lit, paint, strokes
from zsq.data.shapes.outlines import OUTLINES
from zsq.data.shapes.stream import Stream

CLASSES = tuple(OUTLINES)
"""Names of the classes, in the order of their labels."""

TRAIN_SEED, TEST_SEED = 1, 2
"""Seeds of the images that the bundled networks were trained with, and of those that test them."""

MOST_SHAPES = 4
"""Shapes in an image of `scenes` at most."""

GRAIN = 0.015
"""Standard deviation of the sensor's noise at most, of pixels in [0, 1]."""

IMAGE, SCENE, IDENTITY, VIEW, PAIR = range(5)
"""Kinds of streams."""


class Scenes(NamedTuple):
    """Images with several shapes, and what is where."""

    images: np.ndarray
    """uint8 [N, size, size, 3]."""
    masks: np.ndarray
    """Class of each pixel, uint8 [N, size, size]: 0 is the ground, 1 + label a shape."""
    boxes: np.ndarray
    """Left, top, right and bottom edge of each shape's visible pixels, in pixels, float32 [N, MOST_SHAPES, 4]."""
    labels: np.ndarray
    """Class of each box, int64 [N, MOST_SHAPES]; -1 where there is none, after those that are there."""


class Pairs(NamedTuple):
    """Two images each, of one shape in two poses, or of two shapes."""

    first: np.ndarray
    """uint8 [N, size, size, 3]."""
    second: np.ndarray
    """uint8 [N, size, size, 3]."""
    same: np.ndarray
    """Whether class, colours and pattern are those of one shape, bool [N]."""


def labels(count: int, *, seed: int, start: int = 0) -> np.ndarray:
    """Return the classes of `images` without drawing them, int64 [count]."""
    drawn = [Stream(IMAGE, seed, index).below(len(CLASSES)) for index in range(start, start + count)]
    return np.array(drawn, dtype=np.int64)


def images(count: int, *, size: int = 32, seed: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return images of one shape each among strokes: uint8 [count, size, size, 3], and its class, int64 [count].

    Image number `start + i` of a seed is the same whatever else is drawn, on every machine.

    >>> pixels, classes = images(2, seed=7, start=5)
    >>> pixels.shape, [CLASSES[label] for label in classes], bool((pixels[1] == images(1, seed=7, start=6)[0]).all())
    ((2, 32, 32, 3), ['circle', 'cross'], True)
    """
    drawn = [_image(size, seed, index) for index in range(start, start + count)]
    pixels = np.stack([image for image, _ in drawn]) if drawn else np.zeros((0, size, size, 3), np.uint8)
    return pixels, np.array([label for _, label in drawn], dtype=np.int64)


def scenes(count: int, *, size: int = 64, seed: int, start: int = 0) -> Scenes:
    """Return images of one to four shapes that hardly overlap, with the class of each pixel and a box a shape."""
    drawn = [_scene(size, seed, index) for index in range(start, start + count)]
    pixels, masks, boxes, classes = (np.stack(part) for part in zip(*drawn, strict=True))
    return Scenes(pixels, masks, boxes, classes)


def views(count: int, number: int, *, size: int = 32, seed: int, start: int = 0) -> np.ndarray:
    """Return `number` views of each of `count` shapes, uint8 [count, number, size, size, 3]."""
    return np.stack(
        [
            np.stack([_view(_identity(seed, index), size, seed, index * 1000 + view) for view in range(number)])
            for index in range(start, start + count)
        ]
    )


def pairs(count: int, *, size: int = 32, seed: int, start: int = 0) -> Pairs:
    """Return pairs of images, half of them of one shape; of the others, half are of one class."""
    drawn = [_pair(size, seed, index) for index in range(start, start + count)]
    first, second, same = zip(*drawn, strict=True)
    return Pairs(np.stack(first), np.stack(second), np.array(same))


def _image(size: int, seed: int, index: int) -> tuple[np.ndarray, int]:
    draws = Stream(IMAGE, seed, index)
    label = draws.below(len(CLASSES))
    canvas, main = ground(draws, size)
    radius = draws.between(0.17, 0.4)
    room = max(0.5 - radius, 0.06)
    x, y = 0.5 + (draws.uniform(2) - 0.5) * 2.0 * room
    pose = Pose(float(x), float(y), radius, draws.between(0, 1))
    strokes(canvas, draws, draws.below(5), 0.2, None)
    paint(canvas, figure(draws, label, main, 0.12), pose)
    strokes(canvas, draws, draws.below(3), 0.25, (pose.x, pose.y))
    return lit(canvas, draws, GRAIN), label


def _scene(size: int, seed: int, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    draws = Stream(SCENE, seed, index)
    canvas, main = ground(draws, size)
    strokes(canvas, draws, draws.below(4), 0.12, None)
    mask, owner = np.zeros((size, size), dtype=np.uint8), np.full((size, size), -1)
    poses: list[Pose] = []
    found: list[int] = []
    wanted = 1 + draws.below(MOST_SHAPES)
    for _ in range(6 * wanted):
        pose = _free_pose(draws, poses)
        if pose is None:
            continue
        label = draws.below(len(CLASSES))
        inside = paint(canvas, figure(draws, label, main, 0.15), pose) > 0.5
        mask[inside], owner[inside] = 1 + label, len(poses)
        poses.append(pose)
        found.append(label)
        if len(poses) == wanted:
            break
    strokes(canvas, draws, draws.below(3), 0.1, None)
    boxes, classes = np.zeros((MOST_SHAPES, 4), np.float32), np.full(MOST_SHAPES, -1, dtype=np.int64)
    for number, label in enumerate(found):
        rows, columns = np.nonzero(owner == number)
        boxes[number] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        classes[number] = label
    return lit(canvas, draws, GRAIN), mask, boxes, classes


def _free_pose(draws: Stream, taken: list[Pose]) -> Pose | None:
    """Return a pose in the image that keeps most of every shape visible, or None if this draw does not."""
    radius, angle = draws.between(0.11, 0.25), draws.between(0, 1)
    x, y = radius + draws.uniform(2) * (1.0 - 2.0 * radius)
    for other in taken:
        room = 0.85 * (radius + other.radius)
        if (x - other.x) * (x - other.x) + (y - other.y) * (y - other.y) < room * room:
            return None
    return Pose(float(x), float(y), radius, angle)


def _identity(seed: int, index: int, label: int | None = None) -> Figure:
    draws = Stream(IDENTITY, seed, index)
    drawn = draws.below(len(CLASSES))
    return figure(draws, drawn if label is None else label, (0.5, 0.5, 0.5), 0.0)


def _view(who: Figure, size: int, seed: int, index: int) -> np.ndarray:
    draws = Stream(VIEW, seed, index)
    canvas, _ = ground(draws, size)
    radius = draws.between(0.24, 0.4)
    room = 0.5 - radius
    x, y = 0.5 + (draws.uniform(2) - 0.5) * 2.0 * room
    strokes(canvas, draws, draws.below(4), 0.2, None)
    paint(canvas, who, Pose(float(x), float(y), radius, draws.between(0, 1)))
    return lit(canvas, draws, 0.5 * GRAIN)


def _pair(size: int, seed: int, index: int) -> tuple[np.ndarray, np.ndarray, bool]:
    draws = Stream(PAIR, seed, index)
    same, alike = draws.chance(0.5), draws.chance(0.5)
    first = _identity(seed, 2 * index)
    second = first if same else _identity(seed, 2 * index + 1, first.label if alike else None)
    number = 2**40 + 2 * index  # apart from the numbers of `views`
    return _view(first, size, seed, number), _view(second, size, seed, number + 1), same
