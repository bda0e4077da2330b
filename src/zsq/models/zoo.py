"""The model zoos of other libraries: what they can name, what images their networks take, and how to build one."""

import contextlib
import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from zsq.data import digits, shapes
from zsq.data.bundled import Bundled
from zsq.errors import MissingExtraError, TeacherError, unknown_name
from zsq.graph.trace import FOREIGN_FAULTS, first_line
from zsq.types import ImageSpec

BUNDLED: dict[str, Bundled] = {network.name: network for network in (digits.NETWORK, *shapes.NETWORKS.values())}
"""The networks that zsq brings and can quantize, by name."""

INSTALL = {
    "pytorchcv": "pip install 'zsq[zoo]'",
    "torchvision": "pip install torchvision",
    "timm": "pip install timm",
}
"""What brings each zoo, by its name before the colon."""

NO_NETWORK = ("NameResolution", "name resolution", "getaddrinfo", "Max retries", "Name or service")
"""What errors of a machine without a connection hold."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PYTORCHCV_SPECS = {
    "cifar10": ImageSpec(
        channels=3, height=32, width=32, classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
    ),
    "cifar100": ImageSpec(
        channels=3, height=32, width=32, classes=100, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
    ),
    "svhn": ImageSpec(
        channels=3, height=32, width=32, classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
    ),
    "cub": ImageSpec(channels=3, height=224, width=224, classes=200, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=256),
    "": ImageSpec(channels=3, height=224, width=224, classes=1000, mean=IMAGENET_MEAN, std=IMAGENET_STD, resize=256),
}
"""Image specs of pytorchcv, by the last part of a name; "" is ImageNet.

