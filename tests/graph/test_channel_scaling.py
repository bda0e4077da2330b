from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SPEC, graph, images

from zsq.graph import edit
from zsq.graph.channel_scaling import LARGEST_SHARE, scale_channels
from zsq.graph.equalize import find_pairs, weight_name
from zsq.graph.fold import fold

PIXELS = (torch.full((3,), -100.0), torch.full((3,), 100.0))
"""So wide that batch norm alone says how far channels reach."""


class Mobile(nn.Module):
    """Stem, depthwise and pointwise layer as in a mobile network, and a linear one."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu6) -> None:
        super().__init__()
        self.activation = activation
        self.stem, self.stem_norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.deep, self.deep_norm = nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)
        self.point, self.point_norm = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, SPEC.classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.stem_norm(self.stem(x)))
        x = self.activation(self.deep_norm(self.deep(F.pad(x, (0, 1, 0, 1)))))
        return self.head(self.point_norm(self.point(x)).mean((2, 3)))


class WithReLU(Mobile):
    def __init__(self) -> None:
        super().__init__(F.relu)


class WithLeakyReLU(Mobile):
    def __init__(self) -> None:
        super().__init__(F.leaky_relu)


def test_a_network_with_relu_computes_the_same():
    network = graph(WithReLU)
    folded, record = fold(network)
    assert scale_channels(folded, record, PIXELS, 6.0) == 1
    torch.testing.assert_close(folded(images()), network(images()), rtol=1e-4, atol=1e-4)


def test_relu6_clips_only_what_exceeds_the_reach():
    network = graph(Mobile)
    folded, record = fold(network)
    original = {name: (std.clone(), mean.clone()) for name, (std, mean) in record.items()}
    assert scale_channels(folded, record, PIXELS, 0.5) == 1
    (std, mean), (scaled_std, _) = original["stem.weight"], record["stem.weight"]
    factors = scaled_std / std
    assert (factors >= 1).all()
    assert (6 / factors >= (mean + 0.5 * std).clamp(0, 6) * (1 - 1e-5)).all()
    small = images() * 1e-3  # far from what the clipped channels hold in training, so nothing is clipped
    scaled, record = fold(network)
    scale_channels(scaled, record, PIXELS, 50.0)
    torch.testing.assert_close(scaled(small), network(small), rtol=1e-4, atol=1e-4)


def test_channels_fill_the_range_in_front_of_a_depthwise_layer_only():
    folded, record = fold(graph(Mobile))
    std, mean = (x.clone() for x in record["stem.weight"])
    deep = tuple(x.clone() for x in record["deep.weight"])
    scale_channels(folded, record, PIXELS, 1.0)
    scaled_std, scaled_mean = record["stem.weight"]
    reach = (mean + std).clamp(0, 6)
    reach = reach.clamp(min=reach.max() / LARGEST_SHARE)
    torch.testing.assert_close(scaled_std / std, 6 / reach)
    torch.testing.assert_close(scaled_mean / mean, 6 / reach)
    assert all(torch.equal(*pair) for pair in zip(record["deep.weight"], deep, strict=True))


def test_the_reach_of_the_first_layer_ends_at_what_pixels_give():
    folded, record = fold(graph(Mobile))
    std = record["stem.weight"][0].clone()
    pixels = (torch.full((3,), -0.5), torch.full((3,), 2.0))
    weight, bias = (edit.get_attribute(folded, name).detach() for name in ("stem.weight", "stem.bias"))
    most = weight.clamp(min=0).sum((1, 2, 3)) * 2.0 - weight.clamp(max=0).sum((1, 2, 3)) * 0.5 + bias
    scale_channels(folded, record, pixels, 1e6)
    reach = most.clamp(0, 6)
    reach = reach.clamp(min=reach.max() / LARGEST_SHARE)
    torch.testing.assert_close(record["stem.weight"][0] / std, 6 / reach)


def test_without_a_relu_nothing_is_scaled():
    folded, record = fold(graph(WithLeakyReLU))
    before = {name: value.clone() for name, value in folded.state_dict().items()}
    assert scale_channels(folded, record, PIXELS, 6.0) == 0
    assert all(torch.equal(value, before[name]) for name, value in folded.state_dict().items())


def test_pairs_behind_relu6_are_found_where_asked_for():
    folded, _ = fold(graph(Mobile))
    assert [(weight_name(p.first), weight_name(p.second), p.limit) for p in find_pairs(folded, limited=True)] == [
        ("stem.weight", "deep.weight", 6.0),
        ("deep.weight", "point.weight", 6.0),
        ("point.weight", "head.weight", None),
    ]
    assert [p.weights for p in find_pairs(folded)] == [("point.weight", "head.weight")]


def test_channels_that_are_clipped_each_at_a_bound_of_its_own_stay():
    class Clipped(Mobile):
        def __init__(self) -> None:
            super().__init__(F.relu)
            self.register_buffer("most", torch.linspace(0.2, 1, 6).view(1, 6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.clamp(F.relu(self.stem_norm(self.stem(x))), None, self.most)
            return self.head(self.point(self.deep_norm(self.deep(x))).mean((2, 3)))

    network = graph(Clipped)
    folded, record = fold(network)
    assert scale_channels(folded, record, PIXELS, 6.0) == 0
    torch.testing.assert_close(folded(images()), network(images()), rtol=1e-4, atol=1e-4)
