"""Hard swish on the grid of its input: close to the function, the same in simulation and file, integers in the file."""

from pathlib import Path

import onnx
import pytest
import torch
from torch.nn import functional as F
from toys import SPEC, Mobile, Tokens, fused_operators, graph, images, quantized

from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.verify import verify_file
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.fake_quantize import integer_range
from zsq.quantization.integer_ops import grid_hardswish
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer, constrain, quantizers, set_mode


@pytest.mark.parametrize("step", [0.02, 0.05, 0.0711])
def test_it_is_hardswish_to_half_a_step_of_its_gate(step: float) -> None:
    x = torch.arange(-128, 128) * step
    found = grid_hardswish(x, torch.tensor([step]))
    assert ((found - F.hardswish(x)).abs() <= x.abs() * step / 6 * 1.01 + 1e-6).all()
    assert torch.equal(found[x <= -3 - step], torch.zeros(int((x <= -3 - step).sum())))


def test_steps_that_divide_three_give_the_function_itself() -> None:
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(grid_hardswish(x, torch.tensor([0.25])), F.hardswish(x))
    torch.testing.assert_close(grid_hardswish(x, torch.zeros(1)), F.hardswish(x))  # before calibration


def test_its_gradient_is_that_of_the_function() -> None:
    x = torch.tensor([-4.0, -2.0, 0.0, 1.0, 2.5, 4.0], requires_grad=True)
    wanted = torch.autograd.grad(F.hardswish(x).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(grid_hardswish(x, torch.tensor([0.25])).sum(), x)[0], wanted)


def hard_inputs(student: torch.nn.Module) -> list[ActivationQuantizer]:
    return [q for q in quantizers(student) if isinstance(q, ActivationQuantizer) and q.reach]


@pytest.mark.parametrize(("bits", "count"), [("8", 1), ("6", 0), ("W4A8", 1)])
def test_only_eight_bit_inputs_are_put_on_grids(bits: str, count: int) -> None:
    student = quantized(graph(Mobile), PTQ(bits=bits))
    assert len(hard_inputs(student)) == count
    assert hard_inputs(quantized(graph(Mobile), PTQ(bits="8", activation_scope="layers"))) == []
    assert hard_inputs(quantized(graph(Tokens), PTQ(bits="8"))) == []


def test_the_range_of_its_input_holds_minus_three_also_when_learnt() -> None:
    student = quantized(graph(Mobile), PTQ(bits="8"), learnable=True)
    (quantizer,) = hard_inputs(student)
    quantizer.set_range(torch.tensor([-0.5]), torch.tensor([2.0]))
    assert (quantizer.quant_min - quantizer.zero_point) * quantizer.scale <= -3 + 1e-5
    with torch.no_grad():
        quantizer.scale.fill_(0.001)
        quantizer.zero_point.fill_(-128.0)
    constrain(student)
    low = (quantizer.quant_min - quantizer.zero_point.round()) * quantizer.scale
    assert low.item() <= -3 + quantizer.scale.item()
    assert quantizer.zero_point.item() <= quantizer.quant_max


@pytest.mark.parametrize("bits", ["8", "W6A8"])
def test_simulation_and_converted_graph_agree(bits: str) -> None:
    student = quantized(graph(Mobile), PTQ(bits=bits))
    with torch.no_grad():
        steps = (student(images(200, 5)) - convert(student)(images(200, 5))) / output_step(convert(student))
    assert (steps.abs() < 1e-3).float().mean() >= 0.99
    assert steps.abs().max() <= 2.01


@pytest.mark.slow
def test_the_file_agrees_and_computes_it_and_hard_sigmoid_in_integers(tmp_path: Path) -> None:
    student = quantized(graph(Mobile), PTQ(bits="8"))
    converted = convert(student)
    path = tmp_path / "model.onnx"
    write_onnx(converted, SPEC, path)
    x = images(400, 7)
    assert verify_file(path, student, iter(x.split(100)), output_step(converted)).decided_agreement >= 99
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert "HardSwish" not in operators
    assert operators.count("Clip") == 1
    assert operators.count("GlobalAveragePool") == 2
    fused = fused_operators(path)
    assert fused.count("QLinearMul") == 2
    assert fused.count("QLinearGlobalAveragePool") == 2
    assert "HardSigmoid" not in fused
    assert fused.count("QuantizeLinear") == 1  # of the images
    assert fused.count("DequantizeLinear") == 1  # of the logits


def test_a_student_with_it_trains() -> None:
    student = quantized(graph(Mobile), PTQ(bits="8"), learnable=True)
    set_mode(student, "quantize")
    student.train()
    student(images(16)).square().mean().backward()
    for quantizer in quantizers(student):
        if isinstance(quantizer, WeightQuantizer):
            assert torch.isfinite(quantizer.scale.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    assert integer_range(8) == (-128, 127)
