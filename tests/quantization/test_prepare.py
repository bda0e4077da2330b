from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SPEC, Branchy, ConvHead, Plain, SharedLayer, Tokens, graph, images

from zsq.errors import InputError
from zsq.graph.fold import fold
from zsq.graph.trace import trace
from zsq.quantization.fake_quantize import quantize_bias
from zsq.quantization.prepare import Bits, Scheme, Student, mean_weight_bits, prepare, prepared_layers, quantized_weight
from zsq.quantization.quantizers import ActivationQuantizer, WeightQuantizer, quantizers, set_mode


def scheme(bits: str = "4", **options: object) -> Scheme:
    return Scheme(bits=Bits.parse(bits), **options)


def student_of(make: Callable[[], nn.Module], **options: object) -> Student:
    return prepare(fold(graph(make))[0], scheme(**options))


def activations(student: Student) -> list[tuple[str, int]]:
    """What each activation quantizer rounds, and to how many bits, in the order of the graph."""
    found = []
    for node in student.network.graph.nodes:
        module = student.network.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, ActivationQuantizer):
            source = node.args[0]
            what = "input" if source.op == "placeholder" else source.target._schema.name.removeprefix("aten::")
            found.append((what, module.bits))
    return found


def weights(student: Student) -> list[tuple[str, int]]:
    """The stored name and width of each layer's weight."""
    pairs = []
    for layer in prepared_layers(student.network):
        quantizer, _ = quantized_weight(student.network, layer)
        pairs.append((str(layer.args[1].args[0].target), quantizer.bits))
    return pairs


def test_every_activation_between_layers_is_rounded() -> None:
    assert activations(student_of(Branchy)) == [
        ("input", 8),
        ("relu", 4),  # of the stem; max-pool, slices, padding and flatten only move values
        ("conv2d", 4),  # read by the addition
        ("relu", 4),  # the addition's, fused
        ("relu", 4),
        ("conv2d", 4),
        ("cat", 4),
        ("adaptive_avg_pool2d", 4),
        ("linear", 8),
    ]


def test_scope_layers_rounds_only_what_layers_read_and_the_ends() -> None:
    assert activations(student_of(Branchy, all_activations=False)) == [
        ("input", 8),
        ("max_pool2d", 4),
        ("relu", 4),
        ("flatten", 4),
        ("linear", 8),
    ]


def test_scope_layers_leaves_the_shortcut_in_float() -> None:
    student = student_of(Branchy, all_activations=False)
    set_mode(student, "quantize")
    for quantizer in quantizers(student):
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.set_range(torch.tensor(0.0), torch.tensor(1e6))
    add = next(node for node in student.network.graph.nodes if "add" in str(node.target))
    names = {node.name for node in student.network.graph.nodes if node.op == "call_module"}
    reached, queue = set(), list(add.all_input_nodes)
    while queue:
        node = queue.pop()
        if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.relu.default):
            continue
        reached.add(node.name)
        queue += node.all_input_nodes
    assert not reached & names


@pytest.mark.parametrize("scope", [True, False])
def test_fused_activations_and_their_layers_round_once(scope: bool) -> None:
    names = [name for name, _ in activations(student_of(Plain, all_activations=scope))]
    assert names == ["input", "relu", {True: "relu6", False: "mean"}[scope], *["mean"] * scope, "linear"]


