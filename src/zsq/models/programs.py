"""A saved `torch.export` program as a network; files that cannot be one are told why."""

import zipfile
from pathlib import Path

import torch
from torch import fx, nn

from zsq.errors import TeacherError
from zsq.graph.plain import plain_network
from zsq.graph.trace import FOREIGN_FAULTS, first_line, quiet_export

PROGRAM = ".pt2"
"""Ending of what `torch.export.save` writes."""

REFUSED = {
    ".onnx": "an ONNX file has its batch norms folded into its convolutions, so nothing is left to learn from",
    ".tflite": "a LiteRT file has its batch norms folded into its convolutions, so nothing is left to learn from",
    ".ts": "TorchScript is not a form that can be exported",
    ".torchscript": "TorchScript is not a form that can be exported",
    ".pt": "it holds weights or TorchScript, and no program",
    ".pth": "it holds weights or TorchScript, and no program",
    ".safetensors": "it holds weights, and no program",
}
"""Endings of files that people give in place of a network, and why they are none."""

INSTEAD = (
    "give FILE.py:FACTORY with --weights FILE, or save the network in eval mode: torch.export.save(torch.export.export("
    "net, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},)), 'net.pt2')"
)


def is_file(model: str) -> bool:
    """Whether a model is named by a file that is one itself, or is taken for one."""
    return Path(model).suffix in (PROGRAM, *REFUSED)


def read_program(model: str) -> tuple[nn.Module, tuple[int, ...]]:
    """Return the network of a saved program and the shape of its input without the batch, [C, ...].

    Args:
        model: a path that `is_file` accepts.

    Raises:
        TeacherError: there is no such file, it is no program, or it takes something else than one batch of inputs.
    """
    path = Path(model)
    if path.suffix != PROGRAM:
        raise TeacherError(f"'{model}' is not a network: {REFUSED[path.suffix]}; {INSTEAD}.")
    if not path.is_file():
        raise TeacherError(f"no such file: {path}")
    if not zipfile.is_zipfile(path):
        raise TeacherError(f"{path} is not a torch.export program.")
    try:
        with quiet_export():
            program = torch.export.load(path)
    except FOREIGN_FAULTS as error:
        raise TeacherError(f"{path} is not a readable torch.export program: {first_line(error)}") from error
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    if len(inputs) != 1:
        names = ", ".join(node.name for node in inputs)
        raise TeacherError(f"{path} takes {len(inputs)} inputs ({names}); zsq quantizes networks of one.")
    batch, *shape = inputs[0].meta["val"].shape
    if isinstance(batch, int):
        raise TeacherError(f"{path} takes batches of {batch} only; {INSTEAD}.")
    if not all(isinstance(size, int) for size in shape):
        shape = [_exported_size(size) for size in shape]
    network = plain_network(program)
    return fx.GraphModule(network, network.graph, class_name=path.stem), tuple(shape)


def _exported_size(size: object) -> int:
    """Return the size with which a program was exported, where it takes others as well."""
    return size if isinstance(size, int) else int(size.node.hint)  # type: ignore[attr-defined]
