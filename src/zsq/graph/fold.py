"""Fold batch norms into the layers in front of them."""

from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph import edit
from zsq.graph.affine import affine_step, of_channels
from zsq.graph.batchnorm import batch_norms
from zsq.graph.canonicalize import drop_permutations, name_token_norms
from zsq.graph.edit import argument, tensor_of
from zsq.graph.equalize import owns_tensors
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
    record: dict[str, tuple[Tensor, Tensor]] = {}
    for norm in batch_norms(network):
        layer = _layer_behind(norm.node.args[0], 1)
        name = None if layer is None else _absorb(network, layer, norm.scale, norm.shift)
        if name is not None:
            norm.node.replace_all_uses_with(norm.node.args[0])  # type: ignore[arg-type]
            network.graph.erase_node(norm.node)
            record[name] = (norm.std, norm.beta)
    _fold_steps(network, record)
    drop_permutations(network.graph)
    return edit.finish(network), record


def _absorb(network: GraphModule, layer: Node, scale: Tensor, shift: Tensor, *, adds: bool = True) -> str | None:
    """Let a layer multiply its output by a scale and add a shift, both [C], in place.

    It gets a bias if it `adds` something. A weight or bias that is read elsewhere, too, is copied for the layer.

    Returns:
        The name of its weight then; None, and nothing is done, where weight or bias depend on the images.
    """
    read, old = layer.args[1], argument(layer, 2)
    weight, bias = tensor_of(network, read), tensor_of(network, old)
    if weight is None or not isinstance(read, Node) or (bias is None and old is not None):
        return None
    name = str(read.target)
    if _read_elsewhere(network, name, layer):
        name = f"{name}_{layer.name}"
    edit.set_tensor(network, name, weight * scale.view(-1, *[1] * (weight.dim() - 1)))
    reads = [edit.read_attribute(network, name, layer), old]
    if bias is not None or adds:
        bias_name = f"{name.removesuffix('.weight')}.bias" if name.endswith(".weight") else f"{name}_bias"
        if _read_elsewhere(network, bias_name, layer):
            bias_name = f"{name}_{layer.name}_bias"
        edit.set_tensor(network, bias_name, shift.clone() if bias is None else bias * scale + shift)
        reads[1] = edit.read_attribute(network, bias_name, layer)
    layer.args = (layer.args[0], *reads, *layer.args[3:])
    return name


def _fold_steps(network: GraphModule, record: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Fold each product with stored factors, as layer scale is, and each sum with stored biases into the layer in front
    of it, in place."""
    for node in list(network.graph.nodes):
        found = _stepping_layer(network, node)
        if found is None:
            continue
        x, layer, factor, shift = found
        name = _absorb(network, layer, factor, shift, adds=bool(shift.any()))
        if name is None:
            continue
        if name in record:
            std, mean = record[name]
            record[name] = (std * factor.abs(), mean * factor + shift)
        node.replace_all_uses_with(x)
        network.graph.erase_node(node)


def _stepping_layer(network: GraphModule, node: Node) -> tuple[Node, Node, Tensor, Tensor] | None:
    """Return what a node multiplies or adds to, the layer that this comes from, and factor and shift, both [C]."""
    step = affine_step(network, node)
    if step is None or str(step[0].meta["val"].shape) != str(node.meta["val"].shape):
        return None
    x, *constants = step
    shape = x.meta["val"].shape
    for dim in range(1, len(shape)):
        layer = _layer_behind(x, dim)
        if layer is not None and owns_tensors(network, layer):
            factor, shift = (of_channels(constant, len(shape), dim, shape[dim]) for constant in constants)
            return None if factor is None or shift is None else (x, layer, factor, shift)
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


def _read_elsewhere(network: GraphModule, name: str, layer: Node) -> bool:
    """Tell whether any node but `layer` reads the tensor of that name."""
    readers = {u for n in network.graph.nodes if n.op == "get_attr" and n.target == name for u in n.users}
    return bool(readers - {layer})
