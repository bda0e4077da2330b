"""What does not depend on the images is a stored tensor in the graph, and the logits are the network's bit for bit."""

import copy

import pytest
import torch
from computed import COMPUTED
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SPEC, images

from zsq.graph import edit
from zsq.graph.constants import MOST_GROWTH
from zsq.graph.trace import trace


def is_constant(node: torch.fx.Node, known: set[torch.fx.Node]) -> bool:
    return node.op == "get_attr" or (node.op == "call_function" and all(n in known for n in node.all_input_nodes))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_a_computed_weight_is_a_weight_like_any_other(name: str) -> None:
    torch.manual_seed(0)
    net = COMPUTED[name]().eval().requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    network = trace(net, SPEC, "toy")
    assert torch.equal(network(images(3)), net(images(3)))
    assert len(list(edit.layers(network))) == 2
    constants = set[torch.fx.Node]()
    for node in network.graph.nodes:
        if is_constant(node, constants):
            constants.add(node)
            assert node.op == "get_attr", node
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


class Drawing(nn.Module):
    """Reads a random draw that changes nothing, a table that is too large to store, and a cast that gives the same."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(MOST_GROWTH + 1)
        weight = self.head.weight.to(x.dtype).contiguous()
        return F.linear(x.flatten(1), weight, self.head.bias) + 0 * torch.rand(5) + table[7:8]


def test_draws_and_large_tables_are_computed_at_each_call_and_equal_tensors_keep_their_name() -> None:
    network = trace(Drawing().eval(), SPEC, "toy")
    assert {name for name, _ in network.named_parameters()} == {"head.weight", "head.bias"}
    assert not list(network.named_buffers())
    called = {str(node.target) for node in network.graph.nodes if node.op == "call_function"}
    assert {"aten.rand.default", "aten.zeros.default"} <= called


class Windows(nn.Module):
    """Adds a mask that is filled like the input, as shifted windows do, and a tensor whose size follows the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, SPEC.classes)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        mask = y.new_zeros((6, 6))
        mask[:3] = 2.0
        y = (y + mask + y.new_full((1,), 0.5)) * torch.ones_like(y)
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


def test_what_is_filled_like_another_tensor_is_stored_unless_the_batch_says_its_size() -> None:
    torch.manual_seed(0)
    net = Windows().eval().requires_grad_(False)
    network = trace(net, SPEC, "toy")
    assert torch.equal(network(images(3)), net(images(3)))
    targets = [str(node.target) for node in network.graph.nodes if node.op == "call_function"]
    assert not any(name in target for target in targets for name in ("new_zeros", "new_full", "scatter", "fill"))
    assert sum("ones_like" in target for target in targets) == 1
