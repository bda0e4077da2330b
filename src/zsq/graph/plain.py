"""Exported programs as plain graphs: no writes in place, no contexts, no assertions, nothing but operators."""

import linecache
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node, graph_module

from zsq.graph.edit import argument, aten

WRITES = ("copy_", "fill_", "zero_")
"""In-place operators that assign to a part of a tensor: they have no pure form of the same meaning."""

IDENTITIES = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)
"""Operators that give what they read."""

STATELESS_NORM = aten._native_batch_norm_legit_no_training.default


def plain_network(program: ExportedProgram) -> GraphModule:
    """Return the network of an exported program as a graph of ATen operators, none of which writes in place.

    In-place operators such as `relu_` become `relu`. Where that is not enough, since a part of a tensor is written to
    or the network opens a context such as `torch.autocast`, torch rewrites the graph: writes become `slice_scatter` and
    its kin, and what a context says of types becomes casts. What the network writes to its own buffers is left out.

    Returns:
        A module whose output node returns the node of the network's answer itself, or a tuple of nodes.
    """
    network = forgetting_examples(program).module(check_guards=False)
    _functionalize(network.graph)
    if not _is_plain(network.graph):
        network = forgetting_examples(program.run_decompositions({})).module(check_guards=False)
        _forget_writes(network.graph)
    graph = network.graph
    _name_batch_norms(graph)
    output = graph.output_node()
    results = [node for node in output.args[0] if isinstance(node, Node)]  # type: ignore[union-attr]
    output.args = (results[0] if len(results) == 1 else tuple(results),)
    graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        if node.target in IDENTITIES or _is_whole_copy(node):
            node.replace_all_uses_with(node.args[-1])
            graph.erase_node(node)
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # takes values in channels-last order, too
    return network


def forgetting_examples(program: ExportedProgram) -> ExportedProgram:
    """Return an exported program that ends with its last reference: PyTorch 2.11 to 2.14 keeps each one for good.

    Its shapes hold the tensors that they were told from, which hold the shapes in turn through C++, where Python's
    garbage collector sees no circle; and the caches of their methods are of all shapes there have been.
    """
    for node in program.graph.nodes:
        shapes = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if shapes is not None:
            shapes.tracked_fakes = None
            for method in vars(type(shapes)).values():
                if hasattr(method, "cache_clear"):
                    method.cache_clear()
            break  # a program has one
    return program


@contextmanager
def forgetting_sources() -> Iterator[None]:
    """Drop, at the end of the block, the sources of the graphs compiled in it, which torch.fx keeps for tracebacks."""
    sources: dict[str, str] = graph_module._loader.eval_cache
    known = set(sources)
    try:
        yield
    finally:
        for name in sources.keys() - known:
            del sources[name]
            linecache.cache.pop(name, None)


def _is_plain(graph: fx.Graph) -> bool:
    """Whether no node writes to a tensor or calls another graph."""
    return not any(_writes(node) or isinstance(node.target, torch._ops.HigherOrderOperator) for node in graph.nodes)


def _writes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_whole_copy(node: Node) -> bool:
    """Whether a node copies its second argument, which has its own shape."""
    copied = argument(node, 1)
    return node.target is aten.copy.default and copied.meta["val"].shape == node.meta["val"].shape


def _functionalize(graph: fx.Graph) -> None:
    """Replace in-place operators such as `relu_` by `relu`, and let what reads the changed value later read the result.

    Writes through views (`x[:, 1:] = y`) stay as they are.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        target: Any = node.target
        packet = target._schema.name.removeprefix("aten::")
        pure = getattr(getattr(aten, packet.removesuffix("_"), None), target._overloadname, None)
        changed = node.args[0]
        if pure is None or not packet.endswith("_") or packet in WRITES or _base_read_later(node, order):
            continue
        node.target = pure
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])


def _base_read_later(node: Node, order: dict[Node, int]) -> bool:
    """Tell whether an in-place operator changes a view of a tensor that is read again afterwards."""
    changed = node.args[0]
    while isinstance(changed, Node) and _is_view(changed):
        base = changed.args[0]
        if isinstance(base, Node) and any(order[user] > order[changed] for user in base.users):
            return True
        changed = base
    return False


def _is_view(node: Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        result.alias_info is not None and not result.alias_info.is_write for result in target._schema.returns
    )


def _name_batch_norms(graph: fx.Graph) -> None:
    """Put batch norms by stored statistics under their usual operator, which gives one tensor."""
    for node in list(graph.nodes):
        if node.target is not STATELESS_NORM:
            continue
        with graph.inserting_before(node):
            norm = graph.call_function(aten.batch_norm.default, (*node.args[:5], False, *node.args[5:7], False))
        for reader in list(node.users):
            assert reader.target is operator.getitem
            assert argument(reader, 1) == 0
            norm.meta.update(reader.meta)
            reader.replace_all_uses_with(norm)
            graph.erase_node(reader)
        graph.erase_node(node)


def _forget_writes(graph: fx.Graph) -> None:
    """Leave out what a network writes to its buffers or its images when all else is done."""
    for node in list(graph.nodes):
        if _writes(node):
            assert node.target is aten.copy_.default
            node.replace_all_uses_with(node.args[1])
            graph.erase_node(node)
