from collections.abc import Callable

import pytest
import torch
from norms import statistics
from torch import Tensor

from zsq.graph.moments import moments, observed_norm


def test_moments_by_hand() -> None:
    x = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[5.0, 7.0], [2.0, 0.0]]])  # [N, C, L]
    mean, var = moments(x)
    assert mean.tolist() == [4.0, 0.5]
    assert var.tolist() == [5.0, 0.75]  # biased; the unbiased variance would be 6.67


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (2, 3, 4, 5), (2, 3, 2, 2, 2)])
def test_moments_and_gradients_agree_with_var_mean(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + 3).requires_grad_()
    weights = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    for got, wanted in zip(moments(x), statistics(x), strict=True):
        torch.testing.assert_close(got, wanted)
    assert torch.autograd.gradcheck(moments, x)

    def gradient(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        mean, var = function(x)
        return torch.autograd.grad((weights[0] * mean).sum() + (weights[1] * var.log()).sum(), x)[0]

    torch.testing.assert_close(gradient(moments), gradient(statistics))


def test_moments_of_values_far_from_zero() -> None:
    x = 1e3 + torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moments(x)[1], statistics(x.double())[1].float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (2, 3, 4, 5)])
def test_observed_norm_is_batch_norm_and_moments_in_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + 3).requires_grad_()
    size = (1, 3, *[1] * (len(shape) - 2))
    scale, shift = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    y, (mean, var) = observed_norm(x, scale, shift)
    torch.testing.assert_close(y, x * scale + shift)
    for got, wanted in zip((mean, var), statistics(x), strict=True):
        torch.testing.assert_close(got, wanted)

    def flat(x: Tensor) -> tuple[Tensor, ...]:
        y, statistics_of_x = observed_norm(x, scale, shift)
        return y, *statistics_of_x

    assert torch.autograd.gradcheck(flat, x)
