"""The networks of the drawn world, each of less than 100,000 weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zsq.data.shapes.heartbeats import LEADS, SIGNAL_CLASSES
from zsq.data.shapes.world import CLASSES

EMBEDDING = 64
"""Length of an embedding."""

STRIDE = 4
"""Pixels of the detector's image a side of each cell of its maps."""


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return Conv-BN-ReLU6 that keeps height and width, or divides them by the stride."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class InvertedResidual(nn.Module):
    """Expand, depthwise 3x3, project without activation; a skip where the shape stays.

    Source: Sandler et al., MobileNetV2, figure 4.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.layers = nn.Sequential(
            conv(inputs, hidden, 1),
            conv(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y: Tensor = self.layers(x)
        return x + y if self.skips else y


def inverted_residuals(inputs: int, plan: Sequence[tuple[int, int, int]], expansion: int = 4) -> nn.Sequential:
    """Return blocks by (outputs, stride, how many of them)."""
    blocks = []
    for outputs, stride, number in plan:
        for index in range(number):
            blocks.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
            inputs = outputs
    return nn.Sequential(*blocks)


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a depthwise 5x5 and a pointwise convolution, each followed by ReLU and only then by batch norm.

    Source: Howard et al., MobileNets, figure 3, with batch norm behind the activation.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 5, stride, 2, groups=inputs),
        nn.ReLU(),
        nn.BatchNorm2d(inputs),
        nn.Conv2d(inputs, outputs, 1),
        nn.ReLU(),
        nn.BatchNorm2d(outputs),
    )


class ShapesMobileNet(nn.Module):
    """A MobileNet for 32x32 pixels: classify [N, 3, 32, 32] into logits [N, 10].

    With batch norm behind the activations, no scale of an activation follows from the weights; and it is trained to be
    undecided about noise, so that noise says little of the values that images give, and to withstand small changes, so
    that one sees shapes in what is learned from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 5, 2, 2), nn.ReLU(), nn.BatchNorm2d(24))
        plan = ((24, 48, 1), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 96, 1))
        self.blocks = nn.Sequential(*(separable(*block) for block in plan))
        self.classifier = nn.Linear(96, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images to logits."""
        logits: Tensor = self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


def _double(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, stride=stride), conv(outputs, outputs))


class ShapesUNet(nn.Module):
    """A U-Net at half resolution: classify each pixel of [N, 3, 64, 64], logits [N, 11, 64, 64], 0 the ground.

    Source: Ronneberger et al., U-Net, figure 1, with a stride in the first convolution and padding in all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _double(3, 16, stride=2)
        self.down1 = _double(16, 24, stride=2)
        self.down2 = nn.Sequential(_double(24, 48, stride=2), conv(48, 48))
        self.up1 = nn.ConvTranspose2d(48, 24, 2, 2)
        self.join1 = conv(48, 24)
        self.up2 = nn.ConvTranspose2d(24, 16, 2, 2)
        self.join2 = conv(32, 16)
        self.classifier = nn.ConvTranspose2d(16, 1 + len(CLASSES), 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images to logits of every pixel."""
        half = self.stem(x)
        quarter = self.down1(half)
        y = self.up1(self.down2(quarter))
        y = self.up2(self.join1(torch.cat([y, quarter], 1)))
        logits: Tensor = self.classifier(self.join2(torch.cat([y, half], 1)))
        return logits


class ShapesEmbedder(nn.Module):
    """Embed [N, 3, 32, 32] as [N, 64], of any length: the cosine of two says whether they show the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            conv(3, 16, stride=2), conv(16, 24), conv(24, 32, stride=2), conv(32, 48), conv(48, 64, stride=2)
        )
        self.embedding = nn.Linear(2 * EMBEDDING, EMBEDDING, bias=False)
        self.head = conv(64, 2 * EMBEDDING, 1)
        self.norm = nn.BatchNorm1d(EMBEDDING)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images to embeddings."""
        embedding: Tensor = self.norm(self.embedding(self.head(self.layers(x)).mean((2, 3))))
        return embedding


class ShapesDetector(nn.Module):
    """Find shapes in [N, 3, 64, 64] by three maps of 16x16 cells, which `decode` reads.

    Heat, logits [N, 10, 16, 16]; size [N, 2, 16, 16] and offset [N, 2, 16, 16], in cells.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16, stride=2)
        self.near = inverted_residuals(16, [(24, 2, 2)])
        self.far = inverted_residuals(24, [(48, 2, 2)])
        self.up = nn.ConvTranspose2d(48, 24, 2, 2)
        self.join = conv(48, 48)
        self.heat = nn.Conv2d(48, len(CLASSES), 1)
        self.size = nn.Conv2d(48, 2, 1)
        self.offset = nn.Conv2d(48, 2, 1)
        assert self.heat.bias is not None
        nn.init.constant_(self.heat.bias, -4.0)  # few cells hold a middle

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map normalised images to heat, size and offset."""
        near = self.near(self.stem(x))
        y = self.join(torch.cat([near, self.up(self.far(near))], 1))
        return self.heat(y), self.size(y), self.offset(y)


class SignalsNet(nn.Module):
    """Classify two leads of heartbeats, [N, 2, 256], into logits [N, 8]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((LEADS, 16), (16, 32), (32, 48), (48, 64), (64, 64)):
            layers += [
                nn.Conv1d(inputs, outputs, 7, 2, 3, bias=False),
                nn.BatchNorm1d(outputs),
                nn.ReLU6(),
            ]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(64, len(SIGNAL_CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Map signals to logits."""
        logits: Tensor = self.classifier(self.layers(x).mean(2))
        return logits
