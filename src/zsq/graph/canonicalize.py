"""Operations written in other ways, put under the names that quantizers and runtimes know them by."""

import operator
from typing import Any

from torch.fx import Graph, GraphModule, Node

from zsq.graph.activations import clamp_limits
from zsq.graph.edit import Caller, argument, aten, order_of

SIXTH = 1 / 6

RESHAPES = (aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)


def name_activations(graph: Graph) -> None:
    """Replace `relu6(x + 3) / 6` by `hardsigmoid(x)` and `x * relu6(x + 3) / 6` by `hardswish(x)`, in place.

    What is left over without a reader is for dead-code elimination.
    """
    for node in list(graph.nodes):
        found = _hard(node)
        if found is None:
            continue
        function, x = found
        with graph.inserting_before(node):
            named = graph.call_function(function, (x,))
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


MAX_POOLS: dict[Any, Any] = {
    aten.adaptive_max_pool1d.default: aten.max_pool1d.default,
    aten.adaptive_max_pool2d.default: aten.max_pool2d.default,
    aten.adaptive_max_pool3d.default: aten.max_pool3d.default,
}
"""Adaptive max pooling, and pooling by a kernel, of as many dimensions."""

EXTREMES: dict[Any, Any] = {aten.max.dim: aten.amax.default, aten.min.dim: aten.amin.default}
"""Extremes with their places, and alone."""


def name_extremes(graph: Graph) -> None:
    """Replace adaptive max pooling by pooling by a kernel, and extremes with their places by themselves, in place.

    Pooling to a size that does not divide the map stays, and so does what has a reader of its places.
    """
    for value in list(graph.nodes):
        node = value.args[0] if value.target is operator.getitem and value.args[1] == 0 else None
        if not isinstance(node, Node) or any(user.users for user in node.users if user is not value):
            continue
        x, *rest = node.args
        if node.target in EXTREMES:
            value.target, value.args = EXTREMES[node.target], (x, [rest[0]], *rest[1:])
        elif node.target in MAX_POOLS:
            sizes, wanted = x.meta["val"].shape[2:], value.meta["val"].shape[2:]  # type: ignore[union-attr]
            if not any(size % count for size, count in zip(sizes, wanted, strict=True)):
                kernel = [size // count for size, count in zip(sizes, wanted, strict=True)]
                value.target, value.args = MAX_POOLS[node.target], (x, kernel, kernel)


def name_token_norms(network: GraphModule) -> None:
    """Let a batch norm of tokens read [N, C, ...] where it reads them as rows, [N tokens, C], in place.

    Permutations that undo each other are left out then: a layer in front can take the norm.
    """
    for norm in network.graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        rows = norm.args[0]
        tokens = rows.args[0] if rows.target in RESHAPES else None
        if tokens is None or rows.meta["val"].dim() != 2 or not norm.users:
            continue
        shape = tokens.meta["val"].shape
        back = all(n.target in RESHAPES and str(n.meta["val"].shape) == str(shape) for n in norm.users)
        if len(shape) < 3 or not back or shape[-1] != rows.meta["val"].shape[1]:
            continue
        axes = len(shape) - 1
        readers, call = list(norm.users), Caller(network, norm)
        x = call.permuted(tokens, [0, axes, *range(1, axes)])
        norm.args, norm.meta["val"] = (x, *norm.args[1:]), x.meta["val"]
        for reader in readers:
            moved = Caller(network, reader).permuted(norm, [0, *range(2, axes + 1), 1])
            reader.replace_all_uses_with(moved)
            network.graph.erase_node(reader)
        if not rows.users:
            network.graph.erase_node(rows)


def drop_permutations(graph: Graph) -> None:
    """Leave out each pair of permutations that undo each other, in place."""
    for node in graph.nodes:
        second, first = order_of(node), order_of(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        if first is not None and second is not None and [first[dim] for dim in second] == sorted(first):
            node.replace_all_uses_with(node.args[0].args[0])


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
