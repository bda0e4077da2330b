import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from toys import SPEC, Branchy, ConvHead, Plain, SharedLayer, Tokens, graph, images

import zsq
from zsq.errors import InputError
from zsq.graph import edit
from zsq.graph.batchnorm import batch_norms
from zsq.graph.fold import fold
from zsq.methods import DFQ
from zsq.models.teacher import teacher_from_module
from zsq.quantization import PTQ
from zsq.quantization.bias_correction import correct_biases_by_means
from zsq.quantization.convert import convert
from zsq.quantization.fake_quantize import affine_grid
from zsq.quantization.implied_statistics import ROWS, implied_statistics, normal_quantiles, uniform_pixels
from zsq.quantization.prepare import prepared_layers, quantized_weight
from zsq.quantization.ptq import LOGIT_AGREEMENT, quantize_ptq
from zsq.quantization.quantizers import ActivationQuantizer, quantizers
from zsq.runs.synthesize import synthesize
from zsq.training.loop import Run
from zsq.types import ImageSpec, Statistics

BRIGHT = ImageSpec(channels=3, height=8, width=8, classes=5, mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.1))
"""Of images whose mean pixel is not 0 behind the normalisation."""


class OneNorm(nn.Module):
    """A normalised convolution, something behind it, and a layer that reads it."""

    def __init__(
        self, behind: Callable[[Tensor], Tensor] = torch.relu, gamma: tuple[float, ...] = (1, 2, 0.5, -1)
    ) -> None:
        super().__init__()
        self.behind = behind
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, eps=1e-30)
        self.second = nn.Conv2d(4, 6, 3)
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.behind(self.norm(self.conv(x)))).mean((2, 3))[:, : SPEC.classes]


BETA = (0.0, 1.0, -1.0, 0.5)


def statistics(
    behind: Callable[[Tensor], Tensor] = torch.relu, gamma: tuple[float, ...] = (1, 2, 0.5, -1), eps: float = 0.0
) -> tuple[GraphModule, Statistics]:
    network = graph(lambda: OneNorm(behind))
    norm = batch_norms(network)[0].node
    edit.get_attribute(network, str(norm.args[1].target)).data.copy_(torch.tensor(gamma))
    edit.get_attribute(network, str(norm.args[2].target)).data.copy_(torch.tensor(BETA))
    if eps:
        edit.get_attribute(network, str(norm.args[4].target)).fill_(eps)
        norm.args = (*norm.args[:7], eps, *norm.args[8:])
    folded, record = fold(network)
    return folded, implied_statistics(folded, record, uniform_pixels(SPEC, Run()), 6.0, Run())


def density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def cumulative(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def node_of(network: GraphModule, target: object) -> str:
    return next(node.name for node in network.graph.nodes if node.target is target)


def test_quantiles_are_a_standard_normals() -> None:
    values = normal_quantiles(torch.device("cpu"))
    assert len(values) == ROWS
    assert values.mean().item() == pytest.approx(0, abs=1e-6)
    assert values.square().mean().item() == pytest.approx(1)
    assert (values.abs() < 1).float().mean().item() == pytest.approx(cumulative(1) - cumulative(-1), abs=0.01)


def test_mean_inputs_behind_a_relu_are_the_closed_form() -> None:
    _, found = statistics()
    wanted = [s * density(m / s) + m * cumulative(m / s) for m, s in zip(BETA, (1, 2, 0.5, 1), strict=True)]
    assert found.input_means["conv2d_1"].tolist() == pytest.approx(wanted, abs=5e-3)  # max(0, beta) would be off by 0.4


def test_mean_inputs_behind_a_relu6_match_an_integral() -> None:
    _, found = statistics(F.relu6, gamma=(1, 4, 0.5, -8))
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    weight = torch.exp(-grid.square() / 2)
    for mean, std, got in zip(BETA, (1, 4, 0.5, 8), found.input_means["conv2d_1"].tolist(), strict=True):
        wanted = ((mean + std * grid).clamp(0, 6) * weight).sum() / weight.sum()
        assert got == pytest.approx(wanted.item(), abs=5e-3 * max(1, std))


def test_ranges_are_six_sigmas_around_the_widest_channels() -> None:
    network, found = statistics()
    low, high = found.ranges["conv2d"]
    assert (low.item(), high.item()) == (pytest.approx(1 - 12), pytest.approx(1 + 12))
    low, high = found.ranges[node_of(network, torch.ops.aten.relu.default)]
    assert (low.item(), high.item()) == (0, pytest.approx(13))
    assert low.shape == high.shape == (1,)
    clipped, ends = statistics(F.relu6)
    (name,) = [n.name for n in clipped.graph.nodes if "relu6" in n.name or "hardtanh" in n.name]
    assert [edge.item() for edge in ends.ranges[name]] == [0, 6]


def test_dead_channels_and_negative_scales() -> None:
    _, found = statistics(gamma=(0.0, 0.0, -3.0, 0.0))
    assert [edge.item() for edge in found.ranges["conv2d"]] == pytest.approx([-19, 17])
    assert found.input_means["conv2d_1"][[0, 1, 3]].tolist() == pytest.approx([0, 1, 0.5])


def test_epsilon_makes_the_spread_smaller() -> None:
    """With a variance as large as epsilon, the output varies by gamma / sqrt(2)."""
    _, found = statistics(eps=0.25)
    reach = 12 / math.sqrt(2)
    assert [edge.item() for edge in found.ranges["conv2d"]] == pytest.approx([1 - reach, 1 + reach], rel=1e-5)


def test_a_norm_that_was_not_folded_counts_as_well() -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, SPEC.classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.norm(torch.relu(self.conv(x)))).mean((2, 3)))

    folded, record = fold(graph(First))
    assert record == {}
    (norm,) = batch_norms(folded)
    found = implied_statistics(folded, record, uniform_pixels(SPEC, Run()), 6.0, Run())
    low, high = found.ranges[norm.node.name]
    assert low.item() == pytest.approx((norm.beta - 6 * norm.std).min().item())
    assert high.item() == pytest.approx((norm.beta + 6 * norm.std).max().item())
    wanted = [
        s * density(m / s) + m * cumulative(m / s) for m, s in zip(norm.beta.tolist(), norm.std.tolist(), strict=True)
    ]
    assert found.input_means["linear"].tolist() == pytest.approx(wanted, abs=2e-2)


