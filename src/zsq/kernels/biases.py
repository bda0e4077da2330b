"""Rounded and centred biases."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsq.kernels.base import WEIGHT_BLOCK, dense, inner_values, rounded


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
    integers = tl.clamp(rounded(tl.div_rn(bias, scale)), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
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
def _means(
    input_at: tl.tensor,
    offsets: tl.tensor,
    here: tl.tensor,
    inputs: tl.tensor,
    inner: tl.tensor,
    per_group: tl.tensor,
) -> tl.tensor:
    """Return the mean input that each value of this program's output channel meets."""
    first = (tl.program_id(0) // per_group) * inputs
    return tl.load(input_at + first + (offsets // inner) % inputs, mask=here, other=0.0)


@triton.jit
def _centred_bias(
    output_at: tl.tensor,
    weight_at: tl.tensor,
    input_at: tl.tensor,
    out_at: tl.tensor,
    length: tl.tensor,
    inputs: tl.tensor,
    inner: tl.tensor,
    per_group: tl.tensor,
    block: tl.constexpr,
) -> None:
    channel = tl.program_id(0)
    total = tl.zeros([block], dtype=tl.float32)
    for start in range(0, length, block):
        offsets = start + tl.arange(0, block)
        here = offsets < length
        mean = _means(input_at, offsets, here, inputs, inner, per_group)
        total += tl.load(weight_at + channel.to(tl.int64) * length + offsets, mask=here, other=0.0) * mean
    tl.store(out_at + channel, tl.load(output_at + channel) - tl.sum(total))


@triton.jit
def _centred_bias_back(
    given_at: tl.tensor,
    input_at: tl.tensor,
    out_at: tl.tensor,
    length: tl.tensor,
    inputs: tl.tensor,
    inner: tl.tensor,
    per_group: tl.tensor,
    block: tl.constexpr,
) -> None:
    channel = tl.program_id(0)
    given = tl.load(given_at + channel)
    for start in range(0, length, block):
        offsets = start + tl.arange(0, block)
        here = offsets < length
        mean = _means(input_at, offsets, here, inputs, inner, per_group)
        tl.store(out_at + channel.to(tl.int64) * length + offsets, -given * mean, mask=here)


class CentredBias(torch.autograd.Function):
    """`zsq.quantize.centring.centred_bias`."""

    @staticmethod
    def forward(ctx: Any, mean_output: Tensor, weight: Tensor, input_mean: Tensor) -> Tensor:
        """Return the bias."""
        weight, out = dense(weight), torch.empty_like(mean_output)
        inputs, length = weight.shape[1], weight[0].numel()
        ctx.sizes = (length, inputs, inner_values(weight), len(weight) * inputs // input_mean.numel())
        _centred_bias[(len(weight),)](mean_output, weight, input_mean, out, *ctx.sizes, WEIGHT_BLOCK)
        ctx.save_for_backward(weight, input_mean)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of mean output and weight."""
        weight, input_mean = ctx.saved_tensors
        grad, passed = grad.contiguous(), torch.empty_like(weight)
        _centred_bias_back[(len(weight),)](grad, input_mean, passed, *ctx.sizes, WEIGHT_BLOCK)
        return grad, passed, None
