"""DFQ: no images at all, but a network rewritten to round well, and statistics that its batch norms imply."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from zsq.checked import Count, Factor, Positive
from zsq.errors import InputError
from zsq.graph import edit
from zsq.graph.batchnorm import batch_norms
from zsq.graph.edit import aten
from zsq.graph.equalize import Record, absorb, equalize, replace_relu6, weight_name
from zsq.graph.fold import fold
from zsq.methods.base import Method, Surrogate
from zsq.methods.noise_and_real import Noise, NoiseSource
from zsq.models.teacher import Teacher
from zsq.quantization.bias_correction import channel_dim, channel_mean
from zsq.runtime.random_streams import stream
from zsq.training.loop import Run
from zsq.types import ImageSpec, Statistics

ROWS = 256
"""Draws a channel from which means are taken."""

SUMS = (*edit.LAYERS, aten.add.Tensor)
"""Operators that add what is independent, so that the ends of their terms do not add up to their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DFQ(Method):
    """Equalise the weights of neighbouring layers; take ranges and mean inputs from batch norm."""

    name: ClassVar[str] = "dfq"
    summary: ClassVar[str] = "weight equalization, ranges and bias correction from batch norm, no images"
    quantizers: ClassVar[tuple[str, ...]] = ("ptq",)

    equalize: bool = True
    """Give neighbouring layers equal weight ranges, channel by channel."""
    iterations: Count = 100
    """Most sweeps of equalisation; fewer where no factor changes by more than 0.1 %."""
    absorb: bool = False
    """Move what a channel nearly always exceeds into the next layer's bias."""
    absorb_sigmas: Factor = 3.0
    """Standard deviations below a channel's mean that nearly all of its values exceed."""
    relu6: Literal["relu", "clip", "keep"] = "clip"
    """A ReLU6 becomes a ReLU, or one clipped at a bound a channel, or stays and keeps layers from being equalised."""
    range_sigmas: Positive = 6.0
    """Standard deviations on both sides of a channel's mean that an activation's range spans."""

    def fit(
        self, teacher: Teacher, run: Run, *, distill_steps: int = 0, fitted: dict[str, Tensor] | None = None
    ) -> Surrogate:
        """Rewrite a copy of the network and compute its statistics; nothing is learnt.

        Raises:
            InputError: the teacher has no batch norm.
        """
        del distill_steps, fitted
        if not batch_norms(teacher.network):
            raise InputError(
                f"teacher '{teacher.name}' has no batch norm with stored statistics, and method dfq takes ranges and "
                "means from them. Methods that do without: noise, real."
            )
        network, record = fold(teacher.network)
        if self.relu6 != "keep":
            replace_relu6(network, clip=self.relu6 == "clip")
        if self.equalize:
            equalize(network, record, self.iterations)
        if self.absorb:
            absorb(network, record, self.absorb_sigmas)
        statistics = implied_statistics(network, record, teacher.spec, self.range_sigmas, run)
        return Surrogate(CheckSource(Noise(distribution="uniform"), teacher.spec, run), network, statistics)


class CheckSource(NoiseSource):
    """Noise pixels on which the file is checked against the simulation; nothing is learnt from them."""

    asks_labels = False


