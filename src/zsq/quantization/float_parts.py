"""What a runtime without integers for attention and norms computes faster when nothing inside is rounded."""

import math
from typing import Any

from torch.fx import GraphModule, Node

from zsq.graph.activations import clamp_limits
from zsq.graph.edit import argument, aten, layers, tensor_of
from zsq.graph.products import PRODUCTS

FLOAT_OPERATORS = {
    *PRODUCTS,
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.instance_norm.default,
    aten.rms_norm.default,
    aten.linalg_vector_norm.default,
    aten.exp.default,
    aten.tanh.default,
    aten.var.correction,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.reciprocal.default,
    aten.pow.Tensor_Scalar,
}
"""Operators that ONNX Runtime computes in float, or in integers later: its integer softmax took six times as long as
the float one, and products of two activations 1.1 times (docs/decisions/2026-11-30-float-attention.md)."""

ELEMENTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.mean.dim}
"""Operators that are computed in float between others that are."""

VOLUME = 5
"""Dimensions of the weight of a convolution of volumes."""

MASKED = -50.0
"""Scores below this, as masks of -100 make, have subnormal softmax values, which slow a product down by ten times;
rounded to 8 bits they are 0."""


def float_parts(network: GraphModule, moves: set[Node], every_layer: set[Node]) -> set[Node]:
    """Return the values that are best left in float: nothing in integers reads them or has to give them.

    They come from an operation of `FLOAT_OPERATORS`, from an elementwise one between such, or from a linear layer,
    which can give float, and go to such operations alone. Convolutions give integers only.

    Args:
        network: folded.
        moves: nodes that only move values.
        every_layer: convolutions and linear layers that are quantized.
    """
    parts = {node for node in network.graph.nodes if node.target in FLOAT_OPERATORS}
    linear = {layer for layer in every_layer if layer.target is aten.linear.default}

    def readers(node: Node) -> set[Node]:
        return _readers(node, moves)

    def source(node: Any) -> Node:
        return _source(node, moves)

    def belongs(node: Node) -> bool:
        if node.target not in ELEMENTWISE and clamp_limits(node) is None:
            return False
        sources = {source(n) for n in node.all_input_nodes if tensor_of(network, n) is None}
        return bool(sources) and sources <= parts | linear and readers(node) <= parts

    grown = True
    while grown:
        found = {node for node in network.graph.nodes if node not in parts and node not in moves and belongs(node)}
        grown, parts = bool(found), parts | found
    masked = {node for node in parts if node.target is aten.softmax.int and _is_masked(network, source(node.args[0]))}
    return {node for node in (parts | linear) - masked if readers(node) and readers(node) <= parts}


def float_volumes(network: GraphModule, moves: set[Node], least_channels: int) -> dict[Node, Node]:
    """Return the first convolutions of volumes while they have few channels, and what each reads: best left float.

    ONNX Runtime gathers a volume tap by tap, however few channels a tap has: integers took 6 to 14 times as long as
    float for one channel (3x3x3 to 16 or 64), 3 to 6 times for three or four, and 1 to 2 times for 8 to 16. What these
    read is not rounded then, since the runtime quantizes weights itself behind integers; so one behind integers stays.

    Args:
        network: folded.
        moves: nodes that only move values.
        least_channels: from which on they are quantized.
    """
    found: dict[Node, Node] = {}
    for layer in layers(network):
        weight, read = tensor_of(network, layer.args[1]), _source(layer.args[0], moves)
        few = weight is not None and weight.dim() == VOLUME and weight.shape[1] < least_channels
        alone = argument(layer, 6, 1) == 1 and _readers(read, moves) == {layer}
        if few and alone and (read.op == "placeholder" or _given_by(read) in found):
            found[layer] = read
    return found


def _given_by(node: Node) -> Node:
    """Return the layer in front of an activation that limits its values, or what there is instead."""
    before = node.args[0] if clamp_limits(node) is not None else node
    return before if isinstance(before, Node) and len(before.users) == 1 else node


def _source(node: Any, moves: set[Node]) -> Node:
    found: Node = node
    while found in moves:
        found = found.args[0]  # type: ignore[assignment]
    return found


def _readers(node: Node, moves: set[Node]) -> set[Node]:
    found: set[Node] = set()
    for user in node.users:
        found |= _readers(user, moves) if user in moves else {user}
    return found


def _is_masked(network: GraphModule, scores: Node) -> bool:
    """Whether scores are masked by a number so low that their softmax has subnormal values."""
    added = [tensor_of(network, n) for n in scores.all_input_nodes] if scores.target is aten.add.Tensor else []
    return any(value is not None and -math.inf < float(value.min()) < MASKED for value in added)
