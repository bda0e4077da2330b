"""Hand-written activations are found in every spelling, and nothing else is."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SPEC, images

from zsq.graph.affine import STEPS
from zsq.graph.edit import aten
from zsq.graph.trace import trace

HARD = (aten.hardswish.default, aten.hardsigmoid.default)


class Net(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head, self.activation = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.conv(x)).mean((2, 3)))


def traced(activation: Callable[[Tensor], Tensor]) -> tuple[list[object], float]:
    """Operators of the hard kind in the graph, and how far it is from the network."""
    torch.manual_seed(0)
    net = Net(activation).eval()
    network = trace(net, SPEC, "toy")
    x = 4 * images(4)
    with torch.no_grad():
        difference = (network(x) - net(x)).abs().max().item()
    left = [n.target for n in network.graph.nodes if n.target in (*HARD, aten.relu6.default, aten.clamp.default)]
    return left, difference


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * (F.relu6(x + 3.0) / 6.0),
        lambda x: F.relu6(x + 3, inplace=True) * x * (1 / 6),
        lambda x: x * torch.clamp(x + 3, 0, 6) / 6,
        lambda x: x * F.hardtanh(x + 3, 0, 6).div(6),
        lambda x: x * F.hardsigmoid(x),
        F.hardswish,
    ],
)
def test_hardswish_in_every_spelling(activation: Callable[[Tensor], Tensor]) -> None:
    found, difference = traced(activation)
    assert found == [HARD[0]]
    assert difference < 1e-5


@pytest.mark.parametrize("activation", [lambda x: F.relu6(x + 3) / 6, lambda x: torch.clamp(x + 3, 0, 6) * (1 / 6)])
def test_hardsigmoid(activation: Callable[[Tensor], Tensor]) -> None:
    found, difference = traced(activation)
    assert found == [HARD[1]]
    assert difference < 1e-5


@pytest.mark.parametrize(
    "activation",
    [
        lambda x: F.relu6(x + 2) / 6,
        lambda x: F.relu6(x + 3) / 5,
        lambda x: torch.clamp(x + 3, 0, 5) / 6,
        lambda x: (x + 1) * F.relu6(x + 3),
        lambda x: F.relu6(torch.add(x, 3, alpha=2)) / 6,
    ],
)
def test_what_only_looks_alike_stays(activation: Callable[[Tensor], Tensor]) -> None:
    found, difference = traced(activation)
    assert not set(found) & set(HARD)
    assert difference < 1e-5


def test_a_gate_of_another_value_is_a_hardsigmoid_of_it() -> None:
    found, difference = traced(lambda x: x * (F.relu6(x.mean((2, 3), keepdim=True) + 3) / 6))
    assert found == [HARD[1]]
    assert difference < 1e-5


@pytest.mark.parametrize(
    ("pool", "found"),
    [
        (nn.AvgPool2d(6), True),
        (nn.AvgPool2d((6, 6), stride=1), True),
        (lambda x: F.avg_pool2d(x, kernel_size=x.shape[2:]), True),
        (nn.AvgPool2d(6, divisor_override=7), False),
        (nn.AvgPool2d(6, padding=1), False),
        (nn.AvgPool2d((6, 5)), False),
        (nn.AvgPool2d(4), False),
    ],
)
def test_pooling_of_the_whole_map(pool: Callable[[Tensor], Tensor], found: bool) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(pool(self.conv(x)).flatten(2).mean(2))

    torch.manual_seed(0)
    net = Pooled().eval()
    network = trace(net, SPEC, "toy")
    assert (aten.adaptive_avg_pool2d.default in {node.target for node in network.graph.nodes}) == found
    torch.testing.assert_close(network(images(4)), net(images(4)))


def test_factors_of_one_and_addends_of_zero_are_left_out() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head, self.one = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Parameter(torch.ones(4, 1, 1))
            self.none = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            x = (self.none + self.conv(x) * self.one - self.none) / 1.0
            return self.head((x + self.one).mean((2, 3)))

    net = Idle().eval()
    network = trace(net, SPEC, "toy")
    assert [node.target for node in network.graph.nodes if node.target in STEPS] == [aten.add.Tensor]
    torch.testing.assert_close(network(images(4)), net(images(4)))
