"""MobileNetV1 (Howard et al., 2017) as TensorFlow trained it on ImageNet: ReLU6, eps 1e-3, asymmetric "same" padding.

The names of the weights are `stem`, `blocks.{0..12}.depthwise/pointwise` and `fc`. TensorFlow's weights come from a
folder with `model.json`, as TensorFlow.js loads them: `models/mobilenet` of github.com/giangndonaclover's
ILearnMachineLearning.js holds width 0.25, `mobilenet_v1_0.75_224` of github.com/tangmingsh's ml5featureExtractormodel
width 0.75.

    python examples/mobilenet_v1.py models/mobilenet mobilenet_v1_025.safetensors
    zsq quantize examples/mobilenet_v1.py:mobilenet_v1_025 --weights mobilenet_v1_025.safetensors --out runs/mobilenet
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from zsq.types import ImageSpec

SPEC = ImageSpec(
    channels=3, height=224, width=224, classes=1000, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize=None
)
WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


class ConvBNReLU6(nn.Module):
    """Convolution, batch norm and ReLU6; at stride 2 one row below and one column right are padded, as TensorFlow does.

    That is TensorFlow's "same" padding for even inputs, the only ones that 224x224 images meet at stride 2.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.asymmetric = stride == 2
        padding = 0 if self.asymmetric else kernel // 2
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        if self.asymmetric:
            x = functional.pad(x, (0, 1, 0, 1))
        return functional.relu6(self.bn(self.conv(x)))


class Separable(nn.Module):
    """A depthwise 3x3 and a pointwise 1x1 convolution, each with batch norm and ReLU6."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = ConvBNReLU6(inputs, inputs, 3, stride, groups=inputs)
        self.pointwise = ConvBNReLU6(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inputs, H, W] to [N, outputs, H / stride, W / stride]."""
        return self.pointwise(self.depthwise(x))


class MobileNetV1(nn.Module):
    """The network with every channel count scaled by `width`."""

    def __init__(self, width: float) -> None:
        super().__init__()
        channels = [int(32 * width), *(int(c * width) for c in WIDTHS)]
        self.stem = ConvBNReLU6(3, channels[0], 3, stride=2)
        pairs = zip(channels[:-1], channels[1:], STRIDES, strict=True)
        self.blocks = nn.Sequential(*[Separable(inputs, outputs, stride) for inputs, outputs, stride in pairs])
        self.fc = nn.Linear(channels[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised images [N, 3, 224, 224] to logits [N, 1000]."""
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


def mobilenet_v1_025() -> MobileNetV1:
    """Return the untrained network of width 0.25: 470,072 parameters."""
    return MobileNetV1(0.25)


def mobilenet_v1_075() -> MobileNetV1:
    """Return the untrained network of width 0.75: 2,585,560 parameters."""
    return MobileNetV1(0.75)


for _factory in (mobilenet_v1_025, mobilenet_v1_075):
    _factory.image_spec = SPEC  # type: ignore[attr-defined]

KINDS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
"""Names of Keras's batch norm, and PyTorch's."""


def from_tensorflow_js(folder: Path) -> dict[str, Tensor]:
    """Return the weights in a folder with `model.json`, by the names that they have here."""
    weights = {}
    for group in json.loads((folder / "model.json").read_text())["weightsManifest"]:
        values = np.frombuffer(b"".join((folder / path).read_bytes() for path in group["paths"]), "<f4")
        for entry in group["weights"]:
            count = int(np.prod(entry["shape"]))
            value, values = torch.from_numpy(values[:count].reshape(entry["shape"]).copy()), values[count:]
            layer, kind = entry["name"].split("/")
            weights[_name(layer, kind)] = _as_in_pytorch(layer, kind, value)
    return weights


def _name(layer: str, kind: str) -> str:
    """Return the name here of such as `conv_dw_1_bn/gamma`, `conv1/kernel` and `conv_preds/bias`."""
    if layer == "conv_preds":
        return f"fc.{'weight' if kind == 'kernel' else 'bias'}"
    part = f"bn.{KINDS[kind]}" if layer.endswith("_bn") else "conv.weight"
    if layer.startswith("conv1"):
        return f"stem.{part}"
    _, which, number, *_ = layer.split("_")
    return f"blocks.{int(number) - 1}.{'depthwise' if which == 'dw' else 'pointwise'}.{part}"


def _as_in_pytorch(layer: str, kind: str, value: Tensor) -> Tensor:
    """Return a kernel [H, W, inputs, outputs], depthwise [H, W, channels, 1], as PyTorch has it."""
    if "kernel" not in kind:
        return value
    if layer == "conv_preds":
        return value[0, 0].T.contiguous()
    return value.permute((2, 3, 0, 1) if "depthwise" in kind else (3, 2, 0, 1)).contiguous()


if __name__ == "__main__":
    save_file(from_tensorflow_js(Path(sys.argv[1])), sys.argv[2])
