"""A depthwise convolution with several filters a channel, in files for ONNX Runtime."""

import onnx
import pytest
import torch
from torch import nn
from toys import SPEC, fused_operators, graph, images, quantized

from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.verify import verify_file
from zsq.quantization import PTQ
from zsq.quantization.convert import convert


class Multiplied(nn.Module):
    """Two filters a channel, padded by the layer or by zeros in front, and a head."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.pad = nn.ZeroPad2d((1, 0, 1, 0)) if apart else nn.Identity()
        self.depthwise = nn.Conv2d(4, 8, 3, stride=2, padding=0 if apart else 1, groups=4)
        self.head = nn.Conv2d(8, 5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.depthwise(self.pad(self.stem(x))))).flatten(1)
        return logits


def plain() -> nn.Module:
    return Multiplied(apart=False)


def padded() -> nn.Module:
    return Multiplied(apart=True)


@pytest.mark.parametrize("make", [plain, padded])
@pytest.mark.parametrize("bits", ["8", "4"])
def test_each_filter_reads_a_channel_of_its_own(make, bits, tmp_path):
    student = quantized(graph(make), PTQ(bits=bits))
    converted, path = convert(student), tmp_path / "model.onnx"
    write_onnx(converted, SPEC, path)
    groups = [a.i for node in onnx.load(path).graph.node for a in node.attribute if a.name == "group"]
    assert groups == [8]
    found = verify_file(path, student, iter(images(300, 7).split(100)), output_step(converted), threads=1)
    assert found.decided_agreement == 100
    fused = fused_operators(path)
    assert (fused.count("QLinearConv"), fused.count("Conv")) == (3, 0)
    assert (fused.count("QuantizeLinear"), fused.count("DequantizeLinear")) == (1, 1)
