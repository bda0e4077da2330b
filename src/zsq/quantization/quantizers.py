"""The modules that a student is made of: quantizers of activations and of weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from zsq.quantization.fake_quantize import (
    SMALLEST_SCALE,
    UNCLIPPED,
    Clip,
    affine_grid,
    fake_quantize,
    integer_range,
    symmetric_grid,
)
from zsq.quantization.pair_sums import ROUNDING, neighbour_sums
from zsq.runtime import distributed
from zsq.runtime.gpu import kernels

SHAKE = 1 - 2.0**-22
"""What `answered_shaken` multiplies by: two roundings of a float32."""

Mode = Literal["off", "observe", "histogram", "quantize"]

HISTOGRAM_BINS = 2048
MOST_COUNTED = 2**24
"""Values that are counted at a time: `torch.histc` counts in float32, which ends there."""

DEAD_CHANNEL = 2.0**-16
"""Least scale of a channel over the largest of its weight: a channel of zeros needs one that its bias can live on."""


class ActivationQuantizer(nn.Module):
    """Quantizes one activation tensor per tensor, affine.

    Args:
        bits: width of the integers.
        learnable: train scale and zero point (LSQ+) instead of following a moving average of the range.
        averaging: weight of the newest batch in that moving average.
        symmetric: keep the zero point at 0.

    Attributes:
        mode: `observe` records the range, `histogram` counts values within it, `quantize` rounds, `off` passes on.
        scale, zero_point: the grid, each [1]; scale is 0 until a range is set.
        low, high: the range seen, each [1].
        reach: what the range holds at least, at most 0; `grid_hardswish` needs its input's to hold -3.
        shrink: factor of the value before it is rounded; see `answered_shaken`.
        low_factor, high_factor: what calibration made of the range seen, each [1]; moving averages keep it.
    """

    scale: nn.Parameter
    zero_point: nn.Parameter
    low: Tensor
    high: Tensor
    low_factor: Tensor
    high_factor: Tensor
    histogram: Tensor
    smallest: Tensor

    def __init__(self, bits: int, *, learnable: bool, averaging: float = 0.01, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.learnable, self.averaging, self.symmetric = bits, learnable, averaging, symmetric
        self.quant_min, self.quant_max = integer_range(bits)
        self.mode: Mode = "off"
        self.register_buffer("smallest", torch.full((1,), SMALLEST_SCALE), persistent=False)
        self.average_ranges = False
        self.reach = 0.0
        self.shrink = 1.0
        self.scale = nn.Parameter(torch.zeros(1), requires_grad=learnable)
        self.zero_point = nn.Parameter(torch.zeros(1), requires_grad=learnable and not symmetric)
        self.register_buffer("low", torch.full((1,), math.inf))
        self.register_buffer("high", torch.full((1,), -math.inf))
        self.register_buffer("low_factor", torch.ones(1))
        self.register_buffer("high_factor", torch.ones(1))
        self.register_buffer("histogram", torch.zeros(HISTOGRAM_BINS, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor, clip: Clip = UNCLIPPED) -> Tensor:
        """Map a tensor of any shape to one of the same shape; `clip` stands for an activation function in front."""
        if self.mode == "quantize":
            return self._quantize(x, clip)
        x = x if clip == UNCLIPPED else x.clamp(*clip)
        if self.mode == "observe":
            self._observe(x, self.averaging if self.average_ranges else None)
        elif self.mode == "histogram":
            low, high = self.low.item(), self.high.item()
            if low < high:
                for values in x.detach().float().flatten().split(MOST_COUNTED):
                    self.histogram += torch.histc(values, HISTOGRAM_BINS, low, high)
        return x

    def choose_range(self, low: Tensor, high: Tensor) -> None:
        """Take the grid that spans [low, high], chosen from the range seen; moving averages scale with it."""
        self.low_factor.copy_(torch.where(self.low != 0, low / self.low, 1))
        self.high_factor.copy_(torch.where(self.high != 0, high / self.high, 1))
        self.set_range(low, high)

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take the grid that spans [low, high]."""
        scale, zero_point = self.grid(low.view(1).clamp(max=self.reach), high.view(1))
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and zero point of the grids that span ranges [low, high], of any equal shape."""
        return (symmetric_grid if self.symmetric else affine_grid)(low, high, self.bits)

    @torch.no_grad()
    def _observe(self, x: Tensor, averaging: float | None, clip: Clip = UNCLIPPED) -> None:
        low, high = (end.clamp(*clip) for end in _seen(x))
        widest = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if averaging is not None:
            known = torch.isfinite(self.low)  # not read here: on a GPU, that would wait for the device
            low, high = (torch.lerp(old, new, averaging) for old, new in ((self.low, low), (self.high, high)))
            widest = torch.where(known, low, widest[0]), torch.where(known, high, widest[1])
        self.low.copy_(widest[0])
        self.high.copy_(widest[1])

    def _quantize(self, x: Tensor, clip: Clip) -> Tensor:
        if self.training and not self.learnable:
            if (fused := kernels(x)) is not None and not self.symmetric:
                fused.follow(self, _widest(*fused.ends(x.detach())), clip, SMALLEST_SCALE)
            else:
                self._observe(x, self.averaging, clip)
                self.set_range(self.low * self.low_factor, self.high * self.high_factor)
        x = x if self.shrink == 1 else x * self.shrink
        factor = 1 / math.sqrt(max(1, x[0].numel()) * self.quant_max)
        return fake_quantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max, factor, clip)


def _seen(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of all processes, each [1]."""
    low, high = torch.aminmax(x.detach())
    return distributed.widest(low.view(1), high.view(1))


