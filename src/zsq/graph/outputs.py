"""What a network gives: one tensor or several, each of a kind; inside of zsq they travel as one row an image."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from zsq.errors import TeacherError
from zsq.types import ImageSpec, Output

UNIT = 1e-3
"""Most by which the length of a normalised vector is off 1."""

HOW = (
    "say what it means: --outputs classes (logits, of an image or at every position), embedding (a direction) or "
    "values (anything else)"
)

NAMES = {"classes": "logits", "embedding": "embedding", "values": "values"}
"""Name of a network's only output."""


def pack(*answers: Tensor) -> Tensor:
    """Join what a network gives, each [N, ...], in one row an image, [N, K].

    It is the last node of a graph whose network does not give one vector of logits; its metadata `outputs` say what its
    arguments are.
    """
    rows = [answer.reshape(answer.shape[0], -1) for answer in answers]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def leaves(answer: Any) -> list[Tensor]:
    """Return the tensors of what a network gives: a tensor, or tuples, lists and dicts of these."""
    return [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]


def packer(graph: Graph) -> Node | None:
    """Return the node that packs a network's outputs; None where the network gives logits alone."""
    for node in graph.output_node().all_input_nodes:
        if node.target is pack:
            return node
    return None


def results(graph: Graph) -> list[Node]:
    """Return the nodes whose values a network gives, in order."""
    packed = packer(graph)
    return (
        graph.output_node().all_input_nodes[:1] if packed is None else [n for n in packed.args if isinstance(n, Node)]
    )


def outputs_of(network: Any) -> tuple[Output, ...]:
    """Return what a graph gives; empty for one vector of logits, and for a module that is no graph."""
    packed = packer(network.graph) if isinstance(network, GraphModule) else None
    return () if packed is None else packed.meta["outputs"]


def pack_outputs(network: GraphModule, outputs: tuple[Output, ...]) -> None:
    """Let a graph that returns one node or several return them packed; logits alone are left as they are."""
    if not outputs:
        return
    output = network.graph.output_node()
    found = output.args[0]
    nodes = [node for node in (found if isinstance(found, tuple | list) else [found]) if isinstance(node, Node)]
    with network.graph.inserting_before(output):
        packed = network.graph.call_function(pack, tuple(nodes))
    packed.meta |= {"outputs": outputs, "val": pack(*(node.meta["val"] for node in nodes))}
    output.args = (packed,)


def unpack_outputs(network: GraphModule) -> None:
    """Let a graph return its outputs as they are: one tensor, or a tuple of them."""
    packed, output = packer(network.graph), network.graph.output_node()
    if packed is None:
        return
    output.args = (packed.args[0] if len(packed.args) == 1 else tuple(packed.args),)
    network.graph.erase_node(packed)


def recognised(answer: Any, spec: ImageSpec, name: str) -> ImageSpec:
    """Return an image spec with the outputs that a network gives for two images, recognised or as the spec says.

    Args:
        answer: what the network gives: a tensor [2, ...], or tuples, lists and dicts of these.
        spec: with the number of classes where it is known, and kinds in `outputs`: one without a name for all, several
            in order, or by name. Their shapes are found here.
        name: of the network, for errors.

    Raises:
        TeacherError: an output is no float tensor with an image a row, or what it means cannot be told.
    """
    found = _named_in_order(_named(answer, name), spec)
    kinds = _said(found, spec, name) if spec.outputs else _guessed(found, spec, name)
    alone = len(found) == 1
    outputs = tuple(
        Output(NAMES[kind] if alone and not key else key or f"output_{index}", kind, tuple(tensor.shape[1:]))
        for index, ((key, tensor), kind) in enumerate(zip(found.items(), kinds, strict=True))
    )
    for output in outputs:
        if output.kind != "values" and not output.shape:
            raise TeacherError(f"output '{output.name}' of teacher '{name}' is one number an image, no {output.kind}.")
    counts = [output.classes for output in outputs if output.classes]
    if spec.classes and counts and spec.classes not in counts and not (spec.classes == 1 and counts == [2]):
        raise TeacherError(f"teacher '{name}' knows {counts[0]} classes; --classes says {spec.classes}.")
    classes = (spec.classes if spec.classes in counts else counts[0]) if counts else 0
    if alone and outputs[0].kind == "classes" and len(outputs[0].shape) == 1 and outputs[0].shape[0] > 1:
        outputs = ()
    return replace(spec, classes=classes, outputs=outputs)


