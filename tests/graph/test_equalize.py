from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from toys import SPEC, Branchy, ConvHead, Plain, SharedLayer, Tokens, graph, images

from zsq.graph import edit
from zsq.graph.batchnorm import batch_norms
from zsq.graph.equalize import (
    absorb,
    equalising_factors,
    equalize,
    find_pairs,
    input_ranges,
    output_ranges,
    replace_relu6,
    weight_name,
)
from zsq.graph.fold import fold


class Separable(nn.Module):
    """Convolution, depthwise, grouped and pointwise ones, with every operator that lets a factor pass between them."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.activation = activation
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.deep_norm = nn.Conv2d(6, 12, 3, groups=6, bias=False), nn.BatchNorm2d(12)
        self.grouped, self.grouped_norm = nn.Conv2d(12, 8, 1, groups=4, bias=False), nn.BatchNorm2d(8)
        self.last, self.head = nn.Conv2d(8, 9, 3, padding=1), nn.Linear(9, SPEC.classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.activation(self.stem_norm(self.stem(x))), 2)
        x = self.activation(self.deep_norm(self.deep(F.pad(x, (0, 1, 0, 1)))))
        x = F.leaky_relu(self.grouped_norm(self.grouped(x)), 0.1)
        x = F.avg_pool2d(x, 3, stride=1, padding=1)
        x = torch.flatten(F.adaptive_avg_pool2d(self.activation(self.last(x)), 1), 1)
        return self.head(x)


class WithReLU6(Separable):
    def __init__(self) -> None:
        super().__init__(F.relu6)


class HardSwish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, SPEC.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head((x * F.relu6(x + 3) / 6).mean((2, 3)))


def names(network: GraphModule) -> list[tuple[str, str]]:
    return [pair.weights for pair in find_pairs(network)]


def unequal(make: Callable[[], nn.Module], spread: float = 1.5) -> GraphModule:
    """A folded network whose ranges differ by orders of magnitude between channels."""
    folded, _ = fold(graph(make))
    for layer in edit.layers(folded):
        weight = edit.get_attribute(folded, weight_name(layer)).detach()
        random = torch.Generator().manual_seed(len(weight))
        factors = torch.randn(len(weight), generator=random).mul(spread).exp()
        edit.set_tensor(folded, weight_name(layer), weight * factors.view(-1, *[1] * (weight.dim() - 1)))
    return folded


def ranges(network: GraphModule) -> list[tuple[Tensor, Tensor]]:
    """Ranges of the first layer's outputs and the second's inputs, for each pair."""
    found = []
    for pair in find_pairs(network):
        first, second = (edit.get_attribute(network, name).detach() for name in pair.weights)
        found.append((output_ranges(first), input_ranges(second, len(first))))
    return found


def test_pairs_of_a_chain() -> None:
    assert names(fold(graph(Separable))[0]) == [
        ("stem.weight", "deep.weight"),
        ("deep.weight", "grouped.weight"),
        ("grouped.weight", "last.weight"),
        ("last.weight", "head.weight"),
    ]
    assert all(pair.rectified for pair in find_pairs(fold(graph(Separable))[0]))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Branchy, []),  # a residual sum or a second reader behind every layer
        (Plain, [("conv.weight", "second.weight")]),  # then ReLU6
        (ConvHead, []),  # ReLU6
        (SharedLayer, []),  # weights that serve two layers
        (Tokens, []),  # channels last
        (HardSwish, []),
    ],
)
def test_only_layers_that_factors_pass_between_are_pairs(
    make: Callable[[], nn.Module], found: list[tuple[str, str]]
) -> None:
    assert names(fold(graph(make))[0]) == found


@pytest.mark.parametrize("between", [torch.sigmoid, lambda x: x + 1, lambda x: F.pad(x, (1, 1), value=2.0)])
def test_what_is_not_homogeneous_separates(between: Callable[[Tensor], Tensor]) -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, SPEC.classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.two(between(self.one(x)))).mean((2, 3)))

    assert names(graph(Chain)) == [("two.weight", "head.weight")]


def test_a_flatten_of_several_pixels_separates() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, stride=4), nn.Linear(16, SPEC.classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.conv(x)).flatten(1))

    assert names(graph(Flat)) == []


def test_a_norm_that_was_not_folded_separates() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, SPEC.classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(torch.relu(self.one(x))).mean((2, 3)))

    folded, _ = fold(graph(Behind))
    assert batch_norms(folded)
    assert names(folded) == []


@pytest.mark.parametrize(
    ("first", "second", "factor"),
    [(8.0, 2.0, 2.0), (1.0, 1.0, 1.0), (2.0, 8.0, 0.5), (0.0, 3.0, 1.0), (3.0, 0.0, 1.0)],
)
def test_factors_give_both_ranges_their_geometric_mean(first: float, second: float, factor: float) -> None:
    found = equalising_factors(torch.tensor([first]), torch.tensor([second]))
    assert found.item() == pytest.approx(factor)  # first / second would give 4, its inverse 0.5
    if first and second:
        assert first / found.item() == pytest.approx(second * found.item())


def test_input_ranges_of_groups() -> None:
    weight = torch.zeros(4, 3, 1, 1)  # two groups of three inputs and two outputs
    weight[1, 2], weight[2, 0] = -5, 4
    assert input_ranges(weight, 6).tolist() == [0, 0, 5, 4, 0, 0]
    assert input_ranges(torch.tensor([[1.0, -2.0], [3.0, 0.5]]), 2).tolist() == [3, 2]


@pytest.mark.parametrize("make", [Plain, Separable])
def test_equalising_keeps_the_logits_and_equalises(make: Callable[[], nn.Module]) -> None:
    network = unequal(make)
    before, uneven = network(images()), ranges(network)
    sweeps = equalize(network, {}, 500)
    assert 1 < sweeps < 500
    torch.testing.assert_close(network(images()), before, rtol=1e-4, atol=1e-4)
    assert max((one / other).log().abs().max() for one, other in uneven) > 1
    for one, other in ranges(network):
        torch.testing.assert_close(one, other, rtol=5e-3, atol=0)


def test_one_sweep_is_not_enough_for_a_chain_and_no_more_than_asked_are_made() -> None:
    network = unequal(Separable)
    assert equalize(network, {}, 1) == 1
    assert max((one / other).log().abs().max() for one, other in ranges(network)) > 0.1


def test_what_is_recorded_follows_the_outputs() -> None:
    network, record = fold(graph(Separable))
    before = dict(record)
    weight = edit.get_attribute(network, "deep.weight").clone()
    equalize(network, record, 100)
    factors = output_ranges(weight) / output_ranges(edit.get_attribute(network, "deep.weight"))
    inputs = before["stem.weight"][0] / record["stem.weight"][0]  # what its inputs were multiplied by
    for old, new in zip(before["deep.weight"], record["deep.weight"], strict=True):
        torch.testing.assert_close(new * factors * inputs.repeat_interleave(2), old, rtol=1e-4, atol=1e-5)
    fresh, _ = fold(graph(Separable))
    assert not torch.equal(edit.get_attribute(fresh, "deep.weight"), edit.get_attribute(network, "deep.weight"))


def test_dead_channels_stay_as_they_are() -> None:
    network = unequal(Plain)
    weight = edit.get_attribute(network, "conv.weight")
    weight[2] = 0
    before, bias = network(images()), edit.get_attribute(network, "conv.bias").clone()
    equalize(network, {}, 50)
    after = edit.get_attribute(network, "conv.bias")
    assert after[2] == bias[2]
    assert (after != bias).sum() == 5
    torch.testing.assert_close(network(images()), before, rtol=1e-4, atol=1e-4)


def high(make: Callable[[], nn.Module], beta: float = 8.0) -> tuple[GraphModule, dict[str, tuple[Tensor, Tensor]]]:
    """A folded network whose batch norms have large shifts, and its record."""
    network = graph(make)
    for norm in batch_norms(network):
        edit.get_attribute(network, str(norm.node.args[2].target)).data.fill_(beta)
        edit.get_attribute(network, str(norm.node.args[3].target)).zero_()
        edit.get_attribute(network, str(norm.node.args[4].target)).fill_(9.0)
    return fold(network)


@pytest.mark.parametrize("make", [Plain, Separable])
def test_absorption_lowers_biases_and_what_is_recorded(make: Callable[[], nn.Module]) -> None:
    network, record = high(make)
    before = dict(record)
    biases = {name: value.clone() for name, value in network.state_dict().items()}
    assert absorb(network, record, 3.0) > 5
    name = "conv" if make is Plain else "stem"
    std, mean = before[f"{name}.weight"]
    absorbed = (mean - 3 * std).clamp(min=0)
    torch.testing.assert_close(edit.get_attribute(network, f"{name}.bias"), biases[f"{name}.bias"] - absorbed)
    torch.testing.assert_close(record[f"{name}.weight"][1], mean - absorbed)
    assert torch.equal(record[f"{name}.weight"][0], std)


def test_absorption_is_exact_inside_and_off_at_padded_borders() -> None:
    class Chain(nn.Module):
        def __init__(self, padding: int) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.two = nn.Conv2d(4, SPEC.classes, 3, padding=padding, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.norm(self.one(x)))).mean((2, 3))

    x = 0.01 * images()
    for padding, same in ((0, True), (1, False)):
        network, record = high(lambda padding=padding: Chain(padding))
        logits = network(x)
        assert absorb(network, record, 3.0) == 4
        assert torch.allclose(network(x), logits, rtol=1e-4, atol=1e-4) == same
        (last,) = [layer for layer in edit.layers(network) if weight_name(layer) == "two.weight"]
        assert edit.argument(last, 2) is not None  # it had no bias before


def test_nothing_is_absorbed_without_a_relu_or_where_values_are_low() -> None:
    network, record = high(Plain, beta=0.5)
    assert absorb(network, record, 3.0) == 0
    assert absorb(network, {}, 0.0) == 0


def test_relu6_behind_layers_becomes_relu() -> None:
    folded, _ = fold(graph(WithReLU6))
    plain, _ = fold(graph(Separable))
    assert len(find_pairs(folded)) == 1
    assert replace_relu6(folded, clip=False) == 3
    assert len(find_pairs(folded)) == 4
    assert torch.equal(folded(10 * images()), plain(10 * images()))


def test_clipped_channels_keep_the_logits_through_equalisation_and_absorption() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
            self.two = nn.Conv2d(4, SPEC.classes, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(F.relu6(self.norm(self.one(x)))).mean((2, 3))

    network, record = high(Chain, beta=5.0)
    x = 0.3 * images()
    logits = network(x)
    assert replace_relu6(network, clip=True) == 1
    assert torch.equal(network(x), logits)
    assert equalize(network, record, 100) > 1
    torch.testing.assert_close(network(x), logits, rtol=1e-4, atol=1e-4)
    assert edit.get_attribute(network, "relu6_bound_0").unique().numel() == 4
    bounds = edit.get_attribute(network, "relu6_bound_0").flatten().clone()
    mean = record["one.weight"][1]
    assert absorb(network, record, 3.0) == 4
    moved = mean - record["one.weight"][1]
    torch.testing.assert_close(edit.get_attribute(network, "relu6_bound_0").flatten(), bounds - moved)
    torch.testing.assert_close(network(x), logits, rtol=1e-3, atol=1e-3)


def test_equalisation_scales_the_bounds_of_a_deeper_network() -> None:
    network = unequal(WithReLU6)
    logits = network(images())
    assert replace_relu6(network, clip=True) == 3
    assert len(find_pairs(network)) == 4
    equalize(network, {}, 100)
    torch.testing.assert_close(network(images()), logits, rtol=1e-4, atol=1e-4)


def test_the_relu6_of_hard_swish_stays() -> None:
    network = graph(HardSwish)
    logits = network(images())
    for clip in (False, True):
        assert replace_relu6(network, clip=clip) == 0
    assert torch.equal(network(images()), logits)
