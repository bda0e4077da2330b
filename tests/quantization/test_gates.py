"""SiLU and GELU in integers: close to the functions, the same in simulation and file, no float operation left."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import SPEC, fused_operators, graph, images, quantized

from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.verify import require, verify_file
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.integer_ops import GATES, grid_gelu, grid_silu


class Gated(nn.Module):
    """Two convolutions with a gated activation function, and a linear layer."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.activation, self.head = activation, nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.second(self.activation(self.first(x))))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def gated(activation: nn.Module) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return graph(lambda: Gated(activation))


@pytest.mark.parametrize(("integer", "function", "most"), [(grid_silu, F.silu, 0.0), (grid_gelu, F.gelu, 0.0074)])
def test_they_are_their_functions_to_half_a_step_of_the_gate(integer, function, most):
    x = torch.linspace(-12, 12, 24001)
    step = 1 / GATES[integer].span
    assert ((integer(x) - function(x)).abs() <= most + x.abs() * step / 2 * 1.001 + 1e-6).all()
    gate = integer(x[x.abs() > 1]) / x[x.abs() > 1] * GATES[integer].span
    assert (gate - gate.round()).abs().max() < 1e-3


def test_the_gate_of_gelu_opens_and_ends():
    assert torch.equal(grid_gelu(torch.tensor([-9.0, -4.0, 4.0, 9.0])), torch.tensor([0.0, 0.0, 4.0, 9.0]))


@pytest.mark.parametrize(("integer", "function"), [(grid_silu, F.silu), (grid_gelu, F.gelu)])
def test_their_gradients_are_those_of_the_functions(integer, function):
    x = torch.linspace(-6, 6, 1201, requires_grad=True)
    found, wanted = (torch.autograd.grad(f(x).sum(), x)[0] for f in (integer, function))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 if integer is grid_silu else 0.04)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh")])
@pytest.mark.parametrize("bits", ["8", "4"])
def test_the_file_agrees_and_has_no_float_operation(activation, bits, tmp_path: Path):
    student = quantized(gated(activation), PTQ(bits=bits))
    converted, path = convert(student), tmp_path / "model.onnx"
    write_onnx(converted, SPEC, path)
    require(verify_file(path, student, iter(images(300, 7).split(100)), output_step(converted), threads=1))
    fused = fused_operators(path)
    assert (fused.count("QLinearSigmoid"), fused.count("QLinearMul")) == (2, 2)
    assert (fused.count("QuantizeLinear"), fused.count("DequantizeLinear")) == (1, 1)  # of images and logits


@pytest.mark.parametrize("target", ["openvino", "litert", "executorch", "tensorrt"])
def test_targets_without_an_integer_form_keep_them_in_float(target):
    calls = {node.target for node in quantized(gated(nn.SiLU()), PTQ(target=target)).network.graph.nodes}
    assert torch.ops.aten.silu.default in calls
    assert not calls & set(GATES)
