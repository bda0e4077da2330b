"""The ten shapes, each as a signed distance: below 0 inside, above outside, in units of the shape's radius.

Distances are exact at the outline and near it, which is all that anti-aliasing needs. Star and heart follow Quilez,
2D distance functions (iquilezles.org/articles/distfunctions2d).
"""

from collections.abc import Callable

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _length(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    length: np.ndarray = np.sqrt(x * x + y * y)
    return length


def box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Distance from a rectangle around the origin; corners are sharp outside, too."""
    distance: np.ndarray = np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)
    return distance


def capsule(x: np.ndarray, y: np.ndarray, half_length: float, radius: float) -> np.ndarray:
    """Distance from a thick line along x with round ends."""
    return _length(np.maximum(np.abs(x) - half_length, 0.0), y) - radius


def circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from a disc."""
    return _length(x, y) - 0.9


def square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from a square."""
    return box(x, y, 0.78, 0.78)


def triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from an equilateral triangle that points up."""
    distance: np.ndarray = np.maximum(0.8660254037844386 * np.abs(x) - 0.5 * y, y) - 0.52
    return distance


def hexagon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from a regular hexagon."""
    distance: np.ndarray = np.maximum(0.8660254037844386 * np.abs(x) + 0.5 * np.abs(y), np.abs(y)) - 0.82
    return distance


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from a star with five points: two mirrors fold it to half of one point, which is one edge."""
    cosine, sine, outer, inner = 0.8090169943749475, 0.5877852522924731, 1.05, 0.45
    x, y = np.abs(x), -y
    for side in (1.0, -1.0):
        over = np.maximum(side * cosine * x - sine * y, 0.0) * 2.0
        x, y = x - over * side * cosine, y + over * sine
    x, y = np.abs(x), y - outer
    edge_x, edge_y = inner * sine, inner * cosine - outer
    along = np.clip((x * edge_x + y * edge_y) / (edge_x * edge_x + edge_y * edge_y), 0.0, 1.0)
    distance = _length(x - edge_x * along, y - edge_y * along)
    signed: np.ndarray = np.where(y * edge_x - x * edge_y > 0, distance, -distance)
    return signed


def cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from an upright cross with arms of equal length."""
    distance: np.ndarray = np.minimum(box(x, y, 0.95, 0.3), box(x, y, 0.3, 0.95))
    return distance


def ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from a ring."""
    distance: np.ndarray = np.abs(_length(x, y) - 0.7) - 0.22
    return distance


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from a heart that points down: a disc on each side above the diagonals, a corner below."""
    x, y = np.abs(x) / 1.6, (0.9 - y) / 1.6
    lobe = _length(x - 0.25, y - 0.75) - 0.3535533905932738
    middle = np.maximum(x + y, 0.0) * 0.5
    corner = np.minimum(_length(x, y - 1.0), _length(x - middle, y - middle))
    distance: np.ndarray = 1.6 * np.where(x + y > 1.0, lobe, np.where(x > y, corner, -corner))
    return distance


def arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from an arrow that points to the right: a shaft and a head."""
    head = np.maximum(0.7071067811865476 * (x - 0.98 + np.abs(y)), 0.15 - x)
    shaft = box(x + 0.35, y, 0.62, 0.24)
    distance: np.ndarray = np.minimum(head, shaft)
    return distance


def moon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance from a crescent: a disc without another."""
    distance: np.ndarray = np.maximum(_length(x, y) - 0.95, 0.78 - _length(x - 0.48, y))
    return distance


OUTLINES: dict[str, Distance] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "hexagon": hexagon,
    "star": star,
    "cross": cross,
    "ring": ring,
    "heart": heart,
    "arrow": arrow,
    "moon": moon,
}
"""Distance of each class, in the order of the labels: x to the right, y down, both [H, W], float64; a distance each."""
