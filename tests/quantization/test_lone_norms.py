"""Batch norms and stored constants that no layer can take are integers in vectors, signals, images and volumes."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from zsq.export.converted import output_step
from zsq.export.files import write_file
from zsq.export.verify import require, verify_file
from zsq.models.teacher import teacher_from_module
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.coverage import coverage
from zsq.quantization.ptq import quantize_ptq
from zsq.training.loop import Run
from zsq.types import Batch, ImageSpec

KINDS = {
    1: (nn.Conv1d, nn.BatchNorm1d, (2, 40)),
    2: (nn.Conv2d, nn.BatchNorm2d, (2, 12, 12)),
    3: (nn.Conv3d, nn.BatchNorm3d, (8, 6, 6, 6)),  # of fewer channels, ONNX Runtime's are float
}


class BehindReLU(nn.Module):
    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes, (convolution, norm, (channels, *_)) = axes, KINDS[axes]
        self.first, self.norm = convolution(channels, 8, 3, padding=1), norm(8)
        self.second, self.head = convolution(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x).relu())).flatten(2).mean(2))


class Affine(BehindReLU):
    """Instead of the batch norm a stored factor and a stored shift, of all channels and of each."""

    def __init__(self) -> None:
        super().__init__(2)
        self.norm, self.factor, self.shift = (
            nn.Identity(),
            nn.Parameter(torch.tensor([-0.7])),
            nn.Parameter(torch.randn(8, 1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.shift + self.first(x).relu() * self.factor * 2).relu().flatten(2).mean(2))


class OfVectors(BehindReLU):
    """Two batch norms of [N, C], behind a pooling and behind another one, and one of tokens as rows."""

    def __init__(self) -> None:
        super().__init__(1)
        self.vectors, self.again, self.inner = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.first(x).transpose(1, 2)).relu()
        x = self.norm(x.flatten(0, 1)).view_as(x).transpose(1, 2)
        return self.head(self.again(self.vectors(x.mean(2)).relu()))


@pytest.mark.parametrize("make", [*(partial(BehindReLU, axes) for axes in KINDS), Affine, OfVectors])
def test_a_batch_norm_behind_an_activation(tmp_path, make) -> None:
    torch.manual_seed(0)
    network, random = make().train(), torch.Generator().manual_seed(0)
    shape = KINDS[network.axes][2]
    for _ in range(20):
        network(torch.randn(8, *shape, generator=random))
    spec = ImageSpec.of_shape(shape, classes=5, mean=(0.0,) * shape[0], std=(1.0,) * shape[0])
    teacher = teacher_from_module(network.eval(), spec)
    images = torch.randn(40, *shape, generator=random)
    batch = Batch(images, torch.zeros(40, dtype=torch.int64))
    student = quantize_ptq(teacher.network, lambda: iter([batch]), PTQ(num_samples=40), Run()).eval()
    converted, path = convert(student), tmp_path / "model.onnx"
    found = coverage(converted, spec)
    assert not found.float_weights
    assert not found.float_operations
    write_file(converted, spec, path)
    require(verify_file(path, student, [images], output_step(converted), threads=1))