def _widest(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of a tensor's parts as they are, or where several processes hold parts, of all, each [1]."""
    if distributed.size() == 1:
        return lows, highs
    return distributed.widest(lows.amin().view(1), highs.amax().view(1))


class WeightQuantizer(nn.Module):
    """Quantizes one weight, symmetric, per output channel or per tensor.

    Args:
        weight: [C, ...].
        bits: width of the integers.
        per_channel: one scale a channel instead of one for all.
        learnable: train the scales (LSQ) instead of following the weight's range.
        pair_limit: steps that two neighbours of one sign may sum to; see `zsq.quantization.pair_sums`. None: any.
        symmetric: leave out the smallest integer, which has no opposite.

    Attributes:
        scale: [C] or [1].
        smallest: least value of each scale that is learnt, as scale.
    """

    scale: nn.Parameter
    zero_point: Tensor
    smallest: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        *,
        per_channel: bool,
        learnable: bool,
        pair_limit: int | None = None,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.bits, self.per_channel, self.learnable, self.pair_limit = bits, per_channel, learnable, pair_limit
        self.quant_min, self.quant_max = integer_range(bits)
        self.quant_min += symmetric
        self.mode: Mode = "off"
        channels, device = weight.shape[0] if per_channel else 1, weight.device
        self.scale = nn.Parameter(torch.ones(channels, device=device), requires_grad=learnable)
        self.register_buffer("zero_point", torch.zeros(1, device=device))
        self.register_buffer("smallest", torch.empty(channels, device=device), persistent=False)
        self.factor = 1 / math.sqrt(weight.numel() / channels * self.quant_max)
        self.set_range(weight)

    def forward(self, weight: Tensor) -> Tensor:
        """Map the weight to one of the same shape on the grid."""
        if self.mode != "quantize":
            return weight
        if self.training and not self.learnable:
            self.set_range(weight.detach())
        scale = self.scale.view(-1, *[1] * (weight.dim() - 1))
        return fake_quantize(weight, scale, self.zero_point, self.quant_min, self.quant_max, self.factor)

    def set_range(self, weight: Tensor) -> None:
        """Take the scales that span the weight's largest magnitudes."""
        dims = [*range(1 if self.per_channel else 0, weight.dim())]
        largest = torch.linalg.vector_norm(weight.detach(), math.inf, dims).view(-1)
        steps = torch.full_like(
            largest, self.quant_max - self.quant_min
        )  # GPUs do not divide by a number, they multiply
        self.set_scale(largest * 2 / steps)
        self.keep_pairs(weight)

    def set_scale(self, scale: Tensor) -> None:
        """Take these scales, [C] or [1], raised to what keeps int32 biases from saturating."""
        with torch.no_grad():
            self.smallest.copy_((scale.max() * DEAD_CHANNEL).clamp_(min=SMALLEST_SCALE))
            torch.maximum(scale, self.smallest, out=self.scale)

    @torch.no_grad()
    def keep_pairs(self, weight: Tensor) -> None:
        """Raise the scales to what keeps each pair of neighbours of this weight within `pair_limit`."""
        if self.pair_limit is None:
            return
        sums = neighbour_sums(weight.detach())
        least = (sums if self.per_channel else sums.amax().view(1)) * (ROUNDING / self.pair_limit)
        torch.maximum(self.scale, least, out=self.scale)


def quantizers(network: nn.Module) -> list[ActivationQuantizer | WeightQuantizer]:
    """List the quantizers of a student, in the order of the graph."""
    return [module for module in network.modules() if isinstance(module, (ActivationQuantizer, WeightQuantizer))]


def set_mode(network: nn.Module, mode: Mode) -> None:
    """Switch the quantizers: weights are rounded in `quantize` only."""
    for quantizer in quantizers(network):
        quantizer.mode = mode


def answered_shaken(student: nn.Module, images: Tensor) -> Tensor:
    """Return a student's logits where every activation is two float32 roundings smaller before its grid rounds it.

    Runtimes round a sum or a product more or less often than the simulation does; so much of their logits' distance is
    no fault of a file, however far a deep network carries it.
    """
    found = [q for q in quantizers(student) if isinstance(q, ActivationQuantizer)]
    try:
        for quantizer in found:
            quantizer.shrink = SHAKE
        logits: Tensor = student(images)
        return logits
    finally:
        for quantizer in found:
            quantizer.shrink = 1.0


@contextmanager
def straight_through(student: nn.Module) -> Iterator[None]:
    """Let gradients pass through a student to its images and change nothing of it.

    Within the block the student is in evaluation, so that no quantizer observes, and none of its parameters takes a
    gradient. The backward pass may follow the block, as long as it comes before the student's next update.

    Args:
        student: calibrated, its quantizers on; in training or evaluation, which it is again afterwards.
    """
    was_training = student.training
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    student.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        student.train(was_training)


@torch.no_grad()
def constrain(network: nn.Module) -> None:
    """Keep learnt scales positive and zero points on the integers; to be called after each optimizer step."""
    found = [quantizer for quantizer in quantizers(network) if quantizer.learnable]
    if not found:  # what follows ranges is so at every step
        return
    torch._foreach_maximum_([q.scale for q in found], [q.smallest for q in found])
    zeros = [q.zero_point for q in found]
    torch._foreach_clamp_min_(zeros, [float(q.quant_min) for q in found])
    torch._foreach_clamp_max_(zeros, [float(q.quant_max) for q in found])
    for quantizer in found:
        if isinstance(quantizer, ActivationQuantizer) and quantizer.reach:
            quantizer.scale.clamp_(min=-quantizer.reach / (quantizer.quant_max - quantizer.quant_min))
            steps = (-quantizer.reach / quantizer.scale).round()
            quantizer.zero_point.copy_(torch.maximum(quantizer.zero_point, quantizer.quant_min + steps))
