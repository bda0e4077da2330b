"""Which weight needs how many bits: sensitivities, and the allocations that no other beats (ZeroQ, section 3.2)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule

from zsq.errors import InputError
from zsq.graph import edit
from zsq.graph.fold import fold
from zsq.graph.outputs import outputs_of
from zsq.quantization.pair_sums import pair_limit
from zsq.quantization.prepare import quantized_layers, weight_name
from zsq.quantization.quantizers import WeightQuantizer
from zsq.quantization.range_rules import weight_mse
from zsq.targets import TARGETS, Target
from zsq.training.answers import Answers
from zsq.training.loop import Run

BATCH = 64
"""Images of one forward pass."""

MOST_POINTS = 100_000
"""Points up to which a frontier is exact; beyond, the size axis is cut into as many steps."""


def weight_sizes(network: GraphModule, target: Target = TARGETS["onnxruntime"]) -> dict[str, int]:
    """Return the number of values of each weight that is quantized; one that two layers read is stored twice."""
    sizes: dict[str, int] = {}
    folded, _ = fold(network)
    for layer in quantized_layers(folded, target):
        name = weight_name(layer)
        sizes[name] = sizes.get(name, 0) + edit.get_attribute(folded, name).numel()
    return sizes


@torch.no_grad()
def sensitivities(
    network: GraphModule,
    images: Tensor,
    widths: Iterable[int],
    *,
    per_channel: bool = True,
    range_rule: str = "minmax",
    activation_bits: int = 8,
    target: Target = TARGETS["onnxruntime"],
    run: Run | None = None,
) -> dict[str, dict[int, float]]:
    """Measure how far the network's answers move when one weight alone is rounded.

    Args:
        network: the float graph; it is left alone.
        images: [N, C, H, W] on the network's device.
        widths: in bits.
        per_channel, range_rule: of the weights' grids, as in the quantizer's settings.
        activation_bits: width of the activations that will meet the weights.
        target: what the file will be for; its kernels may limit pairs of weights, or take some layers in float.
        run: shows progress.

    Returns:
        ``{weight name: {width: KL in nats, averaged over the images}}``, in the order of the graph; activations and
        biases stay float. Outputs that name no class count by `Answers.distances`.

    Raises:
        InputError: there is no image.

    Source: Cai et al. 2020, ZeroQ, eq. (4) and section 3.2.
    """
    if not len(images):
        raise InputError("sensitivities were given no image.")
    folded, _ = fold(network)
    batches = images.split(BATCH)
    answers, kinds = torch.cat([folded(batch) for batch in batches]), Answers(outputs_of(folded))
    tried = list(widths)
    layers = {weight_name(layer): layer for layer in quantized_layers(folded, target)}
    found: dict[str, dict[int, float]] = {}
    for name in (run or Run()).each("sensitivity", layers, len(layers), lambda _: 1):
        stored = edit.get_attribute(folded, name)
        weight = stored.detach().clone()
        found[name] = {}
        paired = target.keeps_pairs and not edit.is_depthwise(layers[name], weight)
        for bits in tried:
            limit = pair_limit(bits, activation_bits) if paired else None
            quantizer = WeightQuantizer(weight, bits, per_channel=per_channel, learnable=False, pair_limit=limit)
            stored.copy_(_rounded(weight, quantizer.eval(), range_rule))
            found[name][bits] = kinds.distance(answers, torch.cat([folded(batch) for batch in batches])).item()
        stored.copy_(weight)
    return found


def _rounded(weight: Tensor, quantizer: WeightQuantizer, range_rule: str) -> Tensor:
    if range_rule == "mse":
        quantizer.set_scale(weight_mse(quantizer, weight))
        quantizer.keep_pairs(weight)
    quantizer.mode = "quantize"
    rounded: Tensor = quantizer(weight)
    return rounded


@dataclass(frozen=True, slots=True)
class Allocation:
    """A width for each weight."""

    widths: dict[str, int]
    bits: int
    """Bits that all weights take together, each at its own width."""
    sensitivity: float
    """Sum of the sensitivities, in nats."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """The allocations of which none other is both as small and as insensitive; an index names one.

    Built layer by layer: a point of one stage is a point of the stage before and a width of the next weight.
    """

    bits: np.ndarray
    """Bits that all weights take, int64 [P], rising."""
    sensitivity: np.ndarray
    """Sum of the sensitivities in nats, float64 [P], falling."""
    sizes: dict[str, int]
    """Values of each weight."""
    exact: bool
    """Whether no point was left out for want of memory (see `MOST_POINTS`)."""
    stages: tuple[tuple[np.ndarray, np.ndarray], ...]
    """For each weight: the width that a point takes, and its point in the stage before, each [P of the stage]."""

    def __len__(self) -> int:
        return len(self.bits)

    @property
    def num_weights(self) -> int:
        """Values of all weights together."""
        return sum(self.sizes.values())

    def allocation(self, index: int) -> Allocation:
        """Return the widths of a point."""
        index = range(len(self))[index]
        widths, point = {}, index
        for name, (chosen, before) in reversed(list(zip(self.sizes, self.stages, strict=True))):
            widths[name] = int(chosen[point])
            point = int(before[point])
        return Allocation(
            {name: widths[name] for name in self.sizes}, int(self.bits[index]), float(self.sensitivity[index])
        )

    def within(self, most_bits: float) -> int:
        """Return the least sensitive point that takes at most so many bits.

        Raises:
            InputError: even the smallest takes more.
        """
        index = int(np.searchsorted(self.bits, most_bits, side="right")) - 1
        if index < 0:
            raise InputError(f"the weights take at least {int(self.bits[0])} bits; {most_bits:.0f} are allowed.")
        return index


def pareto_frontier(
    sensitivities: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], *, most_points: int = MOST_POINTS
) -> Frontier:
    """Return all allocations that no other beats in size and summed sensitivity, by dynamic programming over weights.

    It is exact for sums of sensitivities while no stage holds more than `most_points` points. Beyond, the size axis is
    cut into that many steps and each keeps its least sensitive point: sizes stay exact, and a point is larger than the
    best of its sensitivity by at most one step for each weight.

    Args:
        sensitivities: ``{weight name: {width: nats}}``.
        sizes: values of each of these weights.
        most_points: kept after each weight.

    Source: Cai et al. 2020, ZeroQ, section 3.2.
    """
    bits, total = np.zeros(1, np.int64), np.zeros(1)
    exact, stages = True, []
    for name, table in sensitivities.items():
        widths = np.array(sorted(table), np.int64)
        costs = np.array([table[int(width)] for width in widths])
        all_bits = (bits[:, None] + sizes[name] * widths).ravel()
        all_total = (total[:, None] + costs).ravel()
        kept = _undominated(all_bits, all_total)
        if len(kept) > most_points:
            exact = False
            kept = kept[_thinned(all_bits[kept], most_points)]
        before, chosen = np.divmod(kept, len(widths))
        stages.append((widths[chosen].astype(np.int8), before.astype(np.int32)))
        bits, total = all_bits[kept], all_total[kept]
    return Frontier(bits, total, {name: sizes[name] for name in sensitivities}, exact, tuple(stages))


def _undominated(bits: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return the indices of points that no other beats, by rising bits; of equal points the first."""
    order = np.lexsort((total, bits))
    least = np.minimum.accumulate(total[order])
    falls = np.ones(len(order), bool)
    falls[1:] = least[1:] < least[:-1]
    return order[falls]


def _thinned(bits: np.ndarray, steps: int) -> np.ndarray:
    """Return the index of the last, hence least sensitive, point of each step of the size axis, and the smallest."""
    step = (bits - bits[0]) * (steps - 1) // (bits[-1] - bits[0])
    last = np.flatnonzero(np.diff(step, append=step[-1] + 1))
    return np.unique(np.concatenate([[0], last]))