def implied_statistics(
    network: GraphModule, record: Record, spec: ImageSpec, range_sigmas: float, run: Run
) -> Statistics:
    """Return what batch norm says of a network's values: their ranges, and the mean inputs of its layers.

    Behind a batch norm, folded or not, a channel holds N(beta, gamma^2), independent of the others and constant over
    space. Stratified draws of it go through the rest of the network, which computes as it is; the ends
    beta -+ range_sigmas |gamma| go along as two more rows. Instead of |gamma|, the standard deviation is taken, which
    is less where the batch norm's epsilon matters (`BatchNorm.std`).

    Args:
        network: folded; it is not changed.
        record: standard deviation and mean of the outputs of layers with a folded batch norm, by the weight's name.
        spec: pixels are taken to be uniform in [0, 1].
        range_sigmas: standard deviations that a range spans on both sides.
        run: seed and device of the network.
    """
    norms = {norm.node.name: (norm.std, norm.beta) for norm in batch_norms(network)}
    for layer in edit.layers(network):
        if weight_name(layer) in record:
            norms[layer.name] = record[weight_name(layer)]
    sampler = _Sampler(network, norms, range_sigmas, run)
    ends = torch.tensor([[0.0], [1.0]], device=run.device).expand(2, spec.channels)
    pixels = torch.cat([sampler.permuted(_midpoints(run.device), "input", spec.channels), ends])
    shape = (len(pixels), spec.channels, spec.height, spec.width)
    with torch.no_grad():
        sampler.run(spec.normalize(pixels[:, :, None, None].expand(shape)))
    return Statistics(sampler.ranges, sampler.input_means)


def _midpoints(device: torch.device) -> Tensor:
    """Return the middles of `ROWS` equal parts of [0, 1]."""
    return (torch.arange(ROWS, device=device) + 0.5) / ROWS


def normal_quantiles(device: torch.device) -> Tensor:
    """Return `ROWS` values, [ROWS], spread as the standard normal, with mean 0 and variance 1."""
    values: Tensor = torch.special.ndtri(_midpoints(device))
    return values / values.square().mean().sqrt()


class _Sampler(Interpreter):
    """Runs a network on draws where batch norm knows the distribution; the last two rows carry the ends of ranges."""

    def __init__(self, network: GraphModule, norms: Record, sigmas: float, run: Run) -> None:
        super().__init__(network)
        self.norms, self.sigmas, self.seed, self.device = norms, sigmas, run.seed, run.device
        self.ranges: dict[str, tuple[Tensor, Tensor]] = {}
        self.input_means: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node, or draw its value."""
        if n.target in edit.LAYERS:
            x: Tensor = self.env[n.args[0]]  # type: ignore[index]
            self.input_means[n.name] = channel_mean(x[:ROWS], channel_dim(n))
        if n.name in self.norms:
            value = self._draw(n.name)
            self._record(n.name, value)
            space = n.meta["val"].shape[2:]
            return value.view(*value.shape, *[1] * len(space)).expand(*value.shape, *space)
        value = super().run_node(n)
        if not isinstance(value, Tensor) or not value.is_floating_point() or n.op == "get_attr":
            return value
        if n.target in SUMS and len(value) == ROWS + 2:
            value = self._renew_ends(n, value)
        self._record(n.name, value)
        return value

    def permuted(self, values: Tensor, name: str, channels: int) -> Tensor:
        """Return values [ROWS] in another order for each channel, [ROWS, channels]."""
        random = stream(self.seed, f"dfq/{name}", 0, self.device)
        return values[torch.rand(ROWS, channels, generator=random, device=self.device).argsort(0)]

    def _draw(self, name: str) -> Tensor:
        """Return draws of a batch norm's output and the ends of its range, [ROWS + 2, C]."""
        std, mean = self.norms[name]
        draws = mean + std * self.permuted(normal_quantiles(self.device), name, len(mean))
        reach = self.sigmas * std
        return torch.cat([draws, (mean - reach)[None], (mean + reach)[None]])

    def _renew_ends(self, n: Node, value: Tensor) -> Tensor:
        """Set the ends of a sum to sigmas standard deviations of its draws: its terms are not all extreme at once.

        An addition's ends stay within the sums of its terms' ends.
        """
        draws = value[:ROWS]
        mean, reach = draws.mean(0), self.sigmas * draws.std(0, correction=0)
        low, high = mean - reach, mean + reach
        if n.target not in edit.LAYERS:
            low, high = torch.maximum(low, value[ROWS]), torch.minimum(high, value[ROWS + 1])
        return torch.cat([draws, low[None], high[None]])

    def _record(self, name: str, value: Tensor) -> None:
        low, high = torch.aminmax(value)
        self.ranges[name] = (low.view(1), high.view(1))
