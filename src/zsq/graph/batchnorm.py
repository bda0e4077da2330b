"""Read, observe and fold the batch norms of an exported network."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from zsq.errors import InputError
from zsq.graph import edit
from zsq.graph.edit import argument, aten, tensor_of
from zsq.runtime import distributed
from zsq.runtime.gpu import kernels

SMALLEST_VARIANCE = 1e-30
"""Added to variances on a GPU, whose kernel returns one over their root."""


class _Moments(torch.autograd.Function):
    """Mean and biased variance in three passes forward and one backward.

    `torch.var_mean` with its gradient took nine times as long (64x16x32x32, one core; benchmarks/moments.py).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if (fused := kernels(x)) is None else fused.dense(x)
        mean, var = _moments(x)
        ctx.save_for_backward(x, mean)
        return mean.flatten(), var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        return _moments_gradient(x, mean, grad_mean, grad_var)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, [1, C, 1, ...], and biased variance, [C], at least in float32."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    if x.is_cuda:  # one pass
        mean, inverse = torch.batch_norm_stats(x, SMALLEST_VARIANCE)
        return mean.view(shape), inverse.square().reciprocal()
    dims = [0, *range(2, x.dim())]
    mean = x.mean(dims, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, (x - mean).square_().mean(dims)


def _moments_gradient(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    """Return the gradient to x of what has these gradients to its mean and variance."""
    if (fused := kernels(x)) is not None:
        return fused.moments_gradient(x, mean, grad_mean, grad_var)
    count = x.numel() // x.shape[1]
    slope = (2 / count) * grad_var.view_as(mean)
    offset = grad_mean.view_as(mean) / count - slope * mean
    return torch.addcmul(offset.to(x.dtype), x, slope.to(x.dtype))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, differentiable once; where processes share a batch, of the whole batch.

    Args:
        x: [N, C] or [N, C, ...], at least one element a channel.

    Returns:
        Mean [C] and variance [C].
    """
    mean, var = _Moments.apply(x)
    return distributed.pooled(mean, var, x.numel() // x.shape[1])


class _ObservedNorm(torch.autograd.Function):
    """`observed_norm`: with the moments, two passes backward instead of the four of both apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if (fused := kernels(x)) is not None:
            x = fused.dense(x)
            mean, var = _moments(x)
            ctx.save_for_backward(x, mean, scale)
            return fused.scaled(x, scale, shift), mean.flatten(), var
        mean, var = _moments(x)
        scale = scale.to(x.dtype)
        ctx.save_for_backward(x, mean, scale)
        return torch.addcmul(shift.to(x.dtype), x, scale), mean.flatten(), var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor, None, None]:
        x, mean, scale = ctx.saved_tensors
        if (fused := kernels(x)) is not None:
            return fused.moments_gradient(x, mean, grad_mean, grad_var, grad, scale), None, None
        return _moments_gradient(x, mean, grad_mean, grad_var).addcmul_(grad, scale), None, None


def observed_norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Batch norm with stored statistics as one multiply-add a channel, and the `moments` of its input.

    Args:
        x: [N, C] or [N, C, ...].
        scale, shift: [1, C, 1, ...]; they take no gradient.

    Returns:
        The normalised x, and mean and biased variance, each [C].
    """
    y, mean, var = _ObservedNorm.apply(x, scale, shift)
    return y, distributed.pooled(mean, var, x.numel() // x.shape[1])


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
    """List the batch norms that normalise by stored statistics and scale by stored values, in the order of the graph.

    Module and functional forms, 1d to 3d and SyncBatchNorm are one operator in the exported graph.
    """
    found = []
    for node in network.graph.nodes:
        if node.target is not aten.batch_norm.default:
            continue
        gamma, beta, mean, var = (tensor_of(network, argument(node, index)) for index in (1, 2, 3, 4))
        computed = (gamma is None and argument(node, 1)) or (beta is None and argument(node, 2))
        if mean is None or var is None or computed or argument(node, 5):  # the last: normalises by the batch
            continue
        gamma = torch.ones_like(mean) if gamma is None else gamma
        beta = torch.zeros_like(mean) if beta is None else beta
        found.append(BatchNorm(node, gamma, beta, mean, var, float(argument(node, 7, 1e-5))))
    return found


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


def fold(network: GraphModule) -> tuple[GraphModule, dict[str, tuple[Tensor, Tensor]]]:
    """Fold each batch norm into the convolution or linear layer in front of it.

    A batch norm whose input has another reader, does not come from such a layer, or has its channels elsewhere, stays.

    Returns:
        The folded copy, and ``{weight name: (std, mean)}`` of what was folded, both [C]: standard deviation and mean of
        the layer's output in training (|gamma| but for epsilon, and beta), which folding destroys and DFQ needs.
    """
    network = edit.copy_network(network)
    record = {}
    for norm in batch_norms(network):
        layer = norm.node.args[0]
        if not isinstance(layer, Node) or layer.target not in edit.LAYERS or len(layer.users) != 1:
            continue
        if layer.target is aten.linear.default and layer.meta["val"].dim() != 2:
            continue  # [N, tokens, C]: the norm's channels are the tokens
        weight, bias = tensor_of(network, layer.args[1]), tensor_of(network, argument(layer, 2))
        if weight is None or (bias is None and argument(layer, 2) is not None):
            continue
        name = str(layer.args[1].target)  # type: ignore[union-attr]
        if len(layer.args[1].users) > 1:  # type: ignore[union-attr]
            name = f"{name}_{layer.name}"  # a weight that two layers share gets a copy, since their norms differ
        bias = torch.zeros_like(norm.mean) if bias is None else bias
        bias_name = f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else f"{name}_bias"
        if _read_elsewhere(network, bias_name, layer):
            bias_name = f"{name}_{layer.name}_bias"
        edit.set_tensor(network, name, weight * norm.scale.view(-1, *[1] * (weight.dim() - 1)))
        edit.set_tensor(network, bias_name, bias * norm.scale + norm.shift)
        weight_node = edit.read_attribute(network, name, layer)
        bias_node = edit.read_attribute(network, bias_name, layer)
        layer.args = (layer.args[0], weight_node, bias_node, *layer.args[3:])
        norm.node.replace_all_uses_with(layer)
        network.graph.erase_node(norm.node)
        record[name] = (norm.std, norm.beta)
    return edit.finish(network), record


def _read_elsewhere(network: GraphModule, name: str, layer: Node) -> bool:
    """Tell whether any node but `layer` reads the tensor of that name."""
    readers = {u for n in network.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users}
    return bool(readers - {layer})
