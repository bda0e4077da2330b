"""Where a network comes from: a name, a file or a module in; its exported graph, image spec and hash out."""

import copy
import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, fx, nn

from zsq.errors import InputError, TeacherError, unknown_name
from zsq.graph.trace import FOREIGN_FAULTS, described, first_line, full_spec, trace
from zsq.models import zoo
from zsq.models.network import Network, parse_outputs
from zsq.models.own_code import own_function
from zsq.models.programs import is_file, read_program
from zsq.models.weights import COUNTER, load_weights
from zsq.models.zoo import ModelGroup, known_models
from zsq.types import ImageSpec, Output

__all__ = ["ModelGroup", "Teacher", "known_models", "load_teacher", "teacher_from_module"]

logger = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var")
"""How the names of batch norm's statistics end."""

HUGE = 1e15
"""Larger than any trained weight or statistic; its square still fits a float."""

RANDOM_SEED = 0
"""Seed of the weights of `--weights random`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """The float network that is to be quantized; everything after loading works on its exported graph."""

    name: str
    """The network as the user named it."""
    spec: ImageSpec
    """What it takes and gives."""
    network: fx.GraphModule
    """The `torch.export` graph in eval mode, called as `network(images)`: [N, C, ...] to logits [N, classes], or to
    all its outputs in one row an image, [N, K] (`zsq.graph.outputs`).

    ATen operators (none in place), any batch size, no dropout, parameters frozen under their original names, batch
    norms as `aten.batch_norm` nodes. It is a plain `fx.GraphModule`: one placeholder, and an output node that returns
    the node of the logits or of `pack` itself (not a tuple); `deepcopy`, `train` and `eval` work.
    """
    weights_source: str
    """`bundled`, the file's name, `zoo`, `factory`, `program`, `random` or `memory`."""
    weights_sha256: str
    """Hash over the sorted state dict (name, dtype, shape, bytes), whatever file it came from."""
    graph_sha256: str
    """Hash of what is computed with these weights; see `graph_sha256`."""
    weights_file: str | None = None
    """Where the weights lay, where they are a file of the user's: an absolute path."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the network's order; empty where they are not known."""

    def to(self, device: torch.device | str) -> "Teacher":
        """Return the same teacher on another device; this one stays where it is."""
        device = torch.device(device)
        network = copy.deepcopy(self.network).to(device)
        for node in network.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": device}
            node.args = tuple(device if isinstance(value, torch.device) else value for value in node.args)
        network.recompile()
        return replace(self, network=network)


def load_teacher(
    model: str,
    *,
    weights: str | Path | None = None,
    input: tuple[int, ...] | None = None,
    classes: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    resize: int | Literal["none"] | None = None,
    outputs: str | tuple[Output, ...] | None = None,
) -> Teacher:
    """Return the teacher that MODEL names.

    Args:
        model: `digits`, `shapes_mobilenet`, `pytorchcv:NAME`, `torchvision:NAME`, `timm:NAME`,
            `path/to/file.py:FACTORY` or `package.module:FACTORY`, or a program that `torch.export.save` wrote,
            `path/to/file.pt2`. A factory is called without arguments and returns an
            `nn.Module`; its attribute `image_spec`, an `ImageSpec`, stands in for silent flags.
        weights: a safetensors file or a PyTorch checkpoint (a state dict, also under `state_dict`, `model` or
            `model_state_dict`, also with the prefix `module.`); `random` for seeded initial weights; None for those
            that the model brings: bundled, fetched by the zoo, or set by the factory.
        input: channels, height and width; of signals channels and length, of volumes channels, depth, height and
            width. Required where neither zoo nor factory knows them.
        classes: number of classes; a network that names classes needs it, or `outputs`.
        mean, std: one value a channel on the scale of pixels in [0, 1]; without zoo or factory, 0 and 1.
        resize: shorter side in pixels before the centre crop, "none" for none, None for what zoo or factory say.
        outputs: what the network gives, as on the command line: "embedding", or "heat=values,size=values"; None where
            `classes` tells.

    Raises:
        InputError: the name is unknown or the image spec does not fit together.
        MissingExtraError: the zoo is not installed.
        TeacherError: network or weights cannot serve; the text says why and what would work.
    """
    weights = None if weights is None else str(weights)
    said = parse_outputs(outputs) if isinstance(outputs, str) else outputs
    return load(
        Network(
            model=model,
            weights=weights,
            input=input,
            classes=classes,
            mean=mean,
            std=std,
            resize=resize,
            outputs=said,
        )
    )


