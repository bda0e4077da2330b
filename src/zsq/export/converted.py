"""What is written: the converted network, and its step before either file.

A *converted* network is a ``torch.fx.GraphModule`` of ATen operations whose activations pass through
``quantized_decomposed.quantize_per_tensor`` and ``dequantize_per_tensor`` and whose weights (int8) and biases (int32)
are buffers behind ``dequantize_per_channel`` or ``dequantize_per_tensor``.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx

from zsq.errors import ExportError
from zsq.graph.activations import clamp_limits
from zsq.graph.edit import aten
from zsq.graph.outputs import leaves, pack
from zsq.graph.plain import forgetting_examples
from zsq.types import ImageSpec, Output

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default

TO_ROWS = (aten.squeeze.dim, aten.squeeze.dims, aten.reshape.default, aten.view.default, aten.flatten.using_ints)
"""What may stand behind the last dequantization: an output of one number an image loses its axis there."""


def output_step(converted: fx.GraphModule, outputs: Sequence[Output] = ()) -> float | Tensor:
    """Return the quantization step of what the network gives: the scale of the dequantization that it ends in.

    Several outputs have one each: then that of each value is returned, [K], as they are packed.

    Raises:
        ExportError: an output is not that of a per-tensor dequantization, perhaps moved.
    """
    steps = []
    for result in converted_results(converted.graph):
        node = result
        while node.target in TO_ROWS:
            node = node.all_input_nodes[0]
        if node.target != DEQUANTIZE:
            raise ExportError(f"the converted graph ends in '{node.target}'; its outputs must be quantized to 8 bits.")
        steps.append(float(node.args[1]))  # type: ignore[arg-type]
    if len(steps) == 1:
        return steps[0]
    return torch.cat([torch.full((output.size,), step) for step, output in zip(steps, outputs, strict=True)])


def converted_results(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes whose values a converted network gives, in order."""
    found = graph.output_node().args[0]
    return [node for node in (found if isinstance(found, tuple | list) else [found]) if isinstance(node, fx.Node)]


def packed(converted: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """Return a converted network that gives all its outputs in one row an image, [N, K]."""
    return lambda images: pack(*leaves(converted(images)))


def detached_copy(converted: fx.GraphModule) -> fx.GraphModule:
    """Return a copy on the processor whose nodes carry no metadata, hence no stack trace or path."""
    with warnings.catch_warnings():  # a program that was read from its file says something of torch to itself
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        network = copy.deepcopy(converted).cpu()
    network.meta.clear()
    for node in network.graph.nodes:
        node.meta = {}
    return network


def drop_implied_clamps(graph: fx.Graph) -> None:
    """Remove each ReLU or clamp whose limits the quantizations behind it impose anyway, so that kernels fuse."""
    for node in list(graph.nodes):
        limits = clamp_limits(node)
        if limits is None or not all(user.target == QUANTIZE for user in node.users):
            continue
        low, high = limits
        for user in node.users:
            _, scale, zero_point, quant_min, quant_max, _ = user.args
            if np.rint(low / scale) + zero_point > quant_min or np.rint(high / scale) + zero_point < quant_max:
                break
        else:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def export_program(network: fx.GraphModule, spec: ImageSpec) -> torch.export.ExportedProgram:
    """Export with a dynamic batch; the program holds no example images and no metadata but shapes."""
    images = torch.zeros(2, *spec.shape)
    exported = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in exported.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    exported.example_inputs = None
    return forgetting_examples(exported)