def test_pixels_are_uniform_in_the_valid_range() -> None:
    folded, record = fold(graph(Plain))
    found = implied_statistics(folded, record, uniform_pixels(BRIGHT, Run()), 6.0, Run())
    assert [edge.item() for edge in found.ranges["x"]] == pytest.approx([-3, 7])
    assert found.input_means["conv2d"].tolist() == pytest.approx([0, 0.5, 2], abs=1e-5)


def test_a_sum_spans_its_own_sigmas_within_the_sum_of_its_terms_ends() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norm_one, self.norm_two = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, affine=False)
            self.head = nn.Linear(4, SPEC.classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.norm_one(self.one(x)) + self.norm_two(self.two(x))).mean((2, 3)))

    folded, record = fold(graph(Sum))
    low, high = implied_statistics(folded, record, uniform_pixels(SPEC, Run()), 6.0, Run()).ranges["add"]
    for edge in (-low.item(), high.item()):  # the ends of both would add to 12
        assert edge == pytest.approx(6 * math.sqrt(2), rel=0.15)


@pytest.mark.parametrize("make", [Plain, Branchy, ConvHead, Tokens, SharedLayer])
def test_every_quantizer_and_layer_gets_its_statistics(make: Callable[[], nn.Module]) -> None:
    network = graph(make)
    folded, record = fold(network)
    found = implied_statistics(folded, record, uniform_pixels(SPEC, Run()), 6.0, Run())
    for scope in ("all", "layers"):
        settings = PTQ(activation_scope=scope, logit_headroom=2.0)
        student = quantize_ptq(folded, _no_images, settings, Run(), statistics=found)
        assert student.num_calibration_images == 0
        for node in student.network.graph.nodes:
            module = student.network.get_submodule(node.target) if node.op == "call_module" else None
            if isinstance(module, ActivationQuantizer):
                headroom = 2.0 * LOGIT_AGREEMENT if str(node.target) in student.ends else 1.0
                ends = [edge * headroom for edge in found.ranges[node.args[0].name]]
                scale, zero_point = affine_grid(*ends, module.bits)
                assert torch.equal(module.scale, scale)
                assert torch.equal(module.zero_point, zero_point)
        assert {quantizer.mode for quantizer in quantizers(student)} == {"quantize"}
        assert found.input_means.keys() == {layer.name for layer in prepared_layers(student.network)}


def _no_images() -> object:
    raise AssertionError("no image is needed")


def test_bias_correction_takes_out_the_weights_error_times_the_mean_input() -> None:
    folded, record = fold(graph(Plain))
    found = implied_statistics(folded, record, uniform_pixels(BRIGHT, Run()), 6.0, Run())
    plain, corrected = (
        quantize_ptq(folded, _no_images, PTQ(bits="3", bias_correction=on), Run(), statistics=found)
        for on in (False, True)
    )
    for layer in prepared_layers(plain.network):
        quantizer, weight = quantized_weight(plain.network, layer)
        error = (quantizer(weight) - weight).detach()
        error = error.flatten(2).sum(2) if error.dim() > 2 else error
        name = str(layer.args[2].args[0].target)
        moved = edit.get_attribute(corrected.network, name) - edit.get_attribute(plain.network, name)
        assert moved.abs().max() > 1e-3
        torch.testing.assert_close(moved.detach(), -(error @ found.input_means[layer.name]), rtol=1e-4, atol=1e-6)


def test_layers_without_a_bias_are_left_alone() -> None:
    folded, record = fold(graph(ConvHead))
    found = implied_statistics(folded, record, uniform_pixels(BRIGHT, Run()), 6.0, Run())
    student = quantize_ptq(folded, _no_images, PTQ(bits="4", bias_correction=False), Run(), statistics=found)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    correct_biases_by_means(student, found.input_means)
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["network.conv.bias"]


