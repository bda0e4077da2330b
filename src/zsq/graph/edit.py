"""Small helpers on `torch.export` graphs, the one representation of a network after loading."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
CONVOLUTION_OF = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
"""Convolutions by the axes beside the channels."""

LAYERS = (*CONVOLUTIONS, aten.linear.default)
"""Operators with a weight (second argument, output channels first) and a bias (third argument)."""


def get_attribute(module: nn.Module, name: str) -> Any:
    """Return the attribute at a dotted path."""
    for part in name.split("."):
        module = getattr(module, part)
    return module


def set_tensor(network: GraphModule, name: str, value: Tensor, *, trainable: bool = False) -> None:
    """Store a tensor at a dotted path, as a parameter where it is to be trained and a buffer elsewhere."""
    *path, last = name.split(".")
    owner: nn.Module = network
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if hasattr(owner, last):
        delattr(owner, last)
    if trainable:
        owner.register_parameter(last, nn.Parameter(value))
    else:
        owner.register_buffer(last, value)


def tensor_of(network: GraphModule, node: Any) -> Tensor | None:
    """Return the tensor that a `get_attr` node reads, or None where the argument is absent."""
    return (
        get_attribute(network, str(node.target)).detach() if isinstance(node, Node) and node.op == "get_attr" else None
    )


def argument(node: Node, index: int, default: Any = None) -> Any:
    """Return a positional argument of an operator, or its default where the graph leaves it out."""
    return node.args[index] if len(node.args) > index else default


def layers(network: GraphModule) -> Iterator[Node]:
    """Yield the convolutions and linear layers whose weight is stored in the network, in order."""
    for node in network.graph.nodes:
        if node.target in LAYERS and isinstance(node.args[1], Node) and node.args[1].op == "get_attr":
            yield node


def is_depthwise(layer: Node, weight: Tensor) -> bool:
    """Whether a layer filters each channel by itself, with one filter."""
    groups = argument(layer, 6, 1) if layer.target in CONVOLUTIONS else 1
    return bool(groups > 1 and weight.shape[:2] == (groups, 1))


def channel_dim(layer: Node) -> int:
    """Dimension of a layer's channels: a convolution gives [N, C, ...], a linear layer [..., C]."""
    return 1 if layer.target in CONVOLUTIONS else -1


def order_of(node: Node) -> list[int] | None:
    """Return which dimension of its input each dimension of a value is, where a node only permutes them."""
    dims = range(node.meta["val"].dim()) if "val" in node.meta and isinstance(node.meta["val"], Tensor) else []
    if node.target is aten.permute.default:
        return [dims[dim] for dim in argument(node, 1)]
    if node.target is aten.transpose.int:
        one, other = (dims[dim] for dim in node.args[1:3])  # type: ignore[index]
        return [{one: other, other: one}.get(dim, dim) for dim in dims]
    return None


def read_attribute(network: GraphModule, name: str, before: Node) -> Node:
    """Insert a `get_attr` node in front of `before`."""
    with network.graph.inserting_before(before):
        return network.graph.get_attr(name)


def copy_network(network: GraphModule) -> GraphModule:
    """Return an independent copy of the graph and its tensors."""
    return copy.deepcopy(network)


def finish(network: GraphModule) -> GraphModule:
    """Drop what no longer contributes, forget unused tensors, and recompile."""
    network.graph.eliminate_dead_code()
    network.delete_all_unused_submodules()
    used = {node.target for node in network.graph.nodes if node.op == "get_attr"}
    inside = tuple(f"{node.target}." for node in network.graph.nodes if node.op == "call_module")
    stored = [*(name for name, _ in network.named_parameters()), *(name for name, _ in network.named_buffers())]
    for name in stored:
        if name not in used and not name.startswith(inside or ("\0",)):
            owner, _, last = name.rpartition(".")
            delattr(get_attribute(network, owner) if owner else network, last)
    network.graph.lint()
    network.recompile()
    return network


def view_of(network: GraphModule, nodes: Iterable[Node] | None = None) -> GraphModule:
    """Return a network with a graph of its own, whose tensors and submodules are the given one's, and trained with it.

    Args:
        network: which is left as it is.
        nodes: their values are to be given, too: the view's output is then a pair of the network's and these.
    """
    graph, copied = Graph(), dict[Node, Node]()
    result = graph.graph_copy(network.graph, copied)
    graph.output(result if nodes is None else (result, tuple(copied[node] for node in nodes)))
    return GraphModule(network, graph)


def classifier_weight(network: GraphModule, classes: int) -> Tensor | None:
    """Return the weight [classes, features] of the layer that makes the logits, or None where there is none."""
    last = None
    for node in layers(network):
        weight = tensor_of(network, node.args[1])
        if weight is not None and weight.shape[0] == classes:
            last = weight
    return None if last is None else last.flatten(1).float()


def weight_times_mean(weight: Tensor, input_mean: Tensor) -> Tensor:
    """Return a layer's output without bias, [C], for a constant input.

    Args:
        weight: [C, I / groups, ...].
        input_mean: [I], one constant an input channel.
    """
    summed = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    groups = input_mean.numel() // summed.shape[1]
    grouped = summed.view(groups, -1, summed.shape[1])
    return torch.einsum("goi,gi->go", grouped, input_mean.view(groups, -1)).flatten()


class Caller:
    """Inserts calls of operators in front of a node, with what is known of their values.

    Args:
        network: whose graph is edited.
        node: in front of which calls are inserted.
    """

    def __init__(self, network: GraphModule, node: Node) -> None:
        self.network, self.node = network, node

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call, and compute shape and type of its value from those of its arguments."""
        with self.network.graph.inserting_before(self.node):
            called = self.network.graph.call_function(target, args, kwargs)
        known_args, known_kwargs = map_arg((args, kwargs), lambda n: n.meta["val"])
        called.meta["val"] = target(*known_args, **known_kwargs)
        return called

    def read(self, name: str) -> Node:
        """Insert a node that reads a stored tensor."""
        read = read_attribute(self.network, name, self.node)
        (images,) = self.network.graph.find_nodes(op="placeholder")
        value, fake_mode = get_attribute(self.network, name).detach(), images.meta["val"].fake_mode
        read.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
        return read

    def transposed(self, x: Node) -> Node:
        """Exchange the last two dimensions."""
        return self(aten.transpose.int, x, -1, -2)

    def permuted(self, x: Node, order: list[int]) -> Node:
        """Put dimensions in another order."""
        return x if order == sorted(order) else self(aten.permute.default, x, order)

    def flattened(self, x: Node, start: int, count: int) -> Node:
        """Join so many dimensions from one on; none are joined to one of size 1."""
        if count == 0:
            return self(aten.unsqueeze.default, x, start)
        return x if count == 1 else self(aten.flatten.using_ints, x, start, start + count - 1)

    def unflattened(self, x: Node, dim: int, sizes: Sequence[Any]) -> Node:
        """Split a dimension into some of these sizes, of which one may vary; into none where it is of size 1."""
        if not sizes:
            return self(aten.squeeze.dim, x, dim)
        known = [size if isinstance(size, int) else -1 for size in sizes]
        return x if len(sizes) == 1 else self(aten.unflatten.int, x, dim, known)
