"""Observed norms: a multiply-add a channel, and the gradient of that and of the moments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from zsq.runtime.kernels.base import BLOCK, inner_values, like


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
    channels, inner = x.shape[1], inner_values(x)
    parts, values = triton.cdiv(x.numel(), BLOCK), x.numel() // channels
    _by_channel[(parts,)](x, given, out, *by_channel, x.numel(), channels, inner, float(values), kind, BLOCK)
