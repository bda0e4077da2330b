from collections.abc import Callable

import pytest
import torch
from norms import ComputedScale, FunctionalNorm, conv2d
from torch import fx, nn
from toys import Branchy, graph, images

from zsq.graph.batchnorm import BatchNorm, batch_norms
from zsq.graph.fold import fold


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


@pytest.mark.parametrize("norm", [ComputedScale, lambda c: FunctionalNorm(c, training=True)])
def test_norms_that_do_not_scale_by_stored_values_are_left_alone(norm: Callable[[int], nn.Module]) -> None:
    network = graph(lambda: conv2d(norm(4)))
    assert batch_norms(network) == []
    wanted = network(images())
    torch.testing.assert_close(fold(network)[0](images()), wanted)
