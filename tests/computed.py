"""Networks of which a weight is computed in the forward, for tests of the graph and of the file."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune


class Body(nn.Module):
    """A convolution of some kind, and a head of some kind."""

    def __init__(self, conv: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.head = conv, nn.BatchNorm2d(8), head or nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


class Standardised(nn.Conv2d):
    """Weight standardisation, as BiT has it."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, correction=0)
        return F.conv2d(x, (self.weight - mean) / torch.sqrt(var + 1e-6), self.bias)


class ScaledStandardised(nn.Conv2d):
    """Weight standardisation by a batch norm of the weight, as NFNets in timm have it."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1.3))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=(self.gain * 0.2).view(-1), training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias)


class Equalised(nn.Conv2d):
    """An equalised learning rate: the weight is scaled at each call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * (2 / self.weight[0].numel()) ** 0.5, self.bias)


class Sliced(nn.Conv2d):
    """A part of a larger weight, as once-for-all networks take it."""

    def __init__(self) -> None:
        super().__init__(4, 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:8, :3, 1:4, 1:4], self.bias[:8])


class Cosine(nn.Module):
    """A normalised head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), 16 * F.normalize(self.weight))


def pruned() -> nn.Module:
    return prune.l1_unstructured(nn.Conv2d(3, 8, 3), "weight", amount=0.5)


COMPUTED: dict[str, Callable[[], nn.Module]] = {
    "standardised": lambda: Body(Standardised(3, 8, 3)),
    "scaled standardised": lambda: Body(ScaledStandardised(3, 8, 3)),
    "equalised": lambda: Body(Equalised(3, 8, 3)),
    "sliced": lambda: Body(Sliced()),
    "pruned": lambda: Body(pruned()),
    "weight norm": lambda: Body(parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
    "old weight norm": lambda: Body(nn.utils.weight_norm(nn.Conv2d(3, 8, 3))),
    "spectral norm": lambda: Body(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))),
    "old spectral norm": lambda: Body(nn.utils.spectral_norm(nn.Conv2d(3, 8, 3))),
    "orthogonal": lambda: Body(parametrizations.orthogonal(nn.Conv2d(3, 8, 3))),
    "cosine": lambda: Body(nn.Conv2d(3, 8, 3), Cosine()),
}
