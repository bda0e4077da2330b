"""Run a file in OpenVINO on the processor, and write it as OpenVINO's own intermediate representation (IR)."""

import tempfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from zsq.errors import ExportError, InputError, MissingExtraError
from zsq.export.classifier import FileClassifier
from zsq.export.image_spec import notes_of

INSTALL = "pip install 'zsq[openvino]'"

IR = ".xml"
"""How the name of an IR ends; its weights lie beside it, in a file that ends in `.bin`."""

SECTION = "zsq"
"""Part of an IR's runtime information that holds the metadata."""


def require_openvino() -> Any:
    """Return the module.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError(
            f"target openvino runs its file in OpenVINO, which is not installed: {INSTALL}"
        ) from error
    return openvino


def write_ir(source: Path, path: Path) -> None:
    """Write an ONNX file as an IR, ``.xml`` and ``.bin``, metadata included.

    Raises:
        MissingExtraError: OpenVINO is not installed.
        ExportError: OpenVINO reads the IR otherwise than the ONNX file.
    """
    openvino = require_openvino()
    model = openvino.Core().read_model(str(source))
    for name, text in notes_of(source).items():
        model.set_rt_info(text, [SECTION, name])
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        openvino.save_model(model, str(part), compress_to_fp16=False)
        one, other = OpenVinoClassifier(part, threads=1), OpenVinoClassifier(source, threads=1)
        spec = one.spec
        images = torch.randn(2, *spec.shape, generator=torch.Generator().manual_seed(0))
        if not torch.equal(one(images), other(images)):
            raise ExportError("OpenVINO computes something else from the IR than from the ONNX file.")
        part.with_suffix(".bin").replace(path.with_suffix(".bin"))
        part.replace(path)


def ir_notes(path: Path) -> dict[str, str]:
    """Return the metadata of an IR, by name.

    Raises:
        InputError: there is no such file, or it is none.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file.")
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{path}: it is no IR of OpenVINO.") from error
    return {entry.tag: entry.get("value", "") for entry in root.findall(f"rt_info/{SECTION}/*")}


class OpenVinoClassifier(FileClassifier):
    """An ONNX file or an IR in OpenVINO on the processor, called like a network.

    Args:
        path: the ``.onnx`` or ``.xml`` file.
        threads: threads of inference; None leaves the choice to the runtime.
    Raises:
        MissingExtraError: OpenVINO is not installed.
        InputError: the file does not exist, or OpenVINO cannot read or compile it.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        openvino = require_openvino()
        notes = ir_notes(path) if Path(path).suffix == IR else notes_of(path)
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
        try:
            self._compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise InputError(f"{path}: OpenVINO cannot compile it: {str(error).strip().splitlines()[-1]}") from error
        sizes = self._compiled.input(0).partial_shape
        super().__init__(path, notes, [size.get_length() if size.is_static else "batch" for size in sizes])

    def _run(self, array: np.ndarray) -> list[np.ndarray]:
        found = self._compiled([array])
        return [np.array(found[index]) for index in range(len(found))]
