"""What a runtime without integers for attention and norms computes faster when nothing inside is rounded."""

import math
from typing import Any

from torch.fx import GraphModule, Node

from zsq.graph.activations import clamp_limits
from zsq.graph.edit import aten, tensor_of
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

MASKED = -50.0
"""Scores below this, as masks of -100 make, have subnormal softmax values, which slow a product down by ten times;
rounded to 8 bits they are 0."""


def float_parts(network: GraphModule, moves: set[Node], layers: set[Node]) -> set[Node]:
    """Return the values that are best left in float: nothing in integers reads them or has to give them.

    They come from an operation of `FLOAT_OPERATORS`, from an elementwise one between such, or from a linear layer,
    which can give float, and go to such operations alone. Convolutions give integers only.

    Args:
        network: folded.
        moves: nodes that only move values.
        layers: convolutions and linear layers with a stored weight.
    """
    parts = {node for node in network.graph.nodes if node.target in FLOAT_OPERATORS}
    linear = {layer for layer in layers if layer.target is aten.linear.default}

    def source(node: Any) -> Node:
        return source(node.args[0]) if node in moves else node

    def readers(node: Node) -> set[Node]:
        found: set[Node] = set()
        for user in node.users:
            found |= readers(user) if user in moves else {user}
        return found

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


def _is_masked(network: GraphModule, scores: Node) -> bool:
    """Whether scores are masked by a number so low that their softmax has subnormal values."""
    added = [tensor_of(network, n) for n in scores.all_input_nodes] if scores.target is aten.add.Tensor else []
    return any(value is not None and -math.inf < float(value.min()) < MASKED for value in added)
