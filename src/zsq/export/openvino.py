"""Run an ONNX file in OpenVINO on the processor."""

from pathlib import Path
from typing import Any

import numpy as np

from zsq.errors import InputError, MissingExtraError
from zsq.export.classifier import FileClassifier
from zsq.export.image_spec import notes_of

INSTALL = "pip install 'zsq[openvino]'"


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


class OpenVinoClassifier(FileClassifier):
    """An ONNX file in OpenVINO on the processor, called like a network.

    Args:
        path: the ``.onnx`` file.
        threads: threads of inference; None leaves the choice to the runtime.
    Raises:
        MissingExtraError: OpenVINO is not installed.
        InputError: the file does not exist, or OpenVINO cannot read or compile it.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        openvino, notes = require_openvino(), notes_of(path)
        settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({} if threads is None else {"INFERENCE_NUM_THREADS": threads})
        try:
            self._compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            raise InputError(f"{path}: OpenVINO cannot compile it: {str(error).strip().splitlines()[-1]}") from error
        sizes = self._compiled.input(0).partial_shape
        super().__init__(path, notes, [size.get_length() if size.is_static else "batch" for size in sizes])

    def _run(self, array: np.ndarray) -> np.ndarray:
        return np.array(self._compiled([array])[0])
