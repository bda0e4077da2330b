from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Branchy, Plain, graph, images

from zsq.errors import InputError
from zsq.graph.batchnorm import ObservedTeacher, batch_norms, fold, moments, observed_norm
from zsq.graph.edit import aten


class Normalised(nn.Module):
    """One batch norm between two maps, and a head; keeps what the norm was given."""

    def __init__(self, before: nn.Module, norm: nn.Module, features: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.before, self.norm, self.head, self.shape = before, norm, nn.Linear(features, 5), shape

    def given(self, x: Tensor) -> Tensor:
        return self.before(x.view(-1, *self.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.given(x))).flatten(1))


class FunctionalNorm(nn.Module):
    """Calls `F.batch_norm` on its own buffers."""

    def __init__(self, channels: int, *, training: bool = False) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(torch.randn(channels))
        self.register_buffer("mean", torch.randn(channels))
        self.register_buffer("var", torch.rand(channels) + 0.5)
        self.batch_statistics = training

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.scale, self.shift, self.batch_statistics, eps=1e-3)


class ComputedScale(FunctionalNorm):
    """Its scale is computed, not stored."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, 3 * self.scale, self.shift + 1)


def conv2d(norm: nn.Module) -> Normalised:
    return Normalised(nn.Conv2d(3, 4, 3), norm, 4 * 36, (3, 8, 8))


FORMS: dict[str, Callable[[], Normalised]] = {
    "2d": lambda: conv2d(nn.BatchNorm2d(4)),
    "2d, eps 1e-3": lambda: conv2d(nn.BatchNorm2d(4, eps=1e-3)),
    "2d, no affine": lambda: conv2d(nn.BatchNorm2d(4, affine=False)),
    "sync": lambda: conv2d(nn.SyncBatchNorm(4)),
    "functional": lambda: conv2d(FunctionalNorm(4)),
    "1d": lambda: Normalised(nn.Conv1d(3, 4, 5, stride=4), nn.BatchNorm1d(4), 4 * 15, (3, 64)),
    "1d after linear": lambda: Normalised(nn.Linear(192, 4, bias=False), nn.BatchNorm1d(4), 4, (192,)),
    "3d": lambda: Normalised(nn.Conv3d(1, 4, 3, bias=False), nn.BatchNorm3d(4), 4 * 36, (1, 3, 8, 8)),
}


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    return mean, var


def test_moments_by_hand() -> None:
    x = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[5.0, 7.0], [2.0, 0.0]]])  # [N, C, L]
    mean, var = moments(x)
    assert mean.tolist() == [4.0, 0.5]
    assert var.tolist() == [5.0, 0.75]  # biased; the unbiased variance would be 6.67


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (2, 3, 4, 5), (2, 3, 2, 2, 2)])
def test_moments_and_gradients_agree_with_var_mean(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + 3).requires_grad_()
    weights = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    for got, wanted in zip(moments(x), statistics(x), strict=True):
        torch.testing.assert_close(got, wanted)
    assert torch.autograd.gradcheck(moments, x)

    def gradient(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        mean, var = function(x)
        return torch.autograd.grad((weights[0] * mean).sum() + (weights[1] * var.log()).sum(), x)[0]

    torch.testing.assert_close(gradient(moments), gradient(statistics))


def test_moments_of_values_far_from_zero() -> None:
    x = 1e3 + torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(moments(x)[1], statistics(x.double())[1].float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6), (2, 3, 4, 5)])
def test_observed_norm_is_batch_norm_and_moments_in_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + 3).requires_grad_()
    size = (1, 3, *[1] * (len(shape) - 2))
    scale, shift = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    y, (mean, var) = observed_norm(x, scale, shift)
    torch.testing.assert_close(y, x * scale + shift)
    for got, wanted in zip((mean, var), statistics(x), strict=True):
        torch.testing.assert_close(got, wanted)

    def flat(x: Tensor) -> tuple[Tensor, ...]:
        y, statistics_of_x = observed_norm(x, scale, shift)
        return y, *statistics_of_x

    assert torch.autograd.gradcheck(flat, x)


def test_in_bfloat16_statistics_stay_near_those_of_float32() -> None:
    network = graph(Branchy)
    found = []
    for low in (False, True):
        x = images(16).requires_grad_()
        logits, seen = ObservedTeacher(network, low_precision=low)(x)
        assert logits.dtype == torch.float32
        assert all(value.dtype == torch.float32 for pair in seen for value in pair)
        (sum(mean.sum() + var.sum() for mean, var in seen) + logits.square().sum()).backward()
        found.append((x.grad, logits.detach(), *(value.detach() for pair in seen for value in pair)))
    assert not torch.equal(found[0][1], found[1][1])
    for number, (exact, near) in enumerate(zip(*found, strict=True)):
        assert (near - exact).norm() < (0.02 if number else 0.05) * exact.norm()  # the gradient passes all layers twice


@pytest.mark.parametrize("form", FORMS)
def test_observed_teacher_gives_logits_and_statistics(form: str) -> None:
    holder: list[Normalised] = []
    network = graph(lambda: holder.append(FORMS[form]()) or holder[0])
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = images()
    observed = ObservedTeacher(network)
    logits, seen = observed(x)
    torch.testing.assert_close(logits, network(x))
    with torch.no_grad():
        wanted = statistics(holder[0].given(x))
    assert len(seen) == 1
    for got, value in zip(seen[0], wanted, strict=True):
        torch.testing.assert_close(got, value)
    norm = batch_norms(network)[0]
    torch.testing.assert_close(observed.target_mean, norm.mean)
    torch.testing.assert_close(observed.target_var, norm.var)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())


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


def test_each_layers_eps_is_its_own() -> None:
    def make() -> nn.Module:
        net = Branchy()
        net.stem_norm.eps, net.down_norm.eps = 1e-3, 0.1
        return net

    network = graph(make)
    observed = ObservedTeacher(network)
    assert torch.equal(observed.eps, torch.tensor([1e-3] * 4 + [0.1] * 8))
    torch.testing.assert_close(observed(images())[0], network(images()))
    torch.testing.assert_close(fold(network)[0](images()), network(images()), rtol=1e-4, atol=1e-4)
    assert torch.equal(ObservedTeacher(graph(FORMS["functional"])).eps, torch.full((4,), 1e-3))


def test_observed_teacher_passes_gradients_to_the_image_and_none_to_the_weights() -> None:
    observed = ObservedTeacher(graph(Branchy))
    x = images(4).requires_grad_()
    _, seen = observed(x)
    sum(mean.sum() + var.sum() for mean, var in seen).backward()
    assert x.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in observed.parameters())


def test_statistics_come_in_the_order_of_the_targets() -> None:
    network = graph(Branchy)
    observed = ObservedTeacher(network)
    assert [len(mean) for mean, _ in observed(images())[1]] == [4, 8]
    norms = batch_norms(network)
    torch.testing.assert_close(observed.target_mean, torch.cat([norms[0].mean, norms[1].mean]))


def test_a_network_without_batch_norm_is_refused() -> None:
    network = graph(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))
    with pytest.raises(InputError, match=r"teacher 'bare' has no batch norm .* Methods that do without: noise, real"):
        ObservedTeacher(network, "bare")
    untracked = graph(lambda: conv2d(nn.BatchNorm2d(4, track_running_stats=False)))
    with pytest.raises(InputError, match="no batch norm with stored statistics"):
        ObservedTeacher(untracked)
    assert fold(untracked)[1] == {}


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
    """The convolution's bias is computed, not stored."""

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
        (ComputedBias, 1),
    ],
)
def test_fold_and_observation_of_unusual_networks(make: Callable[[], nn.Module], left: int) -> None:
    network = graph(make)
    folded, _ = fold(network)
    x = images()
    torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
    assert sum(node.target is aten.batch_norm.default for node in folded.graph.nodes) == left
    torch.testing.assert_close(ObservedTeacher(network)(x)[0], network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [ComputedScale, lambda c: FunctionalNorm(c, training=True)])
def test_norms_that_do_not_scale_by_stored_values_are_left_alone(norm: Callable[[int], nn.Module]) -> None:
    network = graph(lambda: conv2d(norm(4)))
    assert batch_norms(network) == []
    wanted = network(images())
    torch.testing.assert_close(fold(network)[0](images()), wanted)


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
