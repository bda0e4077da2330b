import torch
from norms import ComputedScale, Normalised, conv2d
from torch import fx
from toys import Branchy, graph

from zsq.graph.batchnorm import BatchNorm, batch_norms


def test_multiply_add_and_spread_by_hand() -> None:
    gamma, beta, mean, var = torch.tensor([[2.0, -4.0], [1.0, 0.0], [3.0, 1.0], [15.0, 0.0]])
    norm = BatchNorm(fx.Graph().placeholder("x"), gamma, beta, mean, var, eps=1.0)
    assert norm.scale.tolist() == [0.5, -4.0]
    assert norm.shift.tolist() == [-0.5, 4.0]
    torch.testing.assert_close(norm.std, torch.tensor([2 * (15 / 16) ** 0.5, 0.0]))


def test_norms_come_in_the_order_of_the_graph_with_what_they_store() -> None:
    network = graph(Branchy)
    stored = network.state_dict()
    for name, norm in zip(("stem_norm", "down_norm"), batch_norms(network), strict=True):
        for role, value in (("weight", norm.gamma), ("bias", norm.beta), ("running_mean", norm.mean)):
            assert torch.equal(value, stored[f"{name}.{role}"])
        assert torch.equal(norm.var, stored[f"{name}.running_var"])


def test_a_scale_that_is_computed_from_stored_values_is_read() -> None:
    holder: list[Normalised] = []
    network = graph(lambda: holder.append(conv2d(ComputedScale(4))) or holder[0])
    (norm,) = batch_norms(network)
    assert torch.equal(norm.gamma, 3 * holder[0].norm.scale)
    assert torch.equal(norm.beta, holder[0].norm.shift + 1)
