"""Rewrite a folded network so that its weights round better; it computes the same, or nearly where a text says so."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph import edit
from zsq.graph.activations import clamp_limits
from zsq.graph.edit import argument, aten, tensor_of, weight_times_mean

Record = dict[str, tuple[Tensor, Tensor]]
"""Standard deviation and mean, each [C], of a layer's output in training, by the name of its weight; see `fold`."""

CONVERGED = 1e-3
"""Largest change of a factor, relative, at which equalisation stops."""

RELUS = {aten.relu.default, aten.leaky_relu.default}

POOLS = {
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.contiguous.default,
    aten.clone.default,
}
"""Operators that treat each channel by itself and let a positive factor pass."""

PADS = {aten.pad.default, aten.constant_pad_nd.default}

RESHAPES = {
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}
"""Operators that keep the channels where they are if all other dimensions are 1."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers with nothing between them but operators that let a positive factor of a channel pass."""

    first: Node
    second: Node
    rectified: bool = False
    """Whether a ReLU is among those operators."""
    bounds: tuple[Node, ...] = ()
    """What reads the upper bounds of the channels that are clipped between the layers, each [1, C, 1, ...]."""
    limit: float | None = None
    """The upper limit of a ReLU between the layers, infinite for a plain one; None where there is none."""

    @property
    def weights(self) -> tuple[str, str]:
        """Names of both weights."""
        return weight_name(self.first), weight_name(self.second)


def weight_name(layer: Node) -> str:
    """Return the name under which a layer's weight is stored."""
    return str(layer.args[1].target)  # type: ignore[union-attr]


def replace_relu6(network: GraphModule, *, clip: bool) -> int:
    """Turn each ReLU6 behind a layer, or a batch norm that was not folded, into a ReLU, in place.

    One inside another function, such as that of hard swish, reads a sum and stays.

    Args:
        network: folded.
        clip: clip the ReLU at a stored bound a channel, now 6, that equalisation can scale; else the bound is lost.

    Returns:
        How many were turned.
    """
    layers = set(edit.layers(network))
    count = 0
    for node in list(network.graph.nodes):
        behind = node.args[0] if clamp_limits(node) == (0, 6) else None
        if not isinstance(behind, Node):
            continue
        if behind in layers or (behind.target is aten.batch_norm.default and not clip):
            node.target, node.args = aten.relu.default, (behind,)
            if clip:
                _clip(network, node, f"relu6_bound_{count}", like=_value(network, weight_name(behind)))
            count += 1
    network.recompile()
    return count


def _clip(network: GraphModule, node: Node, name: str, like: Tensor) -> None:
    """Clip a node's channels at 6, each at its own stored bound."""
    value = node.meta["val"]
    edit.set_tensor(network, name, like.new_full((1, value.shape[1], *[1] * (value.dim() - 2)), 6.0))
    with network.graph.inserting_after(node):
        bound = network.graph.get_attr(name)
    with network.graph.inserting_after(bound):
        clipped = network.graph.call_function(aten.clamp.Tensor, (node, None, bound))
    clipped.meta["val"] = value
    node.replace_all_uses_with(clipped, delete_user_cb=lambda user: user is not clipped)


def find_pairs(network: GraphModule, *, limited: bool = False) -> list[Pair]:
    """List the layers that can be equalised with the next one, in the order of the graph.

    The output of the first has no other reader, and neither weight nor bias of either serves another layer.

    Args:
        network: folded.
        limited: go on behind ReLU6 and others with an upper limit, by which factors cannot pass unseen.
    """
    own = [layer for layer in edit.layers(network) if owns_tensors(network, layer)]
    found = []
    for layer in own:
        channels = layer.meta["val"].shape[1]
        node, rectified = layer, False
        bounds: tuple[Node, ...] = ()
        limit = None
        if layer.target is aten.linear.default and layer.meta["val"].dim() != 2:
            continue  # [N, tokens, C]
        while len(node.users) == 1:
            (reader,) = node.users
            if reader in own and reader.args[0] is node and node.meta["val"].shape[1] == channels:
                if reader.target in edit.CONVOLUTIONS or node.meta["val"].dim() == 2:
                    found.append(Pair(layer, reader, rectified, bounds, limit))
                break
            if _clips_channels(network, node, reader):
                bounds = (*bounds, reader.args[2])  # type: ignore[arg-type]
            elif (limits := clamp_limits(reader)) and limits[0] == 0 and (limited or limits[1] == math.inf):
                limit = min(limits[1], math.inf if limit is None else limit)
            elif not _lets_factors_pass(node, reader):
                break
            node, rectified = reader, rectified or reader.target in RELUS
    return found


