"""Operators that runtimes compute in float alone, written by those that they have integers for."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph.activations import clamp_limits
from zsq.graph.edit import Caller, argument, aten, set_tensor, tensor_of

TRANSPOSED: dict[Any, Any] = {
    aten.conv_transpose1d.default: aten.conv1d.default,
    aten.conv_transpose2d.input: aten.conv2d.default,
    aten.conv_transpose3d.input: aten.conv3d.default,
}
"""Transposed convolutions, and the convolutions of as many dimensions."""


def lower(network: GraphModule) -> None:
    """Write transposed convolutions as convolutions, and attention as products of matrices, in place.

    The network computes the same. What has no such form stays.
    """
    for node in list(network.graph.nodes):
        if node.target in TRANSPOSED:
            _lower_transposed(network, node)
        elif node.target is aten.scaled_dot_product_attention.default:
            _lower_attention(network, node)
    network.recompile()


def _lower_attention(network: GraphModule, node: Node) -> None:
    """Write softmax(scale q k' + mask) v as such; causal masks, masks of truth values and grouped queries stay."""
    query, key, value, mask, _, causal = (argument(node, index) for index in range(6))
    values = [tensor.meta["val"] for tensor in (query, key, value)]
    dims = {tensor.dim() for tensor in values}
    is_float = mask is None or mask.meta["val"].is_floating_point()
    if causal or not is_float or node.kwargs.get("is_causal") or node.kwargs.get("enable_gqa") or len(dims) > 1:
        return
    scale = node.kwargs.get("scale")
    call = Caller(network, node)
    factor = 1 / math.sqrt(values[0].shape[-1]) if scale is None else scale
    scores = call(aten.matmul.default, call(aten.mul.Tensor, query, factor), call.transposed(key))
    if mask is not None:
        scores = call(aten.add.Tensor, scores, mask)
    attended = call(aten.matmul.default, call(aten.softmax.int, scores, -1), value)
    node.replace_all_uses_with(attended)
    network.graph.erase_node(node)


def phases(weight: Tensor, stride: list[int], dilation: list[int], groups: int) -> Tensor:
    """Return the filters of the convolution that gives all phases of a transposed one's output.

    With s = stride, output t + padding = s q + a is the sum over j of input q - j times weight a + s j: for each of the
    s phases a, a convolution with every s-th tap, reversed.

    Args:
        weight: [I, O / groups, taps, ...] of the transposed convolution.
        stride, dilation: one a dimension of space.
        groups: as there.

    Returns:
        [O s_1 s_2 ..., I / groups, J, ...], with J = ceil(taps / s); phases vary fastest.
    """
    inputs, outputs = weight.shape[0] // groups, weight.shape[1] * groups
    filters = weight.unflatten(0, (groups, inputs)).transpose(1, 2).reshape(outputs, inputs, *weight.shape[2:])
    for dim, (step, spacing) in enumerate(zip(stride, dilation, strict=True)):
        axis = filters.dim() - len(stride) + dim  # behind outputs, phases so far and inputs
        taps = (filters.shape[axis] - 1) * spacing + 1
        spread = filters.new_zeros([*filters.shape[:axis], math.ceil(taps / step) * step, *filters.shape[axis + 1 :]])
        spread.index_copy_(axis, torch.arange(0, taps, spacing, device=weight.device), filters)
        filters = spread.unflatten(axis, (-1, step)).flip(axis).movedim(axis + 1, dim + 1)
    found: Tensor = filters.flatten(0, len(stride)).contiguous()
    return found


def _lower_transposed(network: GraphModule, node: Node) -> None:
    """Write a transposed convolution as a convolution for each phase of its stride, whose outputs are interleaved."""
    x, read, bias = (argument(node, index) for index in range(3))
    weight = tensor_of(network, read)
    added = tensor_of(network, bias)
    if weight is None or (bias is not None and added is None):
        return
    space = weight.dim() - 2
    stride, padding, _, dilation = (_each(argument(node, i), space, d) for i, d in ((3, 1), (4, 0), (5, 0), (7, 1)))
    groups, call = argument(node, 6, 1), Caller(network, node)
    filters = phases(weight, stride, dilation, groups)
    outputs, count = weight.shape[1] * groups, math.prod(stride)
    sizes, wanted, taps = x.meta["val"].shape[2:], node.meta["val"].shape[2:], filters.shape[2:]
    extra = [
        max(-(p // s), 1 - j, -(-(p + t) // s) - (n + j - 1))
        for p, t, s, n, j in zip(padding, wanted, stride, sizes, taps, strict=True)
    ]
    name = str(read.target) if len(read.users) == 1 else f"{read.target}_{node.name}"
    set_tensor(network, name, filters)
    args: list[Any] = [x, call.read(name), None]
    if added is not None:
        args[2] = _repeated(call, bias, added, count)
    around = [j - 1 + e for j, e in zip(taps, extra, strict=True)]
    y = call(TRANSPOSED[node.target], *args, [1] * space, around, [1] * space, groups)
    moved = [node]
    while (reader := _elementwise_reader(moved[-1])) is not None:
        rest = [
            _repeated(call, n, v, count) if (v := tensor_of(network, n)) is not None else n for n in reader.args[1:]
        ]
        y = call(reader.target, y, *rest)
        moved.append(reader)
    y = call.unflattened(y, 1, [outputs, *stride]) if count > 1 else y
    if count > 1:
        y = call.permuted(y, [0, 1, *(dim for i in range(space) for dim in (2 + space + i, 2 + i))])
        for dim in range(2, 2 + space):
            y = call.flattened(y, dim, 2)
    for dim, (p, e, s, t) in enumerate(zip(padding, extra, stride, wanted, strict=True), 2):
        if p + s * e or y.meta["val"].shape[dim] != t:
            y = call(aten.slice.Tensor, y, dim, p + s * e, p + s * e + t)
    moved[-1].replace_all_uses_with(y)
    for done in reversed(moved):
        network.graph.erase_node(done)


def _elementwise_reader(node: Node) -> Node | None:
    """Return what alone reads a node, if it is a batch norm or limits values: it can be computed for each phase."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    if reader is None or reader.kwargs or not reader.args or reader.args[0] is not node:
        return None
    return reader if reader.target is aten.batch_norm.default or clamp_limits(reader) is not None else None


def _repeated(call: Caller, read: Any, value: Tensor, count: int) -> Node:
    """Store a value a channel, [C], for each of so many phases, [C count], and read it."""
    name = f"{read.target}_{call.node.name}_phases"
    set_tensor(call.network, name, value.repeat_interleave(count))
    return call.read(name)


def _each(value: Any, dims: int, default: int) -> list[int]:
    """Return an argument that may be one number or one a dimension as one a dimension."""
    values = list(value) if isinstance(value, (list, tuple)) else [default if value is None else value]
    return values * (dims // len(values))
