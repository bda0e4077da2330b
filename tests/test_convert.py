from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from toys import (
    SPEC,
    Branchy,
    ClampedGate,
    ConvHead,
    DeadBranch,
    Mobile,
    Plain,
    PreActivated,
    SharedLayer,
    Shift,
    ShutGate,
    Tokens,
    fused_operators,
    graph,
    images,
    quantized,
    settle,
)

from zsq.batchnorm import batch_norms
from zsq.export import output_step, write_onnx
from zsq.quantize import PTQ
from zsq.quantize.convert import convert
from zsq.quantize.fakequant import WeightQuantizer, integer_range, quantizers
from zsq.quantize.gates import grid_norm
from zsq.quantize.prepare import Student
from zsq.tracing import trace
from zsq.verification import verify_onnx

NETWORKS = [
    Plain,
    Branchy,
    ConvHead,
    PreActivated,
    SharedLayer,
    Tokens,
    Mobile,
    ClampedGate,
    Shift,
    DeadBranch,
    ShutGate,
]
QD = torch.ops.quantized_decomposed


def student_of(make: Callable[[], nn.Module], bits: str = "8", **options: object) -> Student:
    return quantized(graph(make), PTQ(bits=bits, **options))


def stored(converted: GraphModule) -> dict[str, Tensor]:
    return {name: value for name, value in converted.named_buffers() if not name.endswith(("_scale", "_zero_point"))}


def agree(student: Student, converted: GraphModule, x: Tensor) -> float:
    """Share of logits that are the same; the rest differs by at most a step, where a value lay on a tie."""
    with torch.no_grad():
        steps = (student(x) - converted(x)) / output_step(converted)
    assert steps.abs().max() <= 2.01
    return (steps.abs() < 1e-3).float().mean().item()


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("bits", ["8", "6", "4", "W4A8"])
def test_the_converted_graph_computes_what_was_simulated(make: Callable[[], nn.Module], bits: str) -> None:
    student = student_of(make, bits)
    assert agree(student, convert(student), images(200, seed=5)) >= 0.99


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("make", [DeadBranch, ShutGate, Shift, ClampedGate])
def test_eight_bits_are_near_the_float_network(make: Callable[[], nn.Module], bias_correction: bool) -> None:
    student, x = student_of(make, bias_correction=bias_correction), images(200, seed=5)
    with torch.no_grad():
        wanted = graph(make)(x)
        assert (student(x) - wanted).norm() <= 0.05 * wanted.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"weight_granularity": "tensor"},
        {"activation_scope": "layers"},
        {"first_last_bits": 8},
        {"weight_range_rule": "mse", "range_rule": "percentile"},
        {"bias_correction": False},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("make", [Branchy, ConvHead, SharedLayer])
def test_under_every_option_too(make: Callable[[], nn.Module], options: dict[str, object]) -> None:
    student = student_of(make, "6", **options)
    assert agree(student, convert(student), images(200, seed=5)) >= 0.99


