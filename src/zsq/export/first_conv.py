"""The first convolution, made quick for runtimes: its images get channels of zeros, up to a multiple of four.

Integer kernels first gather the pixels under a filter, row by row, and multiply four bytes at a time. With three
channels, a row of a small filter is few bytes, and no multiple of four: with a fourth, a layer of 3x3 takes 28 to 48 %
less time, and a MobileNet 4 to 9 % (benchmarks/reports/2026-11-cost.md).
"""

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

UNIT = 4
"""Channels whose bytes the kernels multiply at once."""
MOST_BYTES = 21
"""Bytes in a row of a filter above which gathering is quick enough: seven pixels of three channels."""


def pad_channels(model: onnx.ModelProto) -> None:
    """Let the first convolution read images with channels of zeros, in place: the same integers come out.

    Done where a convolution without groups alone reads the quantized images, whose channels are no multiple of four,
    with int8 weights around 0 and a small filter that overlaps the next position's.
    """
    graph = model.graph
    conv = _first_convolution(graph)
    tensor = _weight(graph, conv) if conv else None
    if conv is None or tensor is None:
        return
    weight = numpy_helper.to_array(tensor)
    missing, width = -weight.shape[1] % UNIT, weight.shape[-1]
    strides = node_attribute(conv, "strides", [1] * (weight.ndim - 2))
    if (
        not missing
        or weight.shape[1] * width > MOST_BYTES
        or width <= strides[-1]
        or node_attribute(conv, "group", 1) != 1
    ):
        return
    padded = np.pad(weight, [(0, missing if axis == 1 else 0) for axis in range(weight.ndim)])
    tensor.CopyFrom(numpy_helper.from_array(padded, tensor.name))
    images = graph.input[0].name
    for node in graph.node:
        node.input[:] = [f"{images}_padded" if name == images else name for name in node.input]
    pads = [missing if axis == weight.ndim + 1 else 0 for axis in range(2 * weight.ndim)]
    graph.initializer.append(numpy_helper.from_array(np.array(pads), f"{images}_padding"))
    graph.node.insert(0, helper.make_node("Pad", [images, f"{images}_padding"], [f"{images}_padded"]))


def _first_convolution(graph: onnx.GraphProto) -> onnx.NodeProto | None:
    """Return the convolution that alone reads the quantized images, if there is one."""
    name = graph.input[0].name
    for wanted in ("QuantizeLinear", "DequantizeLinear", "Conv"):
        readers = [node for node in graph.node if name in node.input]
        if [node.op_type for node in readers] != [wanted] or readers[0].input[0] != name:
            return None
        reader: onnx.NodeProto = readers[0]
        name = reader.output[0]
    return reader


def _weight(graph: onnx.GraphProto, conv: onnx.NodeProto) -> onnx.TensorProto | None:
    """Return where the integers of a convolution's weight [O, C, h, w] stand, if they are int8 around 0 and its own."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    reader = next((node for node in graph.node if conv.input[1] in node.output), None)
    if reader is None or reader.op_type != "DequantizeLinear" or reader.input[0] not in stored:
        return None
    tensor = stored[reader.input[0]]
    alone = all(sum(name in node.input for node in graph.node) == 1 for name in (tensor.name, conv.input[1]))
    around_zero = all(name in stored and not numpy_helper.to_array(stored[name]).any() for name in reader.input[2:])
    return tensor if alone and around_zero and tensor.data_type == onnx.TensorProto.INT8 else None


def node_attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Return the value of a node's attribute."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
