"""Mean and variance of each channel, differentiable in few passes over memory, alone and with a batch norm."""

from typing import Any

import torch
from torch import Tensor

from zsq.runtime import distributed
from zsq.runtime.gpu import kernels

SMALLEST_VARIANCE = 1e-30
"""Added to variances on a GPU, whose kernel returns one over their root."""


class _Moments(torch.autograd.Function):
    """Mean and biased variance in three passes forward and one backward.

    `torch.var_mean` with its gradient took nine times as long (64x16x32x32, one core; benchmarks/moments.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if (fused := kernels(x)) is None else fused.dense(x)
        mean, var = _moments(x)
        ctx.save_for_backward(x, mean)
        return mean.flatten(), var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        return _moments_gradient(x, mean, grad_mean, grad_var)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, [1, C, 1, ...], and biased variance, [C], at least in float32."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    if x.is_cuda:  # one pass
        mean, inverse = torch.batch_norm_stats(x, SMALLEST_VARIANCE)
        return mean.view(shape), inverse.square().reciprocal()
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, (x - mean).square_().mean(dims)


def _moments_gradient(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    """Return the gradient to x of what has these gradients to its mean and variance."""
    if (fused := kernels(x)) is not None:
        gradient: Tensor = fused.moments_gradient(x, mean, grad_mean, grad_var)
        return gradient
    count = x.numel() // x.shape[1]
    slope = (2 / count) * grad_var.view_as(mean)
    offset = grad_mean.view_as(mean) / count - slope * mean
    return torch.addcmul(offset.to(x.dtype), x, slope.to(x.dtype))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, differentiable once; where processes share a batch, of the whole batch.

    Args:
        x: [N, C] or [N, C, ...], at least one element a channel.

    Returns:
        Mean [C] and variance [C].
    """
    mean, var = _Moments.apply(x)  # type: ignore[no-untyped-call]
    return distributed.pooled(mean, var, x.numel() // x.shape[1])


class _ObservedNorm(torch.autograd.Function):
    """`observed_norm`: with the moments, two passes backward instead of the four of both apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if (fused := kernels(x)) is not None:
            x = fused.dense(x)
            mean, var = _moments(x)
            ctx.save_for_backward(x, mean, scale)
            return fused.scaled(x, scale, shift), mean.flatten(), var
        mean, var = _moments(x)
        scale = scale.to(x.dtype)
        ctx.save_for_backward(x, mean, scale)
        return torch.addcmul(shift.to(x.dtype), x, scale), mean.flatten(), var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None, None]:
        x, mean, scale = ctx.saved_tensors
        if (fused := kernels(x)) is not None:
            return fused.moments_gradient(x, mean, grad_mean, grad_var, grad, scale), None, None
        return _moments_gradient(x, mean, grad_mean, grad_var).addcmul_(grad, scale), None, None


def observed_norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Batch norm with stored statistics as one multiply-add a channel, and the `moments` of its input.

    Args:
        x: [N, C] or [N, C, ...].
        scale, shift: [1, C, 1, ...]; they take no gradient.

    Returns:
        The normalised x, and mean and biased variance, each [C].
    """
    y, mean, var = _ObservedNorm.apply(x, scale, shift)  # type: ignore[no-untyped-call]
    return y, distributed.pooled(mean, var, x.numel() // x.shape[1])
