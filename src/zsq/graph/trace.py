"""A network in, the graph that everything else works on out."""

import contextlib
import inspect
import io
import logging
import math
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsq.errors import TeacherError
from zsq.graph.affine import drop_idle
from zsq.graph.canonicalize import name_activations, name_extremes, name_global_pools
from zsq.graph.constants import fold_constants
from zsq.graph.islands import cast_to_float32, narrowest_type
from zsq.graph.outputs import has_unit_norm, leaves, outputs_of, pack, pack_outputs, recognised, results
from zsq.graph.plain import plain_network
from zsq.graph.products import name_products
from zsq.runtime.memory import require_memory
from zsq.types import ImageSpec

log = logging.getLogger(__name__)

FOREIGN_FAULTS = (Exception, SystemExit)
"""What foreign code can raise: a user's factory or forward, a zoo's download, torch.export. Its `sys.exit()` is none of
zsq's: a network that leaves like that is not one that was quantized."""

CHECK_BATCH = 3
"""Images of the batch on which graph and network are compared; not the size that the graph was traced with."""

CHECK_TOLERANCE = 1e-4
"""Largest difference allowed there, relative to the largest logit."""

ROUNDINGS = 16
"""Largest difference of a graph that computes in float32, where the network does not, in epsilons of its narrowest
type."""

ALONE_TOLERANCE = 1e-3
"""Largest difference between an image's logits alone and in a batch, relative to the largest logit: kernels differ."""

DROPOUTS = tuple(
    getattr(torch.ops.aten, name).default
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
)


