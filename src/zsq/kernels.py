"""Kernels for GPUs, in Triton, which this module imports: what a step does a value at a time, in one pass.

PyTorch has no kernel for most of it, or one that reads scales back to the host, for which every layer would wait. With
one kernel for each operation instead, a student's step took 1.3 to 1.7 times as long (benchmarks/step.py, H100).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Values of one program."""

WEIGHT_BLOCK = 512
"""Values of a channel that a program takes at a time."""

INTEGERS = tl.constexpr(8388608.0)
"""2**23: a float32 from there on is an integer."""


@triton.jit
def _rounded(x: tl.tensor) -> tl.tensor:
    """Round to the nearest integer, halves to the even one."""
    away = tl.where(x < 0, -INTEGERS, INTEGERS)
    return tl.where(tl.abs(x) < INTEGERS, (x + away) - away, x)


@triton.jit
def _on_grid(x: tl.tensor, scale: tl.tensor, zero: tl.tensor, low: tl.constexpr, high: tl.constexpr) -> tl.tensor:
    """Return what `fake_quantize` makes of x, bit for bit; not a number stays that."""
    integers = _rounded(tl.div_rn(x, scale))
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
    scale, zero = tl.load(scale_at), _rounded(tl.load(zero_at))
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
    block: tl.constexpr,
) -> None:
    part = tl.program_id(0)
    places = part.to(tl.int64) * block + tl.arange(0, block)
    here = places < count
    scale, zero = tl.load(scale_at), _rounded(tl.load(zero_at))
    x = tl.load(x_at + places, mask=here, other=0.0).to(tl.float32)
    given = tl.load(given_at + places, mask=here, other=0.0).to(tl.float32)
    y = _on_grid(x, scale, zero, low, high)
    steps = tl.div_rn(y - x, scale)
    inside = tl.abs(steps) < half_step
    tl.store(passed_at + places, tl.where(inside, given, 0.0), mask=here)
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
        sums = torch.empty(2, parts, device=x.device)
        _fake_quantize_back[(parts,)](
            x, grad, passed, sums, scale, zero_point, x.numel(), *ctx.range, ctx.half_step, BLOCK
        )
        slope, lost = (sums.sum(1, keepdim=True) * ctx.factor).unbind()
        return passed, slope, lost * -scale, None, None, None, None


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


def dense(x: Tensor) -> Tensor:
    """Return x, copied where its values do not fill one stretch of memory, or first dimensions do not come first."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return x, copied where it does not lie in memory as another tensor of its shape does."""
    return x if x.stride() == other.stride() else torch.empty_like(other, dtype=x.dtype).copy_(x)


@triton.jit
def _round_bias(
    bias_at: tl.tensor,
    out_at: tl.tensor,
    activation_at: tl.tensor,
    weight_at: tl.tensor,
    count: tl.tensor,
    each: tl.constexpr,
    limit: tl.constexpr,
    block: tl.constexpr,
) -> None:
    places = tl.program_id(0) * block + tl.arange(0, block)
    here = places < count
    scale = tl.load(activation_at) * tl.load(weight_at + places * each, mask=here, other=1.0)
    bias = tl.load(bias_at + places, mask=here, other=0.0)
    integers = tl.clamp(_rounded(tl.div_rn(bias, scale)), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_at + places, tl.where(scale > 0, integers * scale, bias), mask=here)


class RoundBias(torch.autograd.Function):
    """`zsq.quantize.fakequant.quantize_bias`."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, activation_scale: Tensor, weight_scale: Tensor, limit: float) -> Tensor:
        """Round a bias."""
        del ctx
        out, count = torch.empty_like(bias), bias.numel()
        parts, each = triton.cdiv(count, WEIGHT_BLOCK), int(weight_scale.numel() > 1)
        _round_bias[(parts,)](bias, out, activation_scale, weight_scale, count, each, limit, WEIGHT_BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient on."""
        del ctx
        return grad, None, None, None


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
    zero = tl.clamp(_rounded(least - low / scale), least + 0.0, most + 0.0)
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


@triton.jit
def _by_channel(
    x_at: tl.tensor,
    given_at: tl.tensor,
    out_at: tl.tensor,
    scale_at: tl.tensor,
    shift_at: tl.tensor,
    mean_at: tl.tensor,
    grad_mean_at: tl.tensor,
    grad_var_at: tl.tensor,
    count: tl.tensor,
    channels: tl.tensor,
    inner: tl.tensor,
    values: tl.tensor,
    kind: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Write x * scale + shift (`forward`), or the gradient of that and of the moments (`both`), or of those alone."""
    places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = places < count
    channel = ((places // inner) % channels).to(tl.int32)
    x = tl.load(x_at + places, mask=here, other=0.0).to(tl.float32)
    if kind == "forward":
        out = x * tl.load(scale_at + channel) + tl.load(shift_at + channel)
    else:
        slope = tl.load(grad_var_at + channel) * (2 / values)
        out = tl.load(grad_mean_at + channel) / values + slope * (x - tl.load(mean_at + channel))
        if kind == "both":
            out += tl.load(given_at + places, mask=here, other=0.0).to(tl.float32) * tl.load(scale_at + channel)
    tl.store(out_at + places, out, mask=here)


def scaled(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x * scale + shift, each [C] in float32, for x [N, C, ...]."""
    out = torch.empty_like(x)
    _launch("forward", x, x, out, scale, shift, scale, scale, scale)
    return out


def moments_gradient(
    x: Tensor,
    mean: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    grad: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Return the gradient to x [N, C, ...] of its moments, each [C], and where given, of x * scale."""
    out, kind = torch.empty_like(x), "moments" if grad is None else "both"
    given = x if grad is None else like(grad, x)
    scale = mean if scale is None else scale
    _launch(kind, x, given, out, scale, scale, mean, grad_mean.contiguous(), grad_var.contiguous())
    return out


def _launch(kind: str, x: Tensor, given: Tensor, out: Tensor, *by_channel: Tensor) -> None:
    channels = x.shape[1]
    inner = 1 if x.dim() == 2 or x.stride(1) == 1 else x[0, 0].numel()
    parts, values = triton.cdiv(x.numel(), BLOCK), x.numel() // channels
    _by_channel[(parts,)](x, given, out, *by_channel, x.numel(), channels, inner, float(values), kind, BLOCK)
