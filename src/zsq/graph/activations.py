"""Activation functions that limit a value: which operators they are, and between what they let it pass."""

import math
from typing import Any

from torch.fx import Node

from zsq.graph.edit import argument, aten

_WHERE_UNNAMED: dict[Any, tuple[float, float]] = {
    aten.relu.default: (0.0, math.inf),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: (-1.0, 1.0),
    aten.clamp.default: (-math.inf, math.inf),
    aten.clamp_min.default: (-math.inf, math.inf),
}
"""Operators that only limit a value, with the limits that hold where a call names none."""

_NAMES = (("min", "min_val"), ("max", "max_val"))
"""What the operators call their lower and upper limit; the first and the second argument behind the value."""


def clamp_limits(node: object) -> tuple[float, float] | None:
    """Return the least and the largest value that a node lets through where limiting is all that it does, else None.

    None is also returned for what takes limits from tensors (`clamp.Tensor`), and for operators that write in place,
    such as `relu_`: exported graphs keep one only where something else reads the memory that it writes to, so that it
    cannot be left out or left to another operation.
    """
    if not isinstance(node, Node) or node.target not in _WHERE_UNNAMED:
        return None
    found = list(_WHERE_UNNAMED[node.target])
    for index, names in enumerate(_NAMES):
        given = next((node.kwargs[name] for name in names if name in node.kwargs), argument(node, index + 1))
        if isinstance(given, Node):
            return None
        if given is not None:
            found[index] = float(given)  # type: ignore[arg-type]
    return found[0], found[1]
