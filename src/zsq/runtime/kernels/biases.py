"""Rounded biases."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsq.runtime.kernels.base import WEIGHT_BLOCK, rounded


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
    """`zsq.quantization.fake_quantize.quantize_bias`."""

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
