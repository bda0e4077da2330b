"""Run a ``.tflite`` file in LiteRT's interpreter on the processor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zsq.errors import InputError, MissingExtraError
from zsq.export.classifier import FileClassifier
from zsq.export.litert.flatbuffer import INSTALL, read_notes
from zsq.export.profile import Profile, Ran, grouped
from zsq.runtime.quiet import silent_stderr

DELEGATE = "DELEGATE"
"""Operator that stands for those of the file that XNNPACK computes."""


def require_litert() -> Any:
    """Return the module of the interpreter.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        from ai_edge_litert import interpreter
    except ImportError as error:
        raise MissingExtraError(
            f"target litert runs its file in the interpreter of LiteRT, which is not installed: {INSTALL}"
        ) from error
    return interpreter


class LiteRtClassifier(FileClassifier):
    """A LiteRT file in its interpreter on the processor, called like a network.

    Args:
        path: the ``.tflite`` file.
        optimize: use XNNPACK, as the interpreter does by itself; off, the reference kernels run.
        threads: threads of inference; None leaves the choice to the runtime.
    Raises:
        MissingExtraError: LiteRT's package is not installed.
        InputError: the file does not exist, or the interpreter cannot read it.
    """

    def __init__(self, path: Path, optimize: bool = True, threads: int | None = None) -> None:
        runtime, notes = require_litert(), read_notes(path)
        kinds = runtime.OpResolverType
        try:
            with silent_stderr():
                self._interpreter = runtime.Interpreter(
                    model_path=str(path),
                    num_threads=threads,
                    experimental_op_resolver_type=kinds.AUTO if optimize else kinds.BUILTIN_REF,
                )
            (self._input,) = self._interpreter.get_input_details()
            self._outputs = self._interpreter.get_output_details()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path}: LiteRT cannot read it: {str(error).strip().splitlines()[0]}") from error
        sizes = [int(size) for size in self._input["shape"]]
        self._fed: tuple[int, ...] = ()
        super().__init__(path, notes, ["batch" if sizes[0] == 1 else sizes[0], sizes[-1], *sizes[1:-1]])

    def profile(self) -> Profile:
        """See `FileClassifier.profile`: which kernels compute; the interpreter gives no times."""
        if not self._fed:
            return super().profile()
        types = {int(tensor["index"]): tensor["dtype"].__name__ for tensor in self._interpreter.get_tensor_details()}
        nodes = self._interpreter._get_ops_details()
        in_xnnpack = {index for node in nodes if node["op_name"] == DELEGATE for index in _inside(node, nodes)}
        kernels = [
            Ran(
                node["op_name"],
                tuple(types[index] for index in (node["inputs"][0], node["outputs"][0])),
                "XNNPACK" if node["index"] in in_xnnpack else "LiteRT",
            )
            for node in nodes
            if node["op_name"] != DELEGATE
        ]
        return Profile(
            runtime="LiteRT",
            kernels=grouped(kernels),
            num_operators=len(kernels),
            source="LiteRT's interpreter, which tells operators and delegates and, from Python, no times",
        )

    def _run(self, array: np.ndarray) -> list[np.ndarray]:
        if self._layout is None:
            array = self._rounded(np.moveaxis(array, 1, -1))
        try:
            if array.shape != self._fed:
                with silent_stderr():
                    self._interpreter.resize_tensor_input(self._input["index"], array.shape)
                    self._interpreter.allocate_tensors()
                self._fed = array.shape
            self._interpreter.set_tensor(self._input["index"], array)
            self._interpreter.invoke()
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{self._path}: LiteRT cannot run it: {str(error).strip().splitlines()[0]}") from error
        return [self._floats(output) for output in self._outputs]

    def _floats(self, output: dict[str, Any]) -> np.ndarray:
        """Return what the interpreter holds of an output, in floats."""
        scale, zero_point = output["quantization"]
        integers: np.ndarray = self._interpreter.get_tensor(output["index"])
        return np.asarray((integers.astype(np.float32) - zero_point) * np.float32(scale))

    def _rounded(self, images: np.ndarray) -> np.ndarray:
        """Return normalised images as the integers of the file's input."""
        scale, zero_point = self._input["quantization"]
        steps = np.rint(images / np.float32(scale)) + zero_point
        return np.ascontiguousarray(steps.clip(-128, 127).astype(np.int8))


def _inside(delegate: dict[str, Any], nodes: list[dict[str, Any]]) -> Iterator[int]:
    """Yield the indices of the file's operators that a delegate computes: those between its outputs and its inputs."""
    made = {int(output): node for node in nodes if node["op_name"] != DELEGATE for output in node["outputs"]}
    given, wanted, seen = set(map(int, delegate["inputs"])), list(map(int, delegate["outputs"])), set[int]()
    while wanted:
        tensor = wanted.pop()
        if tensor not in given and tensor in made and made[tensor]["index"] not in seen:
            seen.add(made[tensor]["index"])
            wanted += [int(index) for index in made[tensor]["inputs"]]
    yield from seen
