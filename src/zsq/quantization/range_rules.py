"""Range rules: which range of values the grid spans, given what was seen."""

from collections.abc import Callable

import torch
from torch import Tensor

from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer

PERCENTILE = 99.99
"""Percent of the values that the percentile rule keeps inside the range."""

FRACTIONS = torch.cat([torch.linspace(0.02, 0.2, 19), torch.linspace(0.21, 1.0, 80)])
"""Shares of the seen range that the MSE rule tries."""


def minmax(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    """Return the range seen, or its moving average."""
    return quantizer.low, quantizer.high


def percentile(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    """Return the range that leaves out an equal share of the smallest and the largest values."""
    centres = _centres(quantizer)
    cumulative = quantizer.histogram.double().cumsum(0) / quantizer.histogram.double().sum().clamp(min=1)
    outside = (100 - PERCENTILE) / 200
    low = centres[torch.searchsorted(cumulative, outside).clamp(max=len(centres) - 1)]
    high = centres[torch.searchsorted(cumulative, 1 - outside).clamp(max=len(centres) - 1)]
    return low.view(1), high.view(1)


def mse(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor]:
    """Return the range of least squared rounding error: both ends shrunk together, then each alone."""
    if not quantizer.histogram.any():  # every value was the same
        return minmax(quantizer)
    fractions = FRACTIONS.to(quantizer.low.device)
    low, high = quantizer.low, quantizer.high
    best = _least(quantizer, low * fractions, high * fractions)
    for _ in range(2):
        best = _least(quantizer, low * fractions, best[1].expand_as(fractions))
        best = _least(quantizer, best[0].expand_as(fractions), high * fractions)
    return best


def _least(quantizer: ActivationQuantizer, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return that of the candidate ranges [K] whose grid rounds the histogram with the least squared error."""
    scale, zero_point = (t.unsqueeze(1) for t in quantizer.grid(low, high))
    values = _centres(quantizer).unsqueeze(0)
    integers = (values / scale + zero_point).round_().clamp_(quantizer.quant_min, quantizer.quant_max)
    error = (integers.sub_(zero_point).mul_(scale).sub_(values).square_() * quantizer.histogram).sum(1)
    best = int(error.argmin())
    return low[best].view(1), high[best].view(1)


def _centres(quantizer: ActivationQuantizer) -> Tensor:
    bins = len(quantizer.histogram)
    steps = (torch.arange(bins, device=quantizer.low.device) + 0.5) / bins
    return quantizer.low + (quantizer.high - quantizer.low) * steps


def weight_mse(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    """Return the scales, [C] or [1], of least squared rounding error of a weight [C, ...]."""
    rows = weight.flatten(1) if quantizer.per_channel else weight.view(1, -1)
    largest = rows.abs().amax(1) * 2 / (quantizer.quant_max - quantizer.quant_min)
    best_error = torch.full_like(largest, torch.inf)
    best = largest.clone()
    for fraction in FRACTIONS[FRACTIONS >= 0.3].tolist():
        scale = (largest * fraction).clamp(min=1e-12).unsqueeze(1)
        rounded = (rows / scale).round_().clamp_(quantizer.quant_min, quantizer.quant_max).mul_(scale)
        error = rounded.sub_(rows).square_().sum(1)
        best = torch.where(error < best_error, scale.squeeze(1), best)
        best_error = torch.minimum(error, best_error)
    return best


RULES: dict[str, Callable[[ActivationQuantizer], tuple[Tensor, Tensor]]] = {
    "minmax": minmax,
    "moving-average": minmax,
    "percentile": percentile,
    "mse": mse,
}
"""Every rule by name; `percentile` and `mse` read a histogram, taken in a second pass over the same images."""

NEEDS_HISTOGRAM = ("percentile", "mse")
