"""How an image of the drawn world is painted: ground, shapes, strokes and light, by numpy alone.

Every pixel is computed by additions, products, quotients, square roots and comparisons of float64, which IEEE 754
rounds the same on every machine; sums over arrays, sines of a library and a rasteriser would not be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from zsq.data.shapes.outlines import OUTLINES, capsule
from zsq.data.shapes.stream import Stream, wave

Colour = tuple[float, float, float]

DISTANCES = tuple(OUTLINES.values())


@dataclass(frozen=True, slots=True)
class Figure:
    """What makes a shape this one and no other: its identity, for embeddings."""

    label: int
    """Its class."""
    colours: tuple[Colour, Colour]
    """Of fill and pattern, red, green and blue in [0, 1]."""
    pattern: int
    """Plain, stripes, dots or rings, 0 to 3."""
    turns: float
    """Periods of the pattern over the radius."""
    phase: float
    """Where the pattern starts, in periods."""


@dataclass(frozen=True, slots=True)
class Pose:
    """Where and how a shape lies."""

    x: float
    """Of the middle, from 0, left, to 1."""
    y: float
    """Of the middle, from 0, top, to 1."""
    radius: float
    """As a share of the image's side."""
    angle: float
    """Clockwise, in turns."""


@cache
def _pixels(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of the middles of pixels, each [size, size], from 0 to 1."""
    middles = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(middles, middles)
    return x, y


@cache
def _lattice(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lattice point before each of `size` pixels, and how far past it the pixel lies, smoothed."""
    place = (np.arange(size) + 0.5) / size * cells
    point = place.astype(np.int64)
    past = place - point
    return point, past * past * (3.0 - 2.0 * past)


def _noise(draws: Stream, size: int, rough: float) -> np.ndarray:
    """Return noise in [0, 1], [size, size]: octaves of smoothed lattices, each `rough` times the one before."""
    total, weight, weights = np.zeros((size, size)), 1.0, 0.0
    for cells in (2, 4, 8, 16):
        values, (point, past) = draws.uniform(cells + 1, cells + 1), _lattice(size, cells)
        rows = values[point] * (1.0 - past[:, None]) + values[point + 1] * past[:, None]
        total = total + weight * (rows[:, point] * (1.0 - past) + rows[:, point + 1] * past)
        weights, weight = weights + weight, weight * rough
    return total / weights


def _mixed(colours: tuple[Colour, Colour], share: np.ndarray) -> np.ndarray:
    """Return [3, H, W] between two colours."""
    first, second = (np.array(colour)[:, None, None] for colour in colours)
    mixed: np.ndarray = first + (second - first) * share
    return mixed


def colour(draws: Stream, *, least: float = 0.15, saturation: float = 1.0) -> Colour:
    """Return a colour of random hue, of at least this brightness and at most this saturation."""
    hue, value = draws.between(0, 6), draws.between(least, 1.0)
    grey = 1.0 - draws.between(0.3, 1.0) * saturation
    red, green, blue = (
        value * (grey + (1.0 - grey) * min(max(abs((hue + shift) % 6.0 - 3.0) - 1.0, 0.0), 1.0)) for shift in (0, 4, 2)
    )
    return red, green, blue


def apart(first: Colour, second: Colour) -> float:
    """Return how far apart two colours are, from 0 to 1: the mean difference of their parts."""
    return (abs(first[0] - second[0]) + abs(first[1] - second[1]) + abs(first[2] - second[2])) / 3.0


def figure(draws: Stream, label: int, ground: Colour, contrast: float) -> Figure:
    """Return a shape of this class whose fill is at least `contrast` away from a ground's colour."""
    fill = colour(draws)
    for _ in range(8):
        if apart(fill, ground) >= contrast:
            break
        fill = colour(draws)
    share = draws.between(0.25, 0.8)
    other = colour(draws)
    mixed = (
        fill[0] + share * (other[0] - fill[0]),
        fill[1] + share * (other[1] - fill[1]),
        fill[2] + share * (other[2] - fill[2]),
    )
    return Figure(label, (fill, mixed), draws.below(4), draws.between(0.6, 2.2), draws.between(0, 1))


def ground(draws: Stream, size: int) -> tuple[np.ndarray, Colour]:
    """Return a textured ground, [3, size, size] in [0, 1], and its main colour."""
    main, other = colour(draws, saturation=0.7), colour(draws, saturation=0.7)
    share = draws.between(0.2, 0.7)
    x, y = _pixels(size)
    cosine, sine = wave(np.array([draws.between(0, 1)]) + np.array([0.25, 0.0]))
    across, noise, kind = x * cosine + y * sine, _noise(draws, size, draws.between(0.4, 0.8)), draws.below(4)
    periods, phase = draws.between(1.5, 7.0), draws.between(0, 1)
    if kind == 0:
        texture = noise
    elif kind == 1:
        texture = 0.5 + 0.5 * wave(across * periods + phase + 0.6 * noise)
    elif kind == 2:
        texture = np.clip(across * 0.7 + 0.5 * noise, 0.0, 1.0)
    else:
        along = y * cosine - x * sine
        texture = 0.5 + 0.5 * wave(across * periods + phase) * wave(along * periods + 0.3 * noise)
    return _mixed((main, other), texture * share), main


def paint(canvas: np.ndarray, what: Figure, pose: Pose) -> np.ndarray:
    """Paint a shape with its shadow onto a canvas [3, size, size], in place; return its cover in [0, 1], [size, size].

    A pixel is covered by half where its middle lies on the outline.
    """
    size = canvas.shape[-1]
    x, y = _pixels(size)
    cosine, sine = wave(np.array([pose.angle + 0.25, pose.angle]))
    across, down = (x - pose.x) / pose.radius, (y - pose.y) / pose.radius
    own_x, own_y = across * cosine + down * sine, down * cosine - across * sine
    scale = pose.radius * size
    distance = DISTANCES[what.label](own_x, own_y) * scale
    shadow = DISTANCES[what.label](own_x - 0.12 * (cosine + sine), own_y - 0.12 * (cosine - sine)) * scale
    canvas *= 1.0 - 0.35 * np.clip(0.5 - shadow / (0.08 * scale + 1.0), 0.0, 1.0)
    if what.pattern == 0:
        texture = 0.5 + 0.5 * own_x
    elif what.pattern == 1:
        texture = 0.5 + 0.5 * wave(own_x * what.turns + what.phase)
    elif what.pattern == 2:
        texture = 0.5 + 0.5 * wave(own_x * what.turns + what.phase) * wave(own_y * what.turns)
    else:
        texture = 0.5 + 0.5 * wave(np.sqrt(own_x * own_x + own_y * own_y) * what.turns + what.phase)
    cover: np.ndarray = np.clip(0.5 - distance, 0.0, 1.0)
    canvas += (_mixed(what.colours, texture) * (1.0 - 0.12 * (across + down)) - canvas) * cover
    return cover


def strokes(canvas: np.ndarray, draws: Stream, count: int, longest: float, middle: Sequence[float] | None) -> None:
    """Paint lines and dots that are no shape of any class onto a canvas [3, size, size], in place.

    Args:
        canvas: what is painted on.
        draws: random numbers.
        count: of the strokes.
        longest: half of the length of the longest, as a share of the image.
        middle: x and y which they are near to; None: anywhere.
    """
    size = canvas.shape[-1]
    x, y = _pixels(size)
    for _ in range(count):
        place = draws.uniform(2) if middle is None else np.array(middle) + (draws.uniform(2) - 0.5) * 0.5
        angle, length = draws.between(0, 1), draws.between(0.0, longest)
        cosine, sine = wave(np.array([angle + 0.25, angle]))
        across, down = x - place[0], y - place[1]
        thick = draws.between(0.012, 0.035)
        distance = capsule(across * cosine + down * sine, down * cosine - across * sine, length, thick) * size
        cover = np.clip(0.5 - distance, 0.0, 1.0) * draws.between(0.5, 1.0)
        canvas += (np.array(colour(draws))[:, None, None] - canvas) * cover


def lit(canvas: np.ndarray, draws: Stream, grain: float) -> np.ndarray:
    """Return a canvas [3, size, size] under a light from one side, with a sensor's noise, as uint8 [size, size, 3]."""
    size = canvas.shape[-1]
    x, y = _pixels(size)
    cosine, sine = wave(np.array([draws.between(0, 1)]) + np.array([0.25, 0.0]))
    strength = draws.between(0.0, 0.6)
    light = draws.between(0.75, 1.1) + strength * ((x - 0.5) * cosine + (y - 0.5) * sine)
    noisy = canvas * light + draws.bell(3, size, size) * (grain * draws.between(0.0, 1.0))
    levels: np.ndarray = np.floor(np.clip(noisy, 0.0, 1.0) * 255.0 + 0.5)
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(1, 2, 0))
