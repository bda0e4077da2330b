"""The batch norms of an exported network, and what they store."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph.edit import argument, aten, tensor_of


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """What one batch-norm layer stores; every tensor is [C]."""

    node: Node
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def scale(self) -> Tensor:
        """Factor of the equivalent multiply-add."""
        return self.gamma / torch.sqrt(self.var + self.eps)

    @property
    def shift(self) -> Tensor:
        """Offset of the equivalent multiply-add."""
        return self.beta - self.mean * self.scale

    @property
    def std(self) -> Tensor:
        """Standard deviation of the output in training: |gamma|, less where epsilon matters beside the variance."""
        return self.gamma.abs() * torch.sqrt(self.var / (self.var + self.eps))


def batch_norms(network: GraphModule) -> list[BatchNorm]:
    """List the batch norms that normalise by stored statistics, in the order of the graph.

    Module and functional forms, 1d to 3d and SyncBatchNorm are one operator in the exported graph.
    """
    found = []
    for node in network.graph.nodes:
        if node.target is not aten.batch_norm.default:
            continue
        gamma, beta, mean, var = (tensor_of(network, argument(node, index)) for index in (1, 2, 3, 4))
        if mean is None or var is None or argument(node, 5):  # the last: normalises by the batch
            continue
        gamma = torch.ones_like(mean) if gamma is None else gamma
        beta = torch.zeros_like(mean) if beta is None else beta
        found.append(BatchNorm(node, gamma, beta, mean, var, float(argument(node, 7, 1e-5))))
    return found
