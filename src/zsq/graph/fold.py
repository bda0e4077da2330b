"""Fold batch norms into the layers in front of them."""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph import edit
from zsq.graph.batchnorm import batch_norms
from zsq.graph.canonicalize import drop_permutations, name_token_norms
from zsq.graph.edit import argument, aten, tensor_of
from zsq.graph.lower import lower


def fold(network: GraphModule) -> tuple[GraphModule, dict[str, tuple[Tensor, Tensor]]]:
    """Fold each batch norm into the convolution or linear layer in front of it, and lower what is no such layer.

    A batch norm stays if its input has another reader, or does not come from such a layer, moved perhaps.

    Returns:
        The folded copy, and ``{weight name: (std, mean)}`` of what was folded, both [C]: standard deviation and mean of
        the layer's output in training (|gamma| but for epsilon, and beta), which folding destroys and DFQ needs.
    """
    network = edit.copy_network(network)
    lower(network)
    name_token_norms(network)
    record = {}
    for norm in batch_norms(network):
        layer = _layer_behind(norm.node.args[0], 1)
        if layer is None:
            continue
        weight, bias = tensor_of(network, layer.args[1]), tensor_of(network, argument(layer, 2))
        if weight is None:
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
        norm.node.replace_all_uses_with(norm.node.args[0])  # type: ignore[arg-type]
        network.graph.erase_node(norm.node)
        record[name] = (norm.std, norm.beta)
    _fold_scales(network, record)
    drop_permutations(network.graph)
    return edit.finish(network), record


def _fold_scales(network: GraphModule, record: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Fold each product with a stored factor a channel, as layer scale is, into the layer in front of it, in place."""
    for node in list(network.graph.nodes):
        found = _scaled_layer(network, node) if node.target is aten.mul.Tensor else None
        if found is None:
            continue
        x, layer, factor = found
        for read in (layer.args[1], argument(layer, 2)):
            value = tensor_of(network, read)
            if value is not None and isinstance(read, Node):
                edit.set_tensor(network, str(read.target), value * factor.view(-1, *[1] * (value.dim() - 1)))
        name = str(layer.args[1].target)  # type: ignore[union-attr]
        if name in record:
            std, mean = record[name]
            record[name] = (std * factor.abs(), mean * factor)
        node.replace_all_uses_with(x)
        network.graph.erase_node(node)


def _scaled_layer(network: GraphModule, node: Node) -> tuple[Node, Node, Tensor] | None:
    """Return what a product multiplies, the layer that it comes from, and the factor of each of its channels, [C]."""
    for x, other in (node.args[:2], node.args[1::-1]):
        factor = tensor_of(network, other)
        if not isinstance(x, Node) or factor is None or factor.numel() < 2:
            continue
        shape = [1] * (node.meta["val"].dim() - factor.dim()) + list(factor.shape)
        dims = [dim for dim, size in enumerate(shape) if size > 1]
        layer = _layer_behind(x, dims[0]) if len(dims) == 1 else None
        if layer is None:
            continue
        read = [n for n in (layer.args[1], argument(layer, 2)) if n is not None]
        own = all(tensor_of(network, n) is not None and _is_own(network, n, layer) for n in read)
        if own and x.meta["val"].shape[dims[0]] == factor.numel():
            return x, layer, factor.flatten()
    return None


def _layer_behind(node: object, dim: int) -> Node | None:
    """Return the layer whose channels a dimension of a value holds, permuted perhaps, if nothing else reads them."""
    while isinstance(node, Node) and len(node.users) == 1:
        if node.target in edit.LAYERS:
            return node if dim == edit.channel_dim(node) % node.meta["val"].dim() else None
        order = edit.order_of(node)
        if order is None:
            return None
        node, dim = node.args[0], order[dim]
    return None


def _is_own(network: GraphModule, read: object, layer: Node) -> bool:
    return isinstance(read, Node) and not _read_elsewhere(network, str(read.target), layer)


def _read_elsewhere(network: GraphModule, name: str, layer: Node) -> bool:
    """Tell whether any node but `layer` reads the tensor of that name."""
    readers = {u for n in network.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users}
    return bool(readers - {layer})
