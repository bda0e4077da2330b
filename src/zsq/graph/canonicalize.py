"""Operations written in other ways, put under the names that quantizers and runtimes know them by."""

from typing import Any

from torch.fx import Graph, Node

from zsq.graph.activations import clamp_limits
from zsq.graph.edit import argument, aten

SIXTH = 1 / 6


def name_activations(graph: Graph) -> None:
    """Replace `relu6(x + 3) / 6` by `hardsigmoid(x)` and `x * relu6(x + 3) / 6` by `hardswish(x)`, in place.

    What is left over without a reader is for dead-code elimination.
    """
    for node in list(graph.nodes):
        found = _hard(node)
        if found is None:
            continue
        operator, x = found
        with graph.inserting_before(node):
            named = graph.call_function(operator, (x,))
        named.meta.update(node.meta)
        node.replace_all_uses_with(named)


def name_global_pools(graph: Graph) -> None:
    """Replace average pooling by a kernel of the whole map's size by adaptive pooling to one value, in place.

    Runtimes have integers for both, and those of the second are quicker.
    """
    for node in graph.nodes:
        if node.target is not aten.avg_pool2d.default:
            continue
        x, kernel = node.args[:2]
        size = x.meta["val"].shape[2:] if isinstance(x, Node) else ()
        padding, divisor = argument(node, 3, [0]), argument(node, 6)
        if [*kernel] * (2 // len(kernel)) == [*size] and not any(padding) and divisor is None:
            node.target, node.args = aten.adaptive_avg_pool2d.default, (x, [1, 1])


def _hard(node: Node) -> tuple[Any, Node] | None:
    """Return the operator and argument that a node's expression stands for."""
    inner = _sixth(node)
    if inner is not None:
        x = _gate(inner)
        if x is not None:
            return aten.hardsigmoid.default, x
        for x, other in _factors(inner):
            if _gate(other) is x:
                return aten.hardswish.default, x
    for x, other in _factors(node):
        if other.target is aten.hardsigmoid.default and other.args[0] is x:
            return aten.hardswish.default, x
    return None


def _factors(node: object) -> list[tuple[Node, Node]]:
    """Return both orders of the factors of a product of two tensors."""
    if not isinstance(node, Node) or node.target is not aten.mul.Tensor:
        return []
    one, other = node.args[:2]
    return [(one, other), (other, one)] if isinstance(one, Node) and isinstance(other, Node) else []


def _sixth(node: Node) -> object:
    """Return what a node divides by six."""
    if node.target is aten.div.Tensor and node.args[1] == 6:
        return node.args[0]
    if node.target is aten.mul.Tensor and isinstance(node.args[1], float) and abs(node.args[1] - SIXTH) < 1e-6:
        return node.args[0]
    return None


def _gate(node: object) -> Node | None:
    """Return x where the node is x + 3, clipped to [0, 6]."""
    added = node.args[0] if isinstance(node, Node) and clamp_limits(node) == (0, 6) else None
    if isinstance(added, Node) and added.target is aten.add.Tensor and added.args[1] == 3 and not added.kwargs:
        x = added.args[0]
        return x if isinstance(x, Node) else None
    return None
