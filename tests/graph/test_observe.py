import pytest
import torch
from norms import FORMS, Normalised, statistics
from torch import nn
from toys import Branchy, graph, images

from zsq.errors import InputError
from zsq.graph.batchnorm import batch_norms
from zsq.graph.fold import fold
from zsq.graph.observe import ObservedTeacher


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
