"""A network as the converter leaves it, for tests of what writes, hashes and checks files."""

from collections.abc import Callable

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, fx, nn

from zsq.types import ImageSpec

SPEC = ImageSpec(channels=3, height=8, width=8, classes=5, mean=(0.0,) * 3, std=(1.0,) * 3)
QD = torch.ops.quantized_decomposed
ATEN = torch.ops.aten
CONV, DEQUANTIZE = ATEN.conv2d.default, QD.dequantize_per_tensor.default


class Builder:
    """Writes a converted network node by node, as quantize.convert makes them, calibrated on the way by an example."""

    def __init__(self, bits: int, per_channel: bool, images: Tensor) -> None:
        self.graph, self.root, self.values = fx.Graph(), nn.Module(), {}
        self.bits, self.per_channel = bits, per_channel
        self.images = self.graph.placeholder("images")
        self.values[self.images] = images

    def call(self, target: Callable[..., Tensor], *args: object) -> fx.Node:
        node = self.graph.call_function(target, args)
        self.values[node] = target(*fx.node.map_arg(args, self.values.get))
        return node

    def stored(self, name: str, value: Tensor) -> fx.Node:
        self.root.register_buffer(name, value)
        node = self.graph.get_attr(name)
        self.values[node] = value
        return node

    def quantize(self, node: fx.Node, bits: int | None = None) -> fx.Node:
        bits = bits or self.bits
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        smallest, largest = min(self.values[node].min().item(), 0.0), max(self.values[node].max().item(), 0.0)
        scale = (largest - smallest) / (high - low)
        grid = (scale, max(low, min(high, round(low - smallest / scale))), low, high, torch.int8)
        return self.call(DEQUANTIZE, self.call(QD.quantize_per_tensor.default, node, *grid), *grid)

    def constant(self, name: str, value: Tensor, scales: Tensor, limits: tuple[int, int, torch.dtype]) -> fx.Node:
        shape = [-1] + [1] * (value.dim() - 1)
        integers = self.stored(name, (value / scales.view(shape)).round().to(limits[2]))
        if not self.per_channel:
            return self.call(DEQUANTIZE, integers, scales.item(), 0, *limits)
        zeros = self.stored(f"{name}_zero_points", torch.zeros(len(scales), dtype=torch.int64))
        return self.call(
            QD.dequantize_per_channel.default, integers, self.stored(f"{name}_scales", scales), zeros, 0, *limits
        )

    def layer(self, name: str, target: Callable[..., Tensor], node: fx.Node, shape: tuple[int, ...]) -> fx.Node:
        high = 2 ** (self.bits - 1) - 1
        largest = min(high, 63)  # steps of the largest weight: no pair of products leaves int16
        weight, bias = torch.randn(shape) / np.prod(shape[1:]) ** 0.5, torch.randn(shape[0])
        scales = (weight.flatten(1).abs().amax(1) if self.per_channel else weight.abs().max().reshape(1)) / largest
        weights = self.constant(f"{name}_weight", weight, scales, (-high - 1, high, torch.int8))
        biases = self.constant(f"{name}_bias", bias, scales * node.args[1], (-(2**31), 2**31 - 1, torch.int32))
        return self.call(target, node, weights, biases, *([[1, 1], [1, 1]] if len(shape) == 4 else []))


def converted_network(bits: int = 8, per_channel: bool = True) -> fx.GraphModule:
    """Convolutions, a residual add, relu6, pooling and a linear layer: each kind of fusion once."""
    torch.manual_seed(0)
    build = Builder(bits, per_channel, torch.randn(64, 3, 8, 8))
    x = build.quantize(build.images, 8)
    a = build.quantize(build.call(ATEN.relu.default, build.layer("first", CONV, x, (8, 3, 3, 3))))
    b = build.quantize(build.layer("second", CONV, a, (8, 8, 3, 3)))
    c = build.quantize(build.call(ATEN.relu.default, build.call(ATEN.add.Tensor, a, b)))
    d = build.quantize(build.call(ATEN.hardtanh.default, build.layer("third", CONV, c, (8, 8, 3, 3)), 0.0, 6.0))
    e = build.call(ATEN.flatten.using_ints, build.call(ATEN.adaptive_avg_pool2d.default, d, [1, 1]), 1)
    logits = build.quantize(build.layer("head", ATEN.linear.default, build.quantize(e), (5, 8)), 8)
    build.graph.output((logits,))
    return fx.GraphModule(build.root, build.graph)


def simulate(network: fx.GraphModule) -> Callable[[Tensor], Tensor]:
    return lambda images: network(images)[0]
