"""A value times a constant, or plus one: steps that change nothing, and steps that together are a batch norm."""

import itertools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph import edit
from zsq.graph.edit import aten, tensor_of

SYMMETRIC = (aten.mul.Tensor, aten.add.Tensor)
STEPS = (*SYMMETRIC, aten.div.Tensor, aten.sub.Tensor)


def affine_step(network: GraphModule, node: Node) -> tuple[Node, Tensor, Tensor] | None:
    """Return x, factor and shift where a node computes ``x * factor + shift`` with a number or a stored tensor."""
    if node.target not in STEPS or node.kwargs:
        return None
    for x, other in (node.args[:2], *([node.args[1::-1]] if node.target in SYMMETRIC else [])):
        constant = tensor_of(network, other) if isinstance(other, Node) else _number(network, other)
        if constant is None or not isinstance(x, Node) or x.op == "get_attr":
            continue
        one, none = constant.new_ones(()), constant.new_zeros(())
        return {
            aten.mul.Tensor: (x, constant, none),
            aten.div.Tensor: (x, 1 / constant, none),
            aten.add.Tensor: (x, one, constant),
            aten.sub.Tensor: (x, one, -constant),
        }[node.target]
    return None


def _number(network: GraphModule, value: Any) -> Tensor:
    """Return a number as a tensor where the network's tensors are."""
    stored = itertools.chain(network.parameters(), network.buffers())
    return torch.tensor(float(value), device=next((tensor.device for tensor in stored), None))


def drop_idle(network: GraphModule) -> None:
    """Leave out factors of 1 and addends of 0, in place.

    A runtime leaves them out, too, and then the rounding between them and the next operation.
    """
    for node in list(network.graph.nodes):
        step = affine_step(network, node)
        if step is None or not bool((step[1] == 1).all() and (step[2] == 0).all()):
            continue
        before, after = step[0].meta["val"], node.meta["val"]
        if str(before.shape) == str(after.shape) and before.dtype == after.dtype:
            node.replace_all_uses_with(step[0])
            network.graph.erase_node(node)


def of_channels(constant: Tensor, dims: int, dim: int, channels: int) -> Tensor | None:
    """Return the constants of a value's channels, [C], where a constant has one for each, or one for all.

    Args:
        constant: stored, of any shape that broadcasts to the value's.
        dims: of the value.
        dim: where it has its channels.
        channels: C.
    """
    if constant.numel() == 1:
        return constant.flatten().expand(channels)
    shape = [1] * (dims - constant.dim()) + list(constant.shape)
    return constant.flatten() if shape[dim] == channels == constant.numel() else None


def name_affines(network: GraphModule, kept: Collection[Node]) -> None:
    """Turn steps with stored constants of channels into the batch norm that they are together, in place.

    Maps alone are meant, [N, C, ...] of three dimensions or more.

    Args:
        network: folded.
        kept: nodes that stay, and what they read.
    """
    done: set[Node] = set()
    for end in reversed(list(network.graph.nodes)):
        if end in done or end in kept or end.target not in STEPS or not _is_map(end):
            continue
        value = end.meta["val"]
        channels, stored = value.shape[1], False
        one = _number(network, 1).expand(channels)
        x, factor, shift = end, one, one - 1
        while (x is end or len(x.users) == 1) and (step := affine_step(network, x)) and step[0] not in kept:
            parts = [of_channels(part, value.dim(), 1, channels) for part in step[1:]]
            if parts[0] is None or parts[1] is None or str(step[0].meta["val"].shape) != str(value.shape):
                break
            done.add(x)
            stored |= any(read.op == "get_attr" for read in x.all_input_nodes)
            x, factor, shift = step[0], factor * parts[0], shift + factor * parts[1]
        if stored:
            _norm(network, end, x, factor, shift)


def _is_map(node: Node) -> bool:
    """Whether a value is [N, C, ...], with one to three dimensions behind and as many channels at each call."""
    shape = node.meta["val"].shape
    return len(shape) - 2 in edit.CONVOLUTION_OF and isinstance(shape[1], int)


def _norm(network: GraphModule, node: Node, x: Node, factor: Tensor, shift: Tensor) -> None:
    """Let a node be the batch norm with this factor and shift."""
    read = []
    roles = {"gamma": factor, "beta": shift, "mean": torch.zeros_like(factor), "var": torch.ones_like(factor)}
    for role, value in roles.items():
        edit.set_tensor(network, f"{node.name}_{role}", value)
        read.append(edit.read_attribute(network, f"{node.name}_{role}", node))
    node.target, node.args, node.kwargs = aten.batch_norm.default, (x, *read, False, 0.0, 0.0, False), {}
