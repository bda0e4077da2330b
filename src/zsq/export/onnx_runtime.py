"""Run an ONNX file in ONNX Runtime on the processor."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from zsq.errors import InputError
from zsq.export.classifier import FileClassifier
from zsq.export.profile import Profile, Ran, grouped

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
        profiled: let the runtime note what it does, for `profile`.
    Raises:
        InputError: the file does not exist, or the runtime cannot load or run it.
    """

    def __init__(self, path: Path, optimize: bool = True, threads: int | None = None, profiled: bool = False) -> None:
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; write one with write_onnx.")
        level = onnxruntime.GraphOptimizationLevel
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        self._notes_folder = tempfile.TemporaryDirectory(prefix="zsq-") if profiled else None
        if self._notes_folder is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._notes_folder.name) / "profile")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except _RUNTIME_ERRORS as error:
            raise InputError(f"{path}: ONNX Runtime cannot load it: {str(error).splitlines()[0]}") from error
        self._input = self._session.get_inputs()[0]
        super().__init__(path, self._session.get_modelmeta().custom_metadata_map, list(self._input.shape))

    def profile(self) -> Profile:
        """See `FileClassifier.profile`; medians, without the first call."""
        if self._notes_folder is None:
            return super().profile()
        with self._notes_folder:
            events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        calls: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                calls.setdefault(event["name"], []).append(event)
        operators = sum(
            node.op_type != "Constant" for node in onnx.load(self._path, load_external_data=False).graph.node
        )
        return Profile(
            runtime="ONNX Runtime",
            kernels=grouped(map(_kernel, calls.values())),
            num_operators=operators,
            source="ONNX Runtime's profile of a few images, one at a time on one thread",
        )

    def _run(self, array: np.ndarray) -> Sequence[np.ndarray]:
        try:
            answers: list[np.ndarray] = self._session.run(None, {self._input.name: array})
        except _RUNTIME_ERRORS as error:
            raise InputError(f"{self._path}: ONNX Runtime cannot run it: {str(error).splitlines()[0]}") from error
        return answers


def _kernel(calls: list[dict[str, Any]]) -> Ran:
    """Return what the events of one kernel say of it."""
    facts = calls[-1]["args"]
    read, given = (facts.get(f"{side}_type_shape", [])[:1] for side in ("input", "output"))
    return Ran(
        facts["op_name"],
        tuple(name for value in (*read, *given) for name in value),
        facts["provider"].removesuffix("ExecutionProvider"),
        float(np.median([call["dur"] for call in calls[1:] or calls])) / 1000,
    )
