"""A check of an ONNX file: no layer computes something else on a processor whose products saturate.

Processors without VNNI add the products of two neighbours in int16 (see `zsq.quantization.pair_sums`).
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from zsq.export.first_conv import node_attribute

INT16 = np.iinfo(np.int16)


def saturating_layers(path: Path) -> tuple[str, ...]:
    """Return the names of a file's layers in which two products of neighbours may leave int16.

    Judged are convolutions, `Gemm` and `MatMul` of uint8 activations and stored int8 weights; inputs may be any that
    the activation's width allows. Depthwise convolutions add no pairs.
    """
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        reader, weight = (makers.get(name) for name in node.input[:2])
        turned = weight if weight is not None and weight.op_type == "Transpose" else None
        weight = makers.get(turned.input[0]) if turned is not None else weight
        integers = stored.get(weight.input[0]) if weight is not None and weight.op_type == "DequantizeLinear" else None
        if reader is None or reader.op_type != "DequantizeLinear" or integers is None:
            continue
        if integers.data_type != onnx.TensorProto.INT8:
            continue
        array = numpy_helper.to_array(integers)
        if turned is not None:
            array = array.transpose(node_attribute(turned, "perm", range(array.ndim)[::-1]))
        rows = filters(node, array)
        if rows is not None and may_saturate(rows, _largest(reader, makers, stored)):
            found.append(node.name)
    return tuple(found)


def filters(node: onnx.NodeProto, weight: np.ndarray) -> list[np.ndarray] | None:
    """Return a layer's weight as rows of neighbours, one [outputs, K] for each order of runtimes; None without pairs.

    K runs over all channels of a position, then over those of the next; runtimes that pad channels to an even number
    start anew at each position.
    """
    if node.op_type != "Conv":
        transposed = node.op_type == "Gemm" and node_attribute(node, "transB", 0)
        return [weight if transposed else np.moveaxis(weight, -2, -1).reshape(-1, weight.shape[-2])]
    groups = node_attribute(node, "group", 1)
    if groups > 1 and weight.shape[:2] == (groups, 1):
        return None
    last = np.moveaxis(weight, 1, -1)
    odd = [(0, 0)] * (last.ndim - 1) + [(0, last.shape[-1] % 2)]
    return [last.reshape(len(last), -1), np.pad(last, odd).reshape(len(last), -1)]


def may_saturate(rows: list[np.ndarray], largest: int) -> bool:
    """Whether two neighbours' products with integers up to `largest` may sum to more than int16 holds."""
    for row in rows:
        wide = row.astype(np.int64)
        pairs = np.pad(wide, [(0, 0), (0, wide.shape[1] % 2)]).reshape(len(wide), -1, 2)
        most, least = pairs.clip(min=0).sum(-1).max(initial=0), pairs.clip(max=0).sum(-1).min(initial=0)
        if largest * most > INT16.max or largest * least < INT16.min:
            return True
    return False


def _largest(reader: onnx.NodeProto, makers: dict[str, onnx.NodeProto], stored: dict[str, onnx.TensorProto]) -> int:
    """Return the largest integer that a dequantization of activations can read: the type's, or that of a clip."""
    clip = makers.get(reader.input[0])
    if clip is not None and clip.op_type == "Clip" and len(clip.input) > 2 and clip.input[2] in stored:
        return int(numpy_helper.to_array(stored[clip.input[2]]))
    return int(np.iinfo(np.uint8).max)
