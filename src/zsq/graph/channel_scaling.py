"""Scale the channels of a folded network so that each fills the range of its tensor.

A per-tensor grid has one step for all channels, and a channel of small values takes few of them. The layer in front can
multiply such a channel, and the layer behind divide by it. In front of a depthwise layer this is free, since its
weights have a scale for each channel; in front of others, their weights would become uneven.
"""

import math

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph import edit
from zsq.graph.equalize import PADS, Pair, Record, divide_outputs, find_pairs

REACH_SIGMAS = 6.0
"""Standard deviations above its mean up to which a channel is kept from being clipped."""

LARGEST_SHARE = 64.0
"""Factors stop at this share of the widest channel: one that is always 0 needs no steps."""


@torch.no_grad()
def scale_channels(network: GraphModule, record: Record, pixels: tuple[Tensor, Tensor], sigmas: float) -> int:
    r"""Scale the channels between each layer, its ReLU or ReLU6, and a depthwise layer in place; return how many pairs.

    .. math:: s_c = T / u_c, \quad u_c = \mu_c + k \sigma_c

    u is how far a channel reaches by batch norm. T is the limit of a ReLU6, and for a ReLU max u. The network computes
    the same, except that ReLU6 clips a channel at 6 / s, which is at least u.

    Args:
        network: folded.
        record: what `fold` returned; scaled with the outputs that it describes.
        pixels: least and largest value of each input channel, each [C].
        sigmas: k.

    Source: Nagel et al. 2019, section 4.1, with ranges of activations instead of weights.
    """
    count = 0
    for pair in find_pairs(network, limited=True):
        first, second = pair.weights
        weight = edit.get_attribute(network, second).detach()
        if pair.limit is None or pair.bounds or first not in record or not edit.is_depthwise(pair.second, weight):
            continue
        reach = _reaches(network, record, pair, pixels, sigmas)
        largest = float(reach.max())
        if largest <= 0:
            continue
        reach = reach.clamp(min=largest / LARGEST_SHARE)
        factors = (pair.limit if pair.limit < math.inf else largest) / reach
        divide_outputs(network, pair.first, record, 1 / factors)
        edit.set_tensor(network, second, weight / factors.view(-1, *[1] * (weight.dim() - 1)))
        count += 1
    network.recompile()
    return count


def _reaches(network: GraphModule, record: Record, pair: Pair, pixels: tuple[Tensor, Tensor], sigmas: float) -> Tensor:
    """Return how far the channels between two layers reach, [C], at most to the limit of what clips them."""
    std, mean = record[pair.weights[0]]
    reach = (mean + sigmas * std).clamp(0, pair.limit)
    largest = _largest_of_pixels(network, pair.first, pixels)
    return reach if largest is None else torch.minimum(reach, largest.clamp(min=0))


def _largest_of_pixels(network: GraphModule, layer: Node, pixels: tuple[Tensor, Tensor]) -> Tensor | None:
    """Return the largest output of a layer's channels that any image gives, [C]; None where it reads no image."""
    source = layer.args[0]
    while isinstance(source, Node) and source.target in PADS:
        source = source.args[0]
    weight, bias = (edit.get_attribute(network, str(read.target)).detach() for read in layer.args[1:3])  # type: ignore[union-attr]
    if not isinstance(source, Node) or source.op != "placeholder" or weight.shape[1] != len(pixels[0]):
        return None
    low, high = (end.view(-1, *[1] * (weight.dim() - 2)) for end in pixels)
    largest: Tensor = torch.maximum(weight * low.clamp(max=0), weight * high.clamp(min=0)).flatten(1).sum(1) + bias
    return largest
