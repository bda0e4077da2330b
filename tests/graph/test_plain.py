"""Writes, contexts and other types: the graph holds pure operators in float32 that compute what the network does."""

import linecache

import pytest
import torch
from torch import Tensor, nn
from toys import SPEC, images, settle

from zsq.errors import TeacherError
from zsq.graph.edit import aten
from zsq.graph.islands import narrowest_type
from zsq.graph.plain import forgetting_sources, plain_network
from zsq.graph.trace import trace


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(torch.relu(self.norm(self.conv(x))))
        return self.head(x.float().mean((2, 3)))

    def inside(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class SelectWrite(Base):
    def inside(self, x: Tensor) -> Tensor:
        x = self.second(x)
        x[:, 0] = 0
        x[:, 1:3] *= 0.5
        x[:, 4:8].clamp_(max=0.2)
        return x


class IndexWrite(Base):
    def inside(self, x: Tensor) -> Tensor:
        x = self.second(x)
        x[:, [1, 3]] = 0.25
        return x


class ReluOfPart(Base):
    def inside(self, x: Tensor) -> Tensor:
        x = self.second(x)
        torch.relu_(x[:, ::2])
        return x.relu_()


class NoGrad(Base):
    def inside(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.second(x)
        with torch.enable_grad():
            return x.detach() * 2


class Autocast(Base):
    def inside(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.relu(self.second(x))


class AutocastOff(Base):
    def inside(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.second(x.float())


class Double(Base):
    def inside(self, x: Tensor) -> Tensor:
        return self.second(x).double().mul(torch.ones(8, 1, 1, dtype=torch.float64) / 3).square()


class Half(Base):
    def inside(self, x: Tensor) -> Tensor:
        return self.second(x).half() + torch.zeros((), dtype=torch.float16)


class Counting(Base):
    """Counts its calls, and writes to its images."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x.clone()
        x.sub_(0.5)
        return super().forward(x)

    def inside(self, x: Tensor) -> Tensor:
        return self.second(x)


NETWORKS = (SelectWrite, IndexWrite, ReluOfPart, NoGrad, Autocast, AutocastOff, Double, Half, Counting)
TOLERANCES = {Autocast: 0.02, Half: 0.002}


@pytest.mark.parametrize("make", NETWORKS)
def test_the_graph_is_plain_and_computes_the_same(make: type[Base]) -> None:
    torch.manual_seed(0)
    net = settle(make())
    network = trace(net, SPEC, "toy")
    wanted = net(images(3))
    torch.testing.assert_close(network(images(3)), wanted, rtol=0, atol=TOLERANCES.get(make, 1e-6) * wanted.abs().max())
    for node in network.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node
            assert node.target is not aten._assert_tensor_metadata.default
        assert not isinstance(node.target, torch._ops.HigherOrderOperator), node
    assert narrowest_type(network) is None
    assert sum(node.target is aten.batch_norm.default for node in network.graph.nodes) == 1


class Squeezing(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.adaptive_avg_pool2d(self.conv(x), 1).squeeze())


def test_squeeze_keeps_a_batch_of_one() -> None:
    network = trace(Squeezing().eval(), SPEC, "toy")
    assert network(images(1)).shape == (1, 5)
    torch.testing.assert_close(network(images(1)), network(images(4))[:1])


def test_a_network_that_normalises_over_the_batch_is_refused() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.Flatten(), nn.Linear(288, 5)
    )
    with pytest.raises(TeacherError, match=r"other logits alone than in a batch .*track_running_stats=False"):
        trace(net.eval(), SPEC, "toy")


def test_shapes_of_a_program_let_go_of_its_examples() -> None:
    net, batch = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)), torch.export.Dim("batch")
    program = torch.export.export(net, (images(2),), dynamic_shapes=({0: batch},))
    shapes = program.graph.find_nodes(op="placeholder")[-1].meta["val"].fake_mode.shape_env
    assert shapes.tracked_fakes
    plain_network(program)
    assert shapes.tracked_fakes is None


def test_sources_end_with_their_block() -> None:
    def kept() -> set[str]:
        return {name for name in linecache.cache if name.startswith("<eval_with_key>")}

    before = kept()
    with forgetting_sources():
        trace(settle(NoGrad()), SPEC, "toy")
        assert kept() > before
    assert kept() == before