def test_learnt_grids_convert_to_what_evaluation_computes() -> None:
    student = quantized(graph(Branchy), PTQ(bits="4"), learnable=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for quantizer in quantizers(student):
            quantizer.scale.mul_(torch.rand(quantizer.scale.shape, generator=generator) * 0.3 + 0.9)
            if not isinstance(quantizer, WeightQuantizer):
                quantizer.zero_point.add_(torch.rand(1, generator=generator) - 0.5)
                quantizer.zero_point.clamp_(quantizer.quant_min, quantizer.quant_max)
    assert agree(student, convert(student), images(200, seed=5)) >= 0.99


@pytest.mark.parametrize("bits", ["8", "4", "W4A8"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_weights_are_stored_as_int8_and_biases_as_int32(bits: str, granularity: str) -> None:
    values = stored(convert(student_of(Branchy, bits, weight_granularity=granularity)))
    names = [f"{layer}.{kind}" for layer in ("stem", "down", "left", "right", "head") for kind in ("weight", "bias")]
    assert sorted(values) == sorted(names)
    low, high = integer_range(int(bits.removeprefix("W")[0]))
    for name, value in values.items():
        assert value.dtype == (torch.int8 if name.endswith("weight") else torch.int32)
        if name.endswith("weight"):
            assert low <= value.min() <= value.max() <= high
            assert value.abs().max() >= high


def test_no_float_weight_is_left() -> None:
    converted = convert(student_of(Branchy))
    assert list(converted.parameters()) == []
    floats = [name for name, value in converted.named_buffers() if value.is_floating_point()]
    assert floats
    assert all(name.endswith("_scale") for name in floats)
    assert not any(node.op == "call_module" for node in converted.graph.nodes)


def test_values_that_only_move_keep_their_grid() -> None:
    converted = convert(student_of(Branchy, "4"))
    pools = [n for n in converted.graph.nodes if n.target is torch.ops.aten.max_pool2d.default]
    flattened = [n for n in converted.graph.nodes if n.target is torch.ops.aten.flatten.using_ints]
    for node in pools + flattened:
        (reader,) = node.users
        assert reader.target is QD.quantize_per_tensor.default
        assert node.args[0].target is QD.dequantize_per_tensor.default
        assert reader.args[1:] == node.args[0].args[1:]
    assert len(pools) == len(flattened) == 1


def test_convert_leaves_the_student_alone() -> None:
    student = student_of(Plain)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    code = student.network.code
    convert(student)
    assert student.network.code == code
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_integers_by_hand() -> None:
    student = student_of(Plain, bias_correction=False)
    converted = convert(student)
    network = student.network
    scale = network.weight_1.scale.detach()
    wanted = (network.second.weight.detach() / scale.view(-1, 1, 1, 1)).round().clamp(-128, 127)
    assert torch.equal(converted.second.weight.float(), wanted)
    simulated = network.weight_1(network.second.weight).detach() / scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(simulated, wanted, rtol=1e-6, atol=0)
    product = network.activation_1.scale.detach() * scale
    bias = (network.second.bias.detach() / product).round()
    assert torch.equal(converted.second.bias.float(), bias)
    torch.testing.assert_close(converted.second.bias_scale, product)


def test_a_weight_halfway_between_integers_is_stored_as_it_is_simulated() -> None:
    """With min-max, the largest weight of each channel lies at 127.5 steps."""
    student = student_of(Plain, bias_correction=False)
    quantizer, weight = student.network.weight_1, student.network.second.weight.detach()
    steps = (weight / quantizer.scale.detach().view(-1, 1, 1, 1)).abs().flatten(1).amax(1)
    torch.testing.assert_close(steps, torch.full_like(steps, 127.5))
    stored_values = convert(student).second.weight * quantizer.scale.detach().view(-1, 1, 1, 1)
    assert torch.equal(stored_values, quantizer(weight).detach())


@pytest.mark.parametrize("make", [ConvHead, SharedLayer, Branchy])
def test_the_file_agrees_for_unusual_networks(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    student = student_of(make, "4")
    converted = convert(student)
    write_onnx(converted, SPEC, tmp_path / "model.onnx")
    x = images(100, seed=5)
    found = verify_onnx(tmp_path / "model.onnx", student, [x], output_step(converted), threads=1)
    assert found.agreement_literal >= 99


@pytest.fixture(scope="module", params=["8", "4"])
def pre_activated(request: pytest.FixtureRequest) -> Student:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = settle(PreActivated())
        assert isinstance(network, PreActivated)
        traced = trace(network.harden(), SPEC, "toy")
    return quantized(traced, PTQ(bits=request.param))


def test_batch_norms_that_stand_alone_become_integers(pre_activated: Student) -> None:
    converted = convert(pre_activated)
    assert not batch_norms(converted)
    assert not batch_norms(pre_activated.network)
    factors = converted.get_buffer("batch_norm_factor")
    assert factors.dtype == torch.int8
    assert factors.flatten().tolist() == [0, 0, -127, 127, 127, 127]
    assert agree(pre_activated, converted, images(200, seed=5)) >= 0.99


def test_a_dead_channel_of_a_batch_norm_keeps_its_offset(pre_activated: Student) -> None:
    converted = convert(pre_activated)
    bias = converted.get_buffer("batch_norm_shift")
    assert bias.dtype == torch.int32
    assert bias.abs().max() < 2**31 - 1
    offsets = bias.double() * converted.get_buffer("batch_norm_shift_scale")
    assert offsets[0].item() == pytest.approx(0.7, rel=1e-6)


def test_no_operation_in_float_is_left_of_a_pre_activated_network(pre_activated: Student, tmp_path: Path) -> None:
    converted, path = convert(pre_activated), tmp_path / "model.onnx"
    write_onnx(converted, SPEC, path)
    x = images(200, seed=5)
    found = verify_onnx(path, pre_activated, [x], output_step(converted), threads=1)
    assert found.decided_agreement >= 99
    assert "BatchNormalization" not in [node.op_type for node in onnx.load(path).graph.node]
    if pre_activated.network.activation_1.bits == 8:  # below, ranges are clipped
        assert set(fused_operators(path)) <= {
            "Pad", "QuantizeLinear", "Transpose", "QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "Reshape",
            "Flatten", "Squeeze", "QGemm", "DequantizeLinear",
        }  # fmt: skip


def test_a_batch_norm_of_values_that_are_not_rounded_stays() -> None:
    student = student_of(PreActivated, activation_scope="layers")
    assert len(batch_norms(convert(student))) == 2


def test_a_lone_batch_norm_is_simulated_as_it_was(pre_activated: Student) -> None:
    """Its factors are kept, and its offsets to half of their step."""
    network = pre_activated.network
    integers, scale, shift = (network.get_buffer(f"batch_norm_{role}") for role in ("factor", "factor_scale", "shift"))
    step = network.get_submodule("activation_1").scale
    x = torch.randn(4, 6, 5, 5) * step
    found = grid_norm(x, integers, scale, shift, step)
    wanted = x * (integers * scale).view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    assert ((found - wanted).abs() <= (step * scale / 2 * 1.001 + 1e-6).view(1, -1, 1, 1)).all()
    torch.testing.assert_close(grid_norm(x, integers, scale, shift, torch.zeros(1)), wanted)
