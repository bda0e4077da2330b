"""Products with a stored matrix, however they are written, as linear layers; other sums of products as `matmul`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from zsq.graph.edit import Caller, aten, set_tensor, tensor_of

PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default)


def name_products(network: GraphModule) -> None:
    """Replace products with a stored matrix by `aten.linear`, and sums of products of two values by `aten.matmul`.

    Known are `x @ w`, `w @ x`, `addmm`, `einsum` and `tensordot`, in place; others stay: those that sum a label of one
    operand alone, take its diagonal, or have a matrix of weights for each of several groups.
    """
    for node in list(network.graph.nodes):
        call = Caller(network, node)
        if node.target in PRODUCTS:
            found = _from_matmul(call, *node.args[:2])
        elif node.target is aten.addmm.default:
            found = _from_addmm(call)
        elif node.target is aten.einsum.default:
            found = _from_einsum(call, str(node.args[0]), node.args[1])
        elif node.target is aten.tensordot.default:
            found = _from_tensordot(call)
        else:
            continue
        if found is not None:
            node.replace_all_uses_with(found)
            network.graph.erase_node(node)


def _linear(call: Caller, x: Node, source: Node, weight: Tensor, bias: Node | None = None) -> Node:
    """Call a linear layer with a weight [O, I] that was made from what `source` reads."""
    stored = tensor_of(call.network, source)
    assert stored is not None
    name = str(source.target)
    if stored.shape != weight.shape or not torch.equal(stored, weight):
        name = f"{name}_matrix" if len(source.users) == 1 else f"{name}_{call.node.name}"
        set_tensor(call.network, name, weight.contiguous())
    return call(aten.linear.default, x, call.read(name), *([bias] if bias is not None else []))


def _from_matmul(call: Caller, a: Any, b: Any) -> Node | None:
    left, right = tensor_of(call.network, a), tensor_of(call.network, b)
    if right is not None and (matrix := _matrix(right, a)) is not None:
        return _linear(call, a, b, matrix.T)
    if left is not None and (matrix := _matrix(left, b)) is not None:
        return call.transposed(_linear(call, call.transposed(b), a, matrix))
    return None


def _matrix(stored: Tensor, other: Node) -> Tensor | None:
    """Return a stored factor as a matrix, where it is one and the other factor has a batch."""
    dims = other.meta["val"].dim()
    if stored.dim() < 2 or dims < max(2, stored.dim()) or stored.shape[:-2].numel() != 1:
        return None
    return stored.reshape(stored.shape[-2:])


def _from_addmm(call: Caller) -> Node | None:
    bias, x, source = call.node.args[:3]
    weight, added = tensor_of(call.network, source), tensor_of(call.network, bias)
    if weight is None or added is None or added.shape != weight.shape[1:] or call.node.kwargs:
        return None
    assert isinstance(bias, Node)
    return _linear(call, x, source, weight.T, bias)  # type: ignore[arg-type]


def _from_tensordot(call: Caller) -> Node | None:
    """Read a contraction by dimensions as one by labels."""
    a, b, dims_a, dims_b = call.node.args[:4]
    rank_a, rank_b = (len(_sizes(call.network, node)) for node in (a, b))
    labels_a = [chr(97 + dim) for dim in range(rank_a)]
    labels_b = [chr(97 + rank_a + dim) for dim in range(rank_b)]
    for one, other in zip(dims_a, dims_b, strict=True):  # type: ignore[arg-type]
        labels_b[other] = labels_a[one]
    kept = [label for label in [*labels_a, *labels_b] if not (label in labels_a and label in labels_b)]
    return _from_einsum(call, f"{''.join(labels_a)},{''.join(labels_b)}->{''.join(kept)}", (a, b))


def _sizes(network: GraphModule, node: Any) -> Sequence[Any]:
    stored = tensor_of(network, node)
    shape: Sequence[Any] = node.meta["val"].shape if stored is None else stored.shape
    return shape


@dataclass(frozen=True, slots=True)
class Labels:
    """What the labels of an einsum over two operands do."""

    batch: str
    """In both, and kept."""
    left: str
    """In the first alone."""
    right: str
    """In the second alone."""
    summed: str
    """In both, and summed."""
    kept: str
    """Of the result, in order."""

    @classmethod
    def read(cls, equation: str) -> "Labels | None":
        """Read an equation; None where it has another number of operands, or labels that do something else."""
        operands, arrow, kept = equation.replace(" ", "").partition("->")
        terms = operands.split(",")
        if len(terms) != 2 or "." in equation or any(len(set(term)) != len(term) for term in terms):
            return None
        a, b = terms
        if not arrow:
            kept = "".join(sorted(set(a) ^ set(b)))
        found = cls(
            batch="".join(label for label in a if label in b and label in kept),
            left="".join(label for label in a if label not in b),
            right="".join(label for label in b if label not in a),
            summed="".join(label for label in a if label in b and label not in kept),
            kept=kept,
        )
        whole = found.summed and all(label in kept for label in found.left + found.right)
        return found if whole else None


def _from_einsum(call: Caller, equation: str, operands: Any) -> Node | None:
    labels = Labels.read(equation)
    if labels is None:
        return None
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    (a, b), stored = operands, [tensor_of(call.network, node) for node in operands]
    if stored[0] is not None:  # the stored one comes second
        a, b, terms, stored = b, a, terms[::-1], stored[::-1]
        labels = Labels(labels.batch, labels.right, labels.left, labels.summed, labels.kept)
    sizes = {
        label: size
        for term, node in zip(terms, (a, b), strict=True)
        for label, size in zip(term, _sizes(call.network, node), strict=True)
    }
    if stored[1] is not None:
        return None if labels.batch else _layer_of(call, labels, a, b, terms, sizes)
    return _matmul_of(call, labels, a, b, terms, sizes)


def _layer_of(call: Caller, labels: Labels, x: Node, source: Node, terms: list[str], sizes: dict[str, Any]) -> Node:
    """Write a contraction of x with a stored tensor as a linear layer."""
    stored = tensor_of(call.network, source)
    assert stored is not None
    weight = stored.permute([terms[1].index(label) for label in labels.right + labels.summed])
    inputs = weight.shape[len(labels.right) :].numel()
    x = call.permuted(x, [terms[0].index(label) for label in labels.left + labels.summed])
    x = call.flattened(x, len(labels.left), len(labels.summed))
    y = _linear(call, x, source, weight.reshape(-1, inputs))
    y = call.unflattened(y, len(labels.left), [sizes[label] for label in labels.right])
    return call.permuted(y, [(labels.left + labels.right).index(label) for label in labels.kept])


def _matmul_of(call: Caller, labels: Labels, a: Node, b: Node, terms: list[str], sizes: dict[str, Any]) -> Node | None:
    """Write a contraction of two values as one product of matrices; None where sizes that vary would be joined."""
    if any(sum(not isinstance(sizes[n], int) for n in part) > 1 for part in (labels.left, labels.right)):
        return None
    batch = len(labels.batch)
    a = call.permuted(a, [terms[0].index(label) for label in labels.batch + labels.left + labels.summed])
    a = call.flattened(call.flattened(a, batch + len(labels.left), len(labels.summed)), batch, len(labels.left))
    b = call.permuted(b, [terms[1].index(label) for label in labels.batch + labels.summed + labels.right])
    b = call.flattened(call.flattened(b, batch + len(labels.summed), len(labels.right)), batch, len(labels.summed))
    y = call(aten.matmul.default, a, b)
    y = call.unflattened(y, batch + 1, [sizes[label] for label in labels.right])
    y = call.unflattened(y, batch, [sizes[label] for label in labels.left])
    return call.permuted(y, [(labels.batch + labels.left + labels.right).index(label) for label in labels.kept])
