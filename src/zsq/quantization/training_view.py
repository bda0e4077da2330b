"""A student's graph as it is trained: the same values and gradients in fewer passes over memory and fewer kernels.

ReLU, ReLU6 and hardtanh are left to the quantizers behind them. On a GPU, where a layer's weight is so small that
starting kernels takes longer than they run, all weights are rounded and all biases centred at once.
"""

import operator
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from zsq.graph import edit
from zsq.graph.activations import clamp_limits
from zsq.graph.edit import argument, aten
from zsq.quantization.bias_centring import centred_bias
from zsq.quantization.fake_quantize import HALF_STEP, SMALLEST_SCALE
from zsq.quantization.prepare import prepared_layers, quantized_weight, weight_node
from zsq.quantization.quantizers import DEAD_CHANNEL, ActivationQuantizer, WeightQuantizer
from zsq.runtime.gpu import kernels

MERGED = (aten.relu.default, aten.relu6.default, aten.hardtanh.default)
"""Activations whose gradient is 0 at their limits, as that of a quantizer that clips; `clamp` had 1 before torch
2.14."""


def merged(network: GraphModule) -> GraphModule:
    """Return a view of a student's network that computes the same sooner.

    Tensors and submodules are the network's own, so that what trains one trains the other. The network's quantizers
    round (mode `quantize`) for as long as the view is used.
    """
    view = edit.view_of(network)
    for node in list(view.graph.nodes):
        _merge_activation(view, node)
    if (fused := kernels(next(view.parameters()))) is not None and not _follows_pairs(view):
        _merge_weights(view, fused)
    view.graph.eliminate_dead_code()
    view.graph.lint()
    view.recompile()
    return view


def _follows_pairs(view: GraphModule) -> bool:
    """Whether scales follow sums of neighbours, which the fused kernels do not add."""
    found = [quantized_weight(view, layer)[0] for layer in prepared_layers(view)]
    return any(q.pair_limit is not None and not q.learnable for q in found)


def _merge_activation(view: GraphModule, node: Node) -> None:
    """Let the quantizer that a node calls clip its input, where an activation function does so for it alone."""
    function = node.args[0] if node.op == "call_module" else None
    if not isinstance(function, Node) or function.target not in MERGED or len(function.users) != 1:
        return
    if isinstance(view.get_submodule(str(node.target)), ActivationQuantizer):
        node.args = (function.args[0], clamp_limits(function))


def _merge_weights(view: GraphModule, fused: ModuleType) -> None:
    """Call `RoundedWeights` in front of everything, and take from it what each layer reads."""
    quantizers, known, roundings, centrings = [], [], [], []
    for layer in prepared_layers(view):
        quantizer, weight = quantized_weight(view, layer)
        rounding, _ = weight_node(layer)
        centring = _centring(layer)
        ends = (quantizer.quant_min, quantizer.quant_max, quantizer.factor)
        inputs = centring and edit.get_attribute(view, _names(centring)[2]).numel()
        known.append(fused.Layer(weight.detach(), inputs, quantizer.scale.numel(), *ends))
        quantizers.append(quantizer)
        roundings.append(rounding)
        centrings += [centring] if centring else []
    view.add_submodule("rounded_weights", RoundedWeights(quantizers, fused, known))
    graph = view.graph
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        weights = tuple(graph.get_attr(_names(node)[0]) for node in roundings)
        outputs, means = (tuple(graph.get_attr(_names(node)[i]) for node in centrings) for i in (0, 2))
        called = graph.call_module("rounded_weights", (weights, outputs, means))
        found = [graph.call_function(operator.getitem, (called, i)) for i in range(len(roundings) + len(centrings))]
    for node, value in zip(roundings + centrings, found, strict=True):
        node.replace_all_uses_with(value)


def _centring(layer: Node) -> Node | None:
    """Return the node that centres a layer's bias; None where it has none."""
    bias = argument(layer, 2)
    if not isinstance(bias, Node):
        return None
    centring = bias.args[0]
    assert isinstance(centring, Node)
    assert centring.target is centred_bias
    return centring


def _names(node: Node) -> list[str]:
    """Return the targets of what a node reads."""
    return [str(read.target) for read in node.all_input_nodes]


class RoundedWeights(nn.Module):
    """Rounds all weights of a student and centres all biases, as its quantizers and `centred_bias` do one by one.

    Args:
        quantizers: of the weights, in the order of the layers.
        fused: the kernels.
        layers: what they need to know of each.
    """

    def __init__(self, quantizers: Sequence[WeightQuantizer], fused: ModuleType, layers: Sequence[object]) -> None:
        super().__init__()
        self.quantizers, self.fused = tuple(quantizers), fused
        self.tables = fused.Tables(layers)

    def forward(
        self, weights: Sequence[Tensor], outputs: Sequence[Tensor], means: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the rounded weights, and then the biases.

        Args:
            weights: of all layers.
            outputs, means: mean outputs and mean inputs of the layers that have a bias.
        """
        first = self.quantizers[0]
        follow = first.training and not first.learnable
        grid = (DEAD_CHANNEL, SMALLEST_SCALE, HALF_STEP, follow)
        scales = [q.scale for q in self.quantizers]
        found: tuple[Tensor, ...] = self.fused.RoundWeights.apply(
            self.tables, grid, *weights, *outputs, *means, *scales
        )
        return found
