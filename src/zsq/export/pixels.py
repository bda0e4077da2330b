"""Files that take pixels: uint8 in the layout of a camera or of PyTorch, mean and std folded in."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from zsq.types import ImageSpec

Layout = Literal["nchw", "nhwc"]
"""Order of a pixel's place: channel, row, column, or row, column, channel."""

NOTE = "pixels"
"""Name of the metadata that holds the layout, and of such a file's input."""


def take_pixels(model: onnx.ModelProto, spec: ImageSpec, layout: Layout) -> None:
    """Let a file take uint8 pixels [batch, C, H, W] or [batch, H, W, C] instead of normalised images, in place.

    Pixels are normalised in the order of `ImageSpec.normalize`, so that the same floats come out.
    """
    graph, images = model.graph, model.graph.input[0].name
    sizes = [spec.channels, spec.height, spec.width]
    shape = sizes if layout == "nchw" else [*sizes[1:], sizes[0]]
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(NOTE, TensorProto.UINT8, ["batch", *shape]))
    stored = {"pixels_most": [255.0], "pixels_mean": spec.mean, "pixels_std": spec.std}
    for name, values in stored.items():
        array = np.array(values, np.float32).reshape(1, -1, 1, 1)
        graph.initializer.append(numpy_helper.from_array(array, name))
    nodes, latest = [], NOTE
    if layout == "nhwc":
        nodes.append(helper.make_node("Transpose", [latest], ["pixels_planar"], perm=[0, 3, 1, 2]))
        latest = "pixels_planar"
    nodes += [
        helper.make_node("Cast", [latest], ["pixels_float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels_float", "pixels_most"], ["pixels_share"]),
        helper.make_node("Sub", ["pixels_share", "pixels_mean"], ["pixels_centred"]),
        helper.make_node("Div", ["pixels_centred", "pixels_std"], [images]),
    ]
    for node in nodes:
        node.name = f"{node.output[0]}_{node.op_type.lower()}"
    for place, node in enumerate(nodes):
        graph.node.insert(place, node)
    model.metadata_props.add(key=NOTE, value=layout)


def fed(images: Tensor, spec: ImageSpec, layout: Layout) -> np.ndarray:
    """Return what a file that takes pixels is fed for normalised images [N, C, H, W]: uint8 in its layout."""
    pixels = spec.to_pixels(images.detach().cpu().float())
    return np.ascontiguousarray((pixels if layout == "nhwc" else pixels.permute(0, 3, 1, 2)).numpy())


def as_pixels(images: Tensor, spec: ImageSpec) -> Tensor:
    """Return the normalised images [N, C, H, W] that a file makes of the nearest pixels."""
    return spec.normalize(spec.to_pixels(images).permute(0, 3, 1, 2).to(torch.float32) / 255)


def layout_in(notes: Mapping[str, str]) -> Layout | None:
    """Return the layout of the pixels that a file with these metadata takes; None where it takes images."""
    if NOTE not in notes:
        return None
    return "nhwc" if notes[NOTE] == "nhwc" else "nchw"
