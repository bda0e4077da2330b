"""Parts of a network that compute in float64, bfloat16 or float16, cast to float32."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph.edit import argument, aten, get_attribute, set_tensor

OTHERS = (torch.float64, torch.bfloat16, torch.float16)
"""Types of real numbers that are cast."""

CASTS = (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default, aten.to.other)
"""Operators that change a value's type, and nothing else that matters on one device."""


def narrowest_type(network: GraphModule) -> torch.dtype | None:
    """Return the narrowest type but float32 in which real numbers are computed or stored; None where there is none."""
    found = {value.dtype for node in network.graph.nodes for value in _tensors(network, node)} & {*OTHERS}
    return max(found, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def cast_to_float32(network: GraphModule) -> None:
    """Let everything compute in float32, in place."""
    for node in list(network.graph.nodes):
        if node.op == "get_attr":
            stored = get_attribute(network, str(node.target))
            if stored.dtype in OTHERS:
                set_tensor(network, str(node.target), stored.detach().to(torch.float32))
        read = argument(node, 0) if node.target in CASTS else None
        if isinstance(read, Node) and _is_real(read) and _is_real(node):
            node.replace_all_uses_with(read)
            network.graph.erase_node(node)
            continue
        node.args = tuple(torch.float32 if value in OTHERS else value for value in node.args)
        node.kwargs = {k: torch.float32 if value in OTHERS else value for k, value in node.kwargs.items()}
        if isinstance(value := node.meta.get("val"), Tensor) and value.dtype in OTHERS:
            node.meta["val"] = value.to(torch.float32)
    network.recompile()


def _tensors(network: GraphModule, node: Node) -> list[Tensor]:
    """Return the tensors that a node gives, as far as they are known."""
    if node.op == "get_attr":
        return [get_attribute(network, str(node.target))]
    value = node.meta.get("val")
    return [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, Tensor)]


def _is_real(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
