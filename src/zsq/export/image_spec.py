"""The note of what a file takes and gives: its `ImageSpec` as JSON."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import uses_external_data

from zsq.checked import validated
from zsq.errors import InputError
from zsq.types import ImageSpec

KEY = "image_spec"
"""Name of the metadata of an ONNX file that holds the note, and of the file in a pt2 archive but for its ending."""


def notes_of(path: Path) -> dict[str, str]:
    """Return the metadata of an ONNX file, by name.

    Raises:
        InputError: there is no such file, or it is none, or it names other files, which a runtime would read.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; write one with write_onnx.")
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path}: it is no ONNX file.") from error
    if any(map(uses_external_data, _tensors(model.graph))):
        raise InputError(
            f"{path}: its weights lie in other files; zsq writes and reads files that hold them themselves."
        )
    return {entry.key: entry.value for entry in model.metadata_props}


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors that a graph holds, those of its nodes and their graphs included."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def output_names(spec: ImageSpec) -> list[str]:
    """Return the names of a file's outputs, in order."""
    return [output.name for output in spec.outputs] or ["logits"]


def to_json(spec: ImageSpec) -> str:
    """Return the note."""
    values = asdict(spec)
    if not spec.outputs:
        del values["outputs"]
    if spec.is_image:  # as versions before signals wrote it
        del values["axes"], values["depth"]
    return json.dumps(values, sort_keys=True)


def from_json(text: str, place: str = "its note of the images") -> ImageSpec:
    """Return what a note says.

    Args:
        text: the note.
        place: what errors call it.

    Raises:
        InputError: it is no JSON, or a value is missing or of another type.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{place} holds no image spec.")
    return validated(ImageSpec, values, place)
