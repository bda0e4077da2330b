"""What batch norm says of a network's values, without an image: ranges, and moments of its layers' inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from zsq.graph import edit
from zsq.graph.batchnorm import batch_norms
from zsq.graph.edit import aten
from zsq.graph.equalize import Record, weight_name
from zsq.graph.outputs import results
from zsq.quantization.bias_correction import channel_mean
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.types import ImageSpec, Statistics

ROWS = 256
"""Draws a channel from which means are taken."""

SUMS = (*edit.LAYERS, aten.add.Tensor)
"""Operators that add what is independent, so that the ends of their terms do not add up to their own."""


def implied_statistics(
    network: GraphModule,
    record: Record,
    pixels: Tensor,
    range_sigmas: float,
    run: Run,
    *,
    output_sigmas: float | None = None,
) -> Statistics:
    """Return what batch norm says of a network's values: their ranges, and moments of its layers' inputs.

    Behind a batch norm, folded or not, a channel holds N(beta, gamma^2), independent of the others and constant over
    space. Stratified draws of it go through the rest of the network, which computes as it is; the ends
    beta -+ range_sigmas |gamma| go along as two more rows. Instead of |gamma|, the standard deviation is taken, which
    is less where the batch norm's epsilon matters (`BatchNorm.std`).

    Args:
        network: folded; it is not changed.
        record: standard deviation and mean of the outputs of layers with a folded batch norm, by the weight's name.
        pixels: draws of each input channel as the network takes it and the ends of its range, [ROWS + 2, C].
        range_sigmas: standard deviations that a range spans on both sides.
        run: seed and device of the network.
        output_sigmas: those of the last layer in front of each output and of what follows, where they differ.
    """
    norms = {norm.node.name: (norm.std, norm.beta) for norm in batch_norms(network)}
    for layer in edit.layers(network):
        if weight_name(layer) in record:
            norms[layer.name] = record[weight_name(layer)]
    sigmas = dict.fromkeys((node.name for node in network.graph.nodes), range_sigmas)
    if output_sigmas is not None:
        sigmas |= dict.fromkeys((node.name for node in _ends(network)), output_sigmas)
    sampler = _Sampler(network, norms, sigmas, run)
    pixels = torch.cat([sampler.permuted(pixels[:ROWS], "input"), pixels[ROWS:]])
    space = network.graph.find_nodes(op="placeholder")[0].meta["val"].shape[2:]
    with torch.no_grad():
        sampler.run(pixels.view(*pixels.shape, *[1] * len(space)).expand(*pixels.shape, *space))
    return Statistics(sampler.ranges, sampler.input_means, sampler.input_stds)


def _ends(network: GraphModule) -> set[Node]:
    """Return the last layer in front of each output, and what follows it."""
    found: set[Node] = set()
    waiting = results(network.graph)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node.target in edit.LAYERS else node.all_input_nodes
    return found


def uniform_pixels(spec: ImageSpec, run: Run) -> Tensor:
    """Return draws of pixels that are uniform in [0, 1], and those ends, as the network takes them: [ROWS + 2, C].

    The numbers of signals and volumes are drawn from the standard normal, between their own ends.
    """
    if not spec.is_image:
        draws = normal_quantiles(run.device)[:, None].expand(-1, spec.channels)
        return torch.cat([draws, spec.ends.to(run.device)])
    ends = torch.tensor([0.0, 1.0], device=run.device)
    levels = torch.cat([_midpoints(run.device), ends]).view(-1, 1, 1, 1).expand(-1, spec.channels, 1, 1)
    return spec.normalize(levels).flatten(1)


def pixels_of(images: Tensor) -> Tensor:
    """Return draws of the pixels of images [N, C, H, W], and their ends: [ROWS + 2, C]."""
    channels = images.movedim(1, 0).flatten(1)
    rows = torch.linspace(0, channels.shape[1] - 1, ROWS, device=images.device).round().long()
    draws = channels[:, rows].T
    return torch.cat([draws, channels.amin(1)[None], channels.amax(1)[None]])


def _midpoints(device: torch.device) -> Tensor:
    """Return the middles of `ROWS` equal parts of [0, 1]."""
    return (torch.arange(ROWS, device=device) + 0.5) / ROWS


def normal_quantiles(device: torch.device) -> Tensor:
    """Return `ROWS` values, [ROWS], spread as the standard normal, with mean 0 and variance 1."""
    values: Tensor = torch.special.ndtri(_midpoints(device))
    return values / values.square().mean().sqrt()


def _in_the_middle(x: Tensor, channel: int) -> Tensor:
    """Return the channels in the middle of the other dimensions of [N, C, ...] or [N, ..., C]: [N, C]."""
    rows = x.movedim(channel, 1)
    for _ in rows.shape[2:]:
        rows = rows.select(2, rows.shape[2] // 2)
    return rows


class _Sampler(Interpreter):
    """Runs a network on draws where batch norm knows the distribution; the last two rows carry the ends of ranges."""

    def __init__(self, network: GraphModule, norms: Record, sigmas: Mapping[str, float], run: Run) -> None:
        super().__init__(network)
        self.norms, self.sigmas, self.seed, self.device = norms, sigmas, run.seed, run.device
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self.input_means: dict[str, Tensor] = {}
        self.input_stds: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node, or draw its value."""
        if n.target in edit.LAYERS:
            x: Tensor = self.env[n.args[0]]  # type: ignore[index]
            self.input_means[n.name] = channel_mean(x[:ROWS], edit.channel_dim(n))
            self.input_stds[n.name] = _in_the_middle(x[:ROWS], edit.channel_dim(n)).std(0, correction=0)
        if n.name in self.norms:
            value = self._draw(n.name)
            self._record(n.name, value)
            return self._over_space(n, value)
        value = super().run_node(n)
        if not isinstance(value, Tensor) or not value.is_floating_point() or n.op == "get_attr":
            return value
        if n.target in SUMS and len(value) == ROWS + 2:
            value = self._renew_ends(n, value)
        self._record(n.name, value)
        return value

    def permuted(self, values: Tensor, name: str) -> Tensor:
        """Return values [ROWS, channels] in another order for each channel."""
        random = stream(self.seed, f"dfq/{name}", 0, self.device)
        return values.gather(0, torch.rand(values.shape, generator=random, device=self.device).argsort(0))

    def _draw(self, name: str) -> Tensor:
        """Return draws of a batch norm's output and the ends of its range, [ROWS + 2, C]."""
        std, mean = self.norms[name]
        quantiles = normal_quantiles(self.device)[:, None].expand(-1, len(mean))
        draws = mean + std * self.permuted(quantiles, name)
        reach = self.sigmas[name] * std
        return torch.cat([draws, (mean - reach)[None], (mean + reach)[None]])

    def _over_space(self, n: Node, value: Tensor) -> Tensor:
        """Spread draws [ROWS + 2, C] over the other dimensions of what a node gives, which may hold tokens in rows."""
        given = n.meta["val"].shape
        channel = (edit.channel_dim(n) if n.target in edit.LAYERS else 1) % len(given)
        rows = len(self.env[n.args[0]])  # type: ignore[index]
        value = value.repeat_interleave(rows // len(value), 0)
        shape = [size if dim == channel else 1 for dim, size in enumerate(given)]
        return value.view(rows, *shape[1:]).expand(rows, *given[1:])

    def _renew_ends(self, n: Node, value: Tensor) -> Tensor:
        """Set the ends of a sum to sigmas standard deviations of its draws: its terms are not all extreme at once.

        An addition's ends stay within the sums of its terms' ends.
        """
        draws = value[:ROWS]
        mean, reach = draws.mean(0), self.sigmas[n.name] * draws.std(0, correction=0)
        low, high = mean - reach, mean + reach
        if n.target not in edit.LAYERS:
            low, high = torch.maximum(low, value[ROWS]), torch.minimum(high, value[ROWS + 1])
        return torch.cat([draws, low[None], high[None]])

    def _record(self, name: str, value: Tensor) -> None:
        low, high = torch.aminmax(value)
        self.ranges[name] = (low.view(1), high.view(1))
