"""What the kernels share: how values lie in memory, and rounding."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Values of one program."""

PARTS = 1024
"""Results of programs that one program joins at a time."""

WEIGHT_BLOCK = 512
"""Values of a channel that a program takes at a time."""

INTEGERS = tl.constexpr(8388608.0)
"""2**23: a float32 from there on is an integer."""


@triton.jit
def rounded(x: tl.tensor) -> tl.tensor:
    """Round to the nearest integer, halves to the even one."""
    away = tl.where(x < 0, -INTEGERS, INTEGERS)
    return tl.where(tl.abs(x) < INTEGERS, (x + away) - away, x)


def dense(x: Tensor) -> Tensor:
    """Return x, copied where its values do not fill one stretch of memory, or first dimensions do not come first."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    return x.contiguous()


def inner_values(x: Tensor) -> int:
    """Return how many values of one channel, dimension 1, follow each other in a dense tensor's memory."""
    return 1 if x.dim() == 2 or x.stride(1) == 1 else x[0, 0].numel()


def like(x: Tensor, other: Tensor) -> Tensor:
    """Return x, copied where its values do not lie in memory in the order of a dense tensor of its shape.

    Strides alone do not tell: those of dimensions of one value say nothing.
    """
    channels_last = {"memory_format": torch.channels_last}
    if x.is_contiguous() and other.is_contiguous():
        return x
    if x.dim() == 4 and x.is_contiguous(**channels_last) and other.is_contiguous(**channels_last):
        return x
    return torch.empty_like(other, dtype=x.dtype).copy_(x)
