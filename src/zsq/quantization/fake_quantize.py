"""Fake quantization: float tensors that hold only the values an integer file can hold."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from zsq.runtime.gpu import kernels

Clip = tuple[float, float]
"""The least and the largest value that an activation function lets through."""

UNCLIPPED: Clip = (-math.inf, math.inf)

SMALLEST_SCALE = 1e-8
PIECE = 2**17
"""Values that are rounded at a time: half a MiB, so that all passes over them but the first find them in the cache."""

HALF_STEP = 0.5001
"""What rounding moves a value by at most, in steps, with room for the float's own rounding: beyond lies the outside."""

INT32_LIMIT = float(2**31 - 128)
"""The largest int32 that a float32 holds."""


hardtanh_backward = torch.ops.aten.hardtanh_backward


def integer_range(bits: int) -> tuple[int, int]:
    """Return the smallest and largest integer of `bits`, two's complement; stored in int8.

    >>> integer_range(4)
    (-8, 7)
    """
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def affine_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point whose grid spans [low, high] and holds 0 exactly; an end within half a step of 0 becomes 0.

    The zero point is rounded first and the scale then widened so that no other end is cut off. Keeping the scale, as is
    often done, puts every pixel of an image in [-1, 1] halfway between two grid points. What is always 0 gets the scale
    1: the next layer's bias is held in steps of it, and would saturate with the smallest.

    Args:
        low, high: ends of the range, any equal shape.
        bits: width of the integers.

    Returns:
        Scale and zero point (a float holding an integer), of the same shape.
    """
    quant_min, quant_max = integer_range(bits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=SMALLEST_SCALE)
    zero_point = (quant_min - low / scale).round().clamp(quant_min, quant_max)
    below = torch.where(zero_point > quant_min, -low / (zero_point - quant_min), 0)
    above = torch.where(zero_point < quant_max, high / (quant_max - zero_point), 0)
    scale = torch.maximum(below, above).clamp(min=SMALLEST_SCALE)
    return torch.where(low < high, scale, 1.0), zero_point


def symmetric_grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point 0 of the grid that spans [low, high] with as many steps on both sides; as `affine_grid`."""
    _, quant_max = integer_range(bits)
    largest = torch.maximum(-low, high).clamp(min=0)
    scale = (largest / quant_max).clamp(min=SMALLEST_SCALE)
    return torch.where(largest > 0, scale, 1.0), torch.zeros_like(scale)


def grid_integers(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, out: Tensor | None = None
) -> Tensor:
    """Return the integers of a grid nearest to x, as float: those simulated and those stored."""
    return torch.div(x, scale, out=out).round_().add_(zero_point).clamp_(quant_min, quant_max)


class _FakeQuantize(torch.autograd.Function):
    """`fake_quantize` in passes over memory that the processor's vector units do whole, piece by piece in its cache."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        factor: float,
        clip: Clip,
    ) -> Tensor:
        offset, y = zero_point.round(), torch.empty_like(x)
        for x_piece, y_piece in _pieces(scale, x, y):
            clipped = x_piece if clip == UNCLIPPED else torch.clamp(x_piece, *clip, out=y_piece)
            grid_integers(clipped, scale, offset, quant_min, quant_max, out=y_piece).sub_(offset).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        ctx.factor, ctx.clip = factor, clip
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale = ctx.saved_tensors
        trained, passed = any(ctx.needs_input_grad[1:3]), torch.empty_like(x)
        grad_scale, lost = torch.zeros_like(scale), scale.new_zeros(())
        for x_piece, y_piece, given, inside in _pieces(scale, x, y, grad, passed):
            clipped = x_piece if ctx.clip == UNCLIPPED else x_piece.clamp(*ctx.clip)
            steps = (y_piece - clipped).div_(scale)
            hardtanh_backward(given, steps, -HALF_STEP, HALF_STEP, grad_input=inside)
            if trained:
                outside = given - inside
                grad_scale += _inner(inside, steps, scale) + _inner(outside, y_piece, scale) / scale
                lost += outside.sum()
            if ctx.clip != UNCLIPPED:
                hardtanh_backward(inside, x_piece, *ctx.clip, grad_input=inside)
        if not trained:
            return passed, *[None] * 6
        grad_zero = lost * scale * -ctx.factor if ctx.needs_input_grad[2] else None
        return passed, grad_scale * ctx.factor, grad_zero, *[None] * 4


def _pieces(scale: Tensor, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Return tensors of one shape in the same small, flat parts where they share a scale and lie alike in memory."""
    first = tensors[0]
    if first.is_cuda:  # no cache to keep them in, and every part would cost a start
        return [tensors]
    dense = first.is_contiguous() or (first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last))
    if scale.numel() > 1 or not dense or any(tensor.stride() != first.stride() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.as_strided((tensor.numel(),), (1,)).split(PIECE) for tensor in tensors), strict=True)


