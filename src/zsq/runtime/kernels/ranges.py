"""Ranges of activations, and grids that follow them."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsq.runtime.kernels.base import BLOCK, PARTS, dense, rounded


@triton.jit
def _ends(
    x_at: tl.tensor,
    lows_at: tl.tensor,
    highs_at: tl.tensor,
    count: tl.tensor,
    length: tl.tensor,
    block: tl.constexpr,
) -> None:
    part = tl.program_id(0).to(tl.int64)
    lows, highs = tl.full([block], float("inf"), tl.float32), tl.full([block], -float("inf"), tl.float32)
    broken = tl.zeros([block], dtype=tl.int32)
    for first in range(0, length, block):
        places = part * length + first + tl.arange(0, block)
        here = places < count
        x = tl.load(x_at + places, mask=here, other=0.0).to(tl.float32)
        broken += tl.where(here & (x != x), 1, 0)  # noqa: PLR0124  not a number
        lows, highs = tl.minimum(lows, tl.where(here, x, lows)), tl.maximum(highs, tl.where(here, x, highs))
    whole = tl.sum(broken) == 0
    tl.store(lows_at + part, tl.where(whole, tl.min(lows), float("nan")))
    tl.store(highs_at + part, tl.where(whole, tl.max(highs), float("nan")))


def ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each of at most `PARTS` parts; not a number where there is one."""
    x = dense(x)
    length = triton.cdiv(triton.cdiv(x.numel(), PARTS), BLOCK) * BLOCK
    parts = triton.cdiv(x.numel(), length)
    lows, highs = torch.empty(2, parts, device=x.device).unbind()
    _ends[(parts,)](x, lows, highs, x.numel(), length, BLOCK)
    return lows, highs


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
    parts: tl.tensor,
    floor: tl.tensor,
    ceiling: tl.tensor,
    averaging: tl.constexpr,
    reach: tl.constexpr,
    least: tl.constexpr,
    most: tl.constexpr,
    smallest: tl.constexpr,
    block: tl.constexpr,
) -> None:
    places = tl.arange(0, block)
    lows = tl.load(seen_low_at + places, mask=places < parts, other=float("inf"))
    highs = tl.load(seen_high_at + places, mask=places < parts, other=-float("inf"))
    broken = tl.sum(tl.where(lows != lows, 1, 0)) > 0  # noqa: PLR0124  not a number
    seen_low = tl.where(broken, float("nan"), tl.minimum(tl.maximum(tl.min(lows), floor), ceiling))
    seen_high = tl.where(broken, float("nan"), tl.minimum(tl.maximum(tl.max(highs), floor), ceiling))
    low, high = tl.load(low_at), tl.load(high_at)
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


def follow(quantizer: Any, seen: tuple[Tensor, Tensor], clip: tuple[float, float], smallest: float) -> None:
    """Move the range of an `ActivationQuantizer` towards that of its input's parts, and its grid with it, in place."""
    state = (quantizer.low, quantizer.high, quantizer.low_factor, quantizer.high_factor)
    grid = (quantizer.scale, quantizer.zero_point)
    ends = (quantizer.reach, quantizer.quant_min, quantizer.quant_max)
    _follow[(1,)](*seen, *state, *grid, len(seen[0]), *clip, quantizer.averaging, *ends, smallest, PARTS)
