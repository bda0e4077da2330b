import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from zsq.graph.activations import clamp_limits
from zsq.graph.edit import aten


def call(target: Callable[..., Tensor], *args: object, **kwargs: object) -> fx.Node:
    """Return a node that calls an operator on a graph's input."""
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"), *args), kwargs)


@pytest.mark.parametrize(
    ("node", "limits"),
    [
        (call(aten.relu.default), (0, math.inf)),
        (call(aten.relu6.default), (0, 6)),
        (call(aten.hardtanh.default), (-1, 1)),
        (call(aten.hardtanh.default, -0.1), (-0.1, 1)),
        (call(aten.hardtanh.default, -0.1, 0.2), (-0.1, 0.2)),
        (call(aten.hardtanh.default, max_val=0.2), (-1, 0.2)),
        (call(aten.clamp.default, 0), (0, math.inf)),
        (call(aten.clamp.default, None, 6), (-math.inf, 6)),
        (call(aten.clamp.default, 0, 6), (0, 6)),
        (call(aten.clamp.default, max=6), (-math.inf, 6)),
        (call(aten.clamp_min.default, 0.1), (0.1, math.inf)),
    ],
)
def test_limits_are_those_that_the_operator_imposes(node: fx.Node, limits: tuple[float, float]) -> None:
    assert clamp_limits(node) == limits
    x = torch.linspace(-10, 10, 101)
    torch.testing.assert_close(node.target(x, *node.args[1:], **node.kwargs), x.clamp(*limits))


@pytest.mark.parametrize(
    "node",
    [
        call(aten.clamp.Tensor, None, torch.ones(1)),
        *[call(target) for target in (aten.relu_.default, aten.relu6_.default, aten.hardtanh_.default)],
        *[call(target, 0) for target in (aten.clamp_.default, aten.clamp_min_.default)],
        *[call(target) for target in (aten.leaky_relu.default, aten.sigmoid.default, aten.hardsigmoid.default, F.relu)],
        fx.Graph().placeholder("x"),
        6.0,
        None,
    ],
)
def test_what_does_more_has_no_limits(node: object) -> None:
    assert clamp_limits(node) is None


def test_a_limit_that_another_node_computes_is_not_known() -> None:
    graph = fx.Graph()
    x, most = graph.placeholder("x"), graph.placeholder("most")
    assert clamp_limits(graph.call_function(aten.clamp.default, (x, 0, most))) is None
