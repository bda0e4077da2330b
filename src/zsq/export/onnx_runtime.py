"""Run an ONNX file in ONNX Runtime on the processor."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zsq.errors import InputError
from zsq.export.classifier import FileClassifier

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import: the runtime reports every session otherwise

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_status

_RUNTIME_ERRORS = (
    UnicodeDecodeError,
    runtime_status.Fail,
    runtime_status.InvalidArgument,
    runtime_status.InvalidGraph,
    runtime_status.InvalidProtobuf,
    runtime_status.NotImplemented,
)


class OnnxClassifier(FileClassifier):
    """An ONNX file in ONNX Runtime on the processor, called like a network.

    Args:
        path: the ``.onnx`` file.
        optimize: let the runtime fuse operations into integer kernels, as users do; off, it runs the file literally.
        threads: threads of one operation; None leaves the choice to the runtime.
    Raises:
        InputError: the file does not exist, or the runtime cannot load or run it.
    """

    def __init__(self, path: Path, optimize: bool = True, threads: int | None = None) -> None:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; write one with write_onnx.")
        level = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except _RUNTIME_ERRORS as error:
            raise InputError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error
        self._input = self._session.get_inputs()[0]
        super().__init__(path, self._session.get_modelmeta().custom_metadata_map, list(self._input.shape))

    def _run(self, array: np.ndarray) -> Sequence[np.ndarray]:
        try:
            answers: list[np.ndarray] = self._session.run(None, {self._input.name: array})
        except _RUNTIME_ERRORS as error:
            raise InputError(f"{self._path}: ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error
        return answers