def load(network: Network) -> Teacher:
    """Return the teacher that a network's name stands for; see `load_teacher`."""
    model, weights = network.model, network.weights
    net: nn.Module
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        if model in zoo.BUNDLED:
            bundled = zoo.BUNDLED[model]
            net, spec, source = bundled.build(), network.spec_over(bundled.spec), "bundled"
            if weights is None:
                load_weights(net, bundled.weights, bundled.spec, {})
        elif is_file(model):
            net, spec = _from_program(network)
            source = "program"
        elif model.partition(":")[0] in zoo.INSTALL:
            net, spec = _from_zoo(network)
            source = "zoo"
        else:
            net, spec = _from_factory(network)
            source = "factory"
            if weights == "random":
                _initialise(net)
    if weights == "random":
        source = "random"
    elif weights is not None:
        said = {"classes": network.classes, "channels": network.input[0] if network.input else None}
        load_weights(net, Path(weights), spec, said)
        source = Path(weights).name
    teacher = replace(_teacher(net, spec, model, source), class_names=_bundled_names(model, spec))
    if weights not in (None, "random"):
        teacher = replace(teacher, weights_file=str(Path(str(weights)).absolute()))
    unit = not any(spec.mean) and set(spec.std) == {1.0}
    if spec.is_image and unit and network.mean is None and network.std is None:
        logger.info("pixels go into the network as they are, from 0 to 1; --mean and --std normalise them")
    return teacher


def _bundled_names(model: str, spec: ImageSpec) -> tuple[str, ...]:
    """Return the names of a bundled network's classes; none of others."""
    names = zoo.BUNDLED[model].class_names if model in zoo.BUNDLED else ()
    return names if len(names) == spec.classes else ()


def teacher_from_module(
    net: nn.Module, spec: ImageSpec, *, name: str = "network", weights_source: str = "memory"
) -> Teacher:
    """Return a network in memory as a teacher; the network itself is copied and stays as it is.

    The spec's `outputs` say what it gives where that is not one vector of `classes` logits: kinds alone are enough, as
    in `(Output("", "embedding"),)`, since shapes are found.

    Raises:
        TeacherError: its forward fails on the spec's images, what it gives cannot be told, or it cannot be exported.
    """
    try:
        clone = copy.deepcopy(net)
    except FOREIGN_FAULTS as error:
        raise TeacherError(f"teacher '{name}' cannot be copied: {first_line(error)}") from error
    return _teacher(clone, spec, name, weights_source)


