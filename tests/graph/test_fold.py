from collections.abc import Callable

import pytest
import torch
from norms import FORMS
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Branchy, Plain, graph, images

from zsq.graph.affine import STEPS
from zsq.graph.batchnorm import batch_norms
from zsq.graph.edit import aten
from zsq.graph.fold import fold
from zsq.graph.observe import ObservedTeacher


@pytest.mark.parametrize("form", FORMS)
def test_fold_keeps_the_logits(form: str) -> None:
    network = graph(FORMS[form])
    folded, record = fold(network)
    assert not batch_norms(folded)
    assert batch_norms(network)
    torch.testing.assert_close(folded(images()), network(images()), rtol=1e-4, atol=1e-4)
    std, mean = record["before.weight"]
    norm = batch_norms(network)[0]
    torch.testing.assert_close(std, (norm.gamma.square() * norm.var / (norm.var + norm.eps)).sqrt())
    torch.testing.assert_close(mean, norm.beta)


class Chained(nn.Module):
    """A batch norm behind a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.conv(x))).mean((2, 3)))


class TwoReaders(Chained):
    """The convolution's output is also read beside its batch norm, and a batch norm comes first of all."""

    def __init__(self) -> None:
        super().__init__()
        self.input_norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.input_norm(x))
        return self.head((y + self.first(y)).mean((2, 3)))


class SharedWeights(nn.Module):
    """One convolution before two batch norms, and once more without."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.conv(torch.relu(self.first(self.conv(x)))))
        return self.head(self.conv(x).mean((2, 3)))


class TokenNorm(Chained):
    """A batch norm whose channels are not the linear layer's: tokens as many as features."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.head = nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(x.flatten(2))).flatten(1))


class OwnBias(nn.Module):
    """A module whose parameter `bias` is added behind the batch norm, not in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 3, 8, 8) / 14), nn.Parameter(torch.randn(5))
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight)).flatten(1) + self.bias


class ComputedBias(OwnBias):
    """The convolution's bias is computed from what is stored."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight, self.bias * 2)).flatten(1)


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (Chained, 0),
        (TwoReaders, 2),
        (SharedWeights, 0),
        (TokenNorm, 1),
        (lambda: nn.Sequential(OwnBias()), 0),
        (ComputedBias, 0),
    ],
)
def test_fold_and_observation_of_unusual_networks(make: Callable[[], nn.Module], left: int) -> None:
    network = graph(make)
    folded, _ = fold(network)
    x = images()
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
    assert sum(node.target is aten.batch_norm.default for node in folded.graph.nodes) == left
    torch.testing.assert_close(ObservedTeacher(network)(x)[0], network(x), rtol=1e-4, atol=1e-4)


def test_fold_records_each_layer_under_the_name_of_its_weight() -> None:
    network = graph(Branchy)
    folded, record = fold(network)
    assert list(record) == ["stem.weight", "down.weight"]
    names = {name for name, _ in [*folded.named_parameters(), *folded.named_buffers()]}
    assert set(record) <= names
    assert not any("norm" in name for name in names)
    shared = fold(graph(SharedWeights))[1]
    assert list(shared) == ["conv.weight_conv2d", "conv.weight_conv2d_1"]


def test_fold_by_hand() -> None:
    network = graph(Plain)
    norm = batch_norms(network)[0]
    folded, _ = fold(network)
    scale = norm.gamma / (norm.var + 1e-5).sqrt()
    torch.testing.assert_close(folded.conv.weight, network.conv.weight * scale.view(-1, 1, 1, 1))
    torch.testing.assert_close(folded.conv.bias, norm.beta - norm.mean * scale)


class LayerScale(nn.Module):
    """Factors a channel behind a convolution, a linear layer on tokens, a permuted one, and a sum, which keeps its."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.tokens = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)
        self.factors = nn.ParameterList([nn.Parameter(torch.linspace(-1, 2, 4)) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, third, last = self.factors
        x = self.norm(self.conv(x)) * first.view(-1, 1, 1)
        y = self.tokens(x.permute(0, 2, 3, 1)) * second
        y = third.view(1, -1, 1, 1) * self.tokens(y).permute(0, 3, 1, 2)
        logits: torch.Tensor = self.head((x + y).mean((2, 3)) * last)
        return logits


def test_factors_of_channels_are_folded_into_the_layer_of_their_own() -> None:
    network = graph(LayerScale)
    folded, record = fold(network)
    products = [node for node in folded.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert len(products) == 3  # two behind the layer that is shared, one behind the mean
    torch.testing.assert_close(folded(images(4)), network(images(4)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(record["conv.weight"][1], network.get_parameter("norm.bias") * torch.linspace(-1, 2, 4))


class OwnLayerScale(nn.Module):
    """Factors and biases behind a convolution, a linear layer on tokens and a permuted one, and numbers behind all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.norm, self.head, self.number = nn.BatchNorm2d(4), nn.Linear(4, 5), nn.Parameter(torch.tensor([1.5]))
        self.factors = nn.ParameterList([nn.Parameter(torch.linspace(-1, 2, 4)) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x)) / self.number - self.factors[0].view(1, -1, 1, 1)
        y = self.one(x.permute(0, 2, 3, 1)) * self.factors[0] + self.factors[1]
        y = self.factors[1].view(1, -1, 1, 1) * self.two(y).permute(0, 3, 1, 2) + 0.5
        logits: torch.Tensor = self.head(y.mean((2, 3)))
        return logits


def test_constants_behind_layers_tokens_and_permutations_are_folded() -> None:
    network = graph(OwnLayerScale)
    folded, record = fold(network)
    assert not [node for node in folded.graph.nodes if node.target in STEPS]
    factor, norm = torch.linspace(-1, 2, 4), batch_norms(network)[0]
    torch.testing.assert_close(record["conv.weight"], (norm.std / 1.5, norm.beta / 1.5 - factor))
    torch.testing.assert_close(folded(images(4)), network(images(4)), rtol=1e-4, atol=1e-5)
