"""Bias correction: take out of each layer's bias what rounding adds to its mean output."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from zsq.graph import edit
from zsq.quantization.fake_quantize import BIASES
from zsq.quantization.prepare import Student, quantized_weight
from zsq.types import Batch

IMAGES, PIXELS = 256, 2**22
"""Images over which means are taken, or pixels of fewer; held at once, activations are dropped as soon as they are
read."""


def first_images(batches: Iterable[Batch], device: torch.device) -> Tensor:
    """Return the first images of a stream, as many as are held at once, [N, C, H, W] on the device."""
    found: list[Tensor] = []
    most = IMAGES
    for batch in batches:
        found.append(batch.images.to(device))
        most = min(IMAGES, max(1, PIXELS // math.prod(batch.images.shape[2:])))
        if sum(map(len, found)) >= most:
            break
    return torch.cat(found)[:most]


def channel_mean(x: Tensor, channel: int) -> Tensor:
    """Mean over all dimensions but `channel`."""
    return x.mean([dim for dim in range(x.dim()) if dim != channel % x.dim()])


def biased_layers(student: Student) -> list[tuple[Node, Node]]:
    """List the layers that have a bias, with the node that rounds it."""
    found = []
    for node in student.network.graph.nodes:
        bias = edit.argument(node, 2) if node.target in edit.LAYERS else None
        if isinstance(bias, Node) and bias.target in BIASES:
            found.append((node, bias))
    return found


class _Recorder(Interpreter):
    """Records the mean output of each layer."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self.means: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.target in edit.LAYERS:
            self.means[n.name] = channel_mean(value, edit.channel_dim(n))
        return value


class _Corrector(Interpreter):
    """Runs the student layer by layer; each layer sees its predecessors corrected."""

    def __init__(self, network: GraphModule, means: dict[str, Tensor]) -> None:
        super().__init__(network)
        self.means, self.network = means, network

    def run_node(self, n: Node) -> Any:
        """Run one node; a layer's bias takes the difference of means, and its output with it."""
        value = super().run_node(n)
        bias = edit.argument(n, 2) if n.target in edit.LAYERS else None
        if isinstance(bias, Node) and bias.target in BIASES:
            channel = edit.channel_dim(n)
            difference = self.means[n.name] - channel_mean(value, channel)
            stored, *scales = (edit.get_attribute(self.network, str(source.target)) for source in bias.all_input_nodes)
            rounded = bias.target
            assert callable(rounded)
            before = rounded(stored, *scales)
            stored.copy_(before + difference)
            change = rounded(stored, *scales) - before  # the difference, in steps of the file's integers
            value = value + change.view(-1, *[1] * (value.dim() - 2 if channel == 1 else 0))
        return value


@torch.no_grad()
def correct_biases(student: Student, folded: GraphModule, images: Tensor) -> None:
    """Shift the student's biases in place so that each layer's mean output is the float network's.

    Args:
        student: calibrated, its quantizers on; layers without a bias are left alone.
        folded: the float network from which the student was prepared.
        images: [N, C, H, W] on the student's device.

    Source: Nagel et al. 2019, section 4.2, with means over synthetic images ("empirical bias correction", appendix D)
    instead of those that batch norm implies.
    """
    recorder = _Recorder(folded)
    recorder.run(images)
    _Corrector(student.network, recorder.means).run(images)


@torch.no_grad()
def correct_biases_by_means(student: Student, input_means: dict[str, Tensor]) -> None:
    """Take out of the student's biases, in place, what rounding a weight adds to a layer's mean output.

    Args:
        student: calibrated, its quantizers on; layers without a bias are left alone.
        input_means: mean of each input channel [I] of a layer, by the name of its node.

    Source: Nagel et al. 2019, section 4.2: the rounded weight's error times the mean input.
    """
    for layer, rounding in biased_layers(student):
        quantizer, weight = quantized_weight(student.network, layer)
        stored = rounding.args[0]
        assert isinstance(stored, Node)
        error = quantizer(weight) - weight
        shift = edit.weight_times_mean(error, input_means[layer.name])
        edit.get_attribute(student.network, str(stored.target)).sub_(shift)