def owns_tensors(network: GraphModule, layer: Node) -> bool:
    """Tell whether no other layer reads a layer's weight and bias, and the bias is stored."""
    read = [layer.args[1], argument(layer, 2)]
    if not (read[1] is None or (isinstance(read[1], Node) and read[1].op == "get_attr")):
        return False
    names = {str(node.target) for node in read if isinstance(node, Node)}
    readers = [u for n in network.graph.nodes if n.op == "get_attr" and n.target in names for u in n.users]
    return all(reader is layer for reader in readers)


def _clips_channels(network: GraphModule, x: Node, reader: Node) -> bool:
    """Tell whether `reader` clips `x` from above at a bound a channel that nothing else reads; see `replace_relu6`."""
    if reader.target is not aten.clamp.Tensor or len(reader.args) != 3 or reader.args[:2] != (x, None):
        return False
    bound, read = tensor_of(network, reader.args[2]), x.meta["val"]
    shape = (1, read.shape[1], *[1] * (read.dim() - 2))
    return bound is not None and bound.shape == shape and len(reader.args[2].users) == 1  # type: ignore[union-attr]


def _lets_factors_pass(x: Node, reader: Node) -> bool:
    """Tell whether a positive factor of a channel of `x`, [N, C, ...], is one of the same channel behind `reader`."""
    value = reader.meta.get("val")
    if reader.args[0] is not x or not isinstance(value, Tensor):
        return False
    before, after = x.meta["val"].shape, value.shape
    if reader.target in RELUS:
        return float(argument(reader, 1, 0.0)) >= 0  # a leaky slope
    if reader.target in POOLS:
        return len(before) > 2
    if reader.target in RESHAPES:
        return bool(before[1:2] == after[1:2] and math.prod(before[2:]) == math.prod(after[2:]) == 1)
    if reader.target is aten.mean.dim:
        return all(dim % len(before) >= 2 for dim in reader.args[1])  # type: ignore[union-attr, operator]
    return reader.target in PADS and _pads_with_zeros(reader, len(before) - 2)


def _pads_with_zeros(pad: Node, dims: int) -> bool:
    """Tell whether padding touches the last `dims` dimensions only, with zeros or values from inside."""
    modes = [a for a in pad.args[2:] if isinstance(a, str)]
    values = [a for a in pad.args[2:] if isinstance(a, (int, float))]
    return len(pad.args[1]) <= 2 * dims and (modes not in ([], ["constant"]) or not any(values))  # type: ignore[arg-type]


def output_ranges(weight: Tensor) -> Tensor:
    """Return the largest magnitude of each output channel, [O], of a weight [O, I / groups, ...]."""
    return weight.abs().flatten(1).amax(1)


def by_input(weight: Tensor, channels: int) -> Tensor:
    """View a weight [O, I / groups, ...] as [groups, O / groups, I / groups, positions], for I input channels."""
    groups = channels // weight.shape[1]
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def input_ranges(weight: Tensor, channels: int) -> Tensor:
    """Return the largest magnitude with which each of `channels` inputs is multiplied, [I]."""
    return by_input(weight, channels).abs().amax((1, 3)).flatten()


def equalising_factors(first: Tensor, second: Tensor) -> Tensor:
    r"""Return the factors that give both layers of a pair equal ranges in each channel.

    .. math:: s_i = \frac{1}{r^{(2)}_i} \sqrt{r^{(1)}_i r^{(2)}_i}

    The first layer's output channel is divided by it, the second's input channel multiplied.

    Args:
        first, second: ranges of the first layer's output channels and the second's input channels, each [C].

    Returns:
        [C]; 1 where a range is 0.

    Source: Nagel et al. 2019, eq. (11).

    >>> equalising_factors(torch.tensor([8.0, 0.0]), torch.tensor([2.0, 1.0]))
    tensor([2., 1.])
    """
    dead = (first <= 0) | (second <= 0)
    return torch.where(dead, 1.0, (first * second).sqrt() / torch.where(dead, 1.0, second))


