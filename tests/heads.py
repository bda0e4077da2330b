"""Small networks that give something else than one vector of logits; settled batch norms, random weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zsq.types import ImageSpec, Output


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Segmenter(nn.Module):
    """A U-Net of one level; a class at each position, or with one channel yes or no."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.first, self.down, self.deep = block(1, 8), block(8, 12, 2), block(12, 12)
        self.up, self.head = block(20, 8), nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 1, H, W] to logits [N, C, H, W]."""
        first = self.first(x)
        deep = F.interpolate(self.deep(self.down(first)), scale_factor=2.0, mode="nearest")
        return self.head(self.up(torch.cat([first, deep], dim=1)))


class Embedder(nn.Module):
    """Directions of unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(block(3, 8, 2), block(8, 16, 2)), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 3, H, W] to [N, 12]."""
        return F.normalize(self.last(self.body(x).mean((2, 3))), dim=1)


class Detector(nn.Module):
    """A heat map and sizes, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 8, 2), block(8, 16))
        self.heat, self.size = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map [N, 3, H, W] to maps of half the size."""
        features = self.body(x)
        return {"heat": torch.sigmoid(self.heat(features)), "size": self.size(features)}


class Regressor(nn.Module):
    """One number an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(block(3, 8, 2), block(8, 16, 2)), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 3, H, W] to [N]."""
        return self.last(self.body(x).mean((2, 3))).squeeze(1)


class SignalNet(nn.Module):
    """Classes of signals of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, 8, 5, 2, padding=2, bias=False),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Conv1d(8, 16, 3, padding="same", bias=False),
            nn.BatchNorm1d(16),
            nn.ReLU(),
        )
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 3, L] to [N, 5]."""
        return self.last(self.body(x).mean(2))


class VolumeNet(nn.Module):
    """A class at each position of a volume."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv3d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm3d(6),
            nn.ReLU(),
            nn.Conv3d(6, 8, 3, padding=1, bias=False),
            nn.BatchNorm3d(8),
            nn.ReLU(),
        )
        self.head = nn.Conv3d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 1, D, H, W] to logits [N, 3, D, H, W]."""
        return self.head(self.body(x))


def settled(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Let batch norms take the statistics of noise, and leave training mode."""
    network.train()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(30):
            network(torch.randn(8, *shape, generator=random))
    return network.eval()


def _made(kind: type[nn.Module], channels: int, *args: int, sides: tuple[int, ...] = (16, 16)) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return settled(kind(*args), (channels, *sides))


SHAPES = {"segmenter": (1, 16, 16), "binary": (1, 16, 16), "signals": (3, 40), "volumes": (1, 8, 12, 10)}

NETWORKS = {
    "signals": lambda: _made(SignalNet, 3, sides=(40,)),
    "volumes": lambda: _made(VolumeNet, 1, sides=(8, 12, 10)),
    "segmenter": lambda: _made(Segmenter, 1),
    "binary": lambda: _made(Segmenter, 1, 1),
    "embedder": lambda: _made(Embedder, 3),
    "detector": lambda: _made(Detector, 3),
    "regressor": lambda: _made(Regressor, 3),
}

SAID = {
    "signals": {"classes": 5},
    "volumes": {"classes": 3},
    "segmenter": {"classes": 3},
    "binary": {"classes": 2},
    "embedder": {},
    "detector": {"outputs": (Output("heat", "values"), Output("size", "values"))},
    "regressor": {"outputs": (Output("", "values"),)},
}


def spec_of(name: str, **said) -> ImageSpec:
    """Return what a network takes, and what is said of what it gives."""
    shape = SHAPES.get(name, (3, 16, 16))
    known = said or SAID[name]
    return ImageSpec.of_shape(shape, mean=(0.5,) * shape[0], std=(0.25,) * shape[0], **known)