PROBABILITIES: dict[object, str] = {
    torch.ops.aten.softmax.int: "softmax",
    torch.ops.aten._softmax.default: "softmax",
    torch.ops.aten.sigmoid.default: "sigmoid",
    torch.ops.aten.hardsigmoid.default: "hard sigmoid",
}
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
        spec: what it takes, and what is known of what it gives; see `recognised`.
        name: what errors call it.
    Returns:
        A plain graph module: one placeholder, an output node that returns the logits' node or that of `pack`, ATen
        operators without in-place ones, any batch size, no dropout, frozen parameters under their original names. (The
        module that `torch.export` itself returns refuses `train` and `eval` and warns when copied.)
    Raises:
        TeacherError: the forward fails, what it gives cannot be told, it cannot be exported, or the graph disagrees.
    """
    needed = CHECK_BATCH * math.prod(spec.shape) * torch.float32.itemsize
    require_memory(needed, f"{CHECK_BATCH} images of {spec.shape_text}", "is --input right?")
    images = torch.randn(2, *spec.shape, generator=torch.Generator().manual_seed(0))
    spec = recognised(_answer(net, images, spec, name), spec, name)
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad(), quiet_export():
            exported = plain_network(torch.export.export(net, (images,), dynamic_shapes=({0: batch},)))
    except FOREIGN_FAULTS as error:
        branches = "data-dependent" in str(error)
        hint = " Its forward branches on the values of its images, which no exported file can." if branches else ""
        text = f"teacher '{name}' cannot be exported by torch.export: {first_line(error)}{hint}"
        raise TeacherError(text) from error
    graph = exported.graph
    _remove_dropout(graph)
    pack_outputs(exported, spec.outputs)
    _check_logits(graph, spec, name)
    fold_constants(exported)
    _name_squeezes(graph)
    _name_reshapes(graph)
    tolerance = CHECK_TOLERANCE
    if (narrowest := narrowest_type(exported)) is not None:
        exported.recompile()
        _check_graph(net, exported, spec, name, tolerance)
        cast_to_float32(exported)
        tolerance = max(tolerance, ROUNDINGS * torch.finfo(narrowest).eps)
    drop_idle(exported)
    name_products(exported)
    name_activations(graph)
    name_global_pools(graph)
    name_extremes(graph)
    graph.eliminate_dead_code()
    graph.lint()
    network = fx.GraphModule(exported, graph, class_name=type(net).__name__)
    network.train(False)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    _check_graph(net, network, spec, name, tolerance)
    _check_alone(network, spec, name)
    return network


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keep from the user what torch.export says of itself, and the graphs that it prints beside its exception."""
    loggers = [logging.getLogger(name) for name in ("torch.fx.experimental.symbolic_shapes", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def full_spec(network: fx.GraphModule, spec: ImageSpec) -> ImageSpec:
    """Return what a traced network takes and gives, where the spec of its trace left kinds or shapes open."""
    outputs = outputs_of(network)
    if outputs:
        return replace(spec, outputs=outputs, classes=next((o.classes for o in outputs if o.classes), 0))
    (logits,) = results(network.graph)
    return replace(spec, outputs=(), classes=int(logits.meta["val"].shape[1]))


def _check_logits(graph: fx.Graph, spec: ImageSpec, name: str) -> None:
    """Refuse a graph that gives probabilities of classes.

    Raises:
        TeacherError: the last operator of an output of classes, but for those of shape, is a softmax or a sigmoid.
    """
    kinds = [output.kind for output in spec.outputs] or ["classes"]
    for result, kind in zip(results(graph), kinds, strict=True):
        node = result
        while node.target in RESHAPES:
            node = node.all_input_nodes[0]
        if kind == "classes" and (end := PROBABILITIES.get(node.target)):
            labels = " Where several labels may hold at once, --outputs values takes it as it is."
            raise TeacherError(
                f"teacher '{name}' ends in a {end}; zsq learns from logits: return what goes into it. The class is the "
                f"same.{'' if end == 'softmax' else labels}"
            )


def _remove_dropout(graph: fx.Graph) -> None:
    """Remove dropout that is off: the train/eval switches of exported graphs would turn it on with p = 0.5."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in DROPOUTS and not node.args[2]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _check_inputs(net: nn.Module, name: str) -> None:
    """Refuse a network that cannot be called with one batch alone.

    Raises:
        TeacherError: its forward needs more.
    """
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):  # such as a forward in C
        return
    needed = [
        each.name
        for each in parameters
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise TeacherError(
            f"teacher '{name}' takes {len(needed)} inputs ({', '.join(needed)}); zsq quantizes networks of one. Give "
            "the others a default, or wrap the network in one that sets them."
        )


def _answer(net: nn.Module, images: Tensor, spec: ImageSpec, name: str) -> Any:
    """Return what a network gives, and ask where it looks like an embedding and is said to give classes."""
    _check_inputs(net, name)
    size = spec.shape_text
    try:
        with torch.no_grad():
            answer = net(images)
    except FOREIGN_FAULTS as error:
        raise TeacherError(f"teacher '{name}' fails on images of {size}: {described(error)}") from error
    if spec.classes and not spec.outputs and isinstance(answer, Tensor) and has_unit_norm(answer):
        log.warning(f"the output of '{name}' has unit norm; is it an embedding? --outputs embedding takes it for one.")
    return answer


def _check_graph(net: nn.Module, network: fx.GraphModule, spec: ImageSpec, name: str, tolerance: float) -> None:
    """Refuse a graph that does not compute what the network computes, on a batch of another size.

    Raises:
        TeacherError: logits are not finite, or differ by more than `tolerance` of the largest.
    """
    images = _other_images(spec)
    try:
        with torch.no_grad():
            wanted, got = pack(*leaves(net(images))), network(images)
    except FOREIGN_FAULTS as error:
        raise TeacherError(
            f"teacher '{name}' works on a batch of 2 and fails on one of {CHECK_BATCH}: {first_line(error)}"
        ) from error
    if not bool(torch.isfinite(wanted).all()):
        raise TeacherError(f"teacher '{name}' gives logits that are not finite for Gaussian noise.")
    difference = float((wanted - got).abs().max())
    if difference > tolerance * max(1.0, float(wanted.abs().max())):
        raise TeacherError(
            f"the exported graph of teacher '{name}' gives other logits than the network (by up to {difference:.3g}); "
            "its forward may draw random numbers or depend on state that torch.export does not see."
        )


def _check_alone(network: fx.GraphModule, spec: ImageSpec, name: str) -> None:
    """Refuse a graph whose answer to an image depends on the other images of its batch.

    Raises:
        TeacherError: it does, or it fails on a batch of one.
    """
    images = _other_images(spec)
    try:
        with torch.no_grad():
            together, alone = network(images)[:1], network(images[:1])
    except FOREIGN_FAULTS as error:
        raise TeacherError(f"teacher '{name}' fails on a batch of one: {first_line(error)}") from error
    if alone.shape != together.shape:
        shapes = f"{list(alone.shape)} for 1 image, and a row of {list(together.shape)} in a batch"
        raise TeacherError(f"teacher '{name}' gives {shapes}.")
    difference = float((together - alone).abs().max())
    if difference > ALONE_TOLERANCE * max(1.0, float(together.abs().max())):
        raise TeacherError(
            f"teacher '{name}' gives an image other logits alone than in a batch (by up to {difference:.3g}); "
            "something normalizes over the batch, such as a batch norm without stored statistics "
            "(track_running_stats=False)."
        )


def _other_images(spec: ImageSpec) -> Tensor:
    """Return Gaussian noise that the graph was not traced with, [CHECK_BATCH, C, ...]."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(CHECK_BATCH, *spec.shape, generator=generator)


def _name_squeezes(graph: fx.Graph) -> None:
    """Let `squeeze` without dimensions name those that are 1 whatever the batch is."""
    for node in graph.nodes:
        if node.target is torch.ops.aten.squeeze.default:
            sizes = node.args[0].meta["val"].shape
            ones = [dim for dim, size in enumerate(sizes) if isinstance(size, int) and size == 1]
            node.target, node.args = torch.ops.aten.squeeze.dims, (node.args[0], ones)
            if not ones:
                node.replace_all_uses_with(node.args[0])


def _name_reshapes(graph: fx.Graph) -> None:
    """Let `reshape_as` and `view_as` name the shape, where the batch alone varies."""
    for node in graph.nodes:
        if node.target in (torch.ops.aten.reshape_as.default, torch.ops.aten.view_as.default):
            sizes = [size if isinstance(size, int) else -1 for size in node.args[1].meta["val"].shape]
            if sizes.count(-1) <= 1:
                node.target, node.args = torch.ops.aten.reshape.default, (node.args[0], sizes)
