"""Turn a student into the integers that are stored: the converted graph that both files are written from."""

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph import edit
from zsq.graph.edit import argument, tensor_of
from zsq.graph.outputs import unpack_outputs
from zsq.quantization.fake_quantize import bias_integers, grid_integers, keep_bias, quantize_bias, saturated
from zsq.quantization.integer_ops import (
    GATE_LEVELS,
    GATES,
    HARD_REACH,
    LARGEST_FACTOR,
    factor_grid,
    grid_hardsigmoid,
    grid_hardswish,
    grid_norm,
    hardswish_steps,
)
from zsq.quantization.prepare import PADS, Student, is_float, moves_values, prepared_layers, weight_node
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer

_ops = torch.ops.quantized_decomposed


@torch.no_grad()
def convert(student: Student) -> GraphModule:
    """Return the student's graph with integers stored and explicit quantize and dequantize operators, on the CPU.

    It returns its outputs as they are: one tensor, or a tuple of them.

    Weights are int8 behind a dequantize operator, biases int32 at input scale x weight scale, activations pass through
    quantize and dequantize. An operator that only moves values gets the grid of its input again, which changes no value
    and lets a runtime keep it in integers.
    """
    network = edit.copy_network(student.network).cpu().eval()
    for layer in prepared_layers(network):
        _store_layer(network, layer)
    grids: dict[Node, ActivationQuantizer] = {}
    for node in list(network.graph.nodes):
        module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            rounded = _round_behind(network, node.args[0], module, [node])
            node.replace_all_uses_with(rounded)
            network.graph.erase_node(node)
            grids[rounded] = module
        elif node.target is grid_hardswish:
            _store_hardswish(network, node, grids[node.args[0]])
        elif node.target in GATES:
            _store_gate(network, node)
        elif node.target is grid_norm:
            _store_norm(network, node)
        elif moves_values(node) and node.args[0] in grids:
            grid = grids[node.args[0]]
            if _only_pads_layers(node):
                continue  # runtimes make such padding part of the layer
            if is_float(node):
                grids[_round_behind(network, node, grid, list(node.users))] = grid
            else:
                grids[node] = grid
    unpack_outputs(network)
    return edit.finish(network)


def _only_pads_layers(node: Node) -> bool:
    return node.target in PADS and all(user.target in edit.CONVOLUTIONS for user in node.users)


def _round_behind(network: GraphModule, node: Node, grid: ActivationQuantizer, readers: list[Node]) -> Node:
    """Insert quantize and dequantize behind a node, and let the readers read the result.

    `grid_hardsigmoid` is its layer, rounded on a grid six times as coarse and clipped; its bias holds the 3 already.
    """
    scale, zero = float(grid.scale), int(grid.zero_point.round())
    ends = (zero, grid.quant_min, grid.quant_max, torch.int8)
    gate = node.target is grid_hardsigmoid
    source, coarse = (node.args[0], scale * 2 * HARD_REACH) if gate else (node, scale)
    high = min(zero + round(1 / scale), grid.quant_max)
    with network.graph.inserting_after(node):
        rounded = network.graph.call_function(_ops.dequantize_per_tensor.default, (node, scale, *ends))
    with network.graph.inserting_before(rounded):
        integers = network.graph.call_function(_ops.quantize_per_tensor.default, (source, coarse, *ends))
        if gate and (zero, high) != (grid.quant_min, grid.quant_max):
            integers = network.graph.call_function(edit.aten.clamp.default, (integers, zero, high))
    rounded.replace_input_with(node, integers)
    rounded.meta["val"] = node.meta.get("val")
    for reader in readers:
        reader.replace_input_with(node, rounded)
    return rounded


