"""Fake quantization."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsq.kernels.base import BLOCK, WEIGHT_BLOCK, dense, like, rounded


@triton.jit
def _on_grid(x: tl.tensor, scale: tl.tensor, zero: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    """Return what `fake_quantize` makes of x, bit for bit; not a number stays that."""
    integers = rounded(tl.div_rn(x, scale))
    return tl.clamp(integers, low - zero, high - zero, propagate_nan=tl.PropagateNan.ALL) * scale


@triton.jit
def _fake_quantize(
    x_at: tl.tensor,
    y_at: tl.tensor,
    scale_at: tl.tensor,
    zero_at: tl.tensor,
    count: tl.tensor,
    low: tl.constexpr,
    high: tl.constexpr,
    block: tl.constexpr,
) -> None:
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = places < count
    scale, zero = tl.load(scale_at), rounded(tl.load(zero_at))
    x = tl.load(x_at + places, mask=here, other=0.0).to(tl.float32)
    tl.store(y_at + places, _on_grid(x, scale, zero, low, high), mask=here)


@triton.jit
def _fake_quantize_back(
    x_at: tl.tensor,
    given_at: tl.tensor,
    passed_at: tl.tensor,
    sums_at: tl.tensor,
    scale_at: tl.tensor,
    zero_at: tl.tensor,
    count: tl.tensor,
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
    x = tl.load(x_at + places, mask=here, other=0.0).to(tl.float32)
    given = tl.load(given_at + places, mask=here, other=0.0).to(tl.float32)
    y = _on_grid(x, scale, zero, low, high)
    steps = tl.div_rn(y - x, scale)
    inside = tl.abs(steps) < half_step
    tl.store(passed_at + places, tl.where(inside, given, 0.0), mask=here)
    if trained:
        slope = tl.where(inside, steps, tl.div_rn(y, scale))
        tl.store(sums_at + part, tl.sum(slope * given))
        tl.store(sums_at + tl.num_programs(0) + part, tl.sum(tl.where(inside, 0.0, given)))


@triton.jit
def _fake_quantize_channels(
    x_at: tl.tensor,
    y_at: tl.tensor,
    scale_at: tl.tensor,
    length: tl.tensor,
    low: tl.constexpr,
    high: tl.constexpr,
    block: tl.constexpr,
) -> None:
    channel = tl.program_id(0)
    scale = tl.load(scale_at + channel)
    for start in range(0, length, block):
        offsets = start + tl.arange(0, block)
        here, places = offsets < length, channel.to(tl.int64) * length + offsets
        x = tl.load(x_at + places, mask=here, other=0.0)
        tl.store(y_at + places, _on_grid(x, scale, scale * 0.0, low, high), mask=here)


@triton.jit
def _fake_quantize_channels_back(
    x_at: tl.tensor,
    given_at: tl.tensor,
    passed_at: tl.tensor,
    slope_at: tl.tensor,
    scale_at: tl.tensor,
    length: tl.tensor,
    factor: tl.tensor,
    low: tl.constexpr,
    high: tl.constexpr,
    half_step: tl.constexpr,
    block: tl.constexpr,
) -> None:
    channel = tl.program_id(0)
    scale = tl.load(scale_at + channel)
    sums = tl.zeros([block], dtype=tl.float32)
    for start in range(0, length, block):
        offsets = start + tl.arange(0, block)
        here, places = offsets < length, channel.to(tl.int64) * length + offsets
        x = tl.load(x_at + places, mask=here, other=0.0)
        given = tl.load(given_at + places, mask=here, other=0.0)
        y = _on_grid(x, scale, scale * 0.0, low, high)
        steps = tl.div_rn(y - x, scale)
        inside = tl.abs(steps) < half_step
        tl.store(passed_at + places, tl.where(inside, given, 0.0), mask=here)
        sums += tl.where(inside, steps, tl.div_rn(y, scale)) * given
    tl.store(slope_at + channel, tl.sum(sums) * factor)


class FakeQuantize(torch.autograd.Function):
    """`zsq.quantize.fakequant.fake_quantize` for one scale; what is summed is summed in the same order every time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        low: int,
        high: int,
        factor: float,
        half_step: float,
    ) -> Tensor:
        """Round x."""
        x = dense(x)
        y = torch.empty_like(x)
        parts = triton.cdiv(x.numel(), BLOCK)
        _fake_quantize[(parts,)](x, y, scale, zero_point, x.numel(), low, high, BLOCK)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.range, ctx.factor, ctx.half_step = (low, high), factor, half_step
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
            return passed, *[None] * 6
        slope, lost = (sums.sum(1, keepdim=True) * ctx.factor).unbind()
        return passed, slope, lost * -scale, *[None] * 4


class FakeQuantizeChannels(torch.autograd.Function):
    """`zsq.quantize.fakequant.fake_quantize` for a scale a channel, [C], of a float32 weight [C, ...], zero point 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, factor: float, half_step: float) -> Tensor:
        """Round x."""
        x = dense(x)
        y = torch.empty_like(x)
        _fake_quantize_channels[(len(x),)](x, y, scale, x[0].numel(), low, high, WEIGHT_BLOCK)
        ctx.save_for_backward(x, scale)
        ctx.range, ctx.factor, ctx.half_step = (low, high), factor, half_step
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the scales."""
        x, scale = ctx.saved_tensors
        grad, passed, slope = like(grad, x), torch.empty_like(x), torch.empty_like(scale)
        _fake_quantize_channels_back[(len(x),)](
            x, grad, passed, slope, scale, x[0].numel(), ctx.factor, *ctx.range, ctx.half_step, WEIGHT_BLOCK
        )
        return passed, slope, None, None, None, None