@torch.no_grad()
def equalize(network: GraphModule, record: Record, iterations: int) -> int:
    """Equalise all pairs of layers in place, again and again until no factor changes; return the number of sweeps.

    The network computes the same. `record` is scaled with the outputs that it describes.

    Args:
        network: folded.
        record: what `fold` returned; changed in place.
        iterations: most sweeps over the pairs.

    Source: Nagel et al. 2019, section 4.1.
    """
    pairs = find_pairs(network)
    for sweep in range(iterations):
        change = 0.0
        for pair in pairs:
            first, second = (_value(network, name) for name in pair.weights)
            factors = equalising_factors(output_ranges(first), input_ranges(second, len(first)))
            divide_outputs(network, pair.first, record, factors)
            for bound in pair.bounds:
                clipped = _value(network, str(bound.target))
                edit.set_tensor(network, str(bound.target), clipped / factors.view(clipped.shape))
            scaled = by_input(second, len(first)) * factors.view(-1, 1, by_input(second, len(first)).shape[2], 1)
            edit.set_tensor(network, pair.weights[1], scaled.reshape(second.shape))
            change = max(change, float(factors.log().abs().max()))
        if change < CONVERGED:
            return sweep + 1
    return iterations


def divide_outputs(network: GraphModule, layer: Node, record: Record, factors: Tensor) -> None:
    """Divide a layer's output channels, and what is recorded of them, by [C]."""
    name = weight_name(layer)
    weight, bias = _value(network, name), argument(layer, 2)
    edit.set_tensor(network, name, weight / factors.view(-1, *[1] * (weight.dim() - 1)))
    if bias is not None:
        edit.set_tensor(network, str(bias.target), _value(network, str(bias.target)) / factors)
    if name in record:
        std, mean = record[name]
        record[name] = (std / factors, mean / factors)


@torch.no_grad()
def absorb(network: GraphModule, record: Record, sigmas: float) -> int:
    """Move what a channel's value exceeds (nearly) always into the next layer's bias, in place; return the channels.

    That is max(0, mean - sigmas std) of each channel behind which a ReLU follows. The network computes nearly the
    same: values below that bound are raised to it, and at borders that the next layer pads with zeros its new bias
    stands for the channel's inside (the paper takes no account of either).

    Args:
        network: folded.
        record: what `fold` returned, equalised; changed in place.
        sigmas: standard deviations below the mean at which the bound lies; the paper takes 3.

    Source: Nagel et al. 2019, section 4.1.3.
    """
    count = 0
    for pair in find_pairs(network):
        name, next_name = pair.weights
        bias = argument(pair.first, 2)
        if not pair.rectified or name not in record or bias is None:
            continue
        std, mean = record[name]
        absorbed = (mean - sigmas * std).clamp(min=0)
        if not bool(absorbed.any()):
            continue
        edit.set_tensor(network, str(bias.target), _value(network, str(bias.target)) - absorbed)
        record[name] = (std, mean - absorbed)
        for bound in pair.bounds:
            clipped = _value(network, str(bound.target))
            edit.set_tensor(network, str(bound.target), clipped - absorbed.view(clipped.shape))
        _add_to_bias(network, pair.second, weight_times_mean(_value(network, next_name), absorbed))
        count += int((absorbed > 0).sum())
    network.recompile()
    return count


def _add_to_bias(network: GraphModule, layer: Node, value: Tensor) -> None:
    """Add [C] to a layer's bias; a layer without one gets it."""
    bias = argument(layer, 2)
    if bias is not None:
        edit.set_tensor(network, str(bias.target), _value(network, str(bias.target)) + value)
        return
    name = f"{weight_name(layer)}_absorbed"
    edit.set_tensor(network, name, value)
    layer.args = (*layer.args[:2], edit.read_attribute(network, name, layer), *layer.args[3:])


def _value(network: GraphModule, name: str) -> Tensor:
    value: Tensor = edit.get_attribute(network, name)
    return value.detach()
