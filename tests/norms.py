"""Batch norm in every form, for tests of what reads, observes and folds it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Normalised(nn.Module):
    """One batch norm between two maps, and a head; keeps what the norm was given."""

    def __init__(self, before: nn.Module, norm: nn.Module, features: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.before, self.norm, self.head, self.shape = before, norm, nn.Linear(features, 5), shape

    def given(self, x: Tensor) -> Tensor:
        return self.before(x.view(-1, *self.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.given(x))).flatten(1))


class FunctionalNorm(nn.Module):
    """Calls `F.batch_norm` on its own buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.scale, self.shift, eps=1e-3)


class ComputedScale(FunctionalNorm):
    """Its scale is computed, not stored."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, 3 * self.scale, self.shift + 1)


class OfTokens(nn.Linear):
    """A linear layer on tokens, whose channels come first then."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, 2)


class AsRows(nn.BatchNorm1d):
    """Is given [N, C, tokens], and normalises the rows of [N tokens, C]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return super().forward(x.flatten(0, 1)).reshape_as(x)


def conv2d(norm: nn.Module) -> Normalised:
    return Normalised(nn.Conv2d(3, 4, 3), norm, 4 * 36, (3, 8, 8))


FORMS: dict[str, Callable[[], Normalised]] = {
    "2d": lambda: conv2d(nn.BatchNorm2d(4)),
    "2d, eps 1e-3": lambda: conv2d(nn.BatchNorm2d(4, eps=1e-3)),
    "2d, no affine": lambda: conv2d(nn.BatchNorm2d(4, affine=False)),
    "sync": lambda: conv2d(nn.SyncBatchNorm(4)),
    "functional": lambda: conv2d(FunctionalNorm(4)),
    "computed scale": lambda: conv2d(ComputedScale(4)),
    "1d": lambda: Normalised(nn.Conv1d(3, 4, 5, stride=4), nn.BatchNorm1d(4), 4 * 15, (3, 64)),
    "1d after linear": lambda: Normalised(nn.Linear(192, 4, bias=False), nn.BatchNorm1d(4), 4, (192,)),
    "1d of tokens": lambda: Normalised(OfTokens(24, 4, bias=False), nn.BatchNorm1d(4), 4 * 8, (8, 24)),
    "1d of rows": lambda: Normalised(OfTokens(24, 4, bias=False), AsRows(4), 4 * 8, (8, 24)),
    "3d": lambda: Normalised(nn.Conv3d(1, 4, 3, bias=False), nn.BatchNorm3d(4), 4 * 36, (1, 3, 8, 8)),
}


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    return mean, var
