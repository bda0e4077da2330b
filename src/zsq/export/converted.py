"""What is written: the converted network, and its step before either file.

A *converted* network is a ``torch.fx.GraphModule`` of ATen operations whose activations pass through
``quantized_decomposed.quantize_per_tensor`` and ``dequantize_per_tensor`` and whose weights (int8) and biases (int32)
are buffers behind ``dequantize_per_channel`` or ``dequantize_per_tensor``.
"""

import copy
import warnings

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from zsq.errors import ExportError
from zsq.graph.activations import clamp_limits
from zsq.types import ImageSpec

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default


def output_step(converted: fx.GraphModule) -> float:
    """Return the quantization step of the logits: the scale of the dequantization that the graph ends in.

    Raises:
        ExportError: the graph's output is not a per-tensor dequantization.
    """
    result = next(node for node in converted.graph.nodes if node.op == "output").args[0]
    node = result[0] if isinstance(result, tuple | list) else result
    if node.target != DEQUANTIZE:
        raise ExportError(f"the converted graph ends in '{node.target}'; its logits must be quantized to 8 bits.")
    return float(node.args[1])


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
    images = torch.zeros(2, spec.channels, spec.height, spec.width)
    exported = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for node in exported.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key == "val"}
    exported.example_inputs = None
    return exported
