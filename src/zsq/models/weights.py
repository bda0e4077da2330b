"""Read a network's weights from a safetensors file or a PyTorch checkpoint, without running any code of the file."""

import argparse
import logging
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from zsq.errors import ZIP_FAULTS, TeacherError
from zsq.graph.trace import FOREIGN_FAULTS, first_line
from zsq.types import ImageSpec

NESTS = ("state_dict", "model_state_dict", "model", "net", "state_dict_ema", "model_ema", "ema")
"""Keys under which training scripts keep the state dict, tried in this order; averaged weights come last."""

logger = logging.getLogger(__name__)

PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and Lightning put before every name."""

COUNTER = "num_batches_tracked"
"""Batch norm's step counter: some files hold it, and no output depends on it."""

QUOTED = 3
"""How many names an error quotes."""


def load_weights(net: nn.Module, path: Path, spec: ImageSpec, said: Mapping[str, int | None]) -> None:
    """Copy the weights of a file into `net`, every one of them.

    Args:
        net: the network, changed in place.
        path: a `.safetensors` file, or a checkpoint that `torch.load` reads with `weights_only=True`. `FILE:ENTRY`
            names one of a checkpoint's entries, such as `net.pth:state_dict_ema`.
        spec: what the network is built for.
        said: values of the flags `classes` and `channels`, None where the user gave none: for the errors' wording.
    Raises:
        TeacherError: the file is missing, unreadable or unsafe, or its names and shapes are not the network's.
    """
    own = {name: value for name, value in net.state_dict().items() if not name.endswith(COUNTER)}
    state = without_prefix(read_state(path), own)
    state = {name: value for name, value in state.items() if not name.endswith(COUNTER)}
    _check_shapes(path, state, net, spec, said)
    missing = [f"{name} ({_shape(value)})" for name, value in own.items() if name not in state]
    unexpected = [f"{name} ({_shape(value)})" for name, value in state.items() if name not in own]
    if missing or unexpected:
        parts = [
            f"{len(names)} {word}: {_quote(names)}"
            for word, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise TeacherError(f"{path.name} holds the weights of another network; {'; '.join(parts)}.")
    net.load_state_dict(state, strict=False)


def read_state(path: Path) -> dict[str, Tensor]:
    """Return the state dict of a file, wherever the checkpoint keeps it, or of an entry: `FILE:ENTRY`.

    Raises:
        TeacherError: no such file, not readable, would execute code, or holds no state dict.
    """
    entry = None
    if not path.is_file() and ":" in path.name:
        name, _, entry = path.name.rpartition(":")
        path = path.with_name(name)
    if not path.is_file():
        raise TeacherError(f"no such weights file: {path}")
    if entry is not None:
        held = _unpickle(path) if path.suffix != ".safetensors" else {}
        if not isinstance(held, Mapping) or entry not in held:
            keys = _quote([str(key) for key in held]) if isinstance(held, Mapping) and held else "none"
            raise TeacherError(f"{path.name} has no entry '{entry}'; it has {keys}.")
        return _state_in(held[entry], path)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise TeacherError(f"{path.name} is not a readable safetensors file: {first_line(error)}") from error
    return _state_in(_unpickle(path), path)


def without_prefix(state: dict[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    """Strip what wrappers put before every name, unless the network's own names have it.

    >>> sorted(without_prefix({"module.fc.bias": 1, "module.fc.weight": 2}, {"fc.weight": 0, "fc.bias": 0}))
    ['fc.bias', 'fc.weight']
    """
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            if state and all(name.startswith(prefix) for name in state) and not any(n.startswith(prefix) for n in own):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                stripped = True
    return state


def _unpickle(path: Path) -> Any:
    """Return what `torch.load` reads; of Python's own objects, only the options of a training script are let in."""
    with path.open("rb") as stream:
        start = stream.read(1)
    if start != b"\x80" and not _is_zip(path):
        raise TeacherError(f"{path.name} is not a PyTorch checkpoint: it is neither a whole zip file nor a pickle.")
    if start != b"\x80":
        _check_zip(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = str(error).partition("GLOBAL ")[2].partition(" ")[0]
        holds = f"holds {what}" if what else "needs Python's own unpickler"
        raise TeacherError(
            f"{path.name} would execute code when loaded (it {holds}). Save the weights alone as safetensors: "
            "safetensors.torch.save_file(net.state_dict(), 'weights.safetensors')."
        ) from error
    except FOREIGN_FAULTS as error:
        raise TeacherError(f"{path.name} is not a readable PyTorch checkpoint: {first_line(error)}") from error


def _is_zip(path: Path) -> bool:
    """Whether a file ends as a zip file does."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one in several parts, it says of itself
        return False


def _check_zip(path: Path) -> None:
    """Check the checksums of a zip file, which `torch.load` leaves aside.

    Raises:
        TeacherError: one is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except ZIP_FAULTS as error:
        raise TeacherError(f"{path.name} is a damaged zip file: {first_line(error)}") from error
    if damaged is not None:
        raise TeacherError(f"{path.name} is damaged: its part {damaged} does not match its checksum (CRC).")


def _state_in(value: Any, path: Path) -> dict[str, Tensor]:
    """Return the mapping of names to tensors in a checkpoint, at its top or under one of `NESTS`."""
    if isinstance(value, Mapping):
        if value and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items()):
            return dict(value)
        found = [nest for nest in NESTS if isinstance(value.get(nest), Mapping)]
        if len(found) > 1:
            logger.info(
                f"{path.name} holds {' and '.join(found)}; the weights are those of {found[0]}, and "
                f"{path.name}:{found[1]} names the others"
            )
        if found:
            return _state_in(value[found[0]], path)
        held = f"the keys {_quote([str(key) for key in value])}" if value else "nothing"
    else:
        held = f"a {type(value).__name__}"
    raise TeacherError(f"{path.name} holds {held}; a state dict is wanted, at the top or under {', '.join(NESTS)}.")


def _check_shapes(
    path: Path, state: Mapping[str, Tensor], net: nn.Module, spec: ImageSpec, said: Mapping[str, int | None]
) -> None:
    own = net.state_dict()
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    if not wrong:
        return
    file, network = state[wrong[-1]].shape, own[wrong[-1]].shape
    heads = [name for name in wrong if state[name].dim() > 1 and own[name].shape[0] == spec.classes]
    if heads and all(state[name].shape[1:] == own[name].shape[1:] for name in wrong):
        file = state[heads[-1]].shape
        source = f"--classes says {spec.classes}" if said.get("classes") else f"the network has {spec.classes}"
        raise TeacherError(
            f"{path.name} holds {file[0]} classes ({heads[-1]} is {_shape(state[heads[-1]])}); {source}."
        )
    first = wrong[0]
    file, network = state[first].shape, own[first].shape
    if len(wrong) == 1 and len(file) == len(network) == 4 and network[1] == spec.channels and file[0] == network[0]:
        source = f"--input says {spec.channels}" if said.get("channels") else f"the network takes {spec.channels}"
        if file[2:] == network[2:]:
            raise TeacherError(f"{path.name} takes {file[1]} channels ({first} is {_shape(state[first])}); {source}.")
    names = [f"{name} is {_shape(state[name])} there and {_shape(own[name])} in the network" for name in wrong]
    raise TeacherError(f"{path.name} does not fit, in {len(wrong)} shapes: {_quote(names)}.")


def _shape(value: Tensor) -> str:
    return "x".join(str(size) for size in value.shape) or "a single number"


def _quote(names: list[str]) -> str:
    more = f" and {len(names) - QUOTED} more" if len(names) > QUOTED else ""
    return ", ".join(names[:QUOTED]) + more
