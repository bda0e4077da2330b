"""What of a converted network is computed in integers, and what stays float: weights and operations, by name."""

import math
import operator
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from zsq.graph import edit
from zsq.graph.activations import clamp_limits
from zsq.graph.edit import argument, aten, get_attribute
from zsq.graph.equalize import POOLS
from zsq.graph.products import PRODUCTS
from zsq.quantization.prepare import PADS, moves_values
from zsq.types import ImageSpec

MOST_FLOAT = 1.0
"""Percent of weights or of arithmetic in float, above which a warning says so."""

MOST_NAMES = 5
"""Names that a warning lists."""

_ops = torch.ops.quantized_decomposed
DEQUANTIZE = (_ops.dequantize_per_tensor.default, _ops.dequantize_per_channel.default)
CONVERTS = (*DEQUANTIZE, _ops.quantize_per_tensor.default)

FILLS = (aten.fill.Tensor, aten.fill.Scalar, aten.full_like.default, aten.zeros.default, aten.zeros_like.default)
"""Operators that compute nothing."""

RECURRENT = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)

INTEGER_OPERATORS = {
    *edit.LAYERS,
    *POOLS,
    *PRODUCTS,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.cat.default,
    aten.stack.default,
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.sigmoid.default,
    aten.leaky_relu.default,
    aten.softmax.int,
    aten.mean.dim,
    aten.maximum.default,
    aten.minimum.default,
}
"""Operators for which at least one runtime has integer kernels, where all that they read is quantized; `div` by a
number is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of a network is quantized."""

    quantized_weights: int
    """Stored values in integers."""
    float_weights: dict[str, int] = field(default_factory=dict)
    """Stored values in float, by the tensor's name; without the biases of quantized layers and the grids' own."""
    quantized_operations: int
    """Operations whose inputs are all quantized, and which runtimes have integer kernels for."""
    float_operations: dict[str, float] = field(default_factory=dict)
    """The others, by operator and module, with the percentage of the arithmetic that they do."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, and both shares."""
        shares = ("float_weight_share", "float_operation_share")
        return asdict(self) | {name: round(getattr(self, name), 4) for name in shares}

    @property
    def float_weight_share(self) -> float:
        """Percent of the stored values that are float."""
        stored = sum(self.float_weights.values())
        return 100 * stored / max(1, stored + self.quantized_weights)

    @property
    def float_operation_share(self) -> float:
        """Percent of the arithmetic that is float."""
        return sum(self.float_operations.values())

    def warning(self) -> str | None:
        """Return what a user should know before the run: what stays float, where it is more than `MOST_FLOAT`."""
        parts = []
        if self.float_weight_share > MOST_FLOAT:
            parts.append(f"{self.float_weight_share:.1f} % of the weights ({listed(self.float_weights)})")
        if self.float_operation_share > MOST_FLOAT:
            parts.append(f"{self.float_operation_share:.1f} % of the arithmetic ({listed(self.float_operations)})")
        return f"not quantized, but kept in float: {' and '.join(parts)}." if parts else None


def listed(sizes: dict[str, Any]) -> str:
    """Return the names of the largest, and how many there are besides."""
    names = sorted(sizes, key=lambda name: -sizes[name])
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else "")


@torch.no_grad()
def coverage(converted: GraphModule, spec: ImageSpec, in_float: Collection[Any] = ()) -> Coverage:
    """Count what is quantized in a converted network, which answers one image for it.

    The arithmetic of an operation is its number of multiply-adds, or of the values that it gives.

    Args:
        converted: the converted network.
        spec: what it takes.
        in_float: operators that the target's file computes in float, though other runtimes have integers for them.
    """
    counter = _Counter(converted)
    counter.run(torch.zeros(1, *spec.shape))
    total = sum(counter.arithmetic.values())
    quantized = {node for node in counter.arithmetic if node.target not in in_float and _in_integers(node)}
    floats: dict[str, float] = {}
    for node in counter.arithmetic:
        if node not in quantized:
            name = _named(node, floats)
            floats[name] = 100 * counter.arithmetic[node] / max(1, total)
    integers, stored = 0, {}
    for node in dict.fromkeys(converted.graph.find_nodes(op="get_attr")):
        value = get_attribute(converted, str(node.target))
        if not value.is_floating_point():
            integers += (
                value.numel() if any(user.target in DEQUANTIZE and user.args[0] is node for user in node.users) else 0
            )
        elif value.numel() > 1 and any(not _is_grid(node, user) for user in node.users):
            stored[str(node.target)] = value.numel()
    return Coverage(
        quantized_weights=integers, float_weights=stored, quantized_operations=len(quantized), float_operations=floats
    )


def _is_grid(node: Node, reader: Node) -> bool:
    """Whether a float tensor is read as the scale of a weight, or as the bias of a layer with a quantized weight."""
    if reader.target in DEQUANTIZE:
        return True
    return reader.target in edit.LAYERS and argument(reader, 2) is node and argument(reader, 1).target in DEQUANTIZE


def _in_integers(node: Node) -> bool:
    if node.target is aten.div.Tensor and isinstance(node.args[1], Node):
        return False
    return node.target in INTEGER_OPERATORS and all(_is_quantized(read) for read in _float_inputs(node))


def _float_inputs(node: Node) -> Iterator[Node]:
    """Yield what an operator computes with; the bias of a layer may be float."""
    for index, read in enumerate(node.args):
        if node.target in edit.LAYERS and index == 2:
            continue
        yield from (n for n in (read if isinstance(read, (list, tuple)) else [read]) if isinstance(n, Node))


def _is_quantized(node: Node) -> bool:
    """Whether a value comes out of a dequantization, moved perhaps."""
    while moves_values(node) and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.target in DEQUANTIZE


def _named(node: Node, known: dict[str, float]) -> str:
    """Name an operation by its operator and its module."""
    target = node.target
    kind = target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else node.name
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    place = str(list(stack.values())[-1][0])
    name = f"{kind} in {place}" if place else kind
    return name if name not in known else f"{name}: {node.name}"


class _Counter(Interpreter):
    """Counts the arithmetic of each operation that computes floats."""

    def __init__(self, network: GraphModule) -> None:
        super().__init__(network)
        self.arithmetic: dict[Node, int] = {}

    def run_node(self, n: Node) -> Any:
        """Run one node."""
        value = super().run_node(n)
        computes = n.op == "call_function" and n.target not in CONVERTS and n.target is not operator.getitem
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        if not computes or not isinstance(first, Tensor) or not first.is_floating_point():
            return value
        if not moves_values(n) and clamp_limits(n) is None and n.target not in (*FILLS, *PADS):
            self.arithmetic[n] = self._count(n, first)
        return value

    def _count(self, n: Node, value: Tensor) -> int:
        """Return the multiply-adds of a product, and the number of values that another operation gives."""
        args: list[Any] = [self.env[arg] if isinstance(arg, Node) else arg for arg in n.args]
        terms: int = 1
        if n.target in edit.LAYERS:
            terms = args[1][0].numel()
        elif n.target in PRODUCTS:
            terms = args[0].shape[-1]
        elif n.target in RECURRENT:
            weights: int = sum(self.env[read].numel() for read in n.all_input_nodes if read.op == "get_attr")
            positions: int = math.prod(args[0].shape[:-1])
            return weights * positions
        return value.numel() * terms
