"""Hard sigmoid behind a layer: the layer's own rounding computes it, the same in simulation and file."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SPEC, Mobile, fused_operators, graph, images, quantized

from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.verify import verify_file
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.integer_ops import grid_hardsigmoid
from zsq.quantization.prepare import Student


class LinearGate(Mobile):
    """The gate's layer is linear, and its outputs reach far beyond both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Linear(8, 8)
        with torch.no_grad():
            self.squeeze.weight.mul_(100)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        gate = F.hardsigmoid(self.squeeze(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        return self.head(F.adaptive_avg_pool2d(x * gate[:, :, None, None], 1).flatten(1))


class GateWithoutBias(Mobile):
    """The gate's layer has nothing that 3 could be added to."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(8, 8, 1, bias=False)


class GateReadTwice(Mobile):
    """The layer's output is read beside the gate."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.conv(x)))
        squeezed = self.squeeze(F.adaptive_avg_pool2d(x, 1))
        x = x * F.hardsigmoid(squeezed) + squeezed
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def gates(student: Student) -> int:
    return sum(node.target is grid_hardsigmoid for node in student.network.graph.nodes)


def test_it_is_hardsigmoid_to_half_a_step_of_the_bias() -> None:
    x = torch.linspace(-5, 5, 202).view(101, 2)
    scale, weight_scale = torch.tensor([0.1]), torch.tensor([0.25, 0.7])
    found = grid_hardsigmoid(x, scale, weight_scale)
    torch.testing.assert_close(found[:, 0], F.hardsigmoid(x[:, 0]))  # 3 is 120 steps of 0.025
    shifted = x[:, 1] + 43 * 0.07 - 3  # 3 is 42.86 steps of 0.07
    torch.testing.assert_close(found[:, 1], F.hardsigmoid(shifted))
    torch.testing.assert_close(grid_hardsigmoid(x, torch.zeros(1), weight_scale), F.hardsigmoid(x))


def test_its_gradient_is_that_of_the_function() -> None:
    x = torch.tensor([[-4.0, -2.0, 0.0, 1.0, 2.5, 4.0]], requires_grad=True)
    wanted = torch.autograd.grad(F.hardsigmoid(x).sum(), x)[0]
    found = torch.autograd.grad(grid_hardsigmoid(x, torch.tensor([0.1]), torch.tensor([0.25])).sum(), x)[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("make", "scope", "count"),
    [
        (Mobile, "all", 1),
        (LinearGate, "all", 1),
        (GateWithoutBias, "all", 0),
        (GateReadTwice, "all", 0),
        (Mobile, "layers", 0),
    ],
)
def test_where_a_layer_computes_it(make: type[Mobile], scope: str, count: int) -> None:
    student = quantized(graph(make), PTQ(bits="8", activation_scope=scope))
    assert gates(student) == count
    x = images(16)
    torch.testing.assert_close(student.network(x), graph(make)(x), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("bits", ["8", pytest.param("6", marks=pytest.mark.slow), "W8A4"])
@pytest.mark.parametrize("make", [Mobile, LinearGate])
@pytest.mark.parametrize("scale", [1.0, 1.3, pytest.param(0.6, marks=pytest.mark.slow)])
def test_simulation_and_converted_graph_agree(make: type[Mobile], bits: str, scale: float) -> None:
    """Also where a trained grid reaches beyond 1, so that its last integers are not used, or ends before 1."""
    student = quantized(graph(make), PTQ(bits=bits))
    (gate,) = (node for node in student.network.graph.nodes if node.target is grid_hardsigmoid)
    (reader,) = gate.users
    student.network.get_submodule(str(reader.target)).scale.data.mul_(scale)
    converted = convert(student)
    assert "hardsigmoid" not in converted.code
    with torch.no_grad():
        steps = (student(images(200, 5)) - converted(images(200, 5))) / output_step(converted)
    assert (steps.abs() < 1e-3).float().mean() >= 0.99
    assert steps.abs().max() <= 2.01


@pytest.mark.slow
def test_the_file_agrees_and_computes_it_in_integers(tmp_path: Path) -> None:
    """Also behind a convolution, with hard swish before it: see test_hardswish.py."""
    student = quantized(graph(LinearGate), PTQ(bits="8"))
    converted = convert(student)
    path = tmp_path / "model.onnx"
    write_onnx(converted, SPEC, path)
    x = images(400, 7)
    assert verify_file(path, student, iter(x.split(100)), output_step(converted)).decided_agreement >= 99
    fused = fused_operators(path)
    assert "HardSigmoid" not in fused
    assert fused.count("QLinearMul") == 2
    assert fused.count("QuantizeLinear") == 1  # of the images
    assert fused.count("DequantizeLinear") == 1  # of the logits
