"""A network that gives the statistics of its batch norms' inputs with its logits."""

import operator

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from zsq.errors import InputError
from zsq.graph import edit
from zsq.graph.batchnorm import BatchNorm, batch_norms
from zsq.graph.moments import observed_norm


class ObservedTeacher(nn.Module):
    """The teacher, giving logits and the statistics of every batch norm's input in one call.

    Args:
        network: the exported teacher; it is copied, not changed.
        name: for the error text.
        low_precision: compute the layers in bfloat16; logits and statistics are float32.
        required: refuse a teacher without statistics; otherwise it gives none.

    Attributes:
        target_mean, target_var, eps: what the layers store, concatenated, each [sum C_l].

    Raises:
        InputError: no layer stores batch-norm statistics, and they are required.
    """

    target_mean: Tensor
    target_var: Tensor
    eps: Tensor

    def __init__(
        self, network: GraphModule, name: str = "teacher", *, low_precision: bool = False, required: bool = True
    ) -> None:
        super().__init__()
        self.low_precision = low_precision
        network = edit.copy_network(network)
        norms = batch_norms(network)
        if required and not norms:
            raise InputError(
                f"teacher '{name}' has no batch norm with stored statistics, and this method learns from them. "
                "Methods that do without: noise, real, and zscgan with --set method.bns_weight=0."
            )
        observed = [self._replace(network, index, norm) for index, norm in enumerate(norms)]
        output = network.graph.output_node()
        output.args = ((output.args[0], tuple(observed)),)
        self.network = edit.finish(network).requires_grad_(False)
        self.register_buffer("target_mean", _joined([n.mean for n in norms]))
        self.register_buffer("target_var", _joined([n.var for n in norms]))
        self.register_buffer("eps", _joined([torch.full_like(n.mean, n.eps) for n in norms]))

    @staticmethod
    def _replace(network: GraphModule, index: int, norm: BatchNorm) -> Node:
        x = norm.node.args[0]
        assert isinstance(x, Node)
        shape = (1, -1, *[1] * (x.meta["val"].dim() - 2))
        edit.set_tensor(network, f"observed_scale_{index}", norm.scale.view(shape))
        edit.set_tensor(network, f"observed_shift_{index}", norm.shift.view(shape))
        with network.graph.inserting_before(norm.node):
            scale = network.graph.get_attr(f"observed_scale_{index}")
            shift = network.graph.get_attr(f"observed_shift_{index}")
            observed = network.graph.call_function(observed_norm, (x, scale, shift))
            normalised = network.graph.call_function(operator.getitem, (observed, 0))
            statistics = network.graph.call_function(operator.getitem, (observed, 1))
        normalised.meta["val"] = norm.node.meta["val"]
        norm.node.replace_all_uses_with(normalised)
        network.graph.erase_node(norm.node)
        return statistics

    def forward(self, images: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Map images [N, C, H, W] to logits [N, classes] and (mean, biased variance) of each layer."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.low_precision):
            logits, statistics = self.network(images)
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        return logits.float() if self.low_precision else logits, list(statistics)


def _joined(values: list[Tensor]) -> Tensor:
    return torch.cat(values) if values else torch.empty(0)
