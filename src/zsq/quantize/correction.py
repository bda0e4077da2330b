"""Bias correction: take out of each layer's bias what rounding adds to its mean output."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from zsq import graphs
from zsq.quantize.fakequant import quantize_bias
from zsq.quantize.prepare import Student

IMAGES = 256
"""Images over which means are taken, held at once; activations are dropped as soon as they are read."""


def channel_mean(x: Tensor) -> Tensor:
    """Mean of each channel of a convolution's [N, C, ...] or a linear layer's [N, C] output."""
    return x.mean([0, *range(2, x.dim())])


class _Recorder(Interpreter):
    """Records the mean output of each layer."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self.means: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        if n.target in graphs.LAYERS:
            self.means[n.name] = channel_mean(value)
        return value


class _Corrector(Interpreter):
    """Runs the student layer by layer; each layer sees its predecessors corrected."""

    def __init__(self, network: GraphModule, means: dict[str, Tensor]) -> None:
        super().__init__(network)
        self.means, self.network = means, network

    def run_node(self, n: Node) -> Any:
        """Run one node; a layer's bias takes the difference of means, and its output with it."""
        value = super().run_node(n)
        bias = graphs.argument(n, 2) if n.target in graphs.LAYERS else None
        if isinstance(bias, Node) and bias.target is quantize_bias:
            difference = self.means[n.name] - channel_mean(value)
            stored = bias.args[0]
            assert isinstance(stored, Node)
            graphs.get_attribute(self.network, str(stored.target)).add_(difference)
            value = value + difference.view(-1, *[1] * (value.dim() - 2))
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