def _store_hardswish(network: GraphModule, node: Node, grid: ActivationQuantizer) -> None:
    """Write `grid_hardswish` as the product of its input and of the same integers, clipped and read on a finer grid."""
    x, graph = node.args[0], network.graph
    assert isinstance(x, Node)
    three, six = (int(steps) for steps in hardswish_steps(grid.scale))
    zero = int(grid.zero_point.round()) - three
    low, high = max(zero, grid.quant_min), min(zero + six, grid.quant_max)
    with graph.inserting_before(node):
        clipped = graph.call_function(edit.aten.clamp.default, (x.args[0], low, high))
        gate_grid = (float(grid.scale) / 6, zero, grid.quant_min, grid.quant_max, torch.int8)
        gate = graph.call_function(_ops.dequantize_per_tensor.default, (clipped, *gate_grid))
        product = graph.call_function(edit.aten.mul.Tensor, (x, gate))
    product.meta.update(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _store_gate(network: GraphModule, node: Node) -> None:
    """Write a gated activation function as an 8-bit sigmoid of its input's integers, and their product."""
    x, graph, gate = node.args[0], network.graph, GATES[node.target]
    assert isinstance(x, Node)
    integers, scale, *ends = x.args
    assert isinstance(scale, float)
    low = -GATE_LEVELS // 2  # of int8
    grid = (1 / GATE_LEVELS, low, low, low + GATE_LEVELS, torch.int8)
    with graph.inserting_before(node):
        read = x
        if gate.slope != 1:
            read = graph.call_function(_ops.dequantize_per_tensor.default, (integers, scale * gate.slope, *ends))
        sigmoid = graph.call_function(edit.aten.sigmoid.default, (read,))
        rounded = graph.call_function(_ops.quantize_per_tensor.default, (sigmoid, *grid))
        if gate.margin:
            limits = (low + gate.margin, low + GATE_LEVELS - gate.margin)
            rounded = graph.call_function(edit.aten.clamp.default, (rounded, *limits))
        grid = (1 / gate.span, low + gate.margin, *grid[2:])
        opened = graph.call_function(_ops.dequantize_per_tensor.default, (rounded, *grid))
        product = graph.call_function(edit.aten.mul.Tensor, (x, opened))
    sigmoid.meta.update(node.meta)
    product.meta.update(node.meta)
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _store_norm(network: GraphModule, node: Node) -> None:
    """Write `grid_norm` as the convolution of one integer a channel that it stands for."""
    x, *read = node.args
    factor, shift, activation_scale = (_read(network, tensor) for tensor in read)
    integers, step = factor_grid(factor, shift, activation_scale)
    product = activation_scale * step
    name, bias_name = (str(tensor.target) for tensor in read[:2])  # type: ignore[union-attr]
    axes = node.meta["val"].dim() - 2
    edit.set_tensor(network, name, integers.to(torch.int8).view(-1, 1, *[1] * axes))
    edit.set_tensor(network, bias_name, bias_integers(shift, product).to(torch.int32))
    weight = _dequantize(network, node, name, step, -LARGEST_FACTOR, LARGEST_FACTOR, torch.int8)
    bias = _dequantize(network, node, bias_name, product, -(2**31), 2**31 - 1, torch.int32)
    node.target = edit.CONVOLUTION_OF[axes]
    node.args = (x, weight, bias, [1] * axes, [0] * axes, [1] * axes, len(integers))


def _store_layer(network: GraphModule, layer: Node) -> None:
    """Replace a layer's weight and bias by stored integers behind a dequantize operator."""
    called, stored = weight_node(layer)
    quantizer = network.get_submodule(str(called.target))
    assert isinstance(quantizer, WeightQuantizer)
    weight = edit.get_attribute(network, str(stored.target)).detach()
    bias = argument(layer, 2)
    scale = quantizer.scale.detach().clone()
    name = str(stored.target)
    if isinstance(bias, Node) and bias.target is quantize_bias:
        value, activation_scale = (_read(network, node) for node in bias.args[:2])
        product = activation_scale * scale
        integers = bias_integers(value, product)
        if any(user.target is grid_hardsigmoid for user in layer.users):
            integers = saturated(integers + bias_integers(torch.full_like(product, HARD_REACH), product))
        source = bias.args[0]
        assert isinstance(source, Node)
        edit.set_tensor(network, str(source.target), integers.to(torch.int32))
        bias = _dequantize(network, layer, str(source.target), product, -(2**31), 2**31 - 1, torch.int32)
    elif isinstance(bias, Node) and bias.target is keep_bias:
        bias = bias.args[0]
        assert isinstance(bias, Node)
        edit.set_tensor(network, str(bias.target), _read(network, bias))
    shape = (-1, *[1] * (weight.dim() - 1))
    integers = grid_integers(weight, scale.view(shape), scale.new_zeros(1), quantizer.quant_min, quantizer.quant_max)
    edit.set_tensor(network, name, integers.to(torch.int8).contiguous())
    weight_read = _dequantize(network, layer, name, scale, quantizer.quant_min, quantizer.quant_max, torch.int8)
    layer.args = (layer.args[0], weight_read, bias, *layer.args[3:])


def _dequantize(
    network: GraphModule, layer: Node, name: str, scale: Tensor, low: int, high: int, dtype: torch.dtype
) -> Node:
    """Read stored integers in front of a layer and dequantize them, per channel where `scale` has several values."""
    graph = network.graph
    with graph.inserting_before(layer):
        stored = graph.get_attr(name)
        if scale.numel() == 1:
            return graph.call_function(_ops.dequantize_per_tensor.default, (stored, float(scale), 0, low, high, dtype))
        edit.set_tensor(network, f"{name}_scale", scale)
        edit.set_tensor(network, f"{name}_zero_point", torch.zeros(len(scale), dtype=torch.int64))
        scales, zeros = graph.get_attr(f"{name}_scale"), graph.get_attr(f"{name}_zero_point")
        return graph.call_function(_ops.dequantize_per_channel.default, (stored, scales, zeros, 0, low, high, dtype))


def _read(network: GraphModule, node: object) -> Tensor:
    assert isinstance(node, Node)
    value = tensor_of(network, node)
    assert value is not None
    return value