def state_sha256(state: dict[str, Tensor]) -> str:
    """Return the sha256 over the sorted state dict: name, dtype, shape and bytes of each tensor.

    Batch norm's step counter is left out: it changes no output, and only some files hold it.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        if name.endswith(COUNTER):
            continue
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def graph_sha256(network: fx.GraphModule) -> str:
    """Return the sha256 of an exported graph: each operator with its arguments, whatever its value is called.

    Another version of PyTorch may export the same network otherwise.
    """
    numbers: dict[fx.Node, int] = {}
    digest = hashlib.sha256()
    for node in network.graph.nodes:
        read = fx.node.map_arg((node.args, node.kwargs), lambda value: f"%{numbers[value]}")
        named = "" if node.op in ("placeholder", "output") else node.target
        digest.update(f"{node.op} {named} {read}\n".encode())
        numbers[node] = len(numbers)
    return digest.hexdigest()


def _from_zoo(network: Network) -> tuple[nn.Module, ImageSpec]:
    library, _, name = network.model.partition(":")
    default = zoo.zoo_spec(library, name)
    spec, pretrained = network.spec_over(default), network.weights is None
    if pretrained and (spec.classes, spec.channels) != (default.classes, default.channels):
        raise TeacherError(
            f"the zoo's weights of '{network.model}' are for {default.classes} classes and {default.channels} "
            f"channels; the flags say {spec.classes} and {spec.channels}. Give your own with --weights FILE, or "
            "--weights random."
        )
    return zoo.build(library, name, spec, default, pretrained=pretrained), spec


def _from_program(network: Network) -> tuple[nn.Module, ImageSpec]:
    net, shape = read_program(network.model)
    return net, replace(network, input=network.input or shape).spec_alone()


def _from_factory(network: Network) -> tuple[nn.Module, ImageSpec]:
    """Call the factory of `file.py:FACTORY` or `module:FACTORY`."""
    model = network.model
    place, colon, name = model.rpartition(":")
    if not colon or not place or not name:
        near = [f"{library}:{model}" for library in ("pytorchcv",) if _has(library, model)]
        forms = [*zoo.BUNDLED, *(f"{library}:NAME" for library in zoo.INSTALL), "FILE.py:FACTORY", "MODULE:FACTORY"]
        raise unknown_name("model", model, [*near, *forms])
    factory = own_function(place, name, "factory")
    default = getattr(factory, "image_spec", None)
    spec = network.spec_over(default) if isinstance(default, ImageSpec) else network.spec_alone()
    try:
        net = factory()
    except FOREIGN_FAULTS as error:
        raise TeacherError(f"'{model}' fails: {described(error)}") from error
    if not isinstance(net, nn.Module):
        raise TeacherError(f"'{model}' returns a {type(net).__name__}; a factory returns a torch.nn.Module.")
    return net, spec


def _has(library: str, name: str) -> bool:
    try:
        return name in zoo.zoo_names(library)
    except InputError:
        return False
    except ImportError:
        return False


def _check_values(net: nn.Module, name: str) -> None:
    """Refuse weights and statistics that no training leaves and nothing can be learnt from.

    Raises:
        TeacherError: a value is not finite or huge, or a variance is negative; names the tensor.
    """
    statistics = [(key, value) for key, value in net.named_buffers() if key.endswith(STATISTICS)]
    for key, value in [*net.named_parameters(), *statistics]:
        if not value.is_floating_point() or not value.numel() or isinstance(value, nn.UninitializedParameter):
            continue
        largest = float(value.detach().abs().max())
        if not largest <= HUGE:  # nor where it is not a number
            raise TeacherError(
                f"teacher '{name}' has {key} with values up to {largest:g}; weights and batch-norm statistics are "
                f"finite and below {HUGE:g}. Is the file damaged, or did the training diverge?"
            )
        if key.endswith("running_var") and float(value.min()) < 0:
            raise TeacherError(f"teacher '{name}' has {key} with the negative variance {float(value.min()):g}.")


def _unwrapped(net: nn.Module) -> nn.Module:
    """Return the network inside of what spreads it over devices or compiles it."""
    while True:
        compiled = getattr(net, "_orig_mod", None)
        if isinstance(net, nn.DataParallel | nn.parallel.DistributedDataParallel):
            net = net.module
        elif isinstance(compiled, nn.Module):
            net = compiled
        else:
            return net


def _initialise(net: nn.Module) -> None:
    """Give every layer its library's initial weights, whatever the factory had loaded."""
    for module in net.modules():
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def _teacher(net: nn.Module, spec: ImageSpec, name: str, source: str) -> Teacher:
    """Freeze, hash and export a network that nobody else holds."""
    if isinstance(net, torch.jit.ScriptModule):
        raise TeacherError(f"teacher '{name}' is a TorchScript module; give the torch.nn.Module that it was made of.")
    net = _unwrapped(net).cpu().float().eval()
    _check_values(net, name)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    network = trace(net, spec, name)
    return Teacher(
        name=name,
        spec=full_spec(network, spec),
        network=network,
        weights_source=source,
        weights_sha256=state_sha256(net.state_dict()),
        graph_sha256=graph_sha256(network),
    )
