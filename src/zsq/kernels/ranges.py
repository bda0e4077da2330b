"""Ranges of activations, and grids that follow them."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsq.kernels.base import BLOCK, dense, rounded


@triton.jit
def _ends(x_at: tl.tensor, lows_at: tl.tensor, highs_at: tl.tensor, count: tl.tensor, block: tl.constexpr) -> None:
    part = tl.program_id(0)
    places = part.to(tl.int64) * block + tl.arange(0, block)
    here = places < count
    x = tl.load(x_at + places, mask=here, other=0.0).to(tl.float32)
    broken = tl.sum(tl.where(here & (x != x), 1, 0)) > 0  # noqa: PLR0124  not a number
    low, high = tl.min(tl.where(here, x, float("inf"))), tl.max(tl.where(here, x, -float("inf")))
    tl.store(lows_at + part, tl.where(broken, float("nan"), low))
    tl.store(highs_at + part, tl.where(broken, float("nan"), high))


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value, each [1]; not a number where there is such a value."""
    x = dense(x)
    parts = triton.cdiv(x.numel(), BLOCK)
    lows, highs = torch.empty(2, parts, device=x.device).unbind()
    _ends[(parts,)](x, lows, highs, x.numel(), BLOCK)
    return lows.amin().view(1), highs.amax().view(1)


@triton.jit
def _follow(
    seen_low_at: tl.tensor,
    seen_high_at: tl.tensor,
    low_at: tl.tensor,
    high_at: tl.tensor,
    low_factor_at: tl.tensor,
    high_factor_at: tl.tensor,
    scale_at: tl.tensor,
    zero_at: tl.tensor,
    averaging: tl.constexpr,
    reach: tl.constexpr,
    least: tl.constexpr,
    most: tl.constexpr,
    smallest: tl.constexpr,
) -> None:
    seen_low, seen_high, low, high = tl.load(seen_low_at), tl.load(seen_high_at), tl.load(low_at), tl.load(high_at)
    known = tl.abs(low) < float("inf")
    low = tl.where(known, low + averaging * (seen_low - low), tl.minimum(low, seen_low))
    high = tl.where(known, high + averaging * (seen_high - high), tl.maximum(high, seen_high))
    tl.store(low_at, low)
    tl.store(high_at, high)
    low = tl.minimum(tl.minimum(low * tl.load(low_factor_at), reach), 0.0)
    high = tl.maximum(high * tl.load(high_factor_at), 0.0)
    scale = tl.maximum((high - low) / (most - least), smallest)
    zero = tl.clamp(rounded(least - low / scale), least + 0.0, most + 0.0)
    below = tl.where(zero > least, -low / tl.maximum(zero - least, 1.0), 0.0)
    above = tl.where(zero < most, high / tl.maximum(most - zero, 1.0), 0.0)
    scale = tl.maximum(tl.maximum(below, above), smallest)
    tl.store(scale_at, tl.where(low < high, scale, 1.0))
    tl.store(zero_at, zero)


def follow(quantizer: Any, seen: tuple[Tensor, Tensor], smallest: float) -> None:
    """Move the range of an `ActivationQuantizer` towards the range just seen, and its grid with it, in place."""
    state = (quantizer.low, quantizer.high, quantizer.low_factor, quantizer.high_factor)
    grid = (quantizer.scale, quantizer.zero_point)
    ends = (quantizer.reach, quantizer.quant_min, quantizer.quant_max)
    _follow[(1,)](*seen, *state, *grid, quantizer.averaging, *ends, smallest)
