"""What every bundled network has: a name, its module, the images that it takes, and the file of its weights."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save
from torch import nn

from zsq.types import ImageSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundled:
    """A network that comes with zsq, trained by a script of its own."""

    name: str
    """How the command line names it."""
    summary: str
    """What it is, in a few words."""
    build: Callable[[], nn.Module]
    """Returns it with its initial, untrained weights."""
    weights: Path
    """The trained weights, safetensors."""
    spec: ImageSpec
    """What it takes and gives."""
    class_names: tuple[str, ...] = ()
    """Names of its classes in the order of its outputs; empty where they are numbers, or none."""


def write_weights(net: nn.Module, path: Path) -> None:
    """Write the weights as safetensors, whole or not at all."""
    state = {name: value.contiguous() for name, value in net.state_dict().items() if "num_batches" not in name}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(save(state))  # not save_file, which makes the file unreadable for other users
    os.replace(temporary, path)


def trained(build: Callable[[], nn.Module], weights: Path) -> nn.Module:
    """Return a network with its trained weights, in eval mode."""
    net = build()
    net.load_state_dict(load_file(weights), strict=False)  # lacks the counters of batch norm, which change nothing
    return net.eval()
