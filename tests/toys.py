"""Small networks and what it takes to quantize them, for tests of several parts."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from zsq.graph.edit import copy_network
from zsq.graph.trace import trace
from zsq.quantization import PTQ
from zsq.quantization.prepare import Student
from zsq.quantization.ptq import quantize_ptq
from zsq.training.loop import Run
from zsq.types import Batch, ImageSpec

SPEC = ImageSpec(channels=3, height=8, width=8, classes=5, mean=(0.5,) * 3, std=(0.25,) * 3)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def images(count: int = 32, seed: int = 1, spec: ImageSpec = SPEC) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, spec.channels, spec.height, spec.width, generator=generator)


def settle(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give each batch norm statistics, scales and shifts far from 0 and 1, and freeze the network."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, NORMS):
            if module.track_running_stats:
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.3, 3, generator=generator)
            if module.affine:
                module.weight.data.uniform_(0.5, 2, generator=generator)
                module.bias.data.normal_(generator=generator)
    return net.requires_grad_(False).eval()


def graph(make: Callable[[], nn.Module], spec: ImageSpec = SPEC) -> GraphModule:
    """Build a network from a fixed seed and export it as teachers are."""
    return copy_network(_traced(make, spec))


@functools.cache
def _traced(make: Callable[[], nn.Module], spec: ImageSpec) -> GraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return trace(settle(make()), spec, "toy")


def stream_of(pixels: Tensor, size: int = 16) -> Callable[[], Iterator[Batch]]:
    return lambda: (Batch(part, torch.zeros(len(part), dtype=torch.int64)) for part in pixels.split(size))


def quantized(network: GraphModule, settings: PTQ, *, learnable: bool = False, count: int = 32) -> Student:
    return quantize_ptq(network, stream_of(images(count)), settings, Run(), learnable=learnable)


def fused_operators(path: Path) -> list[str]:
    """The operators that ONNX Runtime executes for a file, after it has fused what it can."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options)
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


class Plain(nn.Module):
    """Two convolutions, the first normalised, and a linear layer."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = F.relu6(self.second(x))
        return self.head(x.mean((2, 3)))


class Branchy(nn.Module):
    """A residual network with max-pool, an option-A shortcut, a concatenation, average pool and flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.down_norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.stem_norm(self.stem(x))), 3, stride=1, padding=1)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = torch.relu(self.down_norm(self.down(x)) + shortcut)
        x = torch.cat([torch.relu(self.left(x)), self.right(x)], dim=1)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class PreActivated(nn.Module):
    """A residual block whose batch norms no layer can take."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm, self.last_norm = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(torch.relu(self.norm(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(torch.relu(self.last_norm(x)), 1), 1))


class ConvHead(nn.Module):
    """Logits from a convolution, flattened last, as pytorchcv's MobileNets make them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 5, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.hardtanh(self.norm(self.conv(x)), 0.0, 6.0)).view(x.size(0), -1)


class SharedLayer(nn.Module):
    """One convolution used twice, at two input scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.conv(x) * 3).mean((2, 3)))


class Tokens(nn.Module):
    """Linear layers over [N, tokens, C], as transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(64, 7)
        self.head = nn.Linear(21, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(x.flatten(2))).flatten(1))


class Mobile(nn.Module):
    """Hard swish behind a convolution and a gate per channel, as MobileNetV3 has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.squeeze = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        x = x * F.hardsigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class ClampedGate(Mobile):
    """A gate that is clamped once more."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        x = x * F.hardsigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1))).clamp(min=0.1)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Shift(nn.Module):
    """Channels moved by writing to a part of a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        y = x.clone()
        y[:, 1:] = x[:, :-1]
        return self.head(self.second(y).mean((2, 3)) * 10)


class DeadBranch(nn.Module):
    """A residual branch whose first activation is always 0, so that its second layer gives its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.first.bias.fill_(-100.0)
            self.second.bias.copy_(torch.linspace(-4, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


class ShutGate(Mobile):
    """A gate whose layer sees zeros only."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(8, 8, 1)
        with torch.no_grad():
            self.before.bias.fill_(-100.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        x = x * F.hardsigmoid(self.squeeze(torch.relu(self.before(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution with a multiplier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 4, 3, groups=2)
        self.head = nn.Linear(4, SPEC.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))