The package ships none of this. Source: `pytorch/datasets/{imagenet1k,cub200_2011,cifar10,cifar100,svhn}_cls_dataset.py`
of osmr/imgclsmob, the evaluation scripts of the same author: mean and std as here (SVHN inherits CIFAR-10's), images
resized to ceil(input size / 0.875) before the centre crop.
"""

PYTORCHCV_OTHER_TASKS = ("coco", "voc", "ade20k", "cityscapes", "celebamaskhq", "cmupan")
"""Parts of pytorchcv names whose networks find or segment objects."""

PYTORCHCV_OTHER_NETWORKS = ("jasper", "lffd", "nvpattexp", "pfpcnet", "prnet", "quartznet", "superpointnet", "voca")
"""Beginnings of pytorchcv names whose networks do something else than classify images."""

CROP_FRACTION = 0.875
"""Crop over shorter side in pytorchcv's evaluation: 224 / 256."""


@dataclass(frozen=True, slots=True)
class ModelGroup:
    """A way to name a teacher, for `zsq models`."""

    form: str
    """How MODEL is written, such as `pytorchcv:NAME`."""
    installed: bool
    """Whether it can be used here."""
    reason: str
    """Why not, or what it is, in one line."""
    names: tuple[str, ...] = ()
    """What NAME can be; empty where the user supplies it."""


def known_models() -> list[ModelGroup]:
    """Return every way to name a teacher; a zoo that does not import here says why."""
    groups = [ModelGroup(each.name, True, f"bundled: {each.summary}", (each.name,)) for each in BUNDLED.values()]
    for zoo in INSTALL:
        try:
            names = zoo_names(zoo)
        except (MissingExtraError, TeacherError) as error:
            groups.append(ModelGroup(f"{zoo}:NAME", False, str(error)))
        else:
            groups.append(ModelGroup(f"{zoo}:NAME", True, f"{len(names)} networks", names))
    groups.append(ModelGroup("FILE.py:FACTORY", True, "a function in a file that returns an nn.Module"))
    groups.append(ModelGroup("PACKAGE.MODULE:FACTORY", True, "a function of an installed module"))
    return groups


@cache
def zoo_names(zoo: str) -> tuple[str, ...]:
    """Return the names of a zoo's image classifiers, sorted.

    Raises:
        MissingExtraError: the library is not installed.
        TeacherError: the library is installed and does not import; the text gives the reason.
    """
    library = _library(zoo)
    names: list[str]
    if zoo == "pytorchcv":
        names = [
            name
            for name in importlib.import_module("pytorchcv.model_provider")._models
            if not name.startswith(PYTORCHCV_OTHER_NETWORKS)
            and not any(part in PYTORCHCV_OTHER_TASKS for part in name.split("_"))
        ]
    elif zoo == "torchvision":
        names = library.models.list_models(module=library.models)
    else:
        names = library.list_models()
    return tuple(sorted(names))


def zoo_spec(zoo: str, name: str) -> ImageSpec:
    """Return what images a zoo's network takes.

    Raises:
        InputError: the zoo has no such name.
        MissingExtraError, TeacherError: as `zoo_names`.
    """
    names = zoo_names(zoo)
    if name not in names and not (zoo == "timm" and name.partition(".")[0] in names):
        near = difflib.get_close_matches(name, names, n=12, cutoff=0.4) or names[:12]
        raise TeacherError(f"{unknown_name(f'{zoo} model', name, near)} To search all {len(names)}: zsq models PART.")
    if zoo == "pytorchcv":
        return _pytorchcv_spec(name)
    if zoo == "torchvision":
        weights = _library(zoo).models.get_model_weights(name).DEFAULT
        preset = weights.transforms()
        size, resize = int(preset.crop_size[0]), int(preset.resize_size[0])
        return ImageSpec(
            channels=3,
            height=size,
            width=size,
            classes=len(weights.meta["categories"]),
            mean=tuple(preset.mean),
            std=tuple(preset.std),
            resize=resize,
        )
    config = _library(zoo).get_pretrained_cfg(name)
    channels, height, width = config.input_size
    resize = math.floor(min(height, width) / (config.crop_pct or CROP_FRACTION))
    return ImageSpec(
        channels=channels,
        height=height,
        width=width,
        classes=config.num_classes,
        mean=tuple(config.mean),
        std=tuple(config.std),
        resize=resize,
    )


def build(zoo: str, name: str, spec: ImageSpec, default: ImageSpec, *, pretrained: bool) -> nn.Module:
    """Return a zoo's network for `spec`, with the zoo's own weights (which it downloads) or its initial ones.

    Raises:
        TeacherError: the zoo cannot build or fetch it; the text passes on the reason.
    """
    options: dict[str, Any] = {}
    if spec.classes != default.classes:
        options["num_classes"] = spec.classes
    if spec.channels != default.channels:
        if zoo == "torchvision":
            raise TeacherError(f"torchvision:{name} takes {default.channels} channels; --input says {spec.channels}.")
        options["in_chans" if zoo == "timm" else "in_channels"] = spec.channels
    if zoo == "pytorchcv" and (spec.height, spec.width) != (default.height, default.width):
        options["in_size"] = (spec.height, spec.width)
    try:
        with contextlib.redirect_stdout(sys.stderr), _numpy_int():  # pytorchcv announces its downloads on stdout
            return _builder(zoo, name, pretrained)(**options)
    except FOREIGN_FAULTS as error:
        if pretrained:
            raise TeacherError(
                f"{zoo}:{name}: its weights could not be fetched ({_why(error)}). "
                "Give --weights FILE, or --weights random."
            ) from error
        wanted = ", ".join(f"{key}={value}" for key, value in options.items())
        raise TeacherError(f"{zoo}:{name} cannot be built with {wanted or 'defaults'}: {first_line(error)}") from error


def _why(error: BaseException) -> str:
    """Return why a download failed, in plain words where it is the network."""
    text = f"{type(error).__name__} {error}"
    if any(sign in text for sign in NO_NETWORK):
        return "the server that has them cannot be reached from here"
    return first_line(error)


@contextlib.contextmanager
def _numpy_int() -> Iterator[None]:
    """Give numpy its former name `int` for a while: pytorchcv's RegNets read it."""
    if hasattr(np, "int"):
        yield
        return
    np.int = int  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del np.int  # type: ignore[attr-defined]


def _builder(zoo: str, name: str, pretrained: bool) -> Callable[..., nn.Module]:
    library = _library(zoo)
    if zoo == "pytorchcv":
        get_model = importlib.import_module("pytorchcv.model_provider").get_model
        return lambda **options: get_model(name, pretrained=pretrained, **options)
    if zoo == "torchvision":
        weights = "DEFAULT" if pretrained else None
        return lambda **options: library.models.get_model(name, weights=weights, **options)
    return lambda **options: library.create_model(name, pretrained=pretrained, **options)


def _library(zoo: str) -> ModuleType:
    try:
        return importlib.import_module(zoo)
    except ModuleNotFoundError as error:
        if error.name == zoo:
            raise MissingExtraError(f"{zoo} is not installed: {INSTALL[zoo]}") from error
        raise TeacherError(f"{zoo} does not import: {first_line(error)}") from error
    except FOREIGN_FAULTS as error:
        raise TeacherError(f"{zoo} does not import: {first_line(error)}") from error


def _pytorchcv_spec(name: str) -> ImageSpec:
    """Return the table's spec, with the size that the network itself names (built without memory for its weights)."""
    spec = PYTORCHCV_SPECS.get(name.rpartition("_")[2], PYTORCHCV_SPECS[""])
    builder = importlib.import_module("pytorchcv.model_provider")._models[name]
    size = inspect.signature(builder).parameters.get("in_size")
    if size is not None:
        height = size.default[0]
    else:
        try:
            with torch.device("meta"), _numpy_int():
                height = getattr(builder(), "in_size", (spec.height,))[0]
        except FOREIGN_FAULTS:  # a constructor that computes on its weights; the table's size stands
            height = spec.height
    resize = None if spec.resize is None else math.ceil(height / CROP_FRACTION)
    return replace(spec, height=height, width=height, resize=resize)
