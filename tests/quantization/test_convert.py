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

from zsq.export.converted import output_step
from zsq.export.onnx import write_onnx
from zsq.export.verify import verify_file
from zsq.graph.batchnorm import batch_norms
from zsq.graph.trace import trace
from zsq.quantization import PTQ
from zsq.quantization.convert import convert
from zsq.quantization.fake_quantize import integer_range
from zsq.quantization.integer_ops import grid_norm
from zsq.quantization.pair_sums import neighbour_sums
from zsq.quantization.prepare import Student
from zsq.quantization.quantizers import WeightQuantizer, quantizers

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
@pytest.mark.parametrize(
    "bits", ["8", pytest.param("6", marks=pytest.mark.slow), "4", pytest.param("W4A8", marks=pytest.mark.slow)]
)
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


@pytest.mark.slow
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
            largest = value.abs().max()
            assert largest >= high or (bits == "8" and neighbour_sums(value.float()).max() in (127, 128))


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
    """With min-max, the largest weight of each channel lies at 127.5 steps where no pair of neighbours is the bound."""
    student = student_of(Plain, "W8A7", bias_correction=False)
    quantizer, weight = student.network.weight_1, student.network.second.weight.detach()
    steps = (weight / quantizer.scale.detach().view(-1, 1, 1, 1)).abs().flatten(1).amax(1)
    torch.testing.assert_close(steps, torch.full_like(steps, 127.5))
    stored_values = convert(student).second.weight * quantizer.scale.detach().view(-1, 1, 1, 1)
    assert torch.equal(stored_values, quantizer(weight).detach())


@pytest.mark.slow
@pytest.mark.parametrize("make", [ConvHead, SharedLayer, Branchy])
def test_the_file_agrees_for_unusual_networks(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    student = student_of(make, "4")
    converted = convert(student)
    write_onnx(converted, SPEC, tmp_path / "model.onnx")
    x = images(100, seed=5)
    found = verify_file(tmp_path / "model.onnx", student, [x], output_step(converted), threads=1)
    assert found.agreement_literal >= 99


class PartlyRectified(nn.Module):
    """An activation that writes to a part of what is read later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, SPEC.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x[:, 1:4].relu_()
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
def test_an_activation_that_writes_in_place_is_kept_in_the_file(tmp_path: Path) -> None:
    student = student_of(PartlyRectified)
    converted = convert(student)
    write_onnx(converted, SPEC, tmp_path / "model.onnx")
    x = images(100, seed=5)
    found = verify_file(tmp_path / "model.onnx", student, [x], output_step(converted), threads=1)
    assert found.max_logit_difference_steps <= 2.01


FACTORS = {
    "usual": {},
    "negative and steep": {2: -1.5, 3: 20.0},
    "dead": {0: 0.0, 1: 1e-30},
    "nearly dead": {0: 2e-6, 1: -1e-4},
    "all dead": dict.fromkeys(range(6), 0.0),
}


def pre_activated(factors: dict[int, float], bits: str) -> tuple[GraphModule, Student]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = settle(PreActivated())
        for channel, factor in factors.items():
            network.norm.weight.data[channel] = factor
            network.norm.bias.data[channel] = 1.0
        traced = trace(network, SPEC, "toy")
    return traced, quantized(traced, PTQ(bits=bits, bias_correction=False))


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8", "4"])
@pytest.mark.parametrize("factors", FACTORS)
def test_batch_norms_that_stand_alone_become_integers(factors: str, bits: str, tmp_path: Path) -> None:
    teacher, student = pre_activated(FACTORS[factors], bits)
    converted, path, x = convert(student), tmp_path / "model.onnx", images(200, seed=5)
    assert not batch_norms(converted)
    assert not batch_norms(student.network)
    assert agree(student, converted, x) >= 0.99
    write_onnx(converted, SPEC, path)
    found = verify_file(path, student, [x], output_step(converted), threads=1)
    assert min(found.decided_agreement, found.decided_self_agreement) >= 99
    assert "BatchNormalization" not in [node.op_type for node in onnx.load(path).graph.node]
    bias = converted.get_buffer("batch_norm_shift")
    assert bias.dtype == torch.int32
    assert bias.abs().max() <= 2**30 + 1
    if bits == "8":
        with torch.no_grad():
            wanted, simulated = teacher(x), student(x)
        assert (simulated - wanted).norm() < 0.03 * wanted.norm()
    if (factors, bits) == ("usual", "8"):  # no operation in float is left
        assert set(fused_operators(path)) <= {
            "Pad", "QuantizeLinear", "Transpose", "QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "Reshape",
            "QGemm", "DequantizeLinear",
        }  # fmt: skip


def test_factors_of_batch_norms_are_kept() -> None:
    _, student = pre_activated(FACTORS["negative and steep"], "4")
    factor = student.network.get_buffer("batch_norm_factor")
    integers = convert(student).get_buffer("batch_norm_factor")
    assert integers.dtype == torch.int8
    assert integers.flatten().tolist() == [127, 127, -127, 127, 127, 127]
    torch.testing.assert_close(convert(student).get_buffer("batch_norm_factor_scale"), factor.abs() / 127)


def test_a_batch_norm_of_values_that_are_not_rounded_stays() -> None:
    student = student_of(PreActivated, activation_scope="layers")
    assert len(batch_norms(convert(student))) == 2


class Normed(nn.Module):
    """A batch norm on the input, one that is used twice, without factors, one behind a pooling, and one of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False)
        self.pooled, self.vectors = nn.BatchNorm2d(3), nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(self.first(x))))
        x = torch.relu(self.pooled(nn.functional.max_pool2d(x, 2)))
        return self.head(torch.relu(self.vectors(x.mean((2, 3)))))


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["8", "4"])
def test_batch_norms_in_unusual_places(bits: str, tmp_path: Path) -> None:
    student = student_of(Normed, bits)
    converted, x = convert(student), images(200, seed=5)
    assert not batch_norms(converted)
    assert agree(student, converted, x) >= 0.99
    write_onnx(converted, SPEC, tmp_path / "model.onnx")
    found = verify_file(tmp_path / "model.onnx", student, [x], output_step(converted), threads=1)
    assert min(found.decided_agreement, found.decided_self_agreement) >= 99


def test_a_lone_batch_norm_is_simulated_as_it_was() -> None:
    """Its factors are kept, and its offsets to half of their step."""
    factor, shift, step = torch.tensor([0.5, -2.0, 1e-3]), torch.tensor([0.3, 1.0, -0.2]), torch.tensor([0.02])
    x = torch.arange(-100, 100).view(1, 1, 10, 20) * step + torch.zeros(2, 3, 1, 1)
    wanted = x * factor.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    difference = (grid_norm(x, factor, shift, step) - wanted).abs().amax((0, 2, 3))
    assert (difference <= step * factor.abs() / 254 * 1.01 + 1e-7).all()
    torch.testing.assert_close(grid_norm(x, factor, shift, torch.zeros(1)), wanted)
