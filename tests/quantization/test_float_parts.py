"""What ONNX Runtime computes in float, and the layers on tokens around it in integers."""

from pathlib import Path

import pytest
import torch
from torch import nn
from toys import SPEC, fused_operators, graph, images, quantized

from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.verify import require, verify_file
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.coverage import coverage
from zsq.quantization.quantizers import ActivationQuantizer, quantizers
from zsq.quantization.sensitivity import weight_sizes
from zsq.targets import TARGETS


class Attention(nn.Module):
    """Patches as tokens, attention with a bias of its scores, and a linear head on their mean."""

    def __init__(self, lowest: float = 0.0) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 5)
        self.register_buffer("mask", torch.linspace(lowest, 1, 256).view(16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(torch.softmax((q * 0.5) @ k.transpose(1, 2) + self.mask, -1) @ v)
        logits: torch.Tensor = self.head(x.mean(1))
        return logits


def masked() -> nn.Module:
    return Attention(-100.0)


def rounded(student: torch.nn.Module) -> list[str]:
    """What each activation quantizer rounds."""
    found = []
    for node in student.network.graph.nodes:
        module = student.network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            source = node.args[0]
            found.append("input" if source.op == "placeholder" else source.target._schema.name.removeprefix("aten::"))
    return found


def test_nothing_is_rounded_inside_attention():
    student = quantized(graph(Attention), PTQ())
    expected = ["input", "conv2d", "layer_norm", "matmul", "linear", "add", "mean", "linear"]
    assert rounded(student) == expected
    floats = coverage(convert(student), SPEC).float_operations
    assert {name.partition(" ")[0] for name in floats} >= {"softmax", "matmul", "layer_norm"}


def test_a_masked_softmax_is_rounded_so_that_it_has_no_subnormal_values():
    assert "softmax" in rounded(quantized(graph(masked), PTQ()))


@pytest.mark.parametrize("target", ["openvino", "litert", "executorch", "tensorrt"])
def test_other_targets_round_inside_attention(target):
    count = [
        sum(isinstance(q, ActivationQuantizer) for q in quantizers(quantized(graph(Attention), PTQ(target=name))))
        for name in (target, "onnxruntime")
    ]
    assert count[0] > count[1]


@pytest.mark.parametrize("bits", ["8", "4"])
def test_layers_on_tokens_add_their_bias_in_integers(bits, tmp_path: Path):
    student = quantized(graph(Attention), PTQ(bits=bits))
    converted, path = convert(student), tmp_path / "model.onnx"
    write_onnx(converted, SPEC, path)
    require(verify_file(path, student, iter(images(300, 7).split(100)), output_step(converted), threads=1))
    fused = fused_operators(path)
    assert fused.count("QGemm") == 3
    assert "MatMulIntegerToFloat" not in fused
    assert "QLinearSoftmax" not in fused


class Volumes(nn.Module):
    """Images as volumes of one channel, and convolutions of few and of many."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.few, self.many = nn.Conv3d(1, 4, 1), nn.Conv3d(4, 8, 2), nn.Conv3d(8, 8, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.many(torch.relu(self.few(nn.functional.max_pool3d(torch.relu(self.first(x.unsqueeze(1))), (1, 2, 2)))))
        logits: torch.Tensor = self.head(x.flatten(2).mean(2))
        return logits


def test_the_first_convolutions_of_volumes_of_few_channels_are_float(tmp_path: Path):
    student = quantized(graph(Volumes), PTQ())
    converted, path = convert(student), tmp_path / "model.onnx"
    write_onnx(converted, SPEC, path)
    require(verify_file(path, student, iter(images(100, 7).split(50)), output_step(converted), threads=1))
    assert [name for name in fused_operators(path) if "Conv" in name] == ["FusedConv", "Conv", "QLinearConv"]
    assert [*coverage(converted, SPEC).float_operations] == ["conv3d in first", "conv3d in few"]
    assert [*weight_sizes(graph(Volumes))] == ["many.weight", "head.weight"]
    assert len(weight_sizes(graph(Volumes), TARGETS["openvino"])) == 4
    assert "input" in rounded(quantized(graph(Volumes), PTQ(target="openvino")))
