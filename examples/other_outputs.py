"""Networks that give something else than one class an image, and of signals and volumes: the guides' own.

Their weights are random; `--weights FILE` or your own code brings others. See docs/guides/other-outputs.md and
docs/guides/signals-and-volumes.md.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CELL = 4
"""Pixels of a cell of the detector's maps, a side."""


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """A class of four for each pixel of a grey scan."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(1, 8, 2), block(8, 16, 2)
        self.deep = block(16, 32, 2)
        self.up2, self.join2 = nn.ConvTranspose2d(32, 16, 2, 2), block(32, 16)
        self.up1, self.join1 = nn.ConvTranspose2d(16, 8, 2, 2), block(16, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map scans [N, 1, 128, 128] to logits [N, 4, 128, 128]."""
        first = self.first(x)
        second = self.second(first)
        y = self.join2(torch.cat([second, self.up2(self.deep(second))], 1))
        y = self.join1(torch.cat([first, self.up1(y)], 1))
        return F.interpolate(self.head(y), scale_factor=2.0, mode="nearest")


class Embedder(nn.Module):
    """A direction of 128 numbers, the same for all pictures of one face."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 8, 2), block(8, 16, 2), block(16, 32, 2), block(32, 64, 2))
        self.last = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        """Map faces [N, 3, 112, 112] to vectors of length 1, [N, 128]."""
        return F.normalize(self.last(self.body(x).mean((2, 3))), dim=1)


class Detector(nn.Module):
    """Three maps of cells: how sure a middle of a box of each of two classes is there, its size, and its offset."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(block(3, 8, 2), block(8, 16, 2), block(16, 16))
        self.heat, self.size, self.offset = nn.Conv2d(16, 2, 1), nn.Conv2d(16, 2, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map images [N, 3, H, W] to maps [N, 2, H/4, W/4]."""
        y = self.body(x)
        return self.heat(y).sigmoid(), F.relu(self.size(y)), self.offset(y)


def decode(heat: np.ndarray, size: np.ndarray, offset: np.ndarray) -> list[np.ndarray]:
    """Return the surest box of each class of each image: left, top, right, bottom, score, class."""
    found = []
    for sure, sides, shift in zip(heat, size, offset, strict=True):
        rows = []
        for label, scores in enumerate(sure):
            row, column = np.unravel_index(scores.argmax(), scores.shape)
            x, y = (column + shift[0, row, column]) * CELL, (row + shift[1, row, column]) * CELL
            wide, high = sides[:, row, column] * CELL / 2
            rows.append([x - wide, y - high, x + wide, y + high, scores[row, column], label])
        found.append(np.array(rows, np.float32))
    return found


class Rhythms(nn.Module):
    """One of five rhythms of a heart, of twelve leads."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((12, 16), (16, 32), (32, 64)):
            layers += [nn.Conv1d(inputs, outputs, 7, 2, 3, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.body, self.last = nn.Sequential(*layers), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map signals [N, 12, 256] to logits [N, 5]."""
        return self.last(self.body(x).mean(2))


class Lesions(nn.Module):
    """Whether there is a lesion, for each place of a volume."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 4), (4, 8)):
            layers += [nn.Conv3d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm3d(outputs), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Conv3d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map volumes [N, 1, D, H, W] to logits [N, 2, D, H, W]."""
        return self.head(self.body(x))


def settled(network: nn.Module, *shape: int) -> nn.Module:
    """Return a network whose batch norms have taken the statistics of noise, as those of a trained one have of data."""
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(4, *shape))
    return network.eval()


def unet() -> nn.Module:
    """Return the U-Net."""
    return settled(UNet(), 1, 64, 64)


def embedder() -> nn.Module:
    """Return the embedder of faces."""
    return settled(Embedder(), 3, 112, 112)


def detector() -> nn.Module:
    """Return the detector."""
    return settled(Detector(), 3, 64, 64)


def rhythms() -> nn.Module:
    """Return the classifier of signals."""
    return settled(Rhythms(), 12, 256)


def lesions() -> nn.Module:
    """Return the segmenter of volumes."""
    return settled(Lesions(), 1, 8, 16, 16)
