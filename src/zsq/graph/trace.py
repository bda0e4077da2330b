"""A network in, the graph that everything else works on out."""

import contextlib
import io
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from zsq.errors import TeacherError
from zsq.graph.canonicalize import name_activations, name_global_pools
from zsq.types import ImageSpec

FOREIGN_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    UserWarning,
)
"""What foreign code can raise: a user's factory or forward, a zoo's download, torch.export."""

CHECK_BATCH = 3
"""Images of the batch on which graph and network are compared; not the size that the graph was traced with."""

CHECK_TOLERANCE = 1e-4
"""Largest difference allowed there, relative to the largest logit."""

DROPOUTS = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
)


SOFTMAX = (torch.ops.aten.softmax.int, torch.ops.aten._softmax.default)
"""What turns logits into probabilities; behind it, the losses that take logits are wrong."""

RESHAPES = tuple(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("flatten", "using_ints"),
        ("view", "default"),
        ("reshape", "default"),
        ("squeeze", "default"),
        ("squeeze", "dim"),
        ("squeeze", "dims"),
        ("clone", "default"),
        ("contiguous", "default"),
        ("_to_copy", "default"),
    )
)

WRITES = ("copy_", "fill_", "zero_")
"""In-place operators that assign to a part of a tensor; they stay in the graph."""


def first_line(error: BaseException) -> str:
    """Return the first line of a fault's text that says something, or its type, in at most 200 characters."""
    for line in str(error).splitlines():
        if any(character.isalpha() for character in line):
            return line.strip()[:200]
    return type(error).__name__


def described(error: BaseException) -> str:
    """Return type and first line of a fault in the user's code, with the place there."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not {"site-packages", "zsq"} & set(Path(frame.filename).parts)]
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {first_line(error)}{place}"


def trace(net: nn.Module, spec: ImageSpec, name: str) -> fx.GraphModule:
    """Return the `torch.export` graph of a network in eval mode, checked to compute what the network computes.

    Args:
        net: the network on the CPU, in eval mode; it stays as it is, but shares its weights with the graph.
        spec: what it takes and gives.
        name: what errors call it.
    Returns:
        A plain graph module: one placeholder, an output node that returns the logits' node, ATen operators without
        in-place ones, any batch size, no dropout, frozen parameters under their original names. (The module that
        `torch.export` itself returns refuses `train` and `eval` and warns when copied.)
    Raises:
        TeacherError: the forward fails, does not give [N, classes], cannot be exported, or the graph disagrees.
    """
    images = torch.randn(2, spec.channels, spec.height, spec.width, generator=torch.Generator().manual_seed(0))
    _check_forward(net, images, spec, name)
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), _quiet_export():
            program = torch.export.export(net, (images,), dynamic_shapes=({0: batch},))
            exported = program.module(check_guards=False)
    except FOREIGN_FAULTS as error:
        branches = "data-dependent" in str(error)
        hint = " Its forward branches on the values of its images, which no exported file can." if branches else ""
        text = f"teacher '{name}' cannot be exported by torch.export: {first_line(error)}{hint}"
        raise TeacherError(text) from error
    graph = exported.graph
    output = graph.output_node()
    output.args = (output.all_input_nodes[0],)
    graph.set_codegen(fx.graph.CodeGen())
    _functionalize(graph)
    _copy_where_needed(graph)
    _remove_dropout(graph)
    _check_logits(output.args[0], name)
    name_activations(graph)
    name_global_pools(graph)
    graph.eliminate_dead_code()
    graph.lint()
    network = fx.GraphModule(exported, graph, class_name=type(net).__name__)
    network.train(False)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    _check_graph(net, network, spec, name)
    return network


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Keep the graphs that torch.export prints on stderr beside its exception from the user."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _functionalize(graph: fx.Graph) -> None:
    """Replace in-place operators such as `relu_` by `relu`, and let what reads the changed value later read the result.

    Writes through views (`x[:, 1:] = y`) stay as they are.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        packet = target._schema.name.removeprefix("aten::")
        pure = getattr(getattr(torch.ops.aten, packet.removesuffix("_"), None), target._overloadname, None)
        changed = node.args[0]
        if pure is None or not packet.endswith("_") or packet in WRITES or _base_read_later(node, order):
            continue
        node.target = pure
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, node=node: order[user] > order[node])


def _copy_where_needed(graph: fx.Graph) -> None:
    """Replace `view` by `reshape`, which takes values in channels-last order, too; not where views are written to."""
    if any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for n in graph.nodes):
        return
    for node in graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default


def _base_read_later(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Tell whether an in-place operator changes a view of a tensor that is read again afterwards."""
    changed = node.args[0]
    while isinstance(changed, fx.Node) and _is_view(changed):
        base = changed.args[0]
        if isinstance(base, fx.Node) and any(order[user] > order[changed] for user in base.users):
            return True
        changed = base
    return False


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        result.alias_info is not None and not result.alias_info.is_write for result in target._schema.returns
    )


def _check_logits(node: fx.Node, name: str) -> None:
    """Refuse a graph that gives probabilities.

    Raises:
        TeacherError: its last operator, but for those of shape, is a softmax.
    """
    while node.target in RESHAPES:
        node = node.all_input_nodes[0]
    if node.target in SOFTMAX:
        raise TeacherError(
            f"teacher '{name}' ends in a softmax; zsq learns from logits: return what goes into it. The class is the "
            "same."
        )


def _remove_dropout(graph: fx.Graph) -> None:
    """Remove dropout that is off: the train/eval switches of exported graphs would turn it on with p = 0.5."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in DROPOUTS and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _check_forward(net: nn.Module, images: Tensor, spec: ImageSpec, name: str) -> None:
    size = f"{spec.channels}x{spec.height}x{spec.width}"
    try:
        with torch.no_grad():
            logits = net(images)
    except FOREIGN_FAULTS as error:
        raise TeacherError(f"teacher '{name}' fails on images of {size}: {described(error)}") from error
    if not isinstance(logits, Tensor):
        raise TeacherError(
            f"teacher '{name}' returns a {type(logits).__name__}; a classifier returns logits [N, classes]."
        )
    shape = tuple(logits.shape)
    if len(shape) == 2 and shape[0] == 2 and shape[1] != spec.classes:
        raise TeacherError(f"teacher '{name}' knows {shape[1]} classes; --classes says {spec.classes}.")
    if shape != (2, spec.classes):
        raise TeacherError(
            f"teacher '{name}' gives {list(shape)} for 2 images of {size}; a classifier gives [2, {spec.classes}]."
        )


def _check_graph(net: nn.Module, network: fx.GraphModule, spec: ImageSpec, name: str) -> None:
    """Refuse a graph that does not compute what the network computes, on a batch of another size."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(CHECK_BATCH, spec.channels, spec.height, spec.width, generator=generator)
    try:
        with torch.no_grad():
            wanted, got = net(images), network(images)
    except FOREIGN_FAULTS as error:
        raise TeacherError(
            f"teacher '{name}' works on a batch of 2 and fails on one of {CHECK_BATCH}: {first_line(error)}"
        ) from error
    if not bool(torch.isfinite(wanted).all()):
        raise TeacherError(f"teacher '{name}' gives logits that are not finite for Gaussian noise.")
    difference = float((wanted - got).abs().max())
    if difference > CHECK_TOLERANCE * max(1.0, float(wanted.abs().max())):
        raise TeacherError(
            f"the exported graph of teacher '{name}' gives other logits than the network (by up to {difference:.3g}); "
            "its forward may draw random numbers or depend on state that torch.export does not see."
        )