def _inner(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Sum a * b over all but the dimensions that `like` has; no temporary for flat tensors."""
    return torch.dot(a, b).view(like.shape) if a.dim() == b.dim() == 1 else (a * b).sum_to_size(like.shape)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    factor: float = 1.0,
    clip: Clip = UNCLIPPED,
) -> Tensor:
    r"""Round to a grid and back to float, literally as the file does, division included.

    .. math:: y = s\,(clip(round(x/s) + z, q_{min}, q_{max}) - z)

    Gradients: straight through inside the grid and none outside for x; for the scale (y - x) / s inside and y / s
    outside, for the zero point -s outside, both times `factor`. An activation in front, such as ReLU, is a clip of x
    that costs no pass over memory of its own. PyTorch's own CPU kernels took twice as long
    on activations (benchmarks/fakequant.py), and its GPU kernels read the scale back to the host.

    Args:
        x: any shape.
        scale: [1], or [C, 1, ...] for one grid a channel of x [C, ...].
        zero_point: [1]; it is rounded.
        quant_min, quant_max: the smallest and the largest integer.
        factor: of the gradients of scale and zero point.
        clip: limits of x before it is rounded; there and beyond, x has no gradient.

    Returns:
        As x.

    Source: Esser et al. 2020, LSQ, section 2.1; Bhalgat et al. 2020, LSQ+, section 3.1.
    """
    scale = scale.view(1) if scale.numel() == 1 else scale
    grid = (scale, zero_point, quant_min, quant_max, factor, clip)
    rounded: Tensor
    if scale.numel() == 1 and (fused := kernels(x)) is not None:
        rounded = fused.FakeQuantize.apply(x, *grid, HALF_STEP)
    else:
        rounded = _FakeQuantize.apply(x, *grid)  # type: ignore[no-untyped-call]
    return rounded


def keep_bias(bias: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Return a bias as it is, for targets that hold it in float."""
    del activation_scale, weight_scale
    return bias


def quantize_bias(bias: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Round a bias to int32 multiples of input scale x weight scale, as the file stores it; gradients pass straight.

    Args:
        bias: [C].
        activation_scale: of the layer's input, [1]; at 0, before calibration, the bias stays as it is.
        weight_scale: [C] or [1].

    Returns:
        [C].
    """
    if (fused := kernels(bias)) is not None:
        fused_bias: Tensor = fused.RoundBias.apply(bias, activation_scale.detach(), weight_scale.detach(), INT32_LIMIT)
        return fused_bias
    scale = (activation_scale * weight_scale).detach()
    rounded = torch.where(scale > 0, bias_integers(bias.detach(), scale) * scale, bias)
    return bias + (rounded - bias).detach()


def bias_integers(bias: Tensor, scale: Tensor) -> Tensor:
    """Return the integers of a bias, [C], as float; saturated to int32."""
    return saturated((bias / scale).round())


def saturated(integers: Tensor) -> Tensor:
    """Limit float integers to what int32 holds."""
    return integers.clamp(-INT32_LIMIT, INT32_LIMIT)


BIASES = (quantize_bias, keep_bias)
"""What stands between a layer and its stored bias in a student's graph."""
