"""What does not depend on the images, computed once: a standardised, pruned or sliced weight is a tensor like any."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph.edit import aten, get_attribute, set_tensor

MOST_GROWTH = 2**22
"""Values up to which a constant may be larger than the largest tensor that it is computed from."""

FILLS: dict[Any, int | None] = {
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_full.default: None,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
}
"""Operators that fill a tensor like another one, and with what; None: with their last argument."""


@torch.no_grad()
def fold_constants(network: GraphModule) -> None:
    """Compute what depends on stored tensors alone, and store it, in place.

    A stored tensor that comes out as it went in keeps its name. Another one is called after the first tensor that it is
    computed from, with `_computed` behind. Computed at every call are random draws, and what would take much more
    memory than its sources.

    Args:
        network: plain (see `zsq.graph.plain`), on the processor.
    """
    values: dict[Node, Any] = {}
    sources: dict[Node, list[Node]] = {}
    for node in network.graph.nodes:
        if node.op == "get_attr":
            values[node], sources[node] = get_attribute(network, str(node.target)), [node]
        elif (filled := _filled(node)) is not None:
            values[node], sources[node] = filled, []
        elif _is_constant(node, values):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            found = node.target(*args, **kwargs)
            read = list(dict.fromkeys(source for n in node.all_input_nodes for source in sources[n]))
            if not _grows(found, [values[source] for source in read]):
                values[node], sources[node] = found, read
    for node in list(values):
        if (
            node.op != "get_attr"
            and isinstance(values[node], Tensor)
            and not all(user in values for user in node.users)
        ):
            _store(network, node, values[node], sources[node])


def _filled(node: Node) -> Tensor | None:
    """Return what a node gives that reads but the type of a value, and fills a shape that no batch changes."""
    shape, fill = getattr(node.meta.get("val"), "shape", ()), FILLS.get(node.target)
    if node.target not in FILLS or not all(isinstance(size, int) for size in shape):
        return None
    value = fill if fill is not None else node.args[-1]
    return torch.full(shape, value, dtype=node.meta["val"].dtype) if isinstance(value, (int, float)) else None


def _is_constant(node: Node, values: dict[Node, Any]) -> bool:
    """Whether an operator reads nothing but constants, and gives the same at every call."""
    if node.op != "call_function" or not all(read in values for read in node.all_input_nodes):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def _grows(found: object, read: list[Any]) -> bool:
    sizes = [value.numel() for value in read if isinstance(value, Tensor)]
    return isinstance(found, Tensor) and found.numel() > max([MOST_GROWTH, *sizes])


def _store(network: GraphModule, node: Node, value: Tensor, read: list[Node]) -> None:
    """Let the readers of a constant read it from the network."""
    name = node.name
    for source in read[:1]:
        name, stored = f"{source.target}_computed", get_attribute(network, str(source.target))
        if stored.dtype == value.dtype and torch.equal(stored, value):
            node.replace_all_uses_with(source)
            return
    taken = {str(n.target) for n in network.graph.nodes if n.op == "get_attr"}
    name = name if name not in taken else f"{name}_{node.name}"
    set_tensor(network, name, value.detach().clone())
    with network.graph.inserting_before(node):
        read_back = network.graph.get_attr(name)
    read_back.meta.update(node.meta)
    node.replace_all_uses_with(read_back)
