"""The hash of a file's content, whenever and wherever it was written."""

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from safetensors import safe_open

from zsq.errors import InputError
from zsq.export.canonical_onnx import strip_metadata
from zsq.export.executorch import content_of


def canonical_sha256(path: Path) -> str:
    """Return the hex sha256 of what a file computes with or holds, by its ending: onnx, pt2, pte, tflite, safetensors.

    Left out is what says how and when it was written: ONNX metadata, documentation and producer; the notes of a pte
    file; names, times and
    serial number of the pt2 archive; the free metadata of safetensors.

    Raises:
        InputError: the file's ending is none of these.
    """
    match path.suffix:
        case ".onnx":
            parts = _onnx_content(path)
        case ".pt2":
            parts = _pt2_content(path)
        case ".safetensors":
            parts = _safetensors_content(path)
        case ".pte":
            parts = content_of(path)
        case ".tflite":
            parts = iter([("model", path.read_bytes())])
        case _:
            raise InputError(
                f"{path.name}: cannot hash '{path.suffix}' files; known: .onnx, .pt2, .pte, .tflite, .safetensors."
            )
    digest = hashlib.sha256()
    for name, content in parts:
        digest.update(f"{len(name.encode())}:{name}{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _onnx_content(path: Path) -> Iterator[tuple[str, bytes]]:
    model = onnx.load(path)
    strip_metadata(model)
    yield "model", model.SerializeToString(deterministic=True)


def _pt2_content(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        for name in sorted(members):
            if name != ".data/serialization_id":
                yield name, archive.read(members[name])


def _safetensors_content(path: Path) -> Iterator[tuple[str, bytes]]:
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            yield f"{name} {tensor.dtype} {list(tensor.shape)}", content
