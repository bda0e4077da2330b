"""The CIFAR-10 ResNets of He et al., section 4.2, with parameter-free ("option A") shortcuts: 20, 32 and 44 layers.

Trained weights lie in `pretrained_models` of github.com/akamaster/pytorch_resnet_cifar10; there, the last layer is
called `linear`.

    python examples/cifar10.py resnet20-12fca82f.th cifar10_resnet20.safetensors
    zsq quantize examples/cifar10.py:cifar10_resnet20 --weights cifar10_resnet20.safetensors --out runs/resnet20
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from zsq.models.weights import read_state
from zsq.types import ImageSpec

SPEC = ImageSpec(
    channels=3, height=32, width=32, classes=10, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=None
)


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut that subsamples and pads with zero channels where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(y + x)


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of `blocks` blocks with 16, 32 and 64 channels, average pooling, one linear."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[Block(16, 16, 1) for _ in range(blocks)])
        self.layer2 = nn.Sequential(*[Block(16 if i == 0 else 32, 32, 2 if i == 0 else 1) for i in range(blocks)])
        self.layer3 = nn.Sequential(*[Block(32 if i == 0 else 64, 64, 2 if i == 0 else 1) for i in range(blocks)])
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images [N, 3, 32, 32] to logits [N, 10]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1))


def cifar10_resnet20() -> CifarResNet:
    """Return the untrained network of 20 layers: 269,722 parameters."""
    return CifarResNet(3)


def cifar10_resnet32() -> CifarResNet:
    """Return the untrained network of 32 layers: 464,154 parameters."""
    return CifarResNet(5)


def cifar10_resnet44() -> CifarResNet:
    """Return the untrained network of 44 layers: 658,586 parameters."""
    return CifarResNet(7)


for _factory in (cifar10_resnet20, cifar10_resnet32, cifar10_resnet44):
    _factory.image_spec = SPEC  # type: ignore[attr-defined]


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return published weights by the names that they have here."""
    return {name.removeprefix("module.").replace("linear.", "fc."): value for name, value in state.items()}


if __name__ == "__main__":
    save_file(renamed(read_state(Path(sys.argv[1]))), sys.argv[2])