def _named(answer: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors by name; one without a name of its own has one that begins with a blank."""
    found: dict[str, Tensor] = {}
    for path, leaf in pytree.tree_flatten_with_path(answer)[0]:
        if not isinstance(leaf, Tensor):
            if leaf is None:
                continue
            raise TeacherError(f"teacher '{name}' returns a {type(leaf).__name__}; outputs are tensors, [N, ...].")
        if not leaf.is_floating_point():
            raise TeacherError(
                f"teacher '{name}' gives {leaf.dtype} values, which cannot be learnt from; return what makes them."
            )
        if leaf.dim() == 0 or leaf.shape[0] != 2:
            raise TeacherError(f"teacher '{name}' gives {list(leaf.shape)} for 2 images; one row an image is needed.")
        keys = [str(key.key) for key in path if isinstance(key, pytree.MappingKey)]
        plain = "_".join("".join(c if c.isalnum() else "_" for c in key) for key in keys)
        key = plain if plain and len(keys) == len(path) and plain not in found else f"output_{len(found)}"
        found["" if not path else key] = leaf
    if not found:
        raise TeacherError(f"teacher '{name}' returns a {type(answer).__name__} without a tensor in it.")
    return found


def _named_in_order(found: dict[str, Tensor], spec: ImageSpec) -> dict[str, Tensor]:
    """Give outputs without names of their own those that the spec has, in order."""
    said = [output.name for output in spec.outputs]
    nameless = all(key == f"output_{index}" for index, key in enumerate(found))
    if nameless and len(said) == len(found) == len(set(said) - {""}):
        return dict(zip(said, found.values(), strict=True))
    return found


def _said(found: dict[str, Tensor], spec: ImageSpec, name: str) -> list[Any]:
    """Return the kind of each output as the spec says."""
    said = spec.outputs
    if len(said) == 1 and (not said[0].name or len(found) == 1):
        return [said[0].kind] * len(found)
    if not any(output.name for output in said) and len(said) == len(found):
        return [output.kind for output in said]
    by_name = {output.name: output.kind for output in said}
    if set(by_name) == set(found):
        return [by_name[key] for key in found]
    known = ", ".join(f"{key} {list(tensor.shape)}" for key, tensor in found.items())
    raise TeacherError(
        f"teacher '{name}' gives {known} for 2 images, and what is said of its outputs is for "
        f"{', '.join(key or 'one without a name' for key in by_name)}; name each: "
        f"--outputs {','.join(f'{key}=values' for key in found)}."
    )


def _guessed(found: dict[str, Tensor], spec: ImageSpec, name: str) -> list[Any]:
    """Return the kind of each output where the number of classes or the length of a vector tells it."""
    tensors = list(found.values())
    if spec.classes:
        if all(tensor.dim() > 1 and tensor.shape[1] in _channels(spec.classes) for tensor in tensors):
            return ["classes"] * len(tensors)
        if len(tensors) == 1 and tensors[0].dim() == 2:
            raise TeacherError(f"teacher '{name}' knows {tensors[0].shape[1]} classes; --classes says {spec.classes}.")
    if len(tensors) == 1 and has_unit_norm(tensors[0]) and not spec.classes:
        return ["embedding"]
    shapes = ", ".join(f"{key + ' ' if key else ''}{list(tensor.shape)}" for key, tensor in found.items())
    also = f", or each by name: --outputs {','.join(f'{key}=values' for key in found)}" if len(found) > 1 else ""
    wanted = f"; [2, {spec.classes}] was expected, for --classes {spec.classes}" if spec.classes else ""
    raise TeacherError(f"teacher '{name}' gives {shapes} for 2 images{wanted}. If that is right, {HOW}{also}.")


def _channels(classes: int) -> tuple[int, ...]:
    """Return how many logits tell so many classes apart: two, by one logit as well."""
    return (1, 2) if classes <= 2 else (classes,)


def has_unit_norm(answer: Tensor) -> bool:
    """Whether an output [N, ...] holds vectors of length 1 along its second axis."""
    if answer.dim() < 2 or answer.shape[1] < 2 or not answer.is_floating_point():
        return False
    return bool(((answer.norm(dim=1) - 1).abs() < UNIT).all())
