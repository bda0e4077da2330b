"""Fake quantization."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsq.runtime.kernels.base import BLOCK, PARTS, dense, like, rounded


@triton.jit
def on_grid(x: tl.tensor, scale: tl.tensor, zero: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Return what `fake_quantize` makes of x, bit for bit; not a number stays that."""
    integers = rounded(tl.div_rn(x, scale))
    return tl.clamp(integers, low - zero, high - zero, propagate_nan=tl.PropagateNan.ALL) * scale


@triton.jit
def clipped(x: tl.tensor, floor: tl.tensor, ceiling: tl.tensor) -> tl.tensor:
    """Return x within its limits; not a number stays that."""
    return tl.clamp(x, floor, ceiling, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _fake_quantize(
    x_at: tl.tensor,
    y_at: tl.tensor,
    scale_at: tl.tensor,
    zero_at: tl.tensor,
    count: tl.tensor,
    floor: tl.tensor,
    ceiling: tl.tensor,
    low: tl.constexpr,
    high: tl.constexpr,
    block: tl.constexpr,
) -> None:
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = places < count
    scale, zero = tl.load(scale_at), rounded(tl.load(zero_at))
    x = clipped(tl.load(x_at + places, mask=here, other=0.0).to(tl.float32), floor, ceiling)
    tl.store(y_at + places, on_grid(x, scale, zero, low, high), mask=here)


@triton.jit
def _fake_quantize_back(
    x_at: tl.tensor,
    given_at: tl.tensor,
    passed_at: tl.tensor,
    sums_at: tl.tensor,
    scale_at: tl.tensor,
    zero_at: tl.tensor,
    count: tl.tensor,
    floor: tl.tensor,
    ceiling: tl.tensor,
    low: tl.constexpr,
    high: tl.constexpr,
    half_step: tl.constexpr,
    trained: tl.constexpr,
    block: tl.constexpr,
) -> None:
    part = tl.program_id(0)
    places = part.to(tl.int64) * block + tl.arange(0, block)
    here = places < count
    scale, zero = tl.load(scale_at), rounded(tl.load(zero_at))
    given_x = tl.load(x_at + places, mask=here, other=0.0).to(tl.float32)
    given = tl.load(given_at + places, mask=here, other=0.0).to(tl.float32)
    x = clipped(given_x, floor, ceiling)
    y = on_grid(x, scale, zero, low, high)
    steps = tl.div_rn(y - x, scale)
    inside = tl.abs(steps) < half_step
    tl.store(passed_at + places, tl.where(inside & (given_x > floor) & (given_x < ceiling), given, 0.0), mask=here)
    if trained:
        slope = tl.where(inside, steps, tl.div_rn(y, scale))
        tl.store(sums_at + part, tl.sum(slope * given))
        tl.store(sums_at + tl.num_programs(0) + part, tl.sum(tl.where(inside, 0.0, given)))


@triton.jit
def _sum_slopes(
    sums_at: tl.tensor,
    slopes_at: tl.tensor,
    scale_at: tl.tensor,
    parts: tl.tensor,
    factor: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Write the gradients of scale and zero point, of the sums of every part."""
    slope, lost = tl.zeros([block], dtype=tl.float32), tl.zeros([block], dtype=tl.float32)
    for first in range(0, parts, block):
        places = first + tl.arange(0, block)
        slope += tl.load(sums_at + places, mask=places < parts, other=0.0)
        lost += tl.load(sums_at + parts + places, mask=places < parts, other=0.0)
    tl.store(slopes_at, tl.sum(slope) * factor)
    tl.store(slopes_at + 1, tl.sum(lost) * factor * -tl.load(scale_at))


class FakeQuantize(torch.autograd.Function):
    """`quantization.fake_quantize.fake_quantize` for one scale; sums are taken in the same order every time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        low: int,
        high: int,
        factor: float,
        clip: tuple[float, float],
        half_step: float,
    ) -> Tensor:
        """Round x."""
        x = dense(x)
        y = torch.empty_like(x)
        parts = triton.cdiv(x.numel(), BLOCK)
        _fake_quantize[(parts,)](x, y, scale, zero_point, x.numel(), *clip, low, high, BLOCK)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.range, ctx.factor, ctx.half_step = (*clip, low, high), factor, half_step
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, scale and zero point."""
        x, scale, zero_point = ctx.saved_tensors
        grad, passed = like(grad, x), torch.empty_like(x)
        parts = triton.cdiv(x.numel(), BLOCK)
        trained = any(ctx.needs_input_grad[1:3])
        sums = torch.empty(2, parts if trained else 0, device=x.device)
        state = (x, grad, passed, sums, scale, zero_point, x.numel())
        _fake_quantize_back[(parts,)](*state, *ctx.range, ctx.half_step, trained, BLOCK)
        if not trained:
            return passed, *[None] * 7
        slopes = torch.empty(2, 1, device=x.device)
        _sum_slopes[(1,)](sums, slopes, scale, parts, ctx.factor, PARTS)
        return passed, *slopes.unbind(), *[None] * 5