class Activated(nn.Module):
    """A layer with an activation behind it."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head, self.activation = nn.Conv2d(3, 6, 3), nn.Linear(6, SPEC.classes), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("activation", "names"),
    [
        (F.relu, ["relu"]),
        (F.relu6, ["relu6"]),
        (F.hardtanh, ["hardtanh"]),
        (lambda x: x.clamp(-1, 2), ["clamp"]),
        (lambda x: x.clamp(max=2), ["clamp"]),
        (lambda x: torch.clamp_min(x, 0.1), ["clamp_min"]),
        (lambda x: x.clamp(None, torch.full((1, 6, 1, 1), 2.0)), ["clamp"]),
        (lambda x: x.relu_(), ["relu"]),
        (lambda x: F.hardtanh(x, inplace=True), ["hardtanh"]),
        (lambda x: x.clamp_(0, 6), ["clamp"]),
        (torch.sigmoid, ["conv2d", "sigmoid"]),
        (F.leaky_relu, ["conv2d", "leaky_relu"]),
    ],
)
def test_activations_that_limit_are_computed_before_rounding(
    activation: Callable[[Tensor], Tensor], names: list[str]
) -> None:
    network = trace(Activated(activation).eval(), SPEC, "toy")
    found = [name for name, _ in activations(prepare(fold(network)[0], scheme()))]
    assert found == ["input", *names, "mean", "linear"]


@pytest.mark.parametrize("scope", [True, False])
def test_logits_have_eight_bits_also_where_they_are_flattened_last(scope: bool) -> None:
    student = student_of(ConvHead, all_activations=scope)
    assert activations(student) == [("input", 8), ("hardtanh", 4), ("conv2d", 8)]
    assert student.network.get_submodule(next(iter(student.ends))).bits == 8


def test_weights_are_rounded_to_the_schemes_bits() -> None:
    names = ["stem.weight", "down.weight", "left.weight", "right.weight", "head.weight"]
    assert weights(student_of(Branchy)) == [(name, 4) for name in names]
    assert weights(student_of(Branchy, bits="W6A8")) == [(name, 6) for name in names]
    assert {bits for _, bits in activations(student_of(Branchy, bits="W6A8"))} == {8}


@pytest.mark.parametrize("scope", [True, False])
def test_first_and_last_layer_can_differ(scope: bool) -> None:
    student = student_of(Branchy, first_last_bits=6, all_activations=scope)
    assert [bits for _, bits in weights(student)] == [6, 4, 4, 4, 6]
    rounded = activations(student)
    assert (rounded[0], rounded[-1]) == (("input", 8), ("linear", 8))
    assert rounded[-2][1] == 6  # what the last layer reads
    assert {bits for _, bits in rounded[1:-2]} == {4}


@pytest.mark.parametrize("make", [Plain, Branchy, ConvHead, SharedLayer, Tokens])
@pytest.mark.parametrize("scope", [True, False])
def test_quantizers_that_are_off_change_nothing(make: Callable[[], nn.Module], scope: bool) -> None:
    network = graph(make)
    student = student_of(make, all_activations=scope, learnable=True).eval()
    torch.testing.assert_close(student(images()), network(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [Plain, Branchy, ConvHead, SharedLayer, Tokens])
@pytest.mark.parametrize("scope", [True, False])
def test_each_layer_reads_a_rounded_input_and_the_scale_of_its_grid(make: Callable[[], nn.Module], scope: bool) -> None:
    student = student_of(make, all_activations=scope)
    for layer in prepared_layers(student.network):
        source = layer.args[0]
        while source.op != "call_module":
            source = source.args[0]
        if len(layer.args) > 2 and layer.args[2] is not None:
            assert layer.args[2].target is quantize_bias
            assert layer.args[2].args[1].target == f"{source.target}.scale"
            assert layer.args[2].args[2].target == f"{layer.args[1].target}.scale"


@pytest.mark.parametrize("learnable", [True, False])
def test_what_is_trained(learnable: bool) -> None:
    student = student_of(Plain, learnable=learnable)
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    layers = {f"network.{name}" for part in ("conv", "second", "head") for name in (f"{part}.weight", f"{part}.bias")}
    assert layers <= trained
    grids = trained - layers
    assert bool(grids) == learnable
    assert all(name.split(".")[1].startswith(("activation_", "weight_")) for name in grids)


def test_granularity_of_weights() -> None:
    for per_channel, sizes in ((True, [6, 8, 5]), (False, [1, 1, 1])):
        student = student_of(Plain, per_channel=per_channel)
        found = [len(q.scale) for q in quantizers(student) if isinstance(q, WeightQuantizer)]
        assert found == sizes


def test_layers_that_share_a_weight_get_copies() -> None:
    folded = fold(graph(SharedLayer))[0]
    student = prepare(folded, scheme())
    stored = [name for name, _ in weights(student)]
    assert len(set(stored)) == len(stored) == 3
    first, second, _ = (quantized_weight(student.network, layer)[1] for layer in prepared_layers(student.network))
    assert torch.equal(first, second)
    assert first.data_ptr() != second.data_ptr()


def test_prepare_leaves_the_folded_network_alone() -> None:
    folded = fold(graph(Branchy))[0]
    code, state = folded.code, {name: value.clone() for name, value in folded.state_dict().items()}
    student = prepare(folded, scheme())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert folded.code == code
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in state.items())


def test_a_network_without_layers_is_refused() -> None:
    network = graph(lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ConstantPad1d((0, 2), 0.0)))
    with pytest.raises(InputError, match="no convolution or linear layer whose weight could be quantized"):
        prepare(network, scheme())


@pytest.mark.parametrize(
    ("text", "weight", "activation", "shown"),
    [
        ("8", 8, 8, "8"),
        (6, 6, 6, "6"),
        ("int4", 4, 4, "4"),
        ("W4A8", 4, 8, "W4A8"),
        (" w2a6 ", 2, 6, "W2A6"),
        ("W4A4", 4, 4, "4"),
    ],
)
def test_bits_parse(text: str | int, weight: int, activation: int, shown: str) -> None:
    bits = Bits.parse(text)
    assert (bits.weight, bits.activation, str(bits)) == (weight, activation, shown)
    assert Bits.parse(str(bits)) == bits


@pytest.mark.parametrize("text", ["", "eight", "W4", "A8", "4.5", "-4", "W4A8B2"])
def test_bits_refuses_other_words(text: str) -> None:
    with pytest.raises(InputError, match="give one width such as 8, 6 or 4, or both such as W4A8"):
        Bits.parse(text)


@pytest.mark.parametrize("text", ["1", "16", "W0A8", "W8A9"])
def test_bits_refuses_other_widths(text: str) -> None:
    with pytest.raises(InputError, match=f"bits is '{text}'; widths from 2 to 8 work"):
        Bits.parse(text)


def test_a_named_width_wins_over_that_of_the_ends_and_that_over_the_rest() -> None:
    named = {"stem.weight": 3, "left.weight": 2}
    student = student_of(Branchy, first_last_bits=8, weight_bits=named)
    found = dict(weights(student))
    assert found == {"stem.weight": 3, "down.weight": 4, "left.weight": 2, "right.weight": 4, "head.weight": 8}
    sizes = {name: value.numel() for name, value in student.network.state_dict().items() if name in found}
    expected = sum(found[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean_weight_bits(student) == pytest.approx(expected)
    assert expected != pytest.approx(sum(found.values()) / 5)


def test_a_shared_weight_has_one_width_in_all_its_layers() -> None:
    student = student_of(SharedLayer, weight_bits={"conv.weight": 5})
    assert sorted(width for _, width in weights(student)) == [4, 5, 5]


def test_a_width_for_an_unknown_weight_is_refused() -> None:
    with pytest.raises(
        InputError, match=r"Unknown weight 'lefd.weight'. Did you mean 'left.weight'\? Known: down.weight"
    ):
        student_of(Branchy, weight_bits={"lefd.weight": 4})