class Uneven(nn.Module):
    """A chain of separable convolutions."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        widths = [3, 8, 8, 12, 12]
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, groups=i if i == o else 1, bias=False) for i, o in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for o in widths[1:])
        self.head = nn.Linear(12, SPEC.classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = self.activation(norm(layer(x)))
        return self.head(x.mean((2, 3)))


def uneven_net(activation: Callable[[Tensor], Tensor]) -> nn.Module:
    """A network whose channels differ by orders of magnitude and whose batch norms store what images give."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Uneven(activation).train()
        for norm, following in zip(net.norms, [*net.layers[1:], net.head], strict=True):
            norm.momentum = None
            factors = torch.randn(len(norm.weight)).mul(1.5).exp()
            norm.weight.data.uniform_(0.5, 1.5).mul_(factors)
            norm.bias.data.normal_().mul_(factors)
            weight = following.weight.data  # what comes in larger is multiplied by less
            by_input = weight if weight.shape[1] == 1 else weight.transpose(0, 1)
            by_input.div_(factors.view(-1, *[1] * (weight.dim() - 1)))
        net(images(256))
    return net.eval()


@pytest.fixture(scope="module")
def uneven() -> zsq.Teacher:
    return teacher_from_module(uneven_net(torch.relu), SPEC)


def relative_error(teacher: zsq.Teacher, method: DFQ, granularity: str) -> float:
    surrogate = method.fit(teacher, Run())
    settings = PTQ(weight_granularity=granularity, logit_headroom=1.0)
    student = quantize_ptq(surrogate.network, _no_images, settings, Run(), statistics=surrogate.statistics)
    with torch.no_grad():
        logits, answers = teacher.network(images(200, seed=3)), student(images(200, seed=3))
    return float((answers - logits).square().mean() / (logits - logits.mean(0)).square().mean())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_equalisation_brings_uneven_channels_back(uneven: zsq.Teacher, granularity: str) -> None:
    without = relative_error(uneven, DFQ(equalize=False, absorb=False), granularity)
    with_it = relative_error(uneven, DFQ(absorb=False), granularity)
    assert without > 1
    assert with_it < 0.2


def test_the_rewritten_network_computes_what_the_teacher_does(uneven: zsq.Teacher) -> None:
    network = DFQ(absorb=False).fit(uneven, Run()).network
    torch.testing.assert_close(network(images()), uneven.network(images()), rtol=1e-4, atol=1e-4)
    assert not batch_norms(network)


def test_clipped_channels_are_rounded_once_and_converted() -> None:
    teacher = teacher_from_module(uneven_net(F.relu6), SPEC)
    surrogate = DFQ(relu6="clip", absorb=False).fit(teacher, Run())
    torch.testing.assert_close(surrogate.network(images()), teacher.network(images()), rtol=1e-4, atol=1e-4)
    student = quantize_ptq(surrogate.network, _no_images, PTQ(), Run(), statistics=surrogate.statistics)
    assert (
        len([q for q in quantizers(student) if isinstance(q, ActivationQuantizer)]) == 1 + 4 + 1 + 1
    )  # the mean's, too
    with torch.no_grad():
        answers, converted = student(images()), convert(student)(images())
    step = float(student.network.get_submodule(next(iter(student.ends))).scale)
    assert ((answers - converted).abs() > step / 2).float().mean() < 0.02


@pytest.mark.slow
def test_a_run_has_no_images_to_show_and_no_labels_to_recognise(tmp_path: Path, said: list[str]) -> None:
    teacher = zsq.load_teacher("digits")
    result = zsq.quantize(teacher, out=tmp_path / "run", method="dfq", data="digits", device="cpu")
    assert result.record.label_recognition is None
    assert result.record.num_calibration_images == 0
    assert result.record.range_rule == "batch-norm"
    assert result.record.data_free
    assert result.record.quantized_top1 > result.record.float_top1 - 1
    assert not any("WARNING" in line for line in said)
    assert not (tmp_path / "run" / "samples.png").exists()
    assert not (tmp_path / "run" / "generator.safetensors").exists()
    with pytest.raises(InputError, match="method dfq makes no images"):
        synthesize(teacher, out=tmp_path / "images", method="dfq")
    assert not (tmp_path / "images").exists()


def test_a_teacher_without_batch_norm_is_refused() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(192, SPEC.classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x.flatten(1))

    with pytest.raises(InputError, match=r"teacher 'bare' has no batch norm.*Methods that do without: noise, real"):
        DFQ().fit(teacher_from_module(Bare().eval(), SPEC, name="bare"), Run())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"iterations": 0}, "method.iterations is 0; it must be at least 1"),
        ({"range_sigmas": 0.0}, "method.range_sigmas is 0.0; it must be above 0"),
        ({"absorb_sigmas": -1.0}, "method.absorb_sigmas is -1.0; it must be at least 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        DFQ(**settings)
